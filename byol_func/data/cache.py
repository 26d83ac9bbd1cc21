"""An on-disk cache that stores the decoded images of a folder in one file, for folders that are read repeatedly."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from typing import NamedTuple

import numpy as np
import PIL
import torch
from absl import logging

from byol_func.data import decoding
from byol_func.data.examples import Files
from byol_func.data.folder import BadFiles, decode_all
from byol_func.errors import UserError
from byol_func.runtime import atomic


class Cache(NamedTuple):
    """The path of the images, uint8 `[N, C, S, S]`, and an error message for each file that could not be read."""

    path: str
    bad: dict[int, str]

    def images(self) -> np.ndarray:
        """Returns all images as a memory map, which is read on access; bad files are black images."""
        return np.lib.format.open_memmap(self.path, mode='r')

    def tensor(self) -> torch.Tensor:
        """Returns all images as a tensor in mapped memory, whose pages all processes of a machine share."""
        return torch.from_numpy(np.lib.format.open_memmap(self.path, mode='c'))  # PyTorch wants a writable array.


def open_or_make(files: Files, form: decoding.Form, cache_dir: str, max_bad_fraction: float) -> Cache:
    """Opens the cache of these files in `cache_dir`, and creates it first if it does not exist.

    The file name contains a digest of the settings, the decoders' versions and the path, size and
    modification time of every file, so any change leads to a new cache. The cache is written to a temporary
    file and renamed once it is complete, so an interruption or a second process does no harm.

    Raises:
      UserError: `cache_dir` cannot be read or written, the cache is damaged, or too many image files cannot be
        read.
    """
    cache_dir = os.path.expanduser(cache_dir)
    name = f'{files.split}-{form.source_size}px-{_digest(files, form)}'
    path, list_of_bad = (os.path.join(cache_dir, f'{name}.{kind}') for kind in ('npy', 'bad.json'))
    try:
        if not os.path.exists(path):
            os.makedirs(cache_dir, exist_ok=True)
            _write(files, form, path, list_of_bad, max_bad_fraction)
            logging.info('Decoded images of %s are in %s', files.split, path)
        else:
            logging.info('Reading the decoded images of %s from %s', files.split, path)
        with open(list_of_bad) as file:
            bad = {int(index): message for index, message in json.load(file).items()}
        cache = Cache(path, bad)
        cache.images()
    except OSError as error:
        raise UserError(
            f'config.dataset.cache_dir={cache_dir!r}: cannot write or read it ({error.strerror or error}); '
            "expected a folder with enough free space, or '' for no cache"
        ) from error
    except ValueError as error:  # The file is truncated, or another program wrote it.
        raise UserError(f'config.dataset.cache_dir={cache_dir!r}: {path} is damaged; remove it') from error
    counted = BadFiles(files, max_bad_fraction)
    for index, message in sorted(bad.items()):
        counted.add(index, message)
    return cache


def _digest(files: Files, form: decoding.Form) -> str:
    versions = decoding.VERSION, PIL.__version__, importlib.metadata.version('torchvision')
    digest = hashlib.blake2b(repr((*versions, *form, os.path.abspath(files.root))).encode(), digest_size=8)
    for i, path in enumerate(files.paths):
        digest.update(f'{path}\0{files.paths.stamp(i)}\0'.encode(errors='surrogateescape'))
    return digest.hexdigest()


def _write(files: Files, form: decoding.Form, path: str, list_of_bad: str, max_bad_fraction: float) -> None:
    shape = (len(files.paths), form.num_channels, form.source_size, form.source_size)
    bad = BadFiles(files, max_bad_fraction, listed=False)
    with atomic.replacing(path, shared=True) as temporary:
        images = np.lib.format.open_memmap(temporary, mode='w+', dtype=np.uint8, shape=shape)
        if hasattr(os, 'posix_fallocate'):  # Not on macOS.
            with open(temporary, 'r+b') as file:  # Otherwise writing to the map on a full disk raises a signal.
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))
        with contextlib.closing(decode_all(files, form, bad)) as decoded:
            for i, pixels in decoded:
                images[i] = pixels.transpose(2, 0, 1)
        images.flush()
        # Write the list before the images get their final name: readers expect both.
        with atomic.replacing(list_of_bad, shared=True) as unfinished:
            unfinished.write_text(json.dumps(bad.messages))
