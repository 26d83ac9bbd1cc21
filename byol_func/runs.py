"""A run and the files it leaves in its workdir.

`config.json`, `metrics.jsonl`, `checkpoints/` and at the end `summary.json`; where several modes
share a workdir, the plain names belong to the latest and `config.MODE.json`, `summary.MODE.json` to
each.
"""

import json
import os
from typing import Any, NamedTuple

import ml_collections
import torch

from byol_func import environment, main_loop, reporting
from byol_func.experiment import Experiment
from byol_func.loop_config import LoopConfig
from byol_func.runtime import collectives
from byol_func.utils import dataset


class Tracking(NamedTuple):
    """Where mlflow keeps a run; the flags of the same names explain the fields."""

    uri: str
    experiment_name: str
    run_id: str | None
    checkpoints: bool


class Run(NamedTuple):
    """Everything a mode needs to know."""

    config: ml_collections.ConfigDict
    workdir: str
    device: torch.device
    checkpoint: str | None
    log_every_seconds: float
    follow: bool = False  # Evaluate what another process trains, as it trains.
    resume: str = 'auto'  # One of `resuming.RESUME`.
    output: str | None = None  # What --mode=export writes, and how.
    format: str | None = None  # None: official.
    split: str | None = None  # What --mode=eval and --mode=embed look at.
    command: str = ''  # As it was typed, without passwords.
    tracking: Tracking | None = None
    is_first_seed: bool = True

    def plain_config(self) -> dict[str, Any]:
        """The resolved config as plain values, as JSON has them."""
        return json.loads(self.config.to_json_best_effort())

    def loop(self, mode: str, compiled: bool | None) -> LoopConfig:
        """How a loop of this run runs; `mode` names its checkpoints and metrics."""
        return LoopConfig(
            mode=mode,
            workdir=self.workdir,
            device=self.device,
            compiled=compiled,
            seed=self.config.random_seed,
            config=self.plain_config(),
            log_every_steps=self.config.log_every_steps,
            log_every_seconds=self.log_every_seconds,
            resume=self.resume,
            **self.config.checkpointing,
        )

    def of_seed(self, i: int) -> 'Run':
        """Run i of `config.num_seeds`, in a folder of its own."""
        config = ml_collections.ConfigDict(self.config)
        config.num_seeds = 1
        config.random_seed = self.config.random_seed + i
        return self._replace(config=config, workdir=os.path.join(self.workdir, f'seed_{i}'), is_first_seed=i == 0)


def write_config(run: Run, mode: str) -> None:
    """Writes the resolved config."""
    _write(run, 'config', mode, run.plain_config())


def write_summary(run: Run, mode: str, summary: dict[str, Any]) -> None:
    """Writes the summary."""
    _write(run, 'summary', mode, summary)


def _write(run: Run, name: str, mode: str, content: dict[str, Any]) -> None:
    if collectives.replica_index() == 0:
        for file in (f'{name}.{mode}.json', f'{name}.json'):
            reporting.write_json(os.path.join(run.workdir, file), content)


class Length(NamedTuple):
    """How long something was trained; None where nothing tells."""

    steps: int
    epochs: float | None
    batch_size: int | None


def length_of(experiment: Experiment, data: dataset.Dataset) -> Length:
    """Of a whole training on a training set."""
    steps, batch_size = experiment.max_steps, experiment.batch_size
    return Length(steps, steps * batch_size / data.num_examples, batch_size)


def summarize(
    run: Run,
    mode: str,
    data: dataset.Dataset,
    length: Length,
    result: main_loop.TrainResult | None,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """What a run was and what came of it.

    Args:
      run: the run.
      mode: its mode.
      data: the training set.
      length: of what was trained or evaluated.
      result: of the training loop, None where nothing was trained.
      metrics: final metrics, under names such as 'test/linear_top1'.
    """
    config = run.config
    summary = {
        'mode': mode,
        'dataset': config.dataset.name,
        'eval_split': config.dataset.eval_split,
        'encoder': config.network.encoder_class,
        'seed': config.random_seed,
        'num_classes': data.num_classes,
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
        # All steps were done before: what they took and logged stands in the summary of that time.
        with open(path) as file:
            earlier = json.load(file)
        taken = ('images_per_second', 'seconds', 'device', 'torch_version', 'command', 'environment')
        measured = ('val/', 'test/')  # Now as then, but older versions had other names for some.
        earlier = {name: v for name, v in earlier.items() if not name.startswith(measured)}
        summary = earlier | {name: v for name, v in summary.items() if name not in taken}
    return summary


def _device_name(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type} ({torch.get_num_threads()} threads)'


def merge_seeds(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """One summary of several seeds: means of the metrics, their spread beside them."""
    spread = {
        name: reporting.mean_and_std([s[name] for s in summaries])
        for name in summaries[0]
        if name.startswith(('train/', 'val/', 'test/'))
    }
    merged = summaries[0] | {name: values['mean'] for name, values in spread.items()}
    merged['seed'] = [s['seed'] for s in summaries]
    merged['over_seeds'] = spread
    if 'collapses' in merged:
        merged['collapses'] = [{'seed': s['seed'], **event} for s in summaries for event in s['collapses']]
    for name in ('chosen', 'checkpoint'):
        if name in merged:
            merged[name] = [s[name] for s in summaries]
    if summaries[0]['seconds'] is not None:
        merged['images_per_second'] = reporting.mean_and_std([s['images_per_second'] for s in summaries])['mean']
        merged['seconds'] = sum(s['seconds'] for s in summaries)
    return merged


# What the closing table calls a metric, whichever split it was measured on.
_ROWS = {
    'untrained_linear_top1': 'linear classifier on the untrained encoder',
    'linear_top1': 'linear classifier on the BYOL encoder',
    'untrained_fine_tuned_top1': 'fine-tuned from the untrained encoder',
    'fine_tuned_top1': 'fine-tuned from the BYOL encoder',
    'logistic_top1': 'logistic regression on the BYOL encoder',
    'knn_top1': 'nearest neighbours on the BYOL encoder',
    'online_top1': 'online classifier of the pre-training',
    'online_knn_top1': '20 nearest neighbours, while training',
}
_SPLITS = {'train': 'training', 'val': 'validation', 'test': 'test'}


def closing_words(summary: dict[str, Any], workdir: str) -> str:
    """The table at the end of a run, and below it what was chosen and which checkpoints were looked at."""
    over_seeds = summary.get('over_seeds', {})
    split = summary.get('split', summary['eval_split'])  # --mode=eval takes any.
    rows = {}
    for metric, row in _ROWS.items():
        if (name := f'{split}/{metric}') in summary:
            rows[row] = over_seeds[name]['values'] if over_seeds else [summary[name]]
    title = f'{summary["dataset"]}, {_SPLITS[split]} set'
    what = (
        reporting.accuracy_table(title, rows)
        if rows
        else (
            'Pre-trained without labels. To evaluate the encoder give --checkpoint and a folder with labels: '
            '--mode=linear_eval --config.dataset.root=DIR with DIR/train/CLASS/* and DIR/test/CLASS/*.'
        )
    )
    lines = []
    if chosen := summary.get('chosen'):
        lines.append(f'Chosen on held-out images: {reporting.choice_in_words(chosen, summary["seed"])}.')
    if found := summary.get('checkpoint'):
        lines.append('Checkpoint: ' + (found if isinstance(found, str) else ', '.join(found)))
    if lines:
        what = '\n'.join([what, '', *lines])
    start = 'report.html' if os.path.exists(os.path.join(workdir, 'report.html')) else 'summary.json'
    return f'\n{what}\n\nEverything is in {workdir}; start with {start}.'
