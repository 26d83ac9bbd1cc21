"""Datasets that are distributed as arrays: scikit-learn's digits, CIFAR and EMNIST; and what all loaders share."""

import contextlib
import math
import os
import pathlib
import shutil
import socket
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from http.client import HTTPException
from typing import NamedTuple

import numpy as np
import torch

from byol_func.data.examples import Dataset, check_labels
from byol_func.errors import UserError, counted, one_of
from byol_func.runtime import memory

_NETWORK_TIMEOUT = 20.0  # seconds without receiving a byte
EMNIST_SPLITS = ('byclass', 'bymerge', 'balanced', 'letters', 'digits', 'mnist')


def load_digits(split: str, max_gib: float) -> Dataset:
    """Loads scikit-learn's digits. The 5th, 10th, ... image of each class is test data, all others are train data."""
    import sklearn.datasets  # slow to import, and only this loader needs it

    digits = sklearn.datasets.load_digits()
    is_test = np.zeros(len(digits.target), bool)
    for label in range(10):
        is_test[np.flatnonzero(digits.target == label)[4::5]] = True
    chosen = is_test if split == 'test' else ~is_test
    check_memory(int(chosen.sum()), (1, 8, 8), max_gib)
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # The originals have 17 levels, 0..16.
    return Dataset(
        images=torch.from_numpy(images[:, None]),
        labels=torch.from_numpy(digits.target[chosen].astype(np.int64)),
        class_names=tuple(str(name) for name in digits.target_names),
    )


def load_cifar(split: str, name: str, root: str, max_gib: float) -> Dataset:
    """Loads CIFAR-10 or CIFAR-100 (fine labels) in its original order; torchvision downloads and verifies it."""
    import torchvision.datasets

    check_memory(50_000 if split == 'train' else 10_000, (3, 32, 32), max_gib)
    cifar_class, title, archive = {
        'cifar10': (torchvision.datasets.CIFAR10, 'CIFAR-10', 'cifar-10-python.tar.gz'),
        'cifar100': (torchvision.datasets.CIFAR100, 'CIFAR-100', 'cifar-100-python.tar.gz'),
    }[name]
    advice = (
        f'put {archive} into {os.path.abspath(root)!r}, or use class folders of images: '
        '--config=configs/folder.py --config.dataset.root=DIR'
    )
    with _downloading(root, title, advice):
        # The files are pickles, but torchvision only unpickles a file whose md5 matches the official one.
        cifar = cifar_class(root, train=split == 'train', download=True)
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return Dataset(images, torch.tensor(cifar.targets), tuple(cifar.classes))


def load_emnist(split: str, name: str, root: str, max_gib: float) -> Dataset:
    """Loads one of EMNIST's six splits: upright images, uint8 `[N, 1, 28, 28]`, with labels from 0.

    The files store the images transposed and number the letters from 1. torchvision changes neither, and
    lists an additional class 'N/A' that has no images.
    """
    import torchvision.datasets

    which = one_of(f'config.dataset.name={name!r}, SPLIT', name.removeprefix('emnist_'), EMNIST_SPLITS)
    raw = os.path.join(os.path.abspath(root), 'EMNIST', 'raw')
    part = f'emnist-{which}-{split}'
    advice = f'put gzip.zip from the EMNIST page, or its {part}-* files unpacked, into {raw!r}'
    kwargs = dict(split=which, train=split == 'train')
    files = [os.path.join(raw, f'{part}-{kind}-ubyte') for kind in ('images-idx3', 'labels-idx1')]
    if not all(map(os.path.isfile, files)):
        with _downloading(root, 'EMNIST', advice):
            torchvision.datasets.EMNIST(root, download=True, **kwargs)
    try:
        emnist = torchvision.datasets.EMNIST(root, **kwargs)
        images, labels = emnist.data, emnist.targets
        sizes = [4 * (1 + data.ndim) + data.nbytes for data in (images, labels.to(torch.uint8))]
        if images.shape[1:] != (28, 28) or len(images) != len(labels):
            raise ValueError(f'images {tuple(images.shape)}, labels {tuple(labels.shape)}')
        if sizes != [os.path.getsize(file) for file in files]:  # torchvision accepts longer files.
            raise ValueError(f'files of {" and ".join(map(str, sizes))} bytes expected')
    except Exception as error:  # torchvision does not verify unpacked files and fails in various ways
        what = f'cannot read {os.path.join(raw, part)}-* ({one_line(error)}); remove them to unpack them again'
        raise root_error(root, what) from error
    low = 1 if which == 'letters' else 0
    class_names = tuple(emnist.classes[low:])
    check_labels(f'config.dataset.root={root!r}', labels, class_names, low)
    check_memory(len(images), (1, 28, 28), max_gib)
    return Dataset(images.transpose(1, 2)[:, None].contiguous(), labels - low, class_names)


class Archive(NamedTuple):
    """An archive on the web that contains a single folder."""

    title: str
    url: str
    md5: str
    folder: str


def fetch(root: str, archive: Archive, what: str) -> str:
    """Downloads and unpacks an archive, and returns the path of its folder below `root`.

    An archive of that name in `root` is used if its checksum is right. The folder appears once it is complete.

    Args:
      root: the folder to download to.
      archive: what to download.
      what: what is missing, for the error message.

    Raises:
      UserError: the archive cannot be downloaded or unpacked.
    """
    from torchvision.datasets.utils import download_and_extract_archive

    found = os.path.join(root, archive.folder)
    here, there = map(os.path.abspath, (root, found))
    advice = f'expected {what} in {there!r} from {archive.url}, or that archive in {here!r}'
    with _downloading(root, archive.title, advice):
        os.makedirs(root, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as unpacked:
            download_and_extract_archive(archive.url, root, unpacked, md5=archive.md5)
            if os.path.isdir(found):  # Some of its files are missing.
                shutil.copytree(os.path.join(unpacked, archive.folder), found, dirs_exist_ok=True)
            else:
                os.rename(os.path.join(unpacked, archive.folder), found)
    return found


@contextlib.contextmanager
def _downloading(root: str, title: str, advice: str) -> Iterator[None]:
    """Sets a timeout for a download; on failure removes new empty folders and raises a one-line UserError."""
    path = pathlib.Path(root).absolute()
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_NETWORK_TIMEOUT)  # torchvision sets none and could wait forever
    archives = (tarfile.TarError, zipfile.BadZipFile)
    try:
        yield
    except (OSError, RuntimeError, EOFError, HTTPException, *archives) as error:
        if new:
            inside = sorted((folder for folder in path.rglob('*') if folder.is_dir()), reverse=True)
            with contextlib.suppress(OSError):  # A non-empty folder and its parents stay.
                for folder in (*inside, *new):
                    folder.rmdir()
        raise root_error(root, f'cannot download {title} ({one_line(error)}); {advice}') from error
    finally:
        socket.setdefaulttimeout(timeout)


def check_memory(num_examples: int, shape: tuple[int, ...], max_gib: float) -> None:
    """Raises a UserError if `num_examples` images of this shape take more than `max_gib` GiB."""
    gib = size_in_gib(num_examples, shape)
    if gib > max_gib:
        size, needed = ' x '.join(map(str, shape)), math.ceil(gib * 1000) / 1000
        raise UserError(
            f'config.dataset.max_gib={max_gib}: expected at least {needed} for '
            f'{counted(num_examples, "image")} of {size} bytes'
        )


def check_available(split: str, gib: float, max_gib: float) -> None:
    """Raises a UserError if the images of a split, which fit into `max_gib`, exceed this machine's free memory."""
    left = memory.available_gib()
    if left is not None and gib > left:
        raise UserError(
            f'config.dataset.max_gib={max_gib}: the images of {split} take {gib:.3g} GiB, but only {left:.3g} GiB of '
            'memory are free; expected less than that, to read images on demand, or a smaller '
            'config.dataset.source_size'
        )


def check_one_image(source_size: int, channels: int) -> None:
    """Raises a UserError if a single image of `config.dataset.source_size` exceeds this machine's free memory."""
    left, gib = memory.available_gib(), size_in_gib(1, (channels, source_size, source_size))
    if left is not None and gib > left:
        raise UserError(
            f'config.dataset.source_size={source_size}: one image takes {gib:.3g} GiB, but only {left:.3g} GiB of '
            'memory are free; expected the side that images are stored with, such as 256'
        )


def size_in_gib(num_examples: int, shape: tuple[int, ...]) -> float:
    """Returns the size in GiB of `num_examples` uint8 images of this shape."""
    return num_examples * math.prod(shape) / 2**30


def root_error(root: str, what: str) -> UserError:
    """Returns a UserError about `config.dataset.root`."""
    return UserError(f'config.dataset.root={root!r}: {what}')


def one_line(error: Exception) -> str:
    """Returns the message of an error on one line, or the name of its type if the message is empty."""
    return ' '.join(str(error).split()) or type(error).__name__
