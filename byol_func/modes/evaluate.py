"""`--mode=eval`: the classifier of a checkpoint on any split, nothing trained.

It writes, for the split SPLIT (train, val or test):

- `eval.SPLIT.json`: `split`, `checkpoint`, `top1`, `top5`, `loss`, `calibration_error`, `per_class`
  (a list of `name`, `precision`, `recall`, `examples`) and `confusion_matrix` (rows are labels,
  columns predictions, counts);
- `predictions.SPLIT.npz`: `index` int64 `[N]`, `label` int64 `[N]`, `prediction` int64 `[N]`,
  `probabilities` float32 `[N, K]`, `class_names` `[K]`; nothing in it is pickled;
- `confusion_matrix.png`, unless `config.pictures` is False.
"""

from typing import Any, NamedTuple

import numpy as np
import tabulate
import torch

from byol_func import eval_experiment, reporting, runs
from byol_func.evaluation import metrics
from byol_func.experiment import Experiment
from byol_func.modes import common, drawing
from byol_func.runs import Run
from byol_func.runtime import collectives
from byol_func.utils import checkpointing, dataset, helpers

# What a checkpoint's classifier is called, by the mode that trained it.
_NAMES = {'pretrain': 'online', 'linear_eval': 'linear', 'fine_tune': 'fine_tuned'}
# With more classes the table shows those of the lowest recall.
_MAX_ROWS = 20


class _Classifier(NamedTuple):
    experiment: Experiment
    state: Any
    checkpoint: checkpointing.Checkpoint


def evaluate(run: Run) -> dict[str, Any]:
    """The classifier of any checkpoint on a split: table, JSON and predictions."""
    checkpoint = common.find_checkpoint(run, ('fine_tune', 'linear_eval', 'pretrain'))
    split = common.split_of(run)
    train, data = common.load_split(run, split)
    classifier = _restore(run, train, checkpoint)
    logits = _logits(classifier, data, run.config.evaluation.batch_size)
    labels = data.labels.to(logits.device)
    one_hot = helpers.one_hot(labels, data.num_classes)
    loss = helpers.softmax_cross_entropy(logits, one_hot, reduction='none').double().mean()
    probabilities = torch.softmax(logits.double(), dim=1)
    # Ranks are those of the logits: far apart, their probabilities may be equal.
    report = metrics.report(probabilities, labels, data.class_names, scores=logits)
    report = {'split': split, 'checkpoint': checkpoint.path, 'loss': float(loss), **report}
    if collectives.replica_index() == 0:
        reporting.write_json(f'{run.workdir}/eval.{split}.json', report)
        reporting.write_npz(
            f'{run.workdir}/predictions.{split}.npz',
            index=np.arange(data.num_examples),
            label=data.labels.cpu().numpy(),
            prediction=metrics.predictions(logits).cpu().numpy(),
            probabilities=probabilities.float().cpu().numpy(),
            class_names=np.array(data.class_names),
        )
        print(_table(report))
    drawing.draw_confusion(
        run, report['confusion_matrix'], data.class_names,
        f'{_NAMES[checkpoint.mode].replace("_", "-")} classifier, {split} set')
    name = f'{split}/{_NAMES[checkpoint.mode]}'
    found = {f'{name}_top1': report['top1'], f'{name}_top5': report['top5'], f'{name}_loss': report['loss']}
    summary = runs.summarize(run, 'eval', train, classifier.experiment, None, found)
    return {
        **summary, 'split': split, 'calibration_error': report['calibration_error'],
        'checkpoint': checkpoint.path, 'steps': checkpoint.step + 1,
    }


def _restore(run: Run, train: dataset.Dataset, checkpoint: checkpointing.Checkpoint) -> _Classifier:
    common.check_classes(checkpoint, train)
    if checkpoint.mode == 'pretrain':
        experiment = common.make_byol(run, train)
    else:
        encoder = common.make_backbone(run, train).init(torch.Generator())
        experiment = eval_experiment.make(
            run.config, checkpoint.mode, *encoder, **common.facts(train, train.image_shape)
        )
    state = checkpointing.restore(checkpoint, experiment.init())
    return _Classifier(experiment, common.to_device(state, run.device), checkpoint)


def _logits(classifier: _Classifier, data: dataset.Dataset, batch_size: int) -> torch.Tensor:
    """float32 `[N, K]`."""
    with torch.no_grad():
        return torch.cat([
            classifier.experiment.predict(classifier.state, batch)
            for batch in dataset.eval_batches(data, batch_size)
        ]).float()


def _table(report: dict[str, Any]) -> str:
    """Precision and recall by class, and the numbers of the whole split, in percent."""
    classes = report['per_class']
    shown = sorted(classes, key=lambda row: row['recall'])[:_MAX_ROWS] if len(classes) > _MAX_ROWS else classes
    rows = [
        [row['name'], f'{100 * row["precision"]:.2f}', f'{100 * row["recall"]:.2f}', row['examples']]
        for row in shown
    ]
    headers = [f'class, {report["split"]} set', 'precision %', 'recall %', 'images']
    table = tabulate.tabulate(
        rows, headers, disable_numparse=True, colalign=('left', 'right', 'right', 'right')
    )
    left_out = len(classes) - len(shown)
    more = f'\n{left_out} classes of higher recall are in eval.{report["split"]}.json.' if left_out else ''
    return (
        f'\n{table}{more}\n\n'
        f'top-1 {100 * report["top1"]:.2f} %, top-5 {100 * report["top5"]:.2f} %, loss {report["loss"]:.4f}, '
        f'expected calibration error {100 * report["calibration_error"]:.2f} %'
    )
