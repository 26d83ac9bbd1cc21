"""Finds the images of a set that deserve a look: the nearest pairs, which may be duplicates, and the outliers."""

from typing import NamedTuple

import torch

from byol_func.evaluation import knn

MOST_IMAGES = 50_000  # The search compares all pairs; of a larger set it takes every n-th image.
_NEIGHBOURS = 5


class OddImages(NamedTuple):
    """Rows of the embeddings, and how similar they are to others."""

    pairs: torch.Tensor  # int64 [P, 2], nearest first; no image is in two pairs
    pair_cosines: torch.Tensor  # float64 [P]
    outliers: torch.Tensor  # int64 [O], the most isolated first
    outlier_cosines: torch.Tensor  # float64 [O], the mean cosine to the nearest neighbours


def find(embeddings: torch.Tensor, num_pairs: int, num_outliers: int) -> OddImages:
    """Finds the nearest pairs and the images whose five nearest neighbours are the farthest on average.

    Args:
      embeddings: float `[N, D]` with at least 2 rows; near means a large cosine.
      num_pairs: at most this many pairs are returned. They are chosen greedily: an image that looks like several others
        is paired with the nearest one that is not yet in a pair.
      num_outliers: at most this many outliers are returned.
    """
    rows = torch.arange(0, len(embeddings), -(-len(embeddings) // MOST_IMAGES))
    searched = embeddings[rows.to(embeddings.device)]
    found = knn.find_neighbours(searched, searched, min(_NEIGHBOURS + 1, len(rows)))
    indices, cosines = found.indices.cpu(), found.similarities.cpu()
    is_self = indices == torch.arange(len(rows))[:, None]
    # Among many equal images, an image may not be among its own nearest ones.
    is_self[~is_self.any(dim=1), -1] = True
    others = indices[~is_self].view(len(rows), -1)
    cosines = cosines[~is_self].view(len(rows), -1)

    density = cosines.mean(dim=1)
    outliers = density.sort(stable=True).indices[:num_outliers]
    pairs: list[list[int]] = []
    pair_cosines: list[float] = []
    taken: set[int] = set()
    for position in cosines.flatten().sort(descending=True, stable=True).indices.tolist():
        first, column = divmod(position, others.shape[1])
        second = int(others[first, column])
        if len(pairs) == num_pairs:
            break
        if first not in taken and second not in taken:
            taken |= {first, second}
            pairs.append(sorted((first, second)))
            pair_cosines.append(float(cosines[first, column]))
    return OddImages(
        rows[torch.tensor(pairs, dtype=torch.int64).view(-1, 2)],
        torch.tensor(pair_cosines, dtype=torch.float64),
        rows[outliers],
        density[outliers],
    )
