"""Measures speed and memory over a long run; neither should change from the first epoch to the last.

  python benchmarks/long_run.py --out=DIR           2,000 steps of the digits network

At regular intervals the benchmark also times a fixed workload: steps from a copy of the initial state. On a
shared machine the speed varies by more than the effect to be measured; the speed of the loop relative to the
fixed workload shows the changes that come from the run itself. Writes `long_run.png` and `long_run.json`, and
prints a comparison of the first tenth with the last, by the clock and relative to the fixed workload.
"""

import json
import pathlib
import sys
import tempfile
import time

import optree
import tabulate
import torch
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

import measuring  # noqa: E402
from byol_func import byol_experiment, main_loop  # noqa: E402
from byol_func.runtime import compilation, memory, precision, transfer  # noqa: E402
from byol_func.training.loop_config import LoopConfig  # noqa: E402
from byol_func.utils import dataset  # noqa: E402
from configs import digits  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_integer('steps', 2000, 'Steps of the run.')
flags.DEFINE_integer('every', 25, 'Steps between two points of the curve.')
flags.DEFINE_integer('fixed_steps', 10, 'Steps of the fixed work at every point.')
flags.DEFINE_string('device', 'cpu', 'cpu or cuda.')
flags.DEFINE_string('precision', 'auto', 'float32, tf32, bfloat16 or auto.')
flags.DEFINE_bool('compile', False, 'Whether to compile the step; by default, if that finishes so many steps sooner.')
flags.DEFINE_string('out', '.', 'Where to write the curve.')


def run(device: torch.device) -> tuple[list[dict], float]:
    """Runs the training loop; returns the points of the curve and the number of epochs.

    A point is `{'step', 'images_per_second', 'fixed', 'relative', 'gib'}`: the step, the rate of the loop, the
    mean rate of the fixed workload before and after, the quotient of the two rates, and the memory in GiB.
    """
    config = digits.get_config()
    config.num_epochs = 1
    config.precision = measuring.resolved(FLAGS.precision, device)
    precision.set_backend(config.precision)
    memory.keep_freed_memory()
    config.lr_schedule.warmup_epochs = 0.0
    data = dataset.load_train_and_test(**config.dataset)[0].to_device(device)
    experiment = byol_experiment.make(
        config, num_examples=data.num_examples, num_classes=10, image_shape=data.images.shape[1:]
    )
    compiled = FLAGS.compile or None
    fixed_work = _fixed_work(experiment, data, device, compiled)
    points, last = [], [0, time.monotonic(), fixed_work()]

    def measure(state, step, draws, inputs):
        del state, draws, inputs
        measuring.synchronize(device)
        rate = (step + 1 - last[0]) * experiment.batch_size / (time.monotonic() - last[1])
        before, after = last[2], fixed_work()
        fixed = (before + after) / 2
        points.append(
            {
                'step': step + 1,
                'images_per_second': rate,
                'fixed': fixed,
                'relative': rate / fixed,
                'gib': measuring.memory_gib(device),
            }
        )
        last[:] = step + 1, time.monotonic(), after
        return {}

    with tempfile.TemporaryDirectory() as workdir:
        loop = LoopConfig(
            mode='pretrain',
            workdir=workdir,
            device=device,
            compiled=compiled,
            seed=0,
            config={},
            save_every_seconds=1e9,
            save_every_steps=0,
            keep=1,
            log_every_steps=50,
            log_every_seconds=1e9,
        )
        main_loop.train_loop(
            experiment._replace(max_steps=FLAGS.steps), data, loop, [main_loop.Probe(FLAGS.every, measure)]
        )
    # The first point is dropped, since it includes the start of the run.
    return points[1:], FLAGS.steps * experiment.batch_size / data.num_examples


def _fixed_work(experiment, data, device: torch.device, compiled: bool | None):
    """Returns a function that does the same steps from a copy of the initial state each time and returns images/s."""
    initial = transfer.place(experiment.init(), device)
    state = transfer.place(initial, device)
    update = compilation.compile_update(experiment.update, compiled=compiled, num_steps=FLAGS.steps)
    step = torch.zeros((), dtype=torch.int64, device=device)
    draws = transfer.to_device(experiment.sample(0), device)
    batch = dataset.train_batch(data, 0, seed=0, batch_size=experiment.batch_size)

    def run_once() -> float:
        for old, first in zip(optree.tree_leaves(state), optree.tree_leaves(initial), strict=True):
            old.copy_(first)
        measuring.synchronize(device)
        start = time.monotonic()
        for _ in range(FLAGS.fixed_steps):
            update(state, step, draws, batch)
        measuring.synchronize(device)
        return FLAGS.fixed_steps * experiment.batch_size / (time.monotonic() - start)

    run_once()
    return run_once


def plot(points: list[dict], path: pathlib.Path) -> None:
    """Draws, over the steps, the images per second, the speed relative to the fixed workload, and the memory."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3), layout='constrained')
    steps = [point['step'] for point in points]
    curves = [
        ('images/s', [('images_per_second', 'training loop'), ('fixed', 'fixed work')]),
        ('training loop / fixed work', [('relative', None)]),
        ('memory, GiB', [('gib', None)]),
    ]
    for axis, (title, names) in zip(axes, curves, strict=True):
        for name, label in names:
            axis.plot(steps, [point[name] for point in points], linewidth=1.2, label=label)
        top = max(point[name] for point in points for name, _ in names)
        axis.set(xlabel='step', title=title, ylim=(0, 1.2 * top))
        axis.grid(alpha=0.3)
    axes[0].legend(loc='lower right')
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    """Runs the measurement, prints the comparison and writes the files."""
    del argv
    device = torch.device(FLAGS.device)
    if device.type == 'cuda':
        torch.cuda.set_device(device.index or 0)
    points, epochs = run(device)
    tenth = max(1, len(points) // 10)
    parts = points[:tenth], points[-tenth:]
    medians = {
        name: [measuring.median([p[name] for p in part]) for part in parts]
        for name in ('images_per_second', 'fixed', 'relative')
    }
    gib = [max(p['gib'] for p in part) for part in parts]
    titles = {
        'images_per_second': 'training loop, images/s',
        'fixed': 'fixed work, images/s',
        'relative': 'training loop / fixed work',
    }
    rows = [
        [titles[name], f'{before:,.4g}', f'{after:,.4g}', f'{after / before - 1:+.1%}']
        for name, (before, after) in medians.items()
    ]
    rows.append(['memory, GiB', f'{gib[0]:.3f}', f'{gib[1]:.3f}', f'{(gib[1] - gib[0]) * 1024:+.0f} MiB'])
    print(f'\n{FLAGS.steps} steps, {epochs:.0f} epochs; medians of the first and of the last tenth\n')
    print(
        tabulate.tabulate(
            rows, ['', 'first', 'last', ''], disable_numparse=True, colalign=('left', 'right', 'right', 'right')
        )
    )
    out = pathlib.Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    result = {
        'command': 'python benchmarks/long_run.py ' + ' '.join(sys.argv[1:]),
        'machine': measuring.machine(device),
        'precision': measuring.resolved(FLAGS.precision, device),
        **{name: dict(zip(('first_tenth', 'last_tenth'), pair, strict=False)) for name, pair in medians.items()},
        'memory_gib': dict(zip(('first_tenth', 'last_tenth'), gib, strict=False)),
        'points': points,
    }
    (out / 'long_run.json').write_text(json.dumps(result, indent=1) + '\n')
    plot(points, out / 'long_run.png')


if __name__ == '__main__':
    app.run(main)
