"""Estimates what communication costs on many GPUs, on paper: no GPU is used, and nothing here is measured.

  python benchmarks/scaling_on_paper.py --encoder=ResNet50

A step communicates once for each batch normalisation of the online network, of the target network and of the backward
pass (the sums of a layer, a few kilobytes), and once for all gradients. Messages and bytes are counted from the
networks. The times follow from the assumptions in the flags, without any overlap of communication and computation:

  small messages:  count * latency
  gradients:       latency + 2 * (N - 1) / N * bytes / bandwidth, as in a ring
"""

import math
import pathlib
import sys

import optree
import tabulate
import torch
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from byol_func import byol_experiment
from configs import byol

FLAGS = flags.FLAGS
flags.DEFINE_string('encoder', 'ResNet50', 'The encoder.')
flags.DEFINE_integer('batch', 4096, 'Images of a step, over all GPUs.')
flags.DEFINE_float('rate', 1200.0, 'Assumed images per second of one GPU, forward and backward, without communication.')
flags.DEFINE_float('latency_inside', 20.0, 'Assumed microseconds of a small message among the 8 GPUs of a machine.')
flags.DEFINE_float('latency_across', 45.0, 'Assumed microseconds of a small message among several machines.')
flags.DEFINE_float('bandwidth_inside', 350.0, 'Assumed gigabytes per second of a GPU inside a machine (NVLink).')
flags.DEFINE_float('bandwidth_across', 45.0, 'Assumed gigabytes per second of a GPU across machines (400 Gbit/s).')


def counts(encoder: str) -> tuple[int, int]:
    """Returns the messages of batch statistics per step, and the bytes of the gradients."""
    config = byol.get_config('1000')
    config.network.encoder_class = encoder
    experiment = byol_experiment.make(config, num_examples=10**6, num_classes=1000, image_shape=(3, 224, 224))
    with torch.device('meta'):
        state = experiment.init()
    layers = sum('mean_ema/counter' in '/'.join(map(str, path)) for path in optree.tree_paths(state.online_state))
    return 3 * layers, 4 * sum(leaf.numel() for leaf in optree.tree_leaves(state.online_params))


def main(argv: list[str]) -> None:
    """Prints the assumptions and the table."""
    del argv
    messages, size = counts(FLAGS.encoder)
    print(
        f'{FLAGS.encoder}, batch {FLAGS.batch}: {messages} small messages and one of {size / 1e6:.0f} MB per step.\n'
        f'Assumed: {FLAGS.rate:g} images/s per GPU; {FLAGS.latency_inside:g} and {FLAGS.latency_across:g} us, '
        f'{FLAGS.bandwidth_inside:g} and {FLAGS.bandwidth_across:g} GB/s inside and across machines of 8 GPUs.\n'
    )
    rows = []
    for gpus in (1, 8, 64):
        where = 'inside' if gpus <= 8 else 'across'
        latency, bandwidth = FLAGS[f'latency_{where}'].value * 1e-6, FLAGS[f'bandwidth_{where}'].value * 1e9
        computing = FLAGS.batch / gpus / FLAGS.rate
        small, gradients = messages * latency, latency + 2 * (gpus - 1) / gpus * size / bandwidth
        if gpus == 1:
            small = gradients = 0.0
        share = computing / (computing + small + gradients)
        milliseconds = [f'{1e3 * seconds:.1f}' for seconds in (computing, small, gradients)]
        rows.append([gpus, *milliseconds, f'{share:.1%}', f'{math.floor(gpus * FLAGS.rate * share):,}'])
    headers = ['GPUs', 'computing, ms', 'small messages, ms', 'gradients, ms', 'efficiency', 'images/s']
    print(tabulate.tabulate(rows, headers, disable_numparse=True, colalign=('right',) * len(headers)))


if __name__ == '__main__':
    app.run(main)
