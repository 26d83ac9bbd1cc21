"""Writes the tables and curves of `compare_official.py`."""

import json
import pathlib
from typing import Any

import tabulate

from byol_func.runtime import atomic

# Group -> the heading of its column.
SHORT = {
    'views': 'views',
    'gradient norm': '|grad|',
    'gradients': 'grads',
    'encoder': 'encod',
    'projector': 'proj',
    'predictor': 'pred',
    'classifier': 'class',
    'BatchNorm': 'BN',
    'momentum': 'mom',
    'target': 'targ',
    'target BatchNorm': 'tBN',
}


def header() -> str:
    """Returns the header for the rows that `row` returns."""
    columns = '  '.join(f'{name:>6}' for name in ('loss', *SHORT.values()))
    above = f'{"":>4}  {"official":>9}  {"ours":>9}  relative difference of'
    return f'{above}\n{"step":>4}  {"loss":>9}  {"loss":>9}  {columns}'


def row(step: int, ours: dict[str, float], official: dict[str, float], found: dict[str, tuple[float, float]]) -> str:
    """Returns the row of one step: both losses and the relative difference of each group."""
    loss = abs(ours['loss'] - official['loss']) / abs(official['loss'])
    values = [loss, *(found[name][1] for name in SHORT)]
    columns = '  '.join(f'{value:6.0e}' if value else f'{"0":>6}' for value in values)
    return f'{step:>4}  {official["loss"]:9.6f}  {ours["loss"]:9.6f}  {columns}'


def closing_table(records: list[dict[str, Any]], moved: dict[str, tuple[float, float]]) -> str:
    """Returns a table of each group's differences after the first and the last update.

    The last column shows how far the official side moved from its start.
    """
    first, last = records[0]['differences'], records[-1]['differences']
    show = lambda value: f'{value:.1e}' if value else '0'
    rows = [
        [name, *map(show, (*first[name], *last[name])), show(moved[name][1]) if name in moved else ''] for name in first
    ]
    for log in records[0]['ours']:
        pairs = [(abs(r['ours'][log] - r['official'][log]), abs(r['official'][log])) for r in (records[0], records[-1])]
        rows.append([f'log: {log}', *(show(x) for d, size in pairs for x in (d, d / max(size, 1e-30))), ''])
    heads = [
        'largest difference',
        'step 1, abs',
        'relative',
        f'step {len(records)}, abs',
        'relative',
        'moved since start',
    ]
    return tabulate.tabulate(rows, heads, disable_numparse=True, colalign=('left', *['right'] * 5))


def write(folder: pathlib.Path, title: str, lines: list[str], numbers: dict[str, Any], is_drawn: bool = True) -> None:
    """Writes `log.txt`, `numbers.json` and, if `is_drawn`, `curves.png`; each file is replaced atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(folder / 'log.txt', ('\n'.join(lines) + '\n').encode())
    atomic.write_bytes(folder / 'numbers.json', (json.dumps(numbers, indent=1) + '\n').encode())
    if is_drawn:
        plot(folder / 'curves.png', title, numbers['steps'])


def plot(path: pathlib.Path, title: str, records: list[dict[str, Any]]) -> None:
    """Draws both loss curves, and below them the differences between the losses and between the networks."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    steps = [record['step'] + 1 for record in records]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout='constrained', height_ratios=(3, 2))
    curves = {side: [record[side]['repr_loss'] for record in records] for side in ('official', 'ours')}
    top.plot(steps, curves['official'], color='tab:orange', linewidth=5, alpha=0.5, label='official code (JAX)')
    top.plot(steps, curves['ours'], color='tab:blue', linewidth=1.5, label='byol_func (PyTorch)')
    top.set(ylabel="BYOL's loss (0 to 8)", title=title)
    top.legend()
    for name, style in (('loss', 'k-'), ('encoder', 'C0-'), ('target', 'C2-'), ('BatchNorm', 'C4-')):
        values = [
            abs(r['ours']['loss'] - r['official']['loss']) / abs(r['official']['loss'])
            if name == 'loss'
            else r['differences'][name][1]
            for r in records
        ]
        bottom.semilogy(steps, [max(value, 1e-18) for value in values], style, label=name)
    bottom.set(xlabel='update', ylabel='relative difference')
    bottom.xaxis.get_major_locator().set_params(integer=True)
    bottom.legend(ncols=4, fontsize='small')
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
