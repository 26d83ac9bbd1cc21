"""Compares runs from their files: `python -m byol_func.report.compare WORKDIR WORKDIR ...`.

Prints the accuracies of the runs and the config fields in which they differ, and draws their curves
into one picture. Several seeds of one run, and runs that differ only in their seed, share one row:
mean +- standard deviation.
"""

import json
import os
import pathlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tabulate
from absl import flags

from byol_func.cli import run_app
from byol_func.errors import UserError, counted
from byol_func.report import curves
from byol_func.utils import variants
from byol_func.workdir import summaries
from byol_func.workdir.files import flatten

_PICTURE = flags.DEFINE_string(
    'picture', None, 'The picture to write; by default comparison.png in the folder that holds all the workdirs.'
)
_EXPECTED = 'expected the --workdir of a run of launch.py'
_WIDTH = 100  # Characters of a line; wider tables are continued below.
_SEEDS = ('random_seed', 'num_seeds')  # The fields in which repetitions of one run differ.
# The first columns of a row, in order; any other accuracy follows under its own name.
_COLUMNS = {
    'pixels_logistic_top1': 'pixels, logistic',
    'pixels_knn_top1': 'pixels, k-NN',
    'untrained_linear_top1': 'linear, untrained',
    'linear_top1': 'linear',
    'fine_tuned_top1': 'fine-tuned',
    'logistic_top1': 'logistic',
    'knn_top1': 'k-NN',
    'online_top1': 'online',
    'online_knn_top1': 'k-NN while training',
}


class Repetition(NamedTuple):
    """One seed of a run: its config, its metrics on the evaluation sets and its curves."""

    config: dict[str, Any]
    metrics: dict[str, float]
    series: dict[str, curves.Series]
    rate: float | None  # Images per second.
    labels: dict[str, int] = {}  # Metric -> number of labelled images that its classifier was trained on, if known.


class Group(NamedTuple):
    """One row of the table: the repetitions of one config."""

    label: str
    config: dict[str, Any]  # Flat, without the seeds.
    repetitions: list[Repetition]


def read_groups(workdirs: Sequence[str]) -> list[Group]:
    """Reads the runs of some workdirs and groups those with the same config.

    Raises:
      UserError: a folder is not a workdir, or a file in it is damaged.
    """
    groups: list[Group] = []
    labels = _labels(workdirs)
    for workdir, label in zip(workdirs, labels, strict=True):
        path = pathlib.Path(workdir)
        folders = sorted(path.glob('seed_*/'), key=lambda folder: (len(folder.name), folder.name)) or [path]
        repetitions = [_read(folder) for folder in folders]
        if repetitions[0].config.get('variant'):
            label = f'{variants.label(repetitions[0].config)} ({label})'
        config = flatten(repetitions[0].config)
        config = {field: value for field, value in config.items() if field not in _SEEDS}
        same = next((i for i, group in enumerate(groups) if group.config == config), None)
        if same is None:
            groups.append(Group(label, config, repetitions))
        else:
            group = groups[same]
            groups[same] = Group(f'{group.label}, {label}', config, group.repetitions + repetitions)
    return groups


def _labels(workdirs: Sequence[str]) -> list[str]:
    """Returns the shortest endings of the paths that tell them apart, all with the same number of parts."""
    parts = [pathlib.Path(workdir).resolve().parts for workdir in workdirs]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    return [os.path.join(*part[-depth:]) for part in parts]


def _read(folder: pathlib.Path) -> Repetition:
    # The config of pre-training describes the run; config.json may come from a later evaluation.
    paths = [folder / 'config.pretrain.json', folder / 'config.json']
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(f'{str(folder)!r}: no config.json in it; {_EXPECTED}')
    config, rate = _read_json(path), None
    metrics: dict[str, float] = {}
    labels: dict[str, int] = {}
    # If two modes have measured the same metric, a separate evaluation overrides pre-training.
    for path in sorted(folder.glob('summary.*.json'), key=lambda path: (path.name != 'summary.pretrain.json', path)):
        summary = _read_json(path)
        found = {
            _name(name, summary): float(value)
            for name, value in summary.items()
            if name.startswith(('test/', 'val/')) and isinstance(value, (int, float))
        }
        metrics |= found
        count = summary.get('labelled_images')
        labels = {name: n for name, n in labels.items() if name not in found} | (
            dict.fromkeys(found, count) if count else {}
        )
        rate = summary.get('images_per_second') if summary.get('mode') == 'pretrain' else rate
    try:
        if (path := folder / 'metrics.jsonl').exists():
            path.read_text()  # Raises an error if the file cannot be read as text: a comparison must not ignore damage.
        series = curves.read_metrics(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{str(folder)!r}: cannot read metrics.jsonl ({error}); {_EXPECTED}') from error
    return Repetition(config, metrics, series.get('pretrain') or next(iter(series.values()), {}), rate, labels)


def _name(name: str, summary: Mapping[str, Any]) -> str:
    """Returns the current name of a metric.

    Older summaries used test/... for every evaluation set, and test/knn_top1 for two different protocols.
    """
    if summary.get('mode') == 'pretrain' and name == 'test/knn_top1':
        name = 'test/online_knn_top1'
    if summary.get('mode') != 'eval' and summary.get('eval_split') == 'val':
        name = name.replace('test/', 'val/')
    return name


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
        reason = f'a {type(content).__name__}'
    except (OSError, ValueError) as error:
        reason = ' '.join(str(error).split())
    raise UserError(f'{str(path)!r}: cannot be read ({reason}); {_EXPECTED}')


def results_table(groups: Sequence[Group]) -> str:
    """Returns one row per group, with seeds, steps, images per second and top-1 accuracies in percent.

    The number of labelled images that a classifier was trained on stands in the header if it is the same in all rows,
    and otherwise behind the accuracy. Accuracies that do not fit the line follow in further tables of the same rows.
    """
    found = {name for group in groups for rep in group.repetitions for name in rep.metrics if name.endswith('top1')}
    order = list(_COLUMNS)
    rank = lambda name: order.index(name) if name in order else len(order)
    names = sorted(found, key=lambda name: (name.split('/')[0], rank(name.split('/')[1]), name))
    common = _common_labels(groups, names)
    rows = []
    for group in groups:
        reps = group.repetitions
        steps = [max((series.steps[-1] + 1 for series in rep.series.values()), default=0) for rep in reps]
        rows.append(
            [
                group.label,
                len(reps),
                max(steps),
                _spread([rep.rate for rep in reps], 1.0, 0),
                *(_accuracy(reps, name, name not in common) for name in names),
            ]
        )
    columns = [
        '\n'.join([*textwrap.wrap(_COLUMNS.get(own, own), 12), f'({split})', *common.get(f'{split}/{own}', [])])
        for split, own in (name.split('/') for name in names)
    ]
    headers = ['top-1 %', 'seeds', 'steps', 'images/s', *columns]
    return '\n\n'.join(_tables([headers, *rows]))


def _common_labels(groups: Sequence[Group], names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the numbers of labels in words, by the names of the metrics that have one number in all rows."""
    reps = [rep for group in groups for rep in group.repetitions]
    found = {name: {rep.labels.get(name, 0) for rep in reps if name in rep.metrics} for name in names}
    return {name: [counted(max(counts), 'label')] for name, counts in found.items() if len(counts) == 1 and max(counts)}


def _accuracy(reps: Sequence[Repetition], name: str, with_labels: bool) -> str:
    """Formats an accuracy in percent, with the number of labels if `with_labels`."""
    labels = {rep.labels[name] for rep in reps if name in rep.labels} if with_labels else set()
    words = ' or '.join(f'{count:,}' for count in sorted(labels))
    text = _spread([rep.metrics.get(name) for rep in reps], 100.0, 2)
    return f'{text}, {words} label{"s" * (labels != {1})}' if labels else text


def _tables(rows: list[list[Any]]) -> Iterator[str]:
    """Yields tables of as many columns as fit a line; each begins with the first column. The first row is a header."""
    columns = [[str(cell) for cell in column] for column in zip(*rows, strict=True)]
    lines = [(max(map(len, head.split('\n'))) + tabulate.MIN_PADDING, *map(len, body)) for head, *body in columns]
    widths = [max(column) + 2 for column in lines]
    start = 1
    while start < len(columns):
        stop = start + 1
        while stop < len(columns) and widths[0] + sum(widths[start : stop + 1]) - 2 <= _WIDTH:
            stop += 1
        headers, *body = zip(columns[0], *columns[start:stop], strict=True)
        align = ('left', *['right'] * (stop - start))
        yield tabulate.tabulate(body, headers, disable_numparse=True, colalign=align)
        start = stop


def _spread(values: Sequence[float | None], scale: float, digits: int) -> str:
    """Formats the values that are not None as 'mean +- std (n of N)'; '(n of N)' only if some are None."""
    there = [scale * value for value in values if value is not None]
    if not there:
        return '-'
    found = summaries.mean_and_std(there)
    text = f'{found["mean"]:.{digits}f}'
    text += f' +- {found["std"]:.{digits}f}' if len(there) > 1 else ''
    return text if len(there) == len(values) else f'{text} ({len(there)} of {len(values)})'


def differences_table(groups: Sequence[Group]) -> str:
    """Returns a table of the config fields that differ between groups; '' if there are none."""
    fields = sorted({field for group in groups for field in group.config})
    rows = []
    for field in fields:
        # An empty section counts as missing: the fields that other runs have in it get rows of their own.
        values = ['-' if (value := group.config.get(field, {})) == {} else value for group in groups]
        if any(value != values[0] for value in values):
            rows.append([f'config.{field}', *map(str, values)])
    if not rows:
        return ''
    headers = ['what differs', *(group.label for group in groups)]
    first = max(len(name) for name in [headers[0], *(row[0] for row in rows)])
    room = max(12, (_WIDTH - first) // len(groups) - 2 - tabulate.MIN_PADDING)
    widths = [first, *[room] * len(groups)]
    return tabulate.tabulate(rows, headers, disable_numparse=True, maxcolwidths=widths, maxheadercolwidths=widths)


def draw(groups: Sequence[Group], path: str) -> bool:
    """Draws the curves of all groups, preferably those of pre-training, into a PNG file; False if there are none.

    Raises:
      UserError: the file cannot be written.
    """
    runs: Mapping[str, Any] = {group.label: [rep.series for rep in group.repetitions] for group in groups}
    try:
        return curves.draw_curves(path, runs, f'{counted(len(groups), "run")}, mean and standard deviation over seeds')
    except OSError as error:
        raise UserError(f'--picture={path}: cannot be written ({error.strerror or error})') from error


def main(argv: list[str]) -> None:
    """Prints the tables and draws the picture for the workdirs on the command line."""
    if len(argv) < 2:
        raise UserError('no WORKDIR given; expected python -m byol_func.report.compare WORKDIR WORKDIR ...')
    workdirs = list(dict.fromkeys(os.path.normpath(workdir) for workdir in argv[1:]))
    path = os.path.expanduser(_PICTURE.value or _beside(workdirs))
    if not path.endswith('.png'):
        raise UserError(f'--picture={path}: expected a name that ends in .png')
    groups = read_groups(workdirs)
    print(f'\n{results_table(groups)}\n')
    if differences := differences_table(groups):
        print(f'{differences}\n')
    if draw(groups, path):
        print(f'The curves are in {path}.')


def _beside(workdirs: Sequence[str]) -> str:
    """Returns the default picture: in the folder that holds all workdirs, or here if that cannot be written to."""
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(workdir)) for workdir in workdirs])
    folder = os.path.relpath(folder) if folder.startswith(os.getcwd()) else folder
    return os.path.normpath(os.path.join(folder if os.access(folder, os.W_OK) else '.', 'comparison.png'))


if __name__ == '__main__':
    run_app(main)
