"""Writes the tables, the curves and the page of `compare_official.py`."""

import base64
import json
import pathlib
from typing import Any

import jinja2

from byol_func.report import page, plots
from byol_func.runtime import atomic

# The columns of the table: the beginnings of the names of groups, and a heading of two lines.
_COLUMNS = {
    'loss': ('', 'loss'),
    'gradients of': ('', 'gradients'),
    'online network of': ('online', 'network'),
    'momentum of': ('', 'momentum'),
    'target network of': ('target', 'network'),
    'network of': ('', 'network'),  # Of a protocol.
}
# The page of a run lends its style.
_TEMPLATES = [pathlib.Path(file).parent / 'templates' for file in (__file__, page.__file__)]


def _worst(found: dict[str, float], beginning: str) -> float:
    return max(value for group, value in found.items() if group.startswith(beginning))


def _columns(record: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Returns those columns of which a record has groups."""
    found = record['differences']
    return {start: heading for start, heading in _COLUMNS.items() if any(group.startswith(start) for group in found)}


def header(record: dict[str, Any]) -> str:
    """Returns the header for the rows that `row` returns; no line is longer than 100 characters."""
    headings = _columns(record).values()
    widths = [max(map(len, heading)) + 2 for heading in headings]
    upper, lower = (''.join(f'{h[i]:>{w}}' for h, w in zip(headings, widths, strict=True)) for i in (0, 1))
    return (
        f'{"":6}  {"the loss of":^17}  {"largest relative difference between":^{sum(widths)}}'
        f'{"official code":>17}{"ReLU":>9}\n'
        f'{"":6}  {"official":>8}{"":>9}  {"this and the official code":^{sum(widths)}}{"to itself":>17}{"signs":>9}\n'
        f'{"":6}  {"code":>8}{"ours":>9}  {upper}{"gradients":>17}{"changed":>9}\n'
        f'{"update":6}  {"":>8}{"":>9}  {lower}'
    )


def row(record: dict[str, Any], number: int) -> str:
    """Returns the row of one update."""
    show = lambda value, width: f'{value:{width}.0e}' if value else f'{"0":>{width}}'
    columns = ''.join(
        show(_worst(record['differences'], beginning), max(map(len, heading)) + 2)
        for beginning, heading in _columns(record).items()
    )
    return (
        f'{number:6}  {record["official"]["loss"]:8.4f}{record["ours"]["loss"]:9.4f}  {columns}'
        f'{show(_worst(record["own"], "gradients of"), 17)}{record["sign_changes"]:9,}'
    )


def groups(records: list[dict[str, Any]], moved: dict[str, float]) -> list[list[str]]:
    """Returns the rows of the closing table: group, differences after the first and last update, and movement.

    Args:
      records: the records of all updates.
      moved: how far the official side moved from its start, for each group that can tell.
    """
    show = lambda value: '' if value is None else f'{value:.0e}' if value else '0'
    ends = [record[of] for record in (records[0], records[-1]) for of in ('differences', 'own')]
    return [[group, *(show(of.get(group)) for of in (*ends, moved))] for group in ends[0]]


def headers(records: list[dict[str, Any]]) -> list[str]:
    """Returns the headings of the closing table."""
    itself = 'itself'
    return ['largest relative difference', 'update 1', itself, f'update {len(records)}', itself, 'moved by']


def table(rows: list[list[str]], heads: list[str]) -> str:
    """Returns the closing table in at most 100 columns."""
    widths = [max(len(head) + 2, 9) for head in heads]
    widths[0] = max(len(row[0]) for row in rows)
    lines = (
        f'{row[0]:{widths[0]}}' + ''.join(f'{cell:>{w}}' for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in (heads, *rows)
    )
    return '\n'.join(line.rstrip() for line in lines)


def write(folder: pathlib.Path, lines: list[str], numbers: dict[str, Any]) -> None:
    """Writes `log.txt` and `numbers.json`; each file is replaced atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(folder / 'log.txt', ('\n'.join(lines) + '\n').encode())
    fields = [f' {json.dumps(name)}: {json.dumps(value)}' for name, value in numbers.items()]
    atomic.write_bytes(folder / 'numbers.json', ('{\n' + ',\n'.join(fields) + '\n}\n').encode())


def packed(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the records with the name of each group written once: `updates`, `differences` and `own`."""
    both = ('differences', 'own')
    updates = [{name: value for name, value in record.items() if name not in both} for record in records]
    columns = {of: {group: [record[of][group] for record in records] for group in records[0][of]} for of in both}
    return {'updates': updates, **columns}


def unpacked(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the records that were packed."""
    return [
        {**update, **{of: {group: values[i] for group, values in numbers[of].items()} for of in ('differences', 'own')}}
        for i, update in enumerate(numbers['updates'])
    ]


def write_page(folder: pathlib.Path, **values: Any) -> None:
    """Writes `report.html` from `curves.png`: one file that needs no network connection.

    Args:
      folder: the folder of the results.
      **values: the fields of the template.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    picture = base64.b64encode((folder / 'curves.png').read_bytes()).decode()
    page = environment.get_template('comparison.html').render(picture=f'data:image/png;base64,{picture}', **values)
    atomic.write_bytes(folder / 'report.html', page.encode())


def plot_updates(path: pathlib.Path, title: str, records: list[dict[str, Any]]) -> None:
    """Draws both loss curves, and below them the differences of every tree and of the official code to itself."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    updates = range(1, len(records) + 1)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout='constrained', height_ratios=(3, 3))
    pretrains = 'repr_loss' in records[0]['ours']
    loss = 'repr_loss' if pretrains else 'loss'
    curves = {side: [record[side][loss] for record in records] for side in ('official', 'ours')}
    top.plot(updates, curves['official'], color=plots.COLORS[1], linewidth=5, alpha=0.5, label='official code (JAX)')
    top.plot(updates, curves['ours'], color=plots.COLORS[0], linewidth=1.5, label='byol_func (PyTorch)')
    top.set(ylabel="BYOL's loss (0 to 8)" if pretrains else 'cross entropy', title=title)
    top.legend()
    for color, (beginning, heading) in zip(plots.COLORS, _columns(records[0]).items(), strict=False):
        for of, style in (('differences', '-'), ('own', ':')):
            values = [max(_worst(record[of], beginning), 1e-18) for record in records]
            bottom.semilogy(
                updates, values, style, color=color, label=' '.join(heading).strip() if style == '-' else None
            )
    bottom.plot([], [], ':', color='black', label='official code to itself')
    bottom.set(xlabel='update', ylabel='largest relative difference')
    bottom.legend(ncols=3, fontsize=8)
    _save(figure, path)


def plot_seeds(path: pathlib.Path, title: str, curves: dict[str, dict[str, list[float]]]) -> None:
    """Draws the curves of each log: the official code from several seeds, and ours."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(curves), 1, figsize=(8, 7), sharex=True, layout='constrained')
    for axis, (what, of_log) in zip(axes, curves.items(), strict=True):
        for name, values in of_log.items():
            is_ours = name.startswith('ours')
            width = max(1, len(values) // 50)
            means = [sum(values[i : i + width]) / len(values[i : i + width]) for i in range(0, len(values), width)]
            color = plots.COLORS[0] if is_ours else plots.COLORS[1]
            same = name.split(', ')[1] == next(n for n in of_log if n.startswith('ours')).split(', ')[1]
            style = '-' if same else ':'
            axis.plot(range(0, len(values), width), means, style, color=color, lw=1.5 if is_ours else 2.5, label=name)
        axis.set(ylabel=what)
    axes[0].set(title=title)
    axes[0].legend(fontsize=8)
    axes[-1].set(xlabel='update (means of stretches)')
    _save(figure, path)


def _save(figure: Any, path: pathlib.Path) -> None:
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format='png')
