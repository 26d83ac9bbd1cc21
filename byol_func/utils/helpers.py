"""Utility functions. Namesake of the official `byol/utils/helpers.py`."""

import torch
from torch.nn import functional as F


def topk_accuracy(logits: torch.Tensor, labels: torch.Tensor, topk: int) -> torch.Tensor:
    """Returns whether the label is among the `topk` largest logits.

    A class is outranked by every larger logit and by an equal logit of a later class: the official
    code reverses a stable ascending sort, so the later class wins a tie. `torch.topk` does not specify the
    order of ties.

    Port of `helpers.topk_accuracy`; differences: there is no `ignore_label_above`, which nothing uses. With
    fewer than `topk` classes every prediction is correct, as in the official code.

    Args:
      logits: `[B, K]`.
      labels: `[B]`, integers in 0..K-1.
      topk: the number of top-ranked classes to consider.

    Returns:
      bool `[B]`.
    """
    own = logits.gather(1, labels[:, None])
    later = torch.arange(logits.shape[1], device=logits.device) > labels[:, None]
    outranked_by = (logits > own) | ((logits == own) & later)
    return outranked_by.sum(dim=1) < topk


def softmax_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, reduction: str | None = 'mean') -> torch.Tensor:
    """Computes the cross entropy -sum_k labels_k log softmax(logits)_k.

    Port of `helpers.softmax_cross_entropy`; differences: none.

    Args:
      logits: `[B, K]`.
      labels: `[B, K]`, one-hot or any distribution.
      reduction: 'mean' or 'sum' over the batch, 'none' or None for `[B]`.

    Raises:
      ValueError: `reduction` has any other value.
    """
    loss = -(labels * F.log_softmax(logits, dim=-1)).sum(dim=-1)
    if reduction == 'mean':
        return loss.mean()
    if reduction == 'sum':
        return loss.sum()
    if reduction in ('none', None):
        return loss
    raise ValueError(f"reduction={reduction!r}: expected 'mean', 'sum', 'none' or None")


def one_hot(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Encodes integer labels `[B]` as float32 `[B, K]`; a label outside 0..K-1 gives a row of zeros, as in JAX."""
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()


def l2_normalize(x: torch.Tensor, axis: int | None = None, epsilon: float = 1e-12) -> torch.Tensor:
    """Returns x / sqrt(max(sum x^2, epsilon)), with the sum over `axis` or over the whole tensor.

    Port of `helpers.l2_normalize`; differences: none. `epsilon` bounds the *squared* norm.
    """
    axes = tuple(range(x.ndim)) if axis is None else axis
    square_sum = x.square().sum(dim=axes, keepdim=True)
    return x * torch.rsqrt(square_sum.clamp_min(epsilon))


def regression_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Computes BYOL's regression loss |x/|x| - y/|y||^2 = 2 - 2 cos(x, y), in 0..4 (equation 2 of the paper).

    Port of `helpers.regression_loss`; differences: none.

    Args:
      x: predictions `[B, D]`.
      y: projections `[B, D]`.

    Returns:
      The loss of each example, `[B]`.
    """
    return (l2_normalize(x, axis=-1) - l2_normalize(y, axis=-1)).square().sum(dim=-1)
