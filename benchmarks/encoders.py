"""Prints features, parameters and, with --measure, speed and memory of every encoder as a table.

  python -m benchmarks.encoders                     features and parameters, of every --width_multiplier
  python -m benchmarks.encoders --measure           also images/s and peak memory of pre-training steps

The counts cover the parameters of the encoder alone, without its moving averages; `--width_multiplier` and
`--stem` are the fields of `config.network.encoder_config`. A measured step is a whole one (augmentation, two views,
online and target network, heads 4096/256, LARS, EMA), traced but not compiled by Inductor, in a process of its own.
The memory is that process's peak, PyTorch itself included.
"""

import concurrent.futures
import multiprocessing
import platform

import optree
import tabulate
import torch
from absl import app, flags

from benchmarks import measuring
from byol_func import byol_experiment
from byol_func.runtime import compilation
from byol_func.utils import networks
from configs import byol

_WIDTHS = flags.DEFINE_multi_float('width_multiplier', [1.0], 'Widths, a column of each.')
_ENCODERS = flags.DEFINE_multi_enum('encoder', list(networks.ENCODERS), list(networks.ENCODERS), 'The rows.')
_STEM = flags.DEFINE_enum('stem', 'imagenet', ['imagenet', 'cifar'], 'The first layers.')
_MEASURE = flags.DEFINE_bool('measure', False, 'Whether to run steps of every encoder.')
_IMAGE_SIZE = flags.DEFINE_integer('image_size', 64, 'Side of the views of measured steps, in pixels.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 16, 'Images per measured step.')
_PRECISION = flags.DEFINE_enum('precision', 'float32', ['float32', 'bfloat16'], 'Precision of measured steps.')
_STEPS = flags.DEFINE_integer('steps', 3, 'Measured steps after two of warm-up; the table shows their median.')


def sizes(encoder_class: str, width: float, stem: str) -> tuple[int, int]:
    """Returns the number of features and of parameters of an encoder, without allocating any parameters."""
    config = dict(resnet_v2=False, width_multiplier=width, stem=stem)
    encoder = networks.make_encoder(encoder_class, config, dict(decay_rate=0.9, eps=1e-5, cross_replica=False))
    with torch.device('meta'):
        params, _ = encoder.init(torch.Generator('cpu'))
    return encoder.output_size, sum(tensor.numel() for tensor in optree.tree_leaves(params))


def measure(
    encoder_class: str, width: float, stem: str, image_size: int, batch_size: int, precision: str, steps: int
) -> tuple[float, float]:
    """Returns images per second (median over `steps`) and the peak memory of this process in GiB."""
    config = byol.get_config('1000')
    config.network.encoder_class = encoder_class
    config.network.encoder_config.update(dict(width_multiplier=width, stem=stem))
    config.update(dict(batch_size=batch_size, image_size=image_size, precision=precision))
    experiment = byol_experiment.make(
        config, num_examples=100 * batch_size, num_classes=10, image_shape=(3, image_size, image_size)
    )
    images = torch.randint(256, (batch_size, 3, image_size, image_size), dtype=torch.uint8)
    batch = {'images': images, 'labels': torch.arange(batch_size) % 10}
    update = compilation.compile_update(experiment.update, backend='aot_eager')
    state, step = experiment.init(), 0

    def run() -> None:
        nonlocal state, step
        state, _ = update(state, torch.tensor(step), experiment.sample(step), batch)
        step += 1

    seconds = measuring.seconds_per_call(run, torch.device('cpu'), repeats=steps, seconds=0.0)
    return batch_size / measuring.median(seconds), measuring.peak_memory_gib(torch.device('cpu'))


def main(argv: list[str]) -> None:
    del argv
    rows = []
    for name in _ENCODERS.value:
        row = [name]
        for width in _WIDTHS.value:
            features, parameters = sizes(name, width, _STEM.value)
            row += [f'{features:,}', f'{parameters:,}']
            if _MEASURE.value:
                settings = (_IMAGE_SIZE.value, _BATCH_SIZE.value, _PRECISION.value, _STEPS.value)
                with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
                    speed, memory = pool.submit(measure, name, width, _STEM.value, *settings).result()
                row += [f'{speed:.3g}', f'{memory:.1f}']
        rows.append(row)
        print('  '.join(row), flush=True)
    headers = ['encoder_class']
    for width in _WIDTHS.value:
        columns = ['features', 'parameters', *(['images/s', 'peak memory, GiB'] if _MEASURE.value else [])]
        headers += [f'{column}, width {width:g}' for column in columns] if len(_WIDTHS.value) > 1 else columns
    align = ('left',) + ('right',) * (len(headers) - 1)
    print('\n' + tabulate.tabulate(rows, headers, tablefmt='github', disable_numparse=True, colalign=align))
    if _MEASURE.value:
        print(
            f'\nViews of {_IMAGE_SIZE.value} px, batch {_BATCH_SIZE.value}, {_PRECISION.value}, '
            f'{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}'
        )


if __name__ == '__main__':
    app.run(main)
