"""The summary of a run: `summary.json` and the final table of the output."""

import json
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tabulate
import torch
from absl import logging

from byol_func.errors import counted
from byol_func.experiment import Experiment, TrainResult
from byol_func.runtime import collectives
from byol_func.utils import dataset, variants
from byol_func.workdir import environment, files
from byol_func.workdir.run import Run


def write_config(run: Run, mode: str) -> None:
    """Writes the resolved config; a pre-training with a variant also copies the variant's file to `variant.py`.

    A resumed run keeps its copy, although comments of the file may have changed since.
    """
    _write(run, 'config', mode, run.plain_config())
    if run.config.variant and mode == 'pretrain' and collectives.replica_index() == 0:
        copy = pathlib.Path(run.workdir, 'variant.py')
        has_begun = any(any(copy.parent.glob(f'{seed}checkpoints/pretrain_*')) for seed in ('', 'seed_*/'))
        if not (has_begun and copy.exists()):
            files.write_text(copy, variants.find(run.config.variant).read_text())


def note_command(run: Run) -> None:
    """Appends the command to `commands.txt`, so that a resumed run also shows the commands before it."""
    if collectives.replica_index() == 0:
        path = os.path.join(run.workdir, 'commands.txt')
        with files.reporting_errors(path):
            os.makedirs(run.workdir, exist_ok=True)
            with open(path, 'a', encoding='utf-8', errors='surrogateescape') as file:  # Paths may be any bytes.
                file.write(' '.join(run.command.splitlines()) + '\n')


def write_summary(run: Run, mode: str, summary: dict[str, Any]) -> None:
    """Writes the summary of a mode."""
    _write(run, 'summary', mode, summary)


def _write(run: Run, name: str, mode: str, content: dict[str, Any]) -> None:
    if collectives.replica_index() == 0:
        for file in (f'{name}.{mode}.json', f'{name}.json'):
            files.write_json(os.path.join(run.workdir, file), content)


class Length(NamedTuple):
    """The length of a training; a field is None if it is unknown."""

    steps: int
    epochs: float | None
    batch_size: int | None


def length_of(experiment: Experiment, data: dataset.Examples) -> Length:
    """Returns the length of a complete training on a training set."""
    steps, batch_size = experiment.max_steps, experiment.batch_size
    return Length(steps, steps * batch_size / data.num_examples, batch_size)


def summarize(
    run: Run,
    mode: str,
    data: dataset.Examples,
    length: Length,
    result: TrainResult | None,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """Returns the summary of a run: its settings, results and environment.

    `length` is that of the training that produced the evaluated state. `result` is None if nothing was trained.
    `metrics` have names such as 'test/linear_top1'.
    """
    config = run.config
    summary = {
        'mode': mode,
        'dataset': config.dataset.name,
        'eval_split': config.dataset.eval_split,
        'variant': variants.label(config),
        'encoder': config.network.encoder_class,
        **({'init_from': config.init_from, 'init_digest': config.init_digest} if config.init_from else {}),
        'seed': config.random_seed,
        'num_classes': data.num_classes,
        **({'labelled_images': data.num_examples} if mode in _ON_LABELS else {}),
        **length._asdict(),
        **metrics,
        'images_per_second': result.images_per_second if result else None,
        'seconds': result.seconds if result else None,
        'device': _device_name(run.device),
        'torch_version': torch.__version__,
        'command': run.command,
        'environment': environment.describe(),
    }
    path = os.path.join(run.workdir, f'summary.{mode}.json')
    if result and not result.steps and os.path.exists(path):
        # An earlier process did all the steps; their time and logs are in its summary.
        earlier = _read_summary(path)
        taken = ('images_per_second', 'seconds', 'device', 'torch_version', 'command', 'environment')
        measured = ('val/', 'test/')  # These have not changed, but older versions named some of them differently.
        earlier = {name: v for name, v in earlier.items() if not name.startswith(measured)}
        summary = earlier | {name: v for name, v in summary.items() if name not in taken}
    return summary


def _read_summary(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding='utf-8') as file:
            found = json.load(file)
        return found if isinstance(found, dict) else {}
    except ValueError:  # A power cut may leave the file empty.
        logging.warning('%s is damaged; its record of the training is lost', path)
        return {}


def _device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type} ({counted(torch.get_num_threads(), "thread")})'


def merge_seeds(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Merges the summaries of several seeds into one with the mean and the spread of every metric."""
    spread = {
        name: mean_and_std([s[name] for s in summaries])
        for name in summaries[0]
        if name.startswith(('train/', 'val/', 'test/'))
    }
    merged = summaries[0] | {name: values['mean'] for name, values in spread.items()}
    merged['seed'] = [s['seed'] for s in summaries]
    merged['over_seeds'] = spread
    if 'collapses' in merged:
        merged['collapses'] = [{'seed': s['seed'], **event} for s in summaries for event in s['collapses']]
    for name in ('chosen', 'checkpoint', 'embeddings'):
        if name in merged:
            merged[name] = [s[name] for s in summaries]
    if summaries[0]['seconds'] is not None:
        merged['images_per_second'] = mean_and_std([s['images_per_second'] for s in summaries])['mean']
        merged['seconds'] = sum(s['seconds'] for s in summaries)
    return merged


# The classifiers by their names in metrics and files, and the classifier that each mode trains.
CLASSIFIERS = {
    'online': 'online classifier',
    'linear': 'linear classifier',
    'fine_tuned': 'fine-tuned classifier',
    'logistic': 'logistic regression',
    'knn': 'nearest neighbours',
}
CLASSIFIER_OF_MODE = {'pretrain': 'online', 'linear_eval': 'linear', 'fine_tune': 'fine_tuned', 'logistic': 'logistic'}
_ON_LABELS = ('linear_eval', 'fine_tune', 'knn', 'logistic')  # The modes that learn from labelled images alone.
# The rows of tables, in order, by the prefix of their metrics: `MEASURE_top1`, `MEASURE_top5`, `MEASURE_loss`.
MEASURES = {
    'pixels_logistic': 'raw pixels, logistic regression',
    'pixels_knn': 'raw pixels, nearest neighbours',
    'untrained_linear': 'linear classifier on the untrained encoder',
    'linear': 'linear classifier on the {rule} encoder',
    'untrained_fine_tuned': 'fine-tuned from the untrained encoder',
    'fine_tuned': 'fine-tuned from the {rule} encoder',
    'logistic': 'logistic regression on the {rule} encoder',
    'knn': 'nearest neighbours on the {rule} encoder',
    'fine_tuned_logistic': 'logistic regression on the fine-tuned encoder',
    'fine_tuned_knn': 'nearest neighbours on the fine-tuned encoder',
    'online': 'online classifier of the pre-training',
    'online_knn': '20 nearest neighbours, while training',
}


_SPLITS = {'train': 'training', 'val': 'validation', 'test': 'test'}


def closing_words(summary: dict[str, Any], workdir: str) -> str:
    """Returns the table at the end of a run, followed by the chosen settings, the checkpoints and any warnings."""
    over_seeds = summary.get('over_seeds', {})
    split = summary.get('split', summary['eval_split'])  # --mode=eval accepts any split.
    rows, rule = {}, summary.get('variant', 'BYOL')
    for measure, row in MEASURES.items():
        if (name := f'{split}/{measure}_top1') in summary:
            rows[row.format(rule=rule)] = over_seeds[name]['values'] if over_seeds else [summary[name]]
    labels = f', from {counted(summary["labelled_images"], "label")}' if 'labelled_images' in summary else ''
    title = f'{summary["dataset"]}, {_SPLITS.get(split, split)} set{labels}'
    what = (
        accuracy_table(title, rows)
        if rows
        else (
            'Pre-trained without labels. --mode=embed writes the features. To evaluate the encoder on labelled images '
            f'in DIR/train/CLASS/* and DIR/test/CLASS/*: --checkpoint={workdir} --workdir=ANOTHER --mode=logistic '
            '--config.dataset.root=DIR --config.dataset.eval_split=test'
        )
    )
    lines = []
    if chosen := summary.get('chosen'):
        lines.append(f'Chosen on held-out images: {choice_in_words(chosen, summary["seed"])}.')
    if found := summary.get('checkpoint'):
        lines.append('Checkpoint: ' + (found if isinstance(found, str) else ', '.join(found)))
    if looked := summary.get('embeddings'):
        all_seeds = looked if isinstance(looked, list) else [looked]
        shown = next((one for one in all_seeds if one['warnings']), all_seeds[0])
        which = f' of seed {summary["seed"][all_seeds.index(shown)]}' if len(all_seeds) > 1 else ''
        lines.append(f'Embeddings{which}: {shown["in_words"]}.')
        lines += [f'Warning: {" ".join(shown["warnings"])}'] if shown['warnings'] else []
    if lines:
        what = '\n'.join([what, '', *lines])
    start = 'report.html' if os.path.exists(os.path.join(workdir, 'report.html')) else 'summary.json'
    return f'\n{what}\n\nEverything is in {workdir}; start with {start}.'


def mean_and_std(values: Sequence[float]) -> dict[str, Any]:
    """Returns `{'mean', 'std', 'values'}`, with the sample standard deviation (0 for a single value)."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {'mean': statistics.fmean(values), 'std': std, 'values': list(values)}


def choice_in_words(chosen: Mapping[str, Any] | Sequence[Mapping[str, Any]], seeds: Sequence[int] = ()) -> str:
    """Returns the chosen settings in words: 'k = 20, temperature 0.07 (top-1 79.3 % of 143 images)', for each seed.

    Args:
      chosen: settings by name, and `held_out_top1`, their top-1 accuracy in 0..1 on the held-out set, and its
        size, `held_out_images`; or a list of these, one per seed.
      seeds: the seeds of the list, in its order.
    """
    if not isinstance(chosen, Mapping):
        return '; '.join(f'seed {seed}: {choice_in_words(one)}' for seed, one in zip(seeds, chosen, strict=True))
    words = [
        f'{name.replace("_", " ")} {"= " * (len(name) == 1)}{value:.4g}'
        for name, value in chosen.items()
        if not name.startswith('held_out_') and isinstance(value, (int, float))
    ]
    count = chosen.get('held_out_images')  # Older summaries lack it.
    on = f' of {counted(count, "image")}' if count else ''
    return f'{", ".join(words)} (top-1 {100 * chosen["held_out_top1"]:.1f} %{on})'


def accuracy_table(title: str, rows: Mapping[str, Sequence[float]]) -> str:
    """Returns a table of top-1 accuracies in percent; for several seeds, their mean, standard deviation and values.

    Args:
      title: title of the first column.
      rows: name -> accuracies in 0..1, one per seed.
    """
    seeds = max(len(values) for values in rows.values())
    headers = [title, 'top-1 %'] + (['std', 'each seed'] if seeds > 1 else [])
    lines = []
    for name, values in rows.items():
        percent = mean_and_std([100 * value for value in values])
        line = [name, f'{percent["mean"]:.2f}']
        if seeds > 1:
            line += [f'{percent["std"]:.2f}', '  '.join(f'{value:.2f}' for value in percent['values'])]
        lines.append(line)
    return tabulate.tabulate(lines, headers, disable_numparse=True, colalign=('left', 'right')[:2])
