"""Prints the number of features and parameters of every encoder as a table: `python -m benchmarks.encoders`.

The counts cover the parameters of the encoder alone, without its moving averages; `--width_multiplier` and
`--stem` are the fields of `config.network.encoder_config`.
"""

import optree
import tabulate
import torch
from absl import app, flags

from byol_func.utils import networks

_WIDTHS = flags.DEFINE_multi_float('width_multiplier', [1.0, 0.25], 'Widths, a column of each.')
_STEM = flags.DEFINE_enum('stem', 'imagenet', ['imagenet', 'cifar'], 'The first layers.')


def sizes(encoder_class: str, width: float, stem: str) -> tuple[int, int]:
    """Returns the number of features and of parameters of an encoder, without allocating any parameters."""
    config = dict(resnet_v2=False, width_multiplier=width, stem=stem)
    encoder = networks.make_encoder(encoder_class, config, dict(decay_rate=0.9, eps=1e-5, cross_replica=False))
    with torch.device('meta'):
        params, _ = encoder.init(torch.Generator('cpu'))
    return encoder.output_size, sum(tensor.numel() for tensor in optree.tree_leaves(params))


def main(argv: list[str]) -> None:
    del argv
    rows = []
    for name in networks.ENCODERS:
        row = [name]
        for width in _WIDTHS.value:
            features, parameters = sizes(name, width, _STEM.value)
            row += [f'{features:,}', f'{parameters:,}']
        rows.append(row)
    headers = ['encoder_class']
    for width in _WIDTHS.value:
        headers += [f'features, width {width:g}', f'parameters, width {width:g}']
    align = ('left',) + ('right',) * (len(headers) - 1)
    print(tabulate.tabulate(rows, headers, tablefmt='github', disable_numparse=True, colalign=align))


if __name__ == '__main__':
    app.run(main)
