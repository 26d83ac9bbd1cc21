"""STL-10: 96 x 96 pixels, 5,000 + 8,000 images of ten classes, and 100,000 images without labels."""

import os

import numpy as np
import torch

from byol_func.data.arrays import Archive, check_memory, fetch, root_error
from byol_func.data.examples import Dataset, check_labels
from byol_func.errors import counted

SIDE = 96
_CLASSES = ('airplane', 'bird', 'car', 'cat', 'deer', 'dog', 'horse', 'monkey', 'ship', 'truck')
_ARCHIVE = Archive(
    'STL-10',
    'http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz',
    '91f7769df0f17e558f3565bffb0c7dfb',
    'stl10_binary',
)
_BYTES = 3 * SIDE * SIDE  # Of an image, stored by columns.


def load_labelled(split: str, root: str, max_gib: float) -> Dataset:
    """Loads the training or the test set in its original order, with labels from 0.

    Args:
      split: 'train' or 'test'.
      root: the folder with `stl10_binary`, or that folder itself; the archive is downloaded into it if a file is
        missing. Files that are there are read as they are.
      max_gib: the largest size of the images in GiB.

    Raises:
      UserError: a file cannot be read or downloaded, or the images do not fit.
    """
    images = _read(root, (f'{split}_X.bin',), max_gib)
    path = _files(root, (f'{split}_y.bin',))[0]
    labels = torch.from_numpy(np.fromfile(path, np.uint8).astype(np.int64))
    if len(labels) != len(images):
        raise root_error(
            root, f'{path!r} has {counted(len(labels), "label")}; expected {len(images)}, as many as images'
        )
    check_labels(f'config.dataset.root={root!r}', labels, _CLASSES, low=1)
    return Dataset(images, labels - 1, _CLASSES)


def load_unlabelled(root: str, max_gib: float) -> Dataset:
    """Loads all images to pre-train on, without labels: the 100,000 that have none, then the training set.

    Arguments and errors are those of `load_labelled`.
    """
    images = _read(root, ('unlabeled_X.bin', 'train_X.bin'), max_gib)
    return Dataset(images, torch.zeros(len(images), dtype=torch.int64), ())


def _files(root: str, names: tuple[str, ...]) -> list[str]:
    """Returns the paths of the files with these names, and downloads all of STL-10 if one is missing."""
    for folder in (os.path.join(root, _ARCHIVE.folder), root):
        paths = [os.path.join(folder, name) for name in names]
        if all(map(os.path.isfile, paths)):
            return paths
    folder = fetch(root, _ARCHIVE, ' and '.join(names))
    paths = [os.path.join(folder, name) for name in names]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise root_error(root, f'the archive does not have {missing[0]!r}')
    return paths


def _read(root: str, names: tuple[str, ...], max_gib: float) -> torch.Tensor:
    """Returns the images in these files, one after the other, uint8 `[N, 3, 96, 96]`."""
    paths = _files(root, names)
    counts = []
    for path in paths:
        count, rest = divmod(os.path.getsize(path), _BYTES)
        if rest or not count:
            size = os.path.getsize(path)
            raise root_error(
                root, f'{path!r} has {counted(size, "byte")}; expected {_BYTES} for each image; unpack it again'
            )
        counts.append(count)
    check_memory(sum(counts), (3, SIDE, SIDE), max_gib)
    images = np.empty((sum(counts), 3, SIDE, SIDE), np.uint8)
    start = 0
    for path, count in zip(paths, counts, strict=True):
        by_column = np.memmap(path, np.uint8, 'r', shape=(count, 3, SIDE, SIDE))
        images[start : start + count] = by_column.transpose(0, 1, 3, 2)
        start += count
    return torch.from_numpy(images)
