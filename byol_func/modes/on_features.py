"""`--mode=knn` and `--mode=logistic`: evaluation protocols on the embeddings of a frozen encoder.

Both choose their settings on `config.dataset.val_fraction` of the training set and are then evaluated once
on the evaluation set. Logistic regression is saved as a checkpoint, so that `--mode=predict` can use it.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from absl import logging
from ml_collections import ConfigDict

from byol_func import console
from byol_func.evaluation import knn, logistic, metrics
from byol_func.library import WITH_ENCODER
from byol_func.modes import checkpoints, drawing, inputs, sizes
from byol_func.runtime import collectives
from byol_func.utils import checkpointing, dataset, helpers
from byol_func.workdir import summaries
from byol_func.workdir.run import Run

# (config, train features, test features, mode) -> the fit, scores of the test set `[M, K]` and the chosen settings.
Measure = Callable[[ConfigDict, dataset.Features, dataset.Features, str], tuple[Any, torch.Tensor, dict[str, Any]]]
# (scores `[M, K]`, labels `[M]`, k) -> bool `[M]`, whether each label is among the top k.
Hits = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def run_knn(run: Run) -> dict[str, Any]:
    """Evaluates weighted k-nearest neighbours, with k and the temperature chosen on held-out data."""
    return _on_checkpoint(run, 'knn', _knn, knn.topk_accuracy)


def run_logistic(run: Run) -> dict[str, Any]:
    """Evaluates logistic regression fitted by L-BFGS, with the penalty chosen on held-out data."""
    return _on_checkpoint(run, 'logistic', _logistic, helpers.topk_accuracy)


def _on_checkpoint(run: Run, mode: str, measure: Measure, hits: Hits) -> dict[str, Any]:
    checkpoint = checkpoints.find_checkpoint(run, WITH_ENCODER)
    train, test = inputs.load_labelled_data(run)
    train = inputs.labelled_part(run.config, 'evaluation', train)
    logging.info('%s: %s', mode, dataset.describe(train))
    params, state = checkpoints.restore_encoder(run, train, checkpoint)
    sizes.check_encoder_memory(run, train, params, state)
    train_features, test_features = (inputs.embed(run.config, split, params, state) for split in (train, test))
    looked = inputs.look_at_embeddings(run.config, test, params, state, test_features)
    result, scores, chosen = measure(run.config, train_features, test_features, 'evaluation')
    logging.info('%s: best on held-out images: %s', mode, summaries.choice_in_words(chosen))
    labels = test_features.labels
    if isinstance(result, logistic.LogisticResult):
        _save(run, mode, (params, state), result.classifier(), train, checkpoint)
    drawing.draw_confusion(run, mode, lambda: metrics.confusion_matrix(scores, labels), test.class_names)
    prefix = f'fine_tuned_{mode}' if checkpoint.mode == 'fine_tune' else mode
    found = {
        f'{run.config.dataset.eval_split}/{prefix}_top{k}': float(hits(scores, labels, k).double().mean())
        for k in (1, 5)
    }
    summary = summaries.summarize(run, mode, train, checkpoints.length_of(checkpoint), None, found)
    return {**summary, **looked, 'chosen': chosen, 'checkpoint': checkpoint.path}


def _save(run: Run, mode: str, encoder, classifier, train: dataset.Examples, checkpoint) -> None:
    """Writes the encoder and the classifier as a checkpoint with the step of the pre-training."""
    if collectives.replica_index() == 0:
        backbone_params, backbone_state = encoder
        state = {
            'backbone_params': backbone_params,
            'backbone_state': backbone_state,
            'classif_params': {'classifier': classifier},
        }
        path = checkpointing.save(
            os.path.join(run.workdir, 'checkpoints'),
            state,
            mode=mode,
            step=checkpoint.step,
            config=run.plain_config(),
            class_names=train.class_names,
        )
        logging.info('%s: the classifier is in %s', mode, path)


def knn_scores(
    config: ConfigDict, train: dataset.Features, test: dataset.Features, mode: str = ''
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Returns the class scores of k-nearest neighbours, `[M, K]`, and the chosen settings.

    Args:
      config: the config of the run.
      train: N embeddings, or other features such as pixels.
      test: M embeddings or features of the same kind.
      mode: as for `inputs.held_out`.
    """
    return _knn(config, train, test, mode)[1:]


def logistic_scores(
    config: ConfigDict, train: dataset.Features, test: dataset.Features, mode: str = ''
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Returns the class scores of logistic regression, `[M, K]`, and the chosen settings; arguments as `knn_scores`."""
    return _logistic(config, train, test, mode)[1:]


def _knn(config: ConfigDict, train, test, mode: str) -> tuple[knn.KnnResult, torch.Tensor, dict[str, Any]]:
    result, found = _choose(knn.choose_and_predict, config, train, test, mode, 'Nearest neighbours', 'block')
    return result, result.probabilities, {'k': result.k, 'temperature': result.temperature, **found}


def _logistic(
    config: ConfigDict, train, test, mode: str
) -> tuple[logistic.LogisticResult, torch.Tensor, dict[str, Any]]:
    result, found = _choose(logistic.choose_and_predict, config, train, test, mode, 'Logistic regression', 'fit')
    return result, result.logits, {'penalty': result.penalty, **found}


def _choose(choose_and_predict, config: ConfigDict, train, test, mode: str, what: str, unit: str) -> tuple[Any, dict]:
    """Returns the result of a protocol, and the accuracy and number of the images on which it chose its settings."""
    mask = inputs.held_out(config, train, mode)
    result = choose_and_predict(
        test.embeddings,
        train.embeddings,
        train.labels,
        mask,
        num_classes=train.num_classes,
        watch=lambda items, total: console.watch(items, what, total, unit=unit),
    )
    return result, {'held_out_top1': result.held_out_top1, 'held_out_images': int(mask.sum())}
