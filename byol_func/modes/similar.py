"""`--mode=similar`: finds the images of the data set that look most like those in --images.

The images in --images may come from anywhere and need no labels; they are compared with all images of the run, its
training set and its evaluation set, or with the split in --split. Similar means a large cosine of the embeddings.

The table, by default `similar.csv`, has up to 100 rows for each image in --images, the most similar first: `image`,
its path below --images; `rank`, from 1; `path`, the similar image, relative to `config.dataset.root` (split and index
if the data set has no files); `cosine`, in -1..1. An image that is itself one of the data set is not listed as similar
to itself. Unless `config.pictures` is False, `similar.png` shows the first images and the eight most similar to each.
"""

import csv
import io
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from byol_func import console, library
from byol_func.errors import UserError, counted
from byol_func.evaluation import knn
from byol_func.modes import checkpoints, drawing, given, inputs, sizes
from byol_func.report import curves, plots
from byol_func.runtime import collectives
from byol_func.utils import checkpointing, dataset
from byol_func.workdir import files
from byol_func.workdir.run import Run

_LISTED, _SHOWN = 100, 8  # Similar images of each image in the table, and in the picture.
_ROWS = 16  # Images of --images in the picture.


class _Part(NamedTuple):
    """A split that is searched, with the embeddings of its images."""

    split: str
    data: dataset.Examples
    features: dataset.Features


class _Found(NamedTuple):
    """What is similar to one image, the nearest first; indices count through the parts, one after the other."""

    query: str
    indices: list[int]
    cosines: list[float]


def _picture(table: str) -> str:
    return f'{table.removesuffix(".csv")}.png'


def similar(run: Run) -> None:
    """Writes the images of the data set that are most similar to each image in --images.

    Raises:
      UserError: there are no images to compare, or no encoder to compare them with.
    """
    table = run.output or os.path.join(run.workdir, 'similar.csv')
    if not table.endswith('.csv'):
        raise UserError(f'--output={table}: expected a name that ends in .csv; the picture is written beside it')
    if run.output:
        for output in (table, _picture(table)):
            given.check_output(output, 'file')
    paths = given.find(run, 'similar', 'compare')
    checkpoint = checkpoints.find_checkpoint(run, library.WITH_ENCODER)
    encoder = library.encoder_of(checkpoint, run.device)
    queries: list[str] = []
    embeddings: list[torch.Tensor] = []
    shown: list[np.ndarray] = []
    for names, views in given.views(run, encoder, paths, 'Reading'):
        queries += names
        embeddings.append(encoder(views))
        if len(shown) < _ROWS:
            shown += list(drawing.reduced(views[: _ROWS - len(shown)]).permute(0, 2, 3, 1).numpy())
    parts = _parts(run, checkpoint)
    if collectives.replica_index() > 0:
        return
    found, names_of = _search(parts, queries, torch.cat(embeddings))
    rows = [('image', 'rank', 'path', 'cosine')]
    for query, indices, cosines in found:
        listed = zip(indices, cosines, strict=True)
        own = given.name(run, query)
        rows += [(own, str(rank), names_of[i], f'{cosine:.6f}') for rank, (i, cosine) in enumerate(listed, start=1)]
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    files.write_text(table, text.getvalue())
    picture = _picture(table)
    if run.config.pictures:
        drawing.attempt(run, picture, lambda: _draw(run, picture, found[:_ROWS], shown, names_of, parts))
    searched = counted(sum(part.features.num_examples for part in parts), 'image')
    beside = f'; {picture} shows the first' if run.config.pictures and os.path.exists(picture) else ''
    print(f'{table}: the most similar of {searched} to {counted(len(found), "image")}{beside}')
    nearest = zip(found[0].indices[:3], found[0].cosines, strict=False)
    words = ', '.join(f'{console.readable(names_of[i])} ({cosine:.3f})' for i, cosine in nearest)
    print(f'Most similar to {console.readable(given.name(run, found[0].query))}: {words}')


def _parts(run: Run, checkpoint: checkpointing.Checkpoint) -> list[_Part]:
    """Loads and embeds the split in --split, or all images of the run."""
    if run.split:
        sets: dict[str, Any] = {run.split: inputs.load_split(run, run.split, labelled=False)[1]}
    else:
        train, test = inputs.load_data(run)
        sets = {'train': train, run.config.dataset.eval_split: test}
    parts = []
    for split, data in sets.items():
        if data is not None:  # A folder without labels has no test set.
            params, state = checkpoints.restore_encoder(run, data, checkpoint)
            sizes.check_encoder_memory(run, data, params, state)
            parts.append(_Part(split, data, inputs.embed(run.config, data, params, state)))
    return parts


def _search(parts: list[_Part], queries: list[str], embeddings: torch.Tensor) -> tuple[list[_Found], dict[int, str]]:
    """Returns what is similar to each query, without itself, and the names of all images that were found."""
    everything = torch.cat([part.features.embeddings for part in parts])
    nearest = knn.find_neighbours(
        embeddings.to(everything.device),
        everything,
        _LISTED + 1,
        lambda items, total: console.watch(items, 'Comparing', total, unit='block'),
    )
    names_of = _describe(parts, nearest.indices.unique().tolist(), _names)
    root = parts[0].data.files.root if parts[0].data.files else ''
    found = []
    for query, indices, cosines in zip(queries, nearest.indices.tolist(), nearest.similarities.tolist(), strict=True):
        pairs = [(i, c) for i, c in zip(indices, cosines, strict=True) if not (root and _is(query, root, names_of[i]))]
        found.append(_Found(query, [i for i, _ in pairs[:_LISTED]], [c for _, c in pairs[:_LISTED]]))
    return found, names_of


def _is(query: str, root: str, name: str) -> bool:
    """Returns whether a query is the file of this name below the root of the data set."""
    if os.path.basename(query) != os.path.basename(name):
        return False
    return os.path.realpath(query) == os.path.realpath(os.path.join(os.path.expanduser(root), name))


def _describe(
    parts: list[_Part], indices: list[int], describe: Callable[[_Part, torch.Tensor], list]
) -> dict[int, Any]:
    """Maps indices that count through all parts to what `describe` returns for the rows of each part."""
    described: dict[int, Any] = {}
    start = 0
    for part in parts:
        stop = start + part.features.num_examples
        own = sorted({i for i in indices if start <= i < stop})
        if own:
            described |= zip(own, describe(part, torch.tensor(own) - start), strict=True)
        start = stop
    return described


def _names(part: _Part, rows: torch.Tensor) -> list[str]:
    chosen = part.features.take(rows)
    return list(chosen.paths) if chosen.files else [f'{part.split}/{i}' for i in chosen.positions.tolist()]


def _draw(
    run: Run, path: str, found: list[_Found], shown: list[np.ndarray], names_of: dict[int, str], parts: list[_Part]
) -> None:
    count = min(_SHOWN, *(len(one.indices) for one in found))
    indices = [i for one in found for i in one.indices[:count]]
    look = lambda part, rows: list(drawing.small_pictures(run.config, part.data, part.features.positions[rows]))
    picture_of = _describe(parts, indices, look)
    plots.neighbours(
        path,
        [[own, *(picture_of[i] for i in one.indices[:count])] for own, one in zip(shown, found, strict=True)],
        [[1.0, *one.cosines[:count]] for one in found],
        None,
        'The most similar images (by the cosine of their embeddings)\n' + curves.title_of(run.plain_config()),
        [[one.query, *(names_of[i] for i in one.indices[:count])] for one in found],
    )
