"""Speed and memory over a long run: neither may change from the first epoch to the last.

  python benchmarks/long_run.py --out=DIR           2,000 steps of the digits network

Writes `long_run.png`, `long_run.json` and prints the comparison of the first with the last tenth: by the
clock, and by the processor's time, which other programs on the machine disturb less.
"""

import json
import pathlib
import sys
import tempfile
import time

from absl import app
from absl import flags
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

import measuring  # noqa: E402

from byol_func import byol_experiment, main_loop  # noqa: E402
from byol_func.loop_config import LoopConfig  # noqa: E402
from byol_func.runtime import memory, precision  # noqa: E402
from byol_func.utils import dataset  # noqa: E402
from configs import digits  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_integer('steps', 2000, 'Steps of the run.')
flags.DEFINE_integer('every', 50, 'Steps between two points of the curve.')
flags.DEFINE_string('device', 'cpu', 'cpu or cuda.')
flags.DEFINE_string('precision', 'auto', 'float32, tf32, bfloat16 or auto.')
flags.DEFINE_bool('compile', False, 'Compile the step.')
flags.DEFINE_string('out', '.', 'Where to write the curve.')


def run(device: torch.device) -> tuple[list[dict], float]:
    """The points of the curve, `{'step', 'images_per_second', 'gib'}`, and the epochs of the run."""
    config = digits.get_config()
    config.num_epochs = 1
    config.precision = precision.resolve(FLAGS.precision, device)
    precision.set_backend(config.precision)
    memory.keep_freed_memory()
    config.lr_schedule.warmup_epochs = 0.0
    data = dataset.to_device(dataset.load_train_and_test(**config.dataset)[0], device)
    experiment = byol_experiment.make(
        config, num_examples=data.num_examples, num_classes=10, image_shape=data.images.shape[1:])
    points, last = [], [0, time.monotonic(), time.process_time()]

    def measure(state, step, draws, inputs):
        del state, draws, inputs
        measuring.synchronize(device)
        now, processor = time.monotonic(), time.process_time()
        images = (step + 1 - last[0]) * experiment.batch_size
        gib = measuring.memory_gib(device)
        points.append({
            'step': step + 1, 'images_per_second': images / (now - last[1]),
            'images_per_processor_second': images / (processor - last[2]), 'gib': gib})
        last[:] = step + 1, time.monotonic(), time.process_time()
        return {}

    with tempfile.TemporaryDirectory() as workdir:
        loop = LoopConfig(
            mode='pretrain', workdir=workdir, device=device, compiled=FLAGS.compile, seed=0, config={},
            save_every_seconds=1e9, save_every_steps=0, keep=1, log_every_steps=50, log_every_seconds=1e9)
        main_loop.train_loop(
            experiment._replace(max_steps=FLAGS.steps), data, loop, [main_loop.Probe(FLAGS.every, measure)])
    return points[1:], FLAGS.steps * experiment.batch_size / data.num_examples  # Without the start.


def plot(points: list[dict], path: pathlib.Path) -> None:
    """Images per second and memory over steps."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout='constrained')
    steps = [point['step'] for point in points]
    for axis, name, title in zip(axes, ('images_per_second', 'gib'), ('images/s', 'memory, GiB'), strict=True):
        axis.plot(steps, [point[name] for point in points], linewidth=1.5)
        axis.set(xlabel='step', title=title, ylim=(0, 1.2 * max(point[name] for point in points)))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    """Runs, prints and writes."""
    del argv
    device = torch.device(FLAGS.device)
    if device.type == 'cuda':
        torch.cuda.set_device(device.index or 0)
    points, epochs = run(device)
    tenth = max(1, len(points) // 10)
    first, last = points[:tenth], points[-tenth:]
    medians = {name: [measuring.median([p[name] for p in part]) for part in (first, last)]
               for name in ('images_per_second', 'images_per_processor_second')}
    gib = [max(p['gib'] for p in part) for part in (first, last)]
    print(f'{FLAGS.steps} steps, {epochs:.0f} epochs; medians of the first and of the last tenth:')
    for name, (before, after) in medians.items():
        print(f'{name.replace("_", " ")} {before:.0f}, {after:.0f} ({after / before - 1:+.1%})')
    print(f'memory, GiB {gib[0]:.3f}, {gib[1]:.3f}')
    out = pathlib.Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    result = {
        'command': 'python benchmarks/long_run.py ' + ' '.join(sys.argv[1:]),
        'machine': measuring.machine(device), 'precision': precision.resolve(FLAGS.precision, device),
        **{name: dict(zip(('first_tenth', 'last_tenth'), pair)) for name, pair in medians.items()},
        'memory_gib': dict(zip(('first_tenth', 'last_tenth'), gib)), 'points': points,
    }
    (out / 'long_run.json').write_text(json.dumps(result, indent=1) + '\n')
    plot(points, out / 'long_run.png')


if __name__ == '__main__':
    app.run(main)
