"""What flags give to some modes: the images of --images, files of any size that need no labels, and --output."""

import os
import pathlib
from collections.abc import Iterator

import torch
from absl import logging

from byol_func import console, library
from byol_func.data import listing
from byol_func.errors import UserError, counted
from byol_func.runtime import collectives
from byol_func.workdir.run import Run


def find(run: Run, mode: str, purpose: str) -> list[str]:
    """Returns the paths of the images in --images; `mode` needs them for a `purpose`.

    Raises:
      UserError: the flag is not given, or there are no such images.
    """
    if not run.images:
        raise UserError(f'--mode={mode}: no images to {purpose}; expected --images=FOLDER or --images=FILE')
    return listing.images_below(run.images, run.config.dataset.channels)


def check_output(output: str | None, wanted: str) -> None:
    """Raises a UserError if --output cannot be written: it is there already, or a file stands where a folder is needed.

    Args:
      output: the path; None if the flag is not given, which is no error.
      wanted: what is written there: a new 'file', or files in a 'folder'.
    """
    if not output:
        return
    above = next(p for p in pathlib.Path(os.path.abspath(output)).parents if os.path.lexists(p))
    if not above.is_dir():
        raise UserError(f'--output={output}: {above} is a file; expected a folder there, or another name')
    if wanted == 'folder' and os.path.isfile(output):
        raise UserError(f'--output={output}: is a file; expected a folder, or a new name')
    if wanted == 'file' and os.path.lexists(output):
        raise UserError(f'--output={output}: already exists; remove it or choose another name')


def views(run: Run, encoder: library.Encoder, paths: list[str], what: str) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Yields the images batch by batch: their paths and what the encoder sees of them, float32 `[B, C, S, S]`.

    Images that cannot be read are left out, with a warning after the last batch. `what` labels the progress.

    Raises:
      UserError: none of the images can be read.
    """
    unreadable: list[str] = []
    size = run.config.evaluation.batch_size
    chunks = [paths[i : i + size] for i in range(0, len(paths), size)]
    for chunk in console.watch(chunks, what, len(chunks), unit='batch'):
        found, names = [], []
        for path in chunk:
            try:
                found.append(encoder.views([path]))
                names.append(path)
            except UserError as error:
                unreadable.append(str(error))
        if names:
            yield names, torch.cat(found)
    if len(unreadable) == len(paths):
        raise UserError(f'--images={run.images}: no image can be read: {unreadable[0]}')
    if unreadable and collectives.replica_index() == 0:
        logging.warning('%s left out: %s', counted(len(unreadable), 'image'), '; '.join(unreadable[:3]))


def name(run: Run, path: str) -> str:
    """Returns the path of an image relative to --images, or the name of the file if --images is one file."""
    assert run.images
    return os.path.relpath(path, run.images if os.path.isdir(run.images) else os.path.dirname(run.images) or '.')
