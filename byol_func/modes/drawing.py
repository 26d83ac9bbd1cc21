"""Draws the pictures of a run and writes its `report.html`.

A picture that cannot be drawn never stops the run. If a file cannot be written, the run reports that at its end.
"""

import csv
import functools
import io
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from absl import logging
from ml_collections import ConfigDict

from byol_func.errors import counted
from byol_func.evaluation import features, metrics, odd_images
from byol_func.experiment import Experiment
from byol_func.modes import inputs
from byol_func.report import contact_sheet, curves, embeddings, page, plots
from byol_func.runtime import collectives
from byol_func.utils import augmentations, dataset
from byol_func.workdir import files, summaries
from byol_func.workdir.run import Run

_MAX_SIDE = 96  # Largest side, in pixels, of an image shown with its nearest neighbours.


def _wanted(run: Run) -> bool:
    return run.config.pictures and collectives.replica_index() == 0


def draw_encoder(run: Run, data: dataset.Examples, params, state, suffix: str = '') -> None:
    """Draws the map of the embeddings and the nearest neighbours, for at most 2000 images of a set.

    If there are several seeds, only the first one is drawn, since the others would look much the same. `suffix` is
    appended to the names of both files, for an encoder that does not come straight from pre-training.
    """
    if not _wanted(run) or not run.is_first_seed:
        return
    shown = []  # The views that the encoder gets, reduced in size.

    def preprocess(batch: dataset.Batch) -> torch.Tensor:
        views = augmentations.center_view(batch, run.config.image_size, run.config.eval_crop_fraction)
        shown.append(reduced(views))
        return views

    def draw() -> None:
        chosen = data.take(embeddings.choose(data.num_examples))
        embedded = features.extract(
            inputs.make_backbone(run.config, data),
            params,
            state,
            chosen,
            preprocess=preprocess,
            batch_size=run.config.evaluation.batch_size,
        )
        embeddings.draw_embeddings(
            run.workdir,
            embedded.embeddings.cpu().numpy(),
            torch.cat(shown).numpy(),
            embedded.labels.cpu().numpy() if data.num_classes else None,
            data.class_names,
            curves.title_of(run.plain_config()) + (f', after{suffix.replace("_", " ")}' if suffix else ''),
            suffix,
            embedded.paths,
        )

    attempt(run, f'embedding_map{suffix}.png', draw)


def reduced(views: torch.Tensor) -> torch.Tensor:
    """Returns views `[B, C, S, S]` in 0..1 as uint8 pictures of at most `_MAX_SIDE` pixels and three channels."""
    size = min(views.shape[-1], _MAX_SIDE)
    small = torch.nn.functional.interpolate(contact_sheet.visible(views), size=(size, size), mode='area')
    return (small.clamp(0, 1) * 255).round().byte().cpu()


def small_pictures(config: ConfigDict, data: dataset.Examples, positions: torch.Tensor) -> np.ndarray:
    """Returns what the encoder sees of the examples at these positions, reduced, as uint8 `[M, S, S, C]`."""
    row_of = {position: row for row, position in enumerate(data.positions.tolist())}
    shown = data.take(torch.tensor([row_of[position] for position in positions.tolist()]))
    batches = dataset.eval_batches(shown, config.evaluation.batch_size, 'Pictures')
    views = (augmentations.center_view(batch, config.image_size, config.eval_crop_fraction) for batch in batches)
    return torch.cat([reduced(part) for part in views]).permute(0, 2, 3, 1).numpy()


def draw_odd_images(run: Run, data: dataset.Examples, embedded: dataset.Features, split: str) -> str:
    """Draws `odd_images.SPLIT.png`: nearest pairs, which may be duplicates, and outliers; `.csv` lists their files.

    Returns:
      The path of the picture; '' if there is none.
    """
    if not _wanted(run) or len(embedded.embeddings) < 2:
        return ''
    name = f'odd_images.{split}.png'

    def draw() -> None:
        found = odd_images.find(embedded.embeddings, plots.ODD_PAIRS, plots.ODD_OUTLIERS)
        chosen = torch.cat([found.pairs.flatten(), found.outliers])
        shown = embedded.take(chosen)
        pictures = small_pictures(run.config, data, shown.positions)
        names = shown.paths if shown.files else [str(position) for position in shown.positions.tolist()]
        cosines = [*found.pair_cosines.tolist(), *found.outlier_cosines.tolist()]
        in_pairs = 2 * len(found.pairs)
        listed = [*zip(names[:in_pairs:2], names[1:in_pairs:2], strict=True), *((one, '') for one in names[in_pairs:])]
        table = io.StringIO()
        rows = [(*both, f'{cosine:.6f}') for both, cosine in zip(listed, cosines, strict=True)]
        csv.writer(table).writerows([('image', 'pair', 'cosine'), *rows])
        files.write_text(os.path.join(run.workdir, f'odd_images.{split}.csv'), table.getvalue())
        plots.odd_images(
            os.path.join(run.workdir, name),
            list(zip(pictures, names, strict=True)),
            cosines,
            f'Nearest pairs, and outliers with the mean cosine to their neighbours ({split}, '
            f'{counted(len(embedded.embeddings), "image")})\n{curves.title_of(run.plain_config())}',
        )

    attempt(run, name, draw)
    path = os.path.join(run.workdir, name)
    return path if os.path.exists(path) else ''


def draw_classifier(run: Run, name: str, experiment: Experiment, state: Any, data: dataset.Examples) -> None:
    """Draws the confusion matrix of a trained experiment on the evaluation set; `name` is one of `CLASSIFIERS`.

    All replicas must call this: each counts its part of the set.
    """
    if not run.config.pictures:
        return
    rank, replicas = collectives.replica_index(), collectives.num_replicas()
    counts = torch.zeros(data.num_classes, data.num_classes, dtype=torch.int64, device=data.labels.device)
    with torch.no_grad():
        for batch in dataset.eval_batches(data, run.config.evaluation.batch_size, rank=rank, num_replicas=replicas):
            counts = counts + metrics.confusion_matrix(experiment.predict(state, batch), batch['labels']).to(counts)
    whole = torch.tensor(collectives.gather_numbers(counts.flatten().tolist())).sum(dim=0).view_as(counts)
    draw_confusion(run, name, lambda: whole, data.class_names)


def draw_confusion(
    run: Run, name: str, count: Callable[[], torch.Tensor], class_names: Sequence[str], split: str | None = None
) -> None:
    """Draws a confusion matrix into `confusion_matrix.NAME.SPLIT.png`; `name` is one of `summaries.CLASSIFIERS`.

    `count` returns the matrix of counts `[K, K]`; rows are labels, columns are predictions. `split` is
    `config.dataset.eval_split` by default.
    """
    if _wanted(run):
        split = split or run.config.dataset.eval_split
        title = f'{curves.title_of(run.plain_config())}: {summaries.CLASSIFIERS[name]}, {split} set'
        file = f'confusion_matrix.{name}.{split}.png'
        path = os.path.join(run.workdir, file)
        attempt(run, file, lambda: plots.confusion_matrix(path, count().cpu().numpy(), class_names, title))


def draw_run(run: Run, mode: str) -> None:
    """Draws the curves of a mode, with all seeds in one picture, and writes the report."""
    if not _wanted(run):
        return
    seeds = run.config.num_seeds
    folders = [os.path.join(run.workdir, f'seed_{i}') for i in range(seeds)] if seeds > 1 else [run.workdir]
    # Pre-training may end with a linear evaluation, which has curves of its own.
    for what in {mode: None, **({'linear_eval': None} if mode == 'pretrain' else {})}:
        runs = [found[what] for f in folders if what in (found := curves.read_metrics(f))]
        name = 'curves.png' if what == 'pretrain' else f'curves_{what}.png'
        title = f'{curves.title_of(run.plain_config(), seeds)}: {what}'
        if runs:
            draw = functools.partial(curves.draw_curves, os.path.join(run.workdir, name), {'': runs}, title)
            attempt(run, name, draw)
    attempt(run, 'report.html', lambda: page.write_report(run.workdir))


def attempt(run: Run, name: str, draw: Callable[[], object]) -> None:
    """Draws a picture; if that fails, the run goes on with a warning, and may report the file at its end."""
    try:
        draw()
    except Exception as error:  # For example a full disk or a missing font; it must not cost the results.
        reason = ' '.join(str(error).split())
        logging.warning('%s could not be made: %s: %s', name, type(error).__name__, reason)
        if run.missing is not None and (name == 'report.html' or isinstance(error, OSError)):
            run.missing.append(f'{name} ({reason})')
