"""`--mode=knn` and `--mode=logistic`: protocols on the embeddings of a frozen encoder.

Both choose their settings on `config.dataset.val_fraction` of the training set and are reported once
on the evaluation set.
"""

from typing import Any

from absl import logging
import torch

from byol_func import reporting, runs
from byol_func.evaluation import knn, logistic
from byol_func.modes import common
from byol_func.runs import Run
from byol_func.utils import dataset, helpers


def run_knn(run: Run) -> dict[str, Any]:
    """Weighted k-nearest neighbours; k and temperature chosen on held-out data."""
    return _on_checkpoint(run, 'knn', knn_metrics)


def run_logistic(run: Run) -> dict[str, Any]:
    """Logistic regression by L-BFGS; its penalty chosen on held-out data."""
    return _on_checkpoint(run, 'logistic', logistic_metrics)


def _on_checkpoint(run: Run, mode: str, measure) -> dict[str, Any]:
    checkpoint = common.find_checkpoint(run, common.WITH_ENCODER)
    train, test = common.load_labelled_data(run)
    encoder = common.restore_encoder(run, train, checkpoint)
    train_features, test_features = (common.embed(run, split, *encoder) for split in (train, test))
    metrics, chosen = measure(run, train_features, test_features)
    logging.info('%s: best on held-out images: %s', mode, reporting.choice_in_words(chosen))
    summary = runs.summarize(run, mode, train, common.length_of(checkpoint), None, metrics)
    return {**summary, 'chosen': chosen, 'checkpoint': checkpoint.path}


def knn_metrics(run: Run, train: dataset.Dataset, test: dataset.Dataset):
    """The metrics of nearest neighbours on embeddings, and what was chosen."""
    result = knn.choose_and_predict(
        test.images, train.images, train.labels, common.held_out(run, train),
        num_classes=train.num_classes,
    )
    chosen = {'k': result.k, 'temperature': result.temperature, 'held_out_top1': result.held_out_top1}
    return _accuracies(run, 'knn', result.probabilities, test.labels), chosen


def logistic_metrics(run: Run, train: dataset.Dataset, test: dataset.Dataset):
    """The metrics of logistic regression on embeddings, and what was chosen."""
    result = logistic.choose_and_predict(
        test.images, train.images, train.labels, common.held_out(run, train),
        num_classes=train.num_classes,
    )
    chosen = {'penalty': result.penalty, 'held_out_top1': result.held_out_top1}
    return _accuracies(run, 'logistic', result.logits, test.labels), chosen


def _accuracies(run: Run, name: str, scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    hits = {k: helpers.topk_accuracy(scores, labels, topk=k).double().mean() for k in (1, 5)}
    return {f'{run.config.dataset.eval_split}/{name}_top{k}': float(share) for k, share in hits.items()}
