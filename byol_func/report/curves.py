"""Reads the metrics of runs and draws their curves."""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from byol_func.report import plots
from byol_func.utils import variants
from byol_func.workdir import files, summaries

# Panels in order: title, regular expression for the names of metrics, whether the axis is logarithmic.
_PANELS = (
    ('loss of the representation (BYOL: 0 to 8)', r'repr_loss', False),
    ('cross entropy of the classifier', r'classif_loss|train_loss|.*online_loss', False),
    ('top-1 accuracy', r'top1_accuracy|.*top1|.*knn.*accuracy', False),
    ('learning rate', r'learning_rate', False),
    ('tau, the rate of the target', r'tau', False),
    ('spread of projections (1: even, 0: collapsed)', r'(.*/)?projection_spread', False),
    ('effective rank of embeddings', r'(.*/)?effective_rank', False),
    ('cosine of prediction and target', r'(.*/)?cosine', False),
    ('norm of gradients', r'(.*/)?grad_norm/.*', True),
    ('norm of parameters', r'(.*/)?param_norm/.*', True),
    ('norm of updates', r'(.*/)?update_norm/.*', True),
    ('images per second', r'images_per_second', False),
)
_LABELS = {'top1_accuracy': 'training batch'}


class Series(NamedTuple):
    """One metric over the steps."""

    steps: list[int]
    epochs: list[float]
    values: list[float]


def read_metrics(workdir: str | os.PathLike) -> dict[str, dict[str, Series]]:
    """Reads `metrics.jsonl` as mode -> name -> series; a missing file counts as empty.

    The metrics of a follower, in `eval.jsonl`, are added to pre-training as 'follower/NAME'.
    """
    metrics: dict[str, dict[str, Series]] = {}
    followed = files.read_records(pathlib.Path(workdir, 'eval.jsonl'))
    for record in sorted(followed, key=lambda record: record['step']):  # A follower takes the newest checkpoint first.
        _add(metrics, 'pretrain', 'follower/', record)
    for record in files.read_records(pathlib.Path(workdir, 'metrics.jsonl')):
        _add(metrics, record['mode'], '', record)
    return metrics


def _add(metrics: dict[str, dict[str, Series]], mode: str, prefix: str, record: Mapping[str, Any]) -> None:
    if 'epoch' not in record:  # Not written by a training loop.
        return
    for name, value in record.items():
        is_metric = name not in ('step', 'epoch') and isinstance(value, (int, float))
        if is_metric and (name != 'images_per_second' or value > 0):  # The first step has no rate yet.
            series = metrics.setdefault(mode, {}).setdefault(prefix + name, Series([], [], []))
            series.steps.append(record['step'])
            series.epochs.append(record['epoch'])
            series.values.append(value)


def over_seeds(runs: Sequence[Series]) -> tuple[Series, list[float] | None]:
    """Returns the mean over seeds at their common steps and the sample standard deviation (None for one seed)."""
    if len(runs) == 1:
        return runs[0], None
    common = sorted(set.intersection(*(set(run.steps) for run in runs)))
    rows = [dict(zip(run.steps, run.values, strict=True)) for run in runs]
    epochs = dict(zip(runs[0].steps, runs[0].epochs, strict=True))
    spreads = [summaries.mean_and_std([row[step] for row in rows]) for step in common]
    mean = Series(common, [epochs[step] for step in common], [spread['mean'] for spread in spreads])
    return mean, [spread['std'] for spread in spreads]


def draw_curves(path: str | os.PathLike, runs: Mapping[str, Sequence[Mapping[str, Series]]], title: str) -> bool:
    """Draws the curves of one run, or of several runs in the same axes; False if there is nothing to draw.

    `runs` maps the label of a run to name -> series for every seed. The label of a single run is not shown.
    """
    names = sorted({name for seeds in runs.values() for series in seeds for name in series})
    panels: list[plots.Panel] = []
    once: list[str] = []
    own = (
        (name.removeprefix(variants.LOGS), re.escape(name), False) for name in names if name.startswith(variants.LOGS)
    )
    for panel_title, pattern, is_log in (*_PANELS, *own):
        chosen = [name for name in names if re.fullmatch(pattern, name)]
        if len(runs) > 1:  # Per-module norms of all runs would be too many.
            chosen = [name for name in chosen if '_norm/' not in name or name.endswith('/all')]
        if limit := _limit(runs, chosen):
            panel_title = f'{panel_title} (at most {limit:g})'
        curves = _panel_curves(runs, chosen)
        lines = [curve for curve in curves if len(curve.epochs) > 1]
        if len(lines) == 1 and chosen[0] in _LABELS:
            panel_title = f'{panel_title}, {_LABELS[chosen[0]]}'
        if lines:
            panels.append(plots.Panel(panel_title, lines, is_log))
        else:
            shown = [curve for curve in curves if not is_log or curve.label.endswith('all')]
            once += [_value(panel_title, curve, len(shown) > 1) for curve in shown]
    if panels or once:
        plots.curves(path, panels, title, once)
    return bool(panels or once)


def _limit(runs: Mapping[str, Sequence[Mapping[str, Series]]], chosen: Sequence[str]) -> float | None:
    """Returns the upper bound that is logged next to a metric as NAME_limit; None if there is none or several."""
    series = [series for seeds in runs.values() for series in seeds]
    found = {
        value for one in series for name in chosen if f'{name}_limit' in one for value in one[f'{name}_limit'].values
    }
    return found.pop() if len(found) == 1 else None


def _panel_curves(runs: Mapping[str, Sequence[Mapping[str, Series]]], chosen: Sequence[str]) -> list[plots.Curve]:
    """Returns the curves of some metrics, labelled by the parts that tell them apart within the panel."""
    words = {name: _LABELS.get(name, re.sub(r'^.*_norm/', '', name)) for name in chosen}
    curves = []
    for label, seeds in runs.items():
        for name in chosen:
            found = [series[name] for series in seeds if name in series]
            if len(found) == len(seeds) and set.intersection(*(set(series.steps) for series in found)):
                both = [label] * (len(runs) > 1) + [words[name]] * (len(runs) == 1 or len(chosen) > 1)
                curves.append(_curve(': '.join(both), found))
    return curves


def _value(title: str, curve: plots.Curve, is_labelled: bool) -> str:
    """Returns one line about a metric that was measured at a single step."""
    spread = f' +- {curve.spread[0]:.4g}' if curve.spread else ''
    what = f'{title}, {curve.label}' if is_labelled else title
    return f'{what}: {curve.values[0]:.4g}{spread} (epoch {curve.epochs[0]:.4g})'


def _curve(label: str, seeds: Sequence[Series]) -> plots.Curve:
    mean, spread = over_seeds(seeds)
    return plots.Curve(label, mean.epochs, mean.values, spread)


def data_name(config: Mapping[str, Any]) -> str:
    """Returns the name of the data set; for the data sets 'folder' and 'shards', the name of their root."""
    name, root = config['dataset']['name'], config['dataset'].get('root') or ''
    return pathlib.Path(root).expanduser().absolute().name or name if name in ('folder', 'shards') else name


def title_of(config: Mapping[str, Any], seeds: int = 1) -> str:
    """Returns a title such as 'digits, ResNet10, seeds 0 to 2', followed by the update rule if it is a variant."""
    first = config['random_seed']
    which = f'seed {first}' if seeds == 1 else f'seeds {first} to {first + seeds - 1}'
    rule = f', {variants.label(config)}' if config.get('variant') else ''
    return f'{data_name(config)}, {config["network"]["encoder_class"]}, {which}{rule}'
