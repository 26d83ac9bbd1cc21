"""Runs every measurement that needs a GPU in one command.

  python benchmarks/gpu.py --out=benchmarks/results/gpu
  python benchmarks/gpu.py --out=DIR --cifar10=DATA --epochs=200      with a training run on DATA

It compares the captured step with the plain one, measures the rows of `throughput.py` and the curve of
`long_run.py`, and trains on CIFAR-10 if its folder (train/CLASS/*, test/CLASS/*) is given. A part that fails
is reported at the end and does not stop the others.
"""

import pathlib
import subprocess
import sys
import traceback

import optree
import torch
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from byol_func import byol_experiment  # noqa: E402
from byol_func.runtime import compilation, precision, transfer  # noqa: E402
from byol_func.utils import dataset  # noqa: E402
from configs import cifar10  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_string('out', 'benchmarks/results/gpu', 'Folder for logs, tables and curves.')
flags.DEFINE_string('cifar10', None, 'CIFAR-10 as class folders, to train on.')
flags.DEFINE_integer('epochs', 200, 'Epochs of that training.')
flags.DEFINE_string('device', 'cuda', 'The GPU, or cpu to try the script.')
flags.DEFINE_float('seconds', 10.0, 'Seconds of a measurement.')

# The rows of throughput.py; the targets are the images/s of the complete loop.
_ROWS = {
    'cifar10_bfloat16': '--encoder=ResNet18 --stem=cifar --image_size=32 --batch_size=512 --precision=bfloat16',
    'cifar10_tf32': '--encoder=ResNet18 --stem=cifar --image_size=32 --batch_size=512 --precision=tf32',
    'cifar10_float32': '--encoder=ResNet18 --stem=cifar --image_size=32 --batch_size=512 --precision=float32',
    'imagenette_bfloat16': '--encoder=ResNet18 --stem=imagenet --image_size=128 --source_size=160 '
    '--batch_size=256 --precision=bfloat16',
    'resnet50_bfloat16': '--encoder=ResNet50 --stem=imagenet --image_size=224 --source_size=256 '
    '--batch_size=256 --precision=bfloat16',
}


def compare_steps(device: torch.device, policy: str, num_steps: int = 6) -> dict[str, float]:
    """Compares the losses and parameters of compiled, captured steps with those of uncompiled steps.

    Returns:
      The largest differences: `loss`, absolute, and `params`, relative to the largest element of the leaf.
    """
    config = cifar10.get_config('small')
    config.precision, config.batch_size, config.optimizer = policy, 64, 'lars'
    precision.set_backend(policy)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (512, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = dataset.Dataset(images, torch.arange(512) % 10, tuple('0123456789')).to_device(device)
    experiment = byol_experiment.make(config, num_examples=512, num_classes=10, image_shape=(3, 32, 32))

    def train(compiled):
        update = compilation.compile_update(experiment.update, compiled=compiled)
        state = transfer.place(experiment.init(), device)
        losses = []
        for i in range(num_steps):
            batch = dataset.train_batch(data, i, seed=0, batch_size=64)
            draws = transfer.to_device(experiment.sample(i), device)
            state, logs = update(state, torch.full((), i, device=device), draws, batch)
            losses.append(float(logs['loss']))
        return losses, optree.tree_leaves(state.online_params)

    (losses, leaves), (expected_losses, expected_leaves) = train(True), train(False)
    return {
        'loss': max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True)),
        'params': max(
            float((a - b).abs().max() / b.abs().max().clamp_min(1e-6))
            for a, b in zip(leaves, expected_leaves, strict=True)
        ),
    }


def _run(name: str, out: pathlib.Path, *argv: str) -> bool:
    """Runs a command, copies its output to the console and to NAME.txt, and returns whether it succeeded."""
    print(f'\n== {name}: python {" ".join(argv)}', flush=True)
    with open(out / f'{name}.txt', 'w') as log:
        process = subprocess.Popen(
            [sys.executable, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout:
            log.write(line)
            print(line, end='', flush=True)
    return process.wait() == 0


def main(argv: list[str]) -> None:
    """Runs all measurements."""
    del argv
    device = torch.device(FLAGS.device)
    if device.type == 'cuda' and not torch.cuda.is_available():
        sys.exit('--device=cuda: no GPU found')
    out = pathlib.Path(FLAGS.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    if device.type == 'cuda':
        torch.cuda.set_device(device.index or 0)
    with open(out / 'compare_steps.txt', 'w') as log:
        for policy, limit in (('float32', 1e-3), ('bfloat16', 5e-2)):
            try:
                found = compare_steps(device, policy)
            except Exception as error:  # The rows below run in their own processes and are not affected.
                traceback.print_exc()
                log.write(f'{policy}: {error!r}\n')
                failed.append(f'compare_steps {policy}')
                continue
            line = f'compiled and captured against plain steps, {policy}: ' + ', '.join(
                f'{name} within {value:.2g}' for name, value in found.items()
            )
            print(line, flush=True)
            log.write(line + '\n')
            if not found['loss'] < limit:
                failed.append(f'compare_steps {policy}')
    if device.type == 'cuda':
        torch.cuda.empty_cache()  # Frees the GPU memory for the processes below.
    common = f'--device={FLAGS.device}', f'--seconds={FLAGS.seconds}'
    for name, row in _ROWS.items():
        if not _run(name, out, 'benchmarks/throughput.py', *row.split(), *common, f'--json={out / name}.json'):
            failed.append(name)
    if not _run('long_run', out, 'benchmarks/long_run.py', f'--device={FLAGS.device}', '--compile', f'--out={out}'):
        failed.append('long_run')
    if FLAGS.cifar10 and not _run(
        'cifar10_training',
        out,
        'launch.py',
        '--config=configs/cifar10.py',
        f'--device={FLAGS.device}',
        f'--config.num_epochs={FLAGS.epochs}',
        '--config.dataset.name=folder',
        f'--config.dataset.root={FLAGS.cifar10}',
        f'--workdir={out / "cifar10_training"}',
    ):
        failed.append('cifar10_training')
    print(f'\nEverything is in {out}.', f'Failed: {", ".join(failed)}.' if failed else 'Nothing failed.')
    sys.exit(bool(failed))


if __name__ == '__main__':
    app.run(main)
