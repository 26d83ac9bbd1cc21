"""Tiny ImageNet: 64 x 64 pixels, 100,000 + 10,000 photographs of 200 classes of ImageNet."""

import os
import re

import torch

from byol_func.data import decoding, folder
from byol_func.data.arrays import Archive, check_memory, fetch, root_error
from byol_func.data.examples import Dataset, Files
from byol_func.data.places import FilePlaces, Names
from byol_func.errors import counted

SIDE = 64
_ARCHIVE = Archive(
    'Tiny ImageNet',
    'http://cs231n.stanford.edu/tiny-imagenet-200.zip',
    '90528d7ca1a48142e341f4ef8d21d0de',
    'tiny-imagenet-200',
)
_ANNOTATIONS = os.path.join('val', 'val_annotations.txt')
_IMAGE = re.compile(r'.*\.jpe?g', re.IGNORECASE)


def load(split: str, root: str, max_gib: float) -> Dataset:
    """Loads the training set or, for 'test', the validation set, since the labels of the test set are not published.

    The classes are in the order of their WordNet IDs, the images of a class in the order of their names.

    Args:
      split: 'train' or 'test'.
      root: the folder with `tiny-imagenet-200`, or that folder itself; the archive is downloaded into it if there is
        neither. Files that are there are read as they are.
      max_gib: the largest size of the images in GiB.

    Raises:
      UserError: the files cannot be downloaded, are not as expected or cannot be read; or the images do not fit.
    """
    top = _find(root)
    try:
        classes = tuple(sorted(entry.name for entry in os.scandir(os.path.join(top, 'train')) if entry.is_dir()))
        of_class = _train_images(top, classes) if split == 'train' else _val_images(root, top, classes)
    except OSError as error:
        what = f'cannot read {error.filename!r} ({error.strerror}); expected the layout of {_ARCHIVE.url}'
        raise root_error(root, what) from error
    empty = [name for name in classes if not of_class[name]]
    if len(classes) < 2 or empty:
        what = f'no images of the class {empty[0]!r}' if empty else counted(len(classes), 'class')
        raise root_error(root, f'{what} for {split} in {top!r}; expected the layout of {_ARCHIVE.url}')
    paths = [path for name in classes for path in sorted(of_class[name])]
    labels = [label for label, name in enumerate(classes) for _ in of_class[name]]
    check_memory(len(paths), (3, SIDE, SIDE), max_gib)
    names = Names.of(os.path.relpath(path, top) for path in paths)
    places = FilePlaces(os.path.join(top, ''), names, 'train' if split == 'train' else 'val')
    files = Files(top, split, places, torch.tensor(labels), classes)
    return folder.read(files, decoding.Form(), max_bad_fraction=0.0)


def _find(root: str) -> str:
    """Returns the folder of the data set, which is downloaded into `root` if it is not there."""
    for top in (os.path.join(root, _ARCHIVE.folder), root):
        if os.path.isfile(os.path.join(top, _ANNOTATIONS)):
            return top
    return fetch(root, _ARCHIVE, f'train and {_ANNOTATIONS}')


def _train_images(top: str, classes: tuple[str, ...]) -> dict[str, list[str]]:
    """Returns the paths `train/WNID/images/*.JPEG` of every class."""
    found = {}
    for name in classes:
        images = os.path.join(top, 'train', name, 'images')
        found[name] = [os.path.join(images, file) for file in os.listdir(images) if _IMAGE.fullmatch(file)]
    return found


def _val_images(root: str, top: str, classes: tuple[str, ...]) -> dict[str, list[str]]:
    """Returns the paths `val/images/*.JPEG` of every class, by the list of names, WordNet IDs and boxes beside it."""
    found: dict[str, list[str]] = {name: [] for name in classes}
    path = os.path.join(top, _ANNOTATIONS)
    with open(path, encoding='utf-8', errors='replace') as file:
        for number, line in enumerate(file, 1):
            name, _, rest = line.strip().partition('\t')
            wnid = rest.split('\t')[0]
            if not name:
                continue
            if wnid not in found:
                raise root_error(root, f'{path}, line {number}: {line.strip()!r}; expected an image and its class')
            found[wnid].append(os.path.join(top, 'val', 'images', os.path.basename(name)))
    return found
