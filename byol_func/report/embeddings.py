"""Draws embeddings: a map (t-SNE) and the nearest neighbours of some images."""

import os
import time
from collections.abc import Sequence

import numpy as np
import torch
from absl import logging

from byol_func.errors import counted
from byol_func.report import plots
from byol_func.runtime import prng

_ROWS, _NEIGHBOURS = 8, 8
_MAX_POINTS = 2000  # Images in a map; more would make it slower but no clearer.


def choose(num_examples: int, most: int = _MAX_POINTS) -> torch.Tensor:
    """Chooses the images to draw, always the same ones: at most `most` int64 indices in ascending order."""
    chosen = torch.randperm(num_examples, generator=prng.fold_in(0, 'pictures'))[:most]
    return chosen.sort().values


def nearest_images(embeddings: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    """Returns indices `[Q, 1 + count]`: each query, then the images with the greatest cosine to it, greatest first.

    The embeddings are float `[N, D]`, the queries int `[Q]` in 0..N-1; `count` is less than N.
    """
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    similar = unit[queries] @ unit.T
    similar[np.arange(len(queries)), queries] = np.inf  # The query itself comes first.
    return np.argsort(-similar, axis=1, kind='stable')[:, : count + 1]


def draw_embeddings(
    workdir: str | os.PathLike,
    embeddings: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray | None,
    class_names: Sequence[str],
    title: str,
    suffix: str = '',
    paths: Sequence[str] = (),
) -> None:
    """Draws `embedding_map.png` (t-SNE) and `neighbours.png` (nearest by cosine among the given images).

    The embeddings are float32 `[N, D]`, for at most a few thousand images; with fewer than 3 nothing is drawn. The
    images are uint8 `[N, C, H, W]`. Without labels, nothing is said about classes. `suffix` belongs to both file names.
    `paths` are those of the image files, if there are any.
    """
    import sklearn.manifold

    start = time.monotonic()
    num_images = len(embeddings)
    if num_images < 3:
        return
    names = list(class_names) if labels is not None else []
    labels = np.zeros(num_images, int) if labels is None else labels
    logging.info('t-SNE of %s', counted(num_images, 'embedding'))
    tsne = sklearn.manifold.TSNE(init='pca', random_state=0, perplexity=min(30.0, (num_images - 1) / 3), max_iter=500)
    points = tsne.fit_transform(embeddings)
    plots.embedding_map(
        os.path.join(workdir, f'embedding_map{suffix}.png'),
        points,
        labels,
        names,
        f'Embeddings of {counted(num_images, "image")} (t-SNE)\n{title}',
    )
    queries = np.random.default_rng(0).choice(num_images, min(_ROWS, num_images), replace=False)
    nearest = nearest_images(embeddings, queries, min(_NEIGHBOURS, num_images - 1))
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    pixels = images.transpose(0, 2, 3, 1)
    plots.neighbours(
        os.path.join(workdir, f'neighbours{suffix}.png'),
        [[pixels[i] for i in row] for row in nearest],
        [(unit[row] @ unit[row[0]]).tolist() for row in nearest],
        [[names[labels[i]] for i in row] for row in nearest] if names else None,
        f'Nearest neighbours among {counted(num_images, "image")} (by the cosine of their embeddings)\n{title}',
        [[paths[i] for i in row] for row in nearest] if paths else (),
    )
    logging.info('Map and neighbours: %.1f s', time.monotonic() - start)
