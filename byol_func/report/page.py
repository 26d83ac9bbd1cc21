"""Writes `report.html`: one page about a run, in a single file that needs no network connection.

The page is made only from files of the workdir: `summary.*.json`, `config.json`, `commands.txt`,
`metrics.jsonl`, `variant.py` and the pictures.
"""

import base64
import collections
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from byol_func.console import readable
from byol_func.report import curves
from byol_func.runtime import atomic
from byol_func.workdir import files
from byol_func.workdir.files import flatten
from byol_func.workdir.summaries import CLASSIFIERS, MEASURES, choice_in_words, mean_and_std

_TEMPLATE = pathlib.Path(__file__).parent / 'templates' / 'report.html'
# Name of a picture -> its caption, in the order of the page; other pictures follow.
_CAPTIONS = {
    'curves': 'Training curves',
    'curves_linear_eval': 'Curves of the linear classifier on the frozen encoder',
    'curves_fine_tune': 'Curves of the fine-tuning',
    'augmentations': 'Augmented views of some images',
    'embedding_map': 'Map of the embeddings: near points have similar embeddings, distances between groups mean little',
    'neighbours': 'Images, their nearest neighbours and the cosine of their embeddings; if there are classes, a green '
    'frame marks that of the query and an orange one another',
    'embedding_map_fine_tune': 'Embeddings of the fine-tuned encoder',
    'neighbours_fine_tune': 'Nearest neighbours by the fine-tuned encoder',
    'confusion_matrix': 'Confusion matrix',
    'similar': 'Images of --images, and those of the run that are most similar to each',
}
_ENDINGS = {'top1': 'top-1', 'top5': 'top-5', 'loss': 'cross entropy'}
_METRICS = {  # In the order of the page.
    **{f'{m}_{e}': f'{what}, {words}' for m, what in MEASURES.items() for e, words in _ENDINGS.items()},
    'calibration_error': 'expected calibration error',
}
_MAX_SEEDS = 10  # Most seeds with a column each; if there are more, the page shows only mean and standard deviation.


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `report.html` into the workdir of a finished run and returns its path.

    Raises:
      OSError, ValueError: a file cannot be read or written.
    """
    import jinja2

    workdir = pathlib.Path(workdir)
    config = json.loads((workdir / 'config.json').read_text())
    summaries = [json.loads(path.read_text()) for path in workdir.glob('summary.*.json')]
    order = {'pretrain': 0, 'linear_eval': 1, 'fine_tune': 2}
    summaries.sort(key=lambda summary: (order.get(summary['mode'], 3), summary['mode']))
    latest = json.loads((workdir / 'summary.json').read_text())
    figures, confusions = _figures(workdir)
    health = _health(workdir)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(_TEMPLATE.name).render(
        name=workdir.resolve().name,
        dataset=curves.data_name(config) if latest['dataset'] in ('folder', 'shards') else latest['dataset'],
        encoder=latest['encoder'],
        variant=latest.get('variant', 'BYOL'),
        variant_source=_variant_source(workdir),
        seeds=latest['seed'],
        results=[_result(summary) | {'warnings': _warnings(workdir, summary)} for summary in summaries],
        figures=figures,
        confusions=confusions,
        health=health or _health(workdir / 'seed_0'),
        health_of='' if health else ' (first seed)',
        commands=_commands(workdir, summaries),
        environment=latest.get('environment', {}) | {'device': latest['device'], 'torch': latest['torch_version']},
        config=sorted(flatten(config).items()),
    )
    path = workdir / 'report.html'
    with atomic.replacing(path, shared=True) as temporary:  # A follower may write it at the same time.
        temporary.write_text(readable(page), encoding='utf-8')
    return path


def _commands(workdir: pathlib.Path, summaries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Returns the commands that ran in a workdir, in the order in which each ran first, and how often each ran."""
    path = workdir / 'commands.txt'
    if path.is_file():
        return dict(collections.Counter(path.read_text(encoding='utf-8', errors='surrogateescape').splitlines()))
    return {summary['command']: 1 for summary in summaries if summary.get('command')}  # Of an earlier version.


def _variant_source(workdir: pathlib.Path) -> str:
    """Returns the source of the update rule as it was when the run started; '' for BYOL itself."""
    paths = [workdir / 'variant.py', *sorted(workdir.glob('seed_*/variant.py'))]
    return next((path.read_text() for path in paths if path.is_file()), '')


def _result(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the table of one mode: metrics on the evaluation set (shares in percent) and their spread over seeds."""
    over_seeds = summary.get('over_seeds', {})
    seeds = summary['seed'] if isinstance(summary['seed'], list) else [summary['seed']]
    splits = {'test', 'val', summary.get('split')}  # --mode=eval accepts any split.
    names = [name for name in summary if name.split('/')[0] in splits and _is_number(summary[name])]
    if summary.get('num_classes', 6) <= 5:  # With at most 5 classes, top-5 is 100 %.
        names = [name for name in names if 'top5' not in name]
    rank = list(_METRICS)
    names.sort(key=lambda n: rank.index(n.split('/')[1]) if n.split('/')[1] in _METRICS else len(rank))
    rows = []
    for name in names:
        values = over_seeds[name]['values'] if name in over_seeds else [summary[name]]
        own = name.split('/', 1)[1]
        is_share = 'loss' not in own and min(values) >= 0 and max(values) <= 1
        scale, unit = (100, ' %') if is_share else (1, '')
        spread = mean_and_std([scale * value for value in values])
        digits = 2 if is_share else 4
        rows.append(
            {
                'name': _METRICS.get(own, own.replace('_', ' ')).format(rule=summary.get('variant', 'BYOL')),
                'is_main': 'top1' in own,
                'mean': f'{spread["mean"]:.{digits}f}{unit}',
                'std': f'{spread["std"]:.{digits}f}',
                'each': [f'{value:.{digits}f}' for value in spread['values']],
            }
        )
    checkpoints, chosen = summary.get('checkpoint'), summary.get('chosen')
    looked = summary.get('embeddings') or []
    looked = looked if isinstance(looked, list) else [looked]
    facts = {
        'steps': summary.get('steps'),
        'epochs': summary.get('epochs'),
        'batch size': summary.get('batch_size'),
        'images per second': summary.get('images_per_second'),
        'seconds': summary.get('seconds'),
        'embeddings': looked[0]['in_words'] if looked else None,
        'checkpoint': ', '.join(checkpoints) if isinstance(checkpoints, list) else checkpoints,
        'chosen on held-out images': choice_in_words(chosen, seeds) if chosen else None,
    }
    shown = {k: f'{v:,.1f}' if isinstance(v, float) else v for k, v in facts.items() if v is not None}
    found = ' and '.join(sorted({name.split('/')[0] for name in names}))
    return {
        'mode': summary['mode'],
        'split': found,
        'rows': rows,
        'seeds': seeds if len(seeds) <= _MAX_SEEDS else [],
        'has_spread': len(seeds) > 1,
        'facts': shown,
    }


def _warnings(workdir: pathlib.Path, summary: Mapping[str, Any]) -> list[str]:
    """Returns warnings about dead embeddings and about collapses, for every seed of the run."""
    looked = summary.get('embeddings') or []
    looked = looked if isinstance(looked, list) else [looked]
    dead = [' '.join(one['warnings']) for one in looked if one['warnings']]
    name = f'summary.{summary["mode"]}.json'
    of_seeds = [json.loads(path.read_text()) for path in sorted(workdir.glob(f'seed_*/{name}'))]
    return dead + [
        f'Seed {one["seed"]} collapsed: {collapse["measure"]} was {collapse["value"]:.3g} after step '
        f'{collapse["step"]}, '
        + ('and stayed so' if collapse['recovered_step'] is None else f'until step {collapse["recovered_step"]}')
        for one in of_seeds or [summary]
        for collapse in one.get('collapses', [])
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and bool(np.isfinite(value))


def _figures(workdir: pathlib.Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Reads all pictures of the workdir; for those it lacks, the pictures of the first seed.

    Returns:
      Caption and URI of each picture; the confusion matrices, which may be many, in a second list.
    """
    paths, own = (
        {path.stem: path for path in folder.glob('*.png') if path.is_file()} for folder in (workdir / 'seed_0', workdir)
    )
    figures: list[dict[str, str]] = []
    confusions: list[dict[str, str]] = []
    rank = {stem: i for i, stem in enumerate(_CAPTIONS)}
    for stem in sorted({**paths, **own}, key=lambda stem: (rank.get(stem, len(rank)), stem)):
        path = own[stem] if stem in own else paths[stem]
        caption = _CAPTIONS.get(stem, stem.replace('_', ' '))
        if is_confusion := stem.startswith('confusion_matrix.'):
            _, name, split = stem.split('.')
            caption = f'{CLASSIFIERS.get(name, name)}, {split} set'
        data = base64.b64encode(path.read_bytes()).decode()
        (confusions if is_confusion else figures).append(
            {'caption': caption if stem in own else f'{caption} (first seed)', 'uri': f'data:image/png;base64,{data}'}
        )
    return figures, confusions


_HEALTH = {
    'projection_spread': 'spread of the projections: 1 if they point in all directions, 0 if they are all equal',
    'effective_rank': 'effective rank of the embeddings: the number of directions that they use',
    'cosine': 'cosine between online prediction and target projection',
}


def _health(workdir: pathlib.Path) -> list[tuple[str, str]]:
    """Returns the last values of the measures that show a collapse, as far as they were measured."""
    found: dict[str, str] = {}
    for record in files.read_records(workdir / 'metrics.jsonl'):
        for name, value in record.items():
            own = name.rsplit('/', 1)[-1]
            if own in _HEALTH and record['mode'] == 'pretrain' and _is_number(value):
                limit = record.get(f'{name}_limit')
                found[own] = f'{value:.3f}{f" of {limit:g}" if limit else ""} at step {record["step"]}'
    return [(_HEALTH[name], words) for name, words in found.items()]
