"""`--mode=eval`: evaluates the classifier of a checkpoint on any split, without training.

The mode writes these files for the split SPLIT (train, val or test):

- `eval.SPLIT.json`: `split`, `checkpoint`, `top1`, `top5`, `loss`, `calibration_error`, `per_class`
  (a list of `name`, `precision`, `recall`, `examples`) and `confusion_matrix` (rows are labels,
  columns are predictions, entries are counts); for val also `seen_in_training`, which is False, or None
  if the checkpoint has no record of its data;
- `predictions.SPLIT.npz`: `index` int64 `[N]` and, for folders, `path` `[N]` as in
  `embeddings.SPLIT.npz` (modes/embed.py), `label` int64 `[N]`, `prediction` int64 `[N]`,
  `probabilities` float32 `[N, K]`, `class_names` `[K]`; nothing is pickled;
- `confusion_matrix.CLASSIFIER.SPLIT.png`, unless `config.pictures` is False.
"""

from typing import Any

import numpy as np
import tabulate
import torch

from byol_func import eval_experiment, library
from byol_func.errors import counted
from byol_func.evaluation import features, metrics
from byol_func.modes import checkpoints, drawing, inputs, sizes
from byol_func.runtime import collectives, transfer
from byol_func.utils import augmentations, checkpointing, dataset, helpers
from byol_func.workdir import files, summaries
from byol_func.workdir.run import Run

# With more classes than this, the table shows the ones with the lowest recall.
_MAX_ROWS = 20


def evaluate(run: Run) -> dict[str, Any]:
    """Evaluates the classifier of a checkpoint on a split; prints a table and writes the files listed above."""
    checkpoint = checkpoints.find_checkpoint(run, library.WITH_CLASSIFIER)
    split = inputs.split_of(run)
    held_out = {'seen_in_training': checkpoints.check_held_out(run.config, checkpoint)} if split == 'val' else {}
    train, data = inputs.load_split(run, split)
    assert data is not None  # Labelled data always has the split.
    encoder = checkpoints.restore_encoder(run, data, checkpoint)
    sizes.check_encoder_memory(run, data, *encoder)
    looked = inputs.look_at_embeddings(run.config, data, *encoder)
    logits, data = _logits(run, checkpoint, data, *encoder)
    labels = data.labels.to(logits.device)
    one_hot = helpers.one_hot(labels, data.num_classes)
    loss = helpers.softmax_cross_entropy(logits, one_hot, reduction='none').double().mean()
    probabilities = torch.softmax(logits.double(), dim=1)
    # The ranks come from the logits: different logits can round to equal probabilities.
    report = metrics.report(probabilities, labels, data.class_names, scores=logits)
    report = {'split': split, 'checkpoint': checkpoint.path, **held_out, 'loss': float(loss), **report}
    if collectives.replica_index() == 0:
        files.write_json(f'{run.workdir}/eval.{split}.json', report)
        files.write_npz(
            f'{run.workdir}/predictions.{split}.npz',
            **inputs.where_from(data),
            label=data.labels.cpu().numpy(),
            prediction=metrics.predictions(logits).cpu().numpy(),
            probabilities=probabilities.float().cpu().numpy(),
            class_names=np.array(data.class_names),
        )
        print(_table(report))
    classifier = summaries.CLASSIFIER_OF_MODE[checkpoint.mode]
    drawing.draw_confusion(run, classifier, lambda: torch.tensor(report['confusion_matrix']), data.class_names, split)
    name = f'{split}/{classifier}'
    found = {
        f'{name}_top1': report['top1'],
        f'{name}_top5': report['top5'],
        f'{name}_loss': report['loss'],
        f'{split}/calibration_error': report['calibration_error'],
    }
    summary = summaries.summarize(run, 'eval', train, checkpoints.length_of(checkpoint), None, found)
    return {**summary, **looked, 'split': split, **held_out, 'checkpoint': checkpoint.path}


def _logits(
    run: Run, checkpoint: checkpointing.Checkpoint, data: dataset.Examples, params: Any, state: Any
) -> tuple[torch.Tensor, dataset.Examples]:
    """Returns the logits, float32 `[N, K]`, and the N examples they belong to.

    `params` and `state` are those of the encoder; replicas share the work. For a stream, the
    examples exclude those that cannot be read.
    """
    checkpoints.check_classes(checkpoint, data)
    backbone = inputs.make_backbone(run.config, data)
    classifier = eval_experiment.make_classifier(backbone.output_size, data.num_classes)
    prefix = 'online_params/' if checkpoint.mode == 'pretrain' else 'classif_params/'
    weights = checkpointing.restore(checkpoint, classifier.init(torch.Generator())[0], prefix=prefix)
    weights = transfer.place(weights, run.device)

    def apply(params, state, images, is_training):
        embeddings, _ = backbone.apply(params, state, images, is_training=is_training)
        return classifier.apply(weights, {}, embeddings, is_training=is_training)

    found = features.extract(
        backbone._replace(apply=apply, output_size=data.num_classes),
        params,
        state,
        data,
        preprocess=lambda batch: augmentations.center_view(batch, run.config.image_size, run.config.eval_crop_fraction),
        batch_size=run.config.evaluation.batch_size,
        shared=True,
    )
    return found.embeddings, found


def _table(report: dict[str, Any]) -> str:
    """Returns a table of precision and recall per class, followed by the metrics of the whole split, in percent."""
    classes = report['per_class']
    shown = sorted(classes, key=lambda row: row['recall'])[:_MAX_ROWS] if len(classes) > _MAX_ROWS else classes
    rows = [
        [row['name'], f'{100 * row["precision"]:.2f}', f'{100 * row["recall"]:.2f}', row['examples']] for row in shown
    ]
    headers = [f'class, {report["split"]} set', 'precision %', 'recall %', 'images']
    table = tabulate.tabulate(rows, headers, disable_numparse=True, colalign=('left', 'right', 'right', 'right'))
    left_out = len(classes) - len(shown)
    more = (
        f'\nIn eval.{report["split"]}.json: {counted(left_out, "more class")}, with higher recall.' if left_out else ''
    )
    top5 = f'top-5 {100 * report["top5"]:.2f} %, ' if len(classes) > 5 else ''  # With 5 classes top-5 is always 100 %.
    return (
        f'\n{table}{more}\n\n'
        f'top-1 {100 * report["top1"]:.2f} %, {top5}loss {report["loss"]:.4f}, '
        f'expected calibration error {100 * report["calibration_error"]:.2f} %'
    )
