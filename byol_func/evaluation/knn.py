"""k-nearest-neighbour classification of embeddings, which needs no training.

Similarities are cosines in float64, rounded to multiples of 2^-40 for the order; ties are broken by the
neighbour's index. The result therefore depends neither on the block size nor on the number of threads,
and equals that of a plain loop over all pairs, even if examples are duplicates or the encoder has collapsed.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from byol_func.utils import helpers

KS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.02, 0.05, 0.07, 0.1, 0.2, 0.5)

_BLOCK = 16384  # Training examples per block.
_QUERIES = 512  # Queries per block.
_STEPS = 2**40  # Cosines are compared as integer multiples of 1 / _STEPS.


Watch = Callable[[Iterable, int], Iterable]  # Maps work items and their number to the same items.


class Neighbours(NamedTuple):
    """The k nearest neighbours of each of M queries, nearest first."""

    similarities: torch.Tensor  # float64 [M, k], cosines
    indices: torch.Tensor  # int64 [M, k], into the training examples


class KnnResult(NamedTuple):
    """The settings chosen on held-out data, and their predictions on the test set."""

    k: int
    temperature: float
    held_out_top1: float  # in 0..1
    probabilities: torch.Tensor  # float64 [M, K], of the test set


def _unwatched(items: Iterable, total: int) -> Iterable:
    del total
    return items


def find_neighbours(
    features: torch.Tensor, train_features: torch.Tensor, k: int, watch: Watch = _unwatched
) -> Neighbours:
    """Finds the nearest training examples by cosine; among equally near ones the earlier comes first.

    Args:
      features: the queries, `[M, D]`.
      train_features: `[N, D]`.
      k: number of neighbours; all N if there are fewer.
      watch: yields the blocks of the search unchanged, and may report progress.
    """
    queries = helpers.l2_normalize(features.double(), axis=-1).split(_QUERIES)
    best: list[Neighbours | None] = [None] * len(queries)
    starts = range(0, len(train_features), _BLOCK)

    def blocks() -> Iterator[tuple[int, torch.Tensor, int, torch.Tensor]]:
        for start in starts:
            block = train_features[start : start + _BLOCK].double()
            block = helpers.l2_normalize(block, axis=-1).T
            for i, query in enumerate(queries):
                yield start, block, i, query

    for start, block, i, query in watch(blocks(), len(starts) * len(queries)):
        found = _nearest(query @ block, k)
        found = found._replace(indices=found.indices + start)
        best[i] = found if best[i] is None else _merge(best[i], found, k)
    return Neighbours(*(torch.cat(parts) for parts in zip(*best, strict=True)))


def _nearest(similarities: torch.Tensor, k: int) -> Neighbours:
    """Returns the k largest values of each row of `[M, N]`."""
    num = similarities.shape[1]
    if k >= num:
        indices = torch.arange(num, device=similarities.device).expand_as(similarities)
        return _ordered(Neighbours(similarities, indices))
    values, indices = similarities.topk(k + 1)  # topk orders equal values arbitrarily.
    indices = indices[:, :k].contiguous()
    levels = _levels(values)
    unclear = (levels[:, k - 1] == levels[:, k]).nonzero()[:, 0]
    if len(unclear):  # Unique keys: sorted by level, then by index.
        keys = _levels(similarities[unclear]) * _BLOCK - torch.arange(num, device=similarities.device)
        indices[unclear] = keys.topk(k).indices
    indices = indices.sort(dim=1).values
    return _ordered(Neighbours(similarities.gather(1, indices), indices))


def _levels(similarities: torch.Tensor) -> torch.Tensor:
    return (similarities * _STEPS).round().long()


def _ordered(found: Neighbours) -> Neighbours:
    """Sorts neighbours, nearest first; equally near ones keep their order."""
    order = _levels(found.similarities).sort(dim=1, descending=True, stable=True).indices
    return Neighbours(*(part.gather(1, order) for part in found))


def _merge(earlier: Neighbours, later: Neighbours, k: int) -> Neighbours:
    both = Neighbours(*(torch.cat(parts, dim=1) for parts in zip(earlier, later, strict=True)))
    return Neighbours(*(part[:, :k] for part in _ordered(both)))


def vote(
    neighbours: Neighbours,
    train_labels: torch.Tensor,
    *,
    num_classes: int,
    k: int,
    temperature: float,
) -> torch.Tensor:
    """Computes class probabilities from the weighted votes of the k nearest neighbours.

    P(c) = sum_i exp(cos_i / temperature) [label_i = c] / sum_i exp(cos_i / temperature), summed over the
    k nearest (Wu et al. 2018, arXiv 1805.01978, section 3.4).

    Args:
      neighbours: at least k neighbours of each of M queries, or all that exist.
      train_labels: int64 `[N]`.
      num_classes: K.
      k: number of neighbours that vote.
      temperature: above 0; the smaller it is, the more weight the nearest neighbours get.

    Returns:
      float64 `[M, K]`.
    """
    similarities, indices = (part[:, :k] for part in neighbours)
    weights = ((similarities - similarities[:, :1]) / temperature).exp()  # The nearest has weight 1.
    votes = weights.new_zeros(len(weights), num_classes)
    votes.scatter_add_(1, train_labels[indices], weights)
    return votes / votes.sum(dim=1, keepdim=True)


def predict(
    features: torch.Tensor,
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    *,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.07,
    watch: Watch = _unwatched,
) -> torch.Tensor:
    """Returns the class probabilities by k-nearest neighbours, float64 `[M, K]`; see `find_neighbours` and `vote`."""
    found = find_neighbours(features, train_features, k, watch)
    return vote(found, train_labels, num_classes=num_classes, k=k, temperature=temperature)


def accuracy(
    features: torch.Tensor,
    labels: torch.Tensor,
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    **settings: Any,
) -> float:
    """Returns the top-1 accuracy of `predict` in 0..1; takes its arguments and the queries' labels, int64 `[M]`."""
    return _top1(predict(features, train_features, train_labels, **settings), labels)


def topk_accuracy(probabilities: torch.Tensor, labels: torch.Tensor, topk: int) -> torch.Tensor:
    """Tells whether the label is among the `topk` likeliest classes, not counting classes without a vote.

    With one neighbour there is one candidate, so top-5 equals top-1. The later class wins a tie among
    classes with votes, as in `helpers.topk_accuracy`.

    Args:
      probabilities: `[M, K]`, as returned by `predict`.
      labels: int64 `[M]`.
      topk: how many classes count.

    Returns:
      bool `[M]`.
    """
    has_votes = probabilities.gather(1, labels[:, None])[:, 0] > 0
    return helpers.topk_accuracy(probabilities, labels, topk) & has_votes


def _top1(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    return float(helpers.topk_accuracy(probabilities, labels, topk=1).double().mean())


def choose_and_predict(
    features: torch.Tensor,
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    held_out: torch.Tensor,
    *,
    num_classes: int,
    ks: Sequence[int] = KS,
    temperatures: Sequence[float] = TEMPERATURES,
    watch: Watch = _unwatched,
) -> KnnResult:
    """Chooses k and the temperature on a held-out part of the training set, then predicts with all of it.

    Args:
      features: the test set, `[M, D]`.
      train_features: `[N, D]`.
      train_labels: int64 `[N]`.
      held_out: bool `[N]`, marks the held-out part.
      num_classes: K.
      ks: numbers of neighbours to choose from; numbers above N count as N.
      temperatures: temperatures to choose from. If accuracies tie, the earlier k and temperature win.
      watch: as in `find_neighbours`.
    """
    found = find_neighbours(train_features[held_out], train_features[~held_out], max(ks), watch)
    scores = {}
    for k, temperature in itertools.product(ks, temperatures):
        votes = vote(found, train_labels[~held_out], num_classes=num_classes, k=k, temperature=temperature)
        scores[k, temperature] = _top1(votes, train_labels[held_out])
    k, temperature = max(scores, key=lambda settings: scores[settings])
    probabilities = predict(
        features, train_features, train_labels, num_classes=num_classes, k=k, temperature=temperature, watch=watch
    )
    return KnnResult(k, temperature, scores[k, temperature], probabilities)
