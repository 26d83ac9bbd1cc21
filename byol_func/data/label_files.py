"""Reads lists of the images whose labels are used, such as SimCLR's 1 % and 10 % of ImageNet."""

import os
from collections.abc import Iterable

import torch

from byol_func.data import listing
from byol_func.data.examples import Examples, Files
from byol_func.errors import UserError, counted


def listed(data: Examples, path: str, field: str) -> torch.Tensor:
    """Returns the indices of the examples that a list names.

    Listed images that are held out or could not be read are left out.

    Args:
      data: a training set of files, or a part of it.
      path: a text file with one image per line: its path relative to the folder of the training set, such as
        'n01440764/n01440764_10026.JPEG', or only its file name if that is unique.
      field: the config field that holds the path, for error messages.

    Returns:
      int64 `[M]` in the order of the dataset, each example once.

    Raises:
      UserError: the dataset has no files, the list cannot be read, a name matches no file or several files, or
        no listed image is in the dataset.
    """
    where = f'{field}={path!r}'
    if not data.files:
        raise UserError(
            f"{where}: needs a data set of files, expected '' unless config.dataset.name is folder or shards"
        )
    try:
        with open(os.path.expanduser(path), encoding='utf-8-sig', errors='surrogateescape') as file:
            names = [listing.normalised(line.strip()) for line in file if line.strip()]
    except OSError as error:
        raise UserError(f'{where}: {error.strerror}; expected a text file, one image file name per line') from error
    places = _places(data.files, names)
    for name in names:
        found = places[name]
        if len(found) != 1:
            kinds = 'names no image' if not found else f'is the name of {counted(len(found), "image")}'
            raise UserError(
                f'{where}: {name!r} {kinds} in the {data.files.split} folder of {data.files.root!r}; expected one '
                'image file name per line, such as cat.jpg, or CLASS/cat.jpg where several have that name'
            )
    chosen = torch.tensor([places[name][0] for name in names], dtype=torch.int64)
    rows = torch.isin(data.positions, chosen).nonzero()[:, 0]
    if not len(rows):
        raise UserError(f'{where}: names no image of the training set, expected at least one')
    return rows


def _places(files: Files, names: Iterable[str]) -> dict[str, list[int]]:
    """Maps each of these names to its positions in the split, as a file name or as a path inside of the split."""
    places: dict[str, list[int]] = {name: [] for name in names}
    for i in range(len(files.paths)):
        path = listing.normalised(files.paths.in_split(i).replace(os.sep, '/'))
        for name in {path, path.rsplit('/', 1)[-1]} & places.keys():
            places[name].append(i)
    return places
