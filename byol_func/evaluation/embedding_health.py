"""Measures whether an encoder tells images apart, given the embeddings under evaluation, and describes the result.

The training panel of `evaluation.health` looks at one training batch. An encoder can be dead on other images, or
in evaluation mode, while that panel looks healthy; without these measures one would only see poor accuracies.
"""

from typing import NamedTuple

import torch

from byol_func.errors import counted
from byol_func.evaluation import health

MOST_IMAGES = 2000  # Enough for shares and ranks; more images would only take longer.
# A share above its limit, or a rank below its limit, means that something is wrong with the encoder or the images.
_MOST_ZERO, _MOST_REPEATED, _MOST_DEAD, _LEAST_RANK = 0.05, 0.2, 0.5, 2.0
_FEWEST_IMAGES = 10


class EmbeddingHealth(NamedTuple):
    """How well N embeddings of D features use their space."""

    images: int  # N
    features: int  # D
    zero_rows: float  # Share of embeddings that are zero in every feature, in 0..1.
    repeated_rows: float  # Share of embeddings that equal another one, in 0..1.
    effective_rank: float  # `health.effective_rank`, in 1..min(N, D).
    dead_features: int  # Number of features with the same value for all images, in 0..D.


def measure(embeddings: torch.Tensor) -> EmbeddingHealth:
    """Measures the embeddings `[N, D]` on at most `MOST_IMAGES` of them, evenly spaced."""
    step = -(-len(embeddings) // MOST_IMAGES)
    rows = embeddings[:: max(step, 1)].float().cpu()
    num_images = len(rows)
    _, counts = torch.unique(rows, dim=0, return_counts=True)
    return EmbeddingHealth(
        images=num_images,
        features=rows.shape[1],
        zero_rows=float((rows == 0).all(dim=1).double().mean()),
        repeated_rows=float(counts[counts > 1].sum()) / num_images,
        effective_rank=float(health.effective_rank(rows)),
        dead_features=int((rows == rows[:1]).all(dim=0).sum()) if num_images > 1 else 0,
    )


def in_words(found: EmbeddingHealth) -> str:
    """Returns one phrase that contains all the measurements."""
    most = min(found.images, found.features)
    words = [
        f'{counted(found.images, "embedding")} of {counted(found.features, "feature")}: '
        f'effective rank {found.effective_rank:.1f} of {most}'
    ]
    if found.dead_features:
        words.append(f'{counted(found.dead_features, "feature")} the same for all images')
    if found.zero_rows:
        words.append(f'{_percent(found.zero_rows)} all zeros')
    if found.repeated_rows:
        words.append(f'{_percent(found.repeated_rows)} equal to another')
    if len(words) == 1:
        words.append('every feature varies, and no embedding is zero or equal to another')
    return ', '.join(words)


def warnings(found: EmbeddingHealth) -> list[str]:
    """Returns one sentence per problem; empty for a healthy encoder and when there are too few images to tell."""
    if found.images < _FEWEST_IMAGES:
        return []
    said = []
    if found.zero_rows > _MOST_ZERO:
        said.append(
            f'{_percent(found.zero_rows)} of the embeddings are zero in all {counted(found.features, "feature")}.'
        )
    if found.repeated_rows > _MOST_REPEATED:
        said.append(f'{_percent(found.repeated_rows)} of the embeddings equal another one.')
    if found.dead_features > _MOST_DEAD * found.features:
        said.append(
            f'{found.dead_features} of {counted(found.features, "feature")} have the same value for all images.'
        )
    if not found.effective_rank >= min(_LEAST_RANK, found.features):  # Also true for NaN.
        said.append(f'The embeddings lie close to one line: effective rank {found.effective_rank:.2f}.')
    if said:
        said.append(
            'The encoder hardly tells images apart, so its accuracies mean little. Often it has too few features (a '
            'wider or deeper config.network), or was trained too briefly or without warm-up.'
        )
    return said


def _percent(share: float) -> str:
    return f'{100 * share:.3g} %'
