"""Measures the images per second of BYOL: of the complete loop, of the step and of the augmentation alone.

  python benchmarks/throughput.py --encoder=ResNet18 --stem=cifar --image_size=32 --batch_size=64
  python benchmarks/throughput.py --device=cuda --precision=bfloat16 --batch_size=512 --json=OUT.json

The images are random bytes in memory; accuracy is not measured. Every row is the median of repeated
stretches. If `lightly` is installed, its BYOL then runs on the same images in a separate process, with the
thread and memory settings of its examples: in float32 (on a GPU with TF32 convolutions, PyTorch's default),
and also under autocast if the precision is bfloat16.
"""

import functools
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import tabulate
import torch
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

import measuring  # noqa: E402
from byol_func import byol_experiment, main_loop  # noqa: E402
from byol_func.runtime import compilation, costs, memory, precision, transfer  # noqa: E402
from byol_func.utils import augmentations, dataset  # noqa: E402
from configs import cifar10  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_string('encoder', 'ResNet18', 'Encoder class.')
flags.DEFINE_enum('stem', 'cifar', ['cifar', 'imagenet'], 'Stem of the encoder.')
flags.DEFINE_integer('image_size', 32, 'Side of the views in pixels.')
flags.DEFINE_integer('source_size', 0, 'Side of the stored images; 0: as large as the views.')
flags.DEFINE_integer('batch_size', 64, 'Images per step.')
flags.DEFINE_string('device', 'auto', 'cpu, cuda, cuda:N or auto.')
flags.DEFINE_string('precision', 'auto', 'float32, tf32, bfloat16 or auto.')
flags.DEFINE_bool('compile', True, 'Compile the step.')
flags.DEFINE_bool('eager', False, 'Measure the step without compiling too.')
flags.DEFINE_integer('hidden_size', 4096, 'Hidden size of the heads.')
flags.DEFINE_integer('output_size', 256, 'Output size of the heads.')
flags.DEFINE_integer('repeats', 3, 'Repetitions per measurement.')
flags.DEFINE_float('seconds', 10.0, 'Seconds of a repetition.')
flags.DEFINE_bool('peer', True, "Whether to measure lightly's BYOL too, if it is installed.")
flags.DEFINE_integer('workers', 2, "Worker processes of the peer's loader.")
flags.DEFINE_enum(
    'only_peer',
    None,
    ['float32', 'bfloat16'],
    "Measure only lightly's BYOL, in this precision, and print JSON.",
)
flags.DEFINE_string('json', None, 'JSON file to write everything to.')


def _config(num_images: int):
    config = cifar10.get_config()
    config.batch_size = FLAGS.batch_size
    config.image_size = FLAGS.image_size
    config.num_epochs = 10_000  # The time limit ends the run earlier.
    config.precision = FLAGS.precision
    config.network.encoder_class = FLAGS.encoder
    config.network.encoder_config.stem = FLAGS.stem
    config.network.projector_hidden_size = FLAGS.hidden_size
    config.network.projector_output_size = FLAGS.output_size
    config.network.predictor_hidden_size = FLAGS.hidden_size
    config.augmentations.view1.gaussian_blur.apply_prob = 1.0  # All augmentations of the paper.
    config.augmentations.view2.gaussian_blur.apply_prob = 0.1
    return config


def _images(device: torch.device) -> dataset.Dataset:
    size = FLAGS.source_size or FLAGS.image_size
    num_images = max(2048, 4 * FLAGS.batch_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (num_images, 3, size, size), dtype=torch.uint8, generator=generator)
    data = dataset.Dataset(images, torch.arange(num_images) % 10, tuple('0123456789'))
    return data.to_device(device)


def measure_augmentation(experiment, data, config, device) -> list[float]:
    """Returns the seconds it takes to make both views of a batch, compiled like the step."""
    presets = config.augmentations.to_dict()
    views = functools.partial(augmentations.postprocess, presets=presets, image_size=config.image_size)
    if FLAGS.compile:
        views = torch.compile(views, fullgraph=True, dynamic=False)
    draws = transfer.to_device(experiment.sample(0), device)
    batch = dataset.train_batch(data, 0, seed=0, batch_size=experiment.batch_size)
    return _stretches(lambda: views(batch, draws), device)


def measure_step(experiment, data, device) -> tuple[list[float], float, int]:
    """Returns the seconds of an update, those of the first one with its compilation, and the update's FLOPs."""
    state = transfer.place(experiment.init(), device)
    draws = transfer.to_device(experiment.sample(0), device)
    batch = dataset.train_batch(data, 0, seed=0, batch_size=experiment.batch_size)
    step = torch.tensor(0, device=device)
    flops = costs.count_flops(experiment.update, state, step, draws, batch)
    update = compilation.compile_update(experiment.update, compiled=FLAGS.compile)
    start = time.perf_counter()
    state, _ = update(state, step, draws, batch)
    measuring.synchronize(device)
    first = time.perf_counter() - start
    # On a GPU the third call captures the CUDA graph.
    return _stretches(lambda: update(state, step, draws, batch), device, warm_up=3), first, flops


def measure_eager_step(experiment, data, device) -> list[float]:
    """Returns the seconds of an uncompiled update."""
    state = transfer.place(experiment.init(), device)
    draws = transfer.to_device(experiment.sample(0), device)
    batch = dataset.train_batch(data, 0, seed=0, batch_size=experiment.batch_size)
    update = compilation.compile_update(experiment.update, compiled=False)
    step = torch.tensor(0, device=device)
    return _stretches(lambda: update(state, step, draws, batch), device)


def measure_loop(experiment, data, device, seconds_per_step: float) -> list[float]:
    """Returns the seconds per step of `main_loop.train_loop` with batches, draws, steps and logs, no checkpoints.

    Time is counted from the first step; on a GPU, where the third step captures the graph, it is counted from
    the first logged step.
    """
    steps = max(4, round(FLAGS.seconds / seconds_per_step))
    seconds = []
    for _ in range(FLAGS.repeats):
        with tempfile.TemporaryDirectory() as workdir:
            loop = main_loop.LoopConfig(
                mode='pretrain',
                workdir=workdir,
                device=device,
                compiled=FLAGS.compile,
                seed=0,
                config={},
                save_every_seconds=1e9,
                save_every_steps=0,
                keep=1,
                log_every_steps=max(2, steps // 10),
                log_every_seconds=1e9,
            )
            main_loop.train_loop(experiment._replace(max_steps=steps), data, loop)
            lines = [json.loads(line) for line in (pathlib.Path(workdir) / 'metrics.jsonl').open()]
        times = [
            (line['step'], line['step'] * experiment.batch_size / line['images_per_second'])
            for line in lines
            if line['images_per_second']
        ]
        (start, before), (end, after) = times[0] if device.type == 'cuda' else (0, 0.0), times[-1]
        seconds.append((after - before) / (end - start))
    return seconds


def measure_peer(data, device, dtype: torch.dtype) -> list[float]:
    """Returns the seconds per step of lightly's BYOL with its data loader."""
    import peer_lightly

    if device.type == 'cuda':
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
    steps = peer_lightly.example(
        data.images.cpu(),
        encoder_class=FLAGS.encoder,
        stem=FLAGS.stem,
        image_size=FLAGS.image_size,
        batch_size=FLAGS.batch_size,
        hidden_size=FLAGS.hidden_size,
        output_size=FLAGS.output_size,
        device=device,
        dtype=dtype,
        workers=FLAGS.workers,
    )
    return _stretches(lambda: next(steps), device, warm_up=2)


def run_peer(policy: str) -> list[float] | None:
    """Runs `measure_peer` in another process; returns None if it fails, and that process reports why."""
    command = [sys.executable, __file__, *sys.argv[1:], f'--only_peer={policy}']
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return None if process.returncode else json.loads(process.stdout.splitlines()[-1])


def _stretches(fn, device, warm_up: int = 1) -> list[float]:
    return measuring.seconds_per_call(fn, device, FLAGS.repeats, FLAGS.seconds, warm_up)


def main(argv: list[str]) -> None:
    """Measures everything and prints the table."""
    del argv
    device = torch.device(FLAGS.device if FLAGS.device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu')
    if device.type == 'cuda':
        torch.cuda.set_device(device.index or 0)
    FLAGS.precision = measuring.resolved(FLAGS.precision, device)
    if FLAGS.only_peer:
        try:
            print(json.dumps(measure_peer(_images(device), device, precision.DTYPES[FLAGS.only_peer])))
        except (ImportError, AttributeError, torch.OutOfMemoryError) as error:
            # lightly is not installed or cannot run with this encoder.
            sys.exit(f'No column for lightly: {error}')
        return
    precision.set_backend(FLAGS.precision)
    memory.keep_freed_memory()
    data = _images(device)
    config = _config(data.num_examples)
    experiment = byol_experiment.make(
        config, num_examples=data.num_examples, num_classes=10, image_shape=data.images.shape[1:]
    )
    batch = experiment.batch_size

    ceilings = measuring.ceilings(device, precision.DTYPES[FLAGS.precision], FLAGS.repeats)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    augmentation = measure_augmentation(experiment, data, config, device)
    step, first, flops = measure_step(experiment, data, device)
    loop = measure_loop(experiment, data, device, measuring.median(step))
    peak_memory = measuring.peak_memory_gib(device)
    eager = measure_eager_step(experiment, data, device) if FLAGS.eager else None
    peer = run_peer('float32') if FLAGS.peer else None
    autocast = run_peer('bfloat16') if peer and FLAGS.precision == 'bfloat16' else None

    achieved = flops / measuring.median(loop)
    result = {
        'command': 'python benchmarks/throughput.py ' + ' '.join(sys.argv[1:]),
        'machine': measuring.machine(device),
        'precision': FLAGS.precision,
        'images_per_second': {
            name: [batch / s for s in seconds]
            for name, seconds in (
                ('loop', loop),
                ('step', step),
                ('eager_step', eager),
                ('augmentation', augmentation),
                ('lightly', peer),
                ('lightly_autocast', autocast),
            )
            if seconds
        },
        'first_step_seconds': first,
        'peak_memory_gib': peak_memory,
        'flops_per_image': flops / batch,
        'ceilings': ceilings,
        'share_of_ceiling': {name: achieved / ceiling for name, ceiling in ceilings.items()},
    }
    if FLAGS.json:
        pathlib.Path(FLAGS.json).write_text(json.dumps(result, indent=2) + '\n')
    print(_table(result))


def _table(result) -> str:
    medians = {name: measuring.median(v) for name, v in result['images_per_second'].items()}
    spread = {name: f'{min(v):,.1f} to {max(v):,.1f}' for name, v in result['images_per_second'].items()}
    titles = {
        'loop': 'complete loop',
        'step': 'step alone',
        'eager_step': 'step, not compiled',
        'augmentation': 'augmentation alone',
        'lightly': "lightly's loop, float32",
        'lightly_autocast': "lightly's loop, bfloat16 autocast",
    }
    rows = [
        [f'{title}, images/s', f'{medians[name]:,.1f}', spread[name]]
        for name, title in titles.items()
        if name in medians
    ]
    for name in ('lightly', 'lightly_autocast'):
        if name in medians:
            rows.append([f'complete loop / {titles[name]}', f'{medians["loop"] / medians[name]:.2f}', ''])
    rows.append(['augmentation, share of the loop', f'{medians["loop"] / medians["augmentation"]:.1%}', ''])
    rows.append(['first step (compilation), s', f'{result["first_step_seconds"]:.1f}', ''])
    rows.append(['peak memory, GiB', f'{result["peak_memory_gib"]:.2f}', ''])
    rows.append(['GFLOP per image', f'{result["flops_per_image"] / 1e9:.2f}', ''])
    achieved = result['flops_per_image'] * medians['loop'] / 1e9
    rows.append(['complete loop, GFLOP/s', f'{achieved:,.1f}', ''])
    for name, ceiling in result['ceilings'].items():
        share = result['share_of_ceiling'][name]
        rows.append([f'ceiling: {name.replace("_", " ")}, GFLOP/s', f'{ceiling / 1e9:,.1f}', f'reached {share:.0%}'])
    machine = result['machine']
    title = (
        f'{FLAGS.encoder}, {FLAGS.stem} stem, {FLAGS.image_size} px, batch {FLAGS.batch_size}, '
        f'{result["precision"]}; {machine["device"]}, {machine["threads"]} threads, '
        f'torch {machine["torch"]}'
    )
    table = tabulate.tabulate(rows, ['', 'median', ''], disable_numparse=True, colalign=('left', 'right', 'left'))
    return f'\n{title}\n\n{table}'


if __name__ == '__main__':
    app.run(main)
