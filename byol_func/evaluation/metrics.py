"""Metrics of a classifier: accuracies, precision and recall, confusion matrix, calibration error."""

from collections.abc import Sequence
from typing import Any

import torch

from byol_func.utils import helpers

CALIBRATION_BINS = 15


def expected_calibration_error(
    probabilities: torch.Tensor, labels: torch.Tensor, num_bins: int = CALIBRATION_BINS
) -> float:
    """Computes sum_b n_b / N |accuracy_b - confidence_b| over bins b of the largest probability.

    The bins have equal width and are open below and closed above: (0, 1/15], (1/15, 2/15], ...
    (Guo et al. 2017, arXiv 1706.04599, equation 3).

    Args:
      probabilities: `[N, K]`, rows that sum to 1.
      labels: int64 `[N]`.
      num_bins: number of bins.

    Returns:
      A number in 0..1.
    """
    confidences = probabilities.double().max(dim=1).values
    hits = helpers.topk_accuracy(probabilities, labels, topk=1).double()
    bins = ((confidences * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
    gaps = torch.zeros(num_bins, dtype=torch.float64, device=bins.device)
    gaps.index_add_(0, bins, hits - confidences)
    return float(gaps.abs().sum()) / len(labels)


def predictions(probabilities: torch.Tensor) -> torch.Tensor:
    """Returns the likeliest class, int64 `[N]`; the later class wins a tie, as in `helpers.topk_accuracy`."""
    return probabilities.shape[1] - 1 - probabilities.flip(1).argmax(dim=1)


def confusion_matrix(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Counts every pair of label and prediction: int64 `[K, K]`, rows are labels, columns predictions.

    Args:
      scores: class scores, `[N, K]`; the highest is the prediction.
      labels: int64 `[N]`.
    """
    num_classes = scores.shape[1]
    pairs = labels * num_classes + predictions(scores)
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def report(
    probabilities: torch.Tensor,
    labels: torch.Tensor,
    class_names: Sequence[str],
    scores: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Computes all metrics, as plain values for JSON.

    Args:
      probabilities: `[N, K]`, rows that sum to 1.
      labels: int64 `[N]`.
      class_names: K names.
      scores: scores that rank the classes, such as logits `[N, K]`; the probabilities by default.

    Returns:
      `top1`, `top5` and `calibration_error` in 0..1; `per_class`, a list of dicts with `name`,
      `precision` (0 for a class that was never predicted), `recall` (0 for a class without examples) and
      `examples`; `confusion_matrix`, counts with labels in rows and predictions in columns.
    """
    from sklearn import metrics  # Slow to import, and only needed for evaluations.

    scores = probabilities if scores is None else scores
    truth, predicted = labels.cpu().numpy(), predictions(scores).cpu().numpy()
    classes = range(len(class_names))
    precision, recall, _, examples = metrics.precision_recall_fscore_support(
        truth, predicted, labels=classes, zero_division=0.0
    )
    rows = zip(class_names, precision.tolist(), recall.tolist(), examples.tolist(), strict=True)
    topk = {k: helpers.topk_accuracy(scores, labels, topk=k).double().mean() for k in (1, 5)}
    return {
        'top1': float(topk[1]),
        'top5': float(topk[5]),
        'calibration_error': expected_calibration_error(probabilities, labels),
        'per_class': [dict(name=name, precision=p, recall=r, examples=n) for name, p, r, n in rows],
        'confusion_matrix': confusion_matrix(scores, labels).tolist(),
    }
