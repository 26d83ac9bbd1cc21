"""Logistic regression on embeddings by L-BFGS: a linear classifier that needs no learning rate.

The features are standardised with the mean and standard deviation of the training set, so that one grid
of penalties fits every encoder. The minimum is that of scikit-learn's `LogisticRegression` on the
standardised features with C = 1 / (N * penalty); only the solver differs.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from byol_func.utils import helpers

# From strong to weak, three per two decades.
PENALTIES = tuple(10.0 ** (-exponent / 1.5) for exponent in range(0, 10))


class Standard(NamedTuple):
    """Mean and inverse standard deviation of every feature, `[D]` each."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Returns (features - mean) * scale, `[N, D]`."""
        return (features.float() - self.mean) * self.scale


class LogisticResult(NamedTuple):
    """The penalty chosen on held-out data, the fit with it, and its predictions on the test set."""

    penalty: float
    held_out_top1: float  # in 0..1
    w: torch.Tensor  # float32 [D, K], for standardised features
    b: torch.Tensor  # float32 [K]
    logits: torch.Tensor  # float32 [M, K], of the test set
    standard: Standard  # that of the whole training set

    def classifier(self) -> dict[str, torch.Tensor]:
        """Returns the same fit as a linear layer on the features as they are, `w` `[D, K]` and `b` `[K]`."""
        w = self.w * self.standard.scale[:, None]
        return {'w': w, 'b': self.b - self.standard.mean @ w}


def standardise(features: torch.Tensor) -> Standard:
    """Computes the statistics of the features `[N, D]`; the scale of a constant feature is 0."""
    mean = features.double().mean(dim=0)
    std = features.double().std(dim=0, correction=0)
    scale = torch.where(std > 1e-6 * mean.abs().clamp_min(1e-12), 1.0 / std, torch.zeros_like(std))
    return Standard(mean.float(), scale.float())


def fit(
    features: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_classes: int,
    penalty: float,
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
    max_iterations: int = 200,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimises mean cross entropy + penalty / 2 * |w|^2 by L-BFGS with strong Wolfe steps.

    Args:
      features: standardised, `[N, D]`, float32 or float64.
      labels: int64 `[N]`.
      num_classes: K.
      penalty: above 0; it does not apply to the bias.
      start: initial w and b, zeros by default.
      max_iterations: limit on the iterations of L-BFGS.

    Returns:
      w `[D, K]` and b `[K]`.
    """
    w, b = start or (features.new_zeros(features.shape[1], num_classes), features.new_zeros(num_classes))
    w, b = w.clone().requires_grad_(), b.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [w, b],
        max_iter=max_iterations,
        history_size=10,
        line_search_fn='strong_wolfe',
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ w + b, labels) + 0.5 * penalty * w.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return w.detach(), b.detach()


def choose_and_predict(
    features: torch.Tensor,
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    held_out: torch.Tensor,
    *,
    num_classes: int,
    penalties: Sequence[float] = PENALTIES,
    watch: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> LogisticResult:
    """Chooses the penalty on a held-out part of the training set, then fits all of it and predicts.

    Each fit starts from the result for the next stronger penalty.

    Args:
      features: the test set, `[M, D]`.
      train_features: `[N, D]`.
      train_labels: int64 `[N]`.
      held_out: bool `[N]`, marks the held-out part.
      num_classes: K.
      penalties: penalties to choose from; if accuracies tie, the stronger wins.
      watch: yields the fits to do unchanged, and may report progress.
    """
    standard = standardise(train_features[~held_out])
    part, part_labels = standard(train_features[~held_out]), train_labels[~held_out]
    rest, rest_labels = standard(train_features[held_out]), train_labels[held_out]
    scores, fits, start = {}, {}, None
    last = None  # Stands for the final fit: the best penalty on the whole training set.
    for penalty in watch([*sorted(penalties, reverse=True), last], len(penalties) + 1):
        if penalty is not last:
            start = fit(part, part_labels, num_classes=num_classes, penalty=penalty, start=start)
            fits[penalty] = start
            hits = helpers.topk_accuracy(rest @ start[0] + start[1], rest_labels, topk=1)
            scores[penalty] = float(hits.double().mean())
            continue
        best = max(scores, key=lambda penalty: scores[penalty])
        standard = standardise(train_features)
        w, b = fit(
            standard(train_features),
            train_labels,
            num_classes=num_classes,
            penalty=best,
            start=fits[best],
        )
    return LogisticResult(best, scores[best], w, b, standard(features) @ w + b, standard)
