"""Folders of images: which files belong to a split, and reading them all into memory."""

import errno
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from absl import logging

from byol_func import console
from byol_func.data import decoding
from byol_func.data.arrays import root_error
from byol_func.data.examples import Dataset, Files
from byol_func.errors import UserError

_CHUNK = 64  # images per task of the thread pool: one 32 px image is too little work for a task
_SHOWN = 20  # bad files that are listed
_LAYOUT = 'expected DIR/train/CLASS/* and DIR/test/CLASS/*'


def list_files(split: str, root: str) -> Files | None:
    """Finds the files of a split; None if it is 'test' and the folder has no labels.

    Raises:
      UserError: a folder is missing or empty or cannot be read, or the classes are not as expected.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    try:
        folder, class_names = _find_classes(split, root, IMG_EXTENSIONS)
        if folder is None:
            return None
        folders = [os.path.join(folder, n) for n in class_names] if class_names else [folder]
        # A test set may lack a class: it cannot be told how well that one is known.
        there = [f for f in folders if split == 'train' or os.path.isdir(f)]
        files = [_list_images(f, IMG_EXTENSIONS) if f in there else [] for f in folders]
    except OSError as error:
        what = f'cannot read {error.filename!r} ({error.strerror})'
        raise root_error(root, f'{what}; {_LAYOUT}') from error
    empty = [i for i, found in enumerate(files) if not found]
    if empty and (split == 'train' or len(empty) == len(files)):
        accepted = f'expected files ending in {", ".join(IMG_EXTENSIONS)}'
        raise root_error(root, f'no images in {folders[empty[0]]!r}; {accepted}')
    if empty:
        names = ', '.join(repr(class_names[i]) for i in empty[:3]) + ', ...' * (len(empty) > 3)
        logging.warning('%s has no images of %s: accuracies are those of the other classes', folder, names)
    labels = [label for label, found in enumerate(files) for _ in found]
    paths = tuple(path for found in files for path in found)
    return Files(root, split, paths, torch.tensor(labels), tuple(map(console.readable, class_names)))


def _find_classes(split: str, root: str, extensions: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """The folder of a split, and the classes: those of train, and test has no others."""
    present = _subfolders(root)
    held_out = 'val' if 'val' in present and 'test' not in present else 'test'
    train_folder = os.path.join(root, 'train')
    if 'train' in present and not _subfolders(train_folder) and _list_images(train_folder, extensions):
        return (train_folder if split == 'train' else None), ()
    classes = {}
    for name in ('train',) if split == 'train' else ('train', held_out):
        folder = os.path.join(root, name)
        if name not in present:
            more = f', or config.dataset.eval_split=val without {folder!r}' if name == held_out else ''
            raise root_error(root, f'there is no folder {folder!r}; {_LAYOUT}{more}')
        classes[name] = _subfolders(folder)
        if not classes[name]:
            what = f'no class folders in {folder!r}; {_LAYOUT}'
            raise root_error(root, f'{what}, or DIR/train/* without labels' if name == 'train' else what)
    train, test = classes['train'], classes.get(held_out, [])
    if set(test) - set(train):
        lone = sorted(set(train) ^ set(test))
        shown = [f'{n!r} (only in {"train" if n in train else held_out})' for n in lone[:3]]
        what = f'the splits differ in classes: {", ".join(shown)}{", ..." * (len(lone) > 3)}'
        raise root_error(root, f'{what}; {_LAYOUT}')
    if len(train) == 1:
        raise root_error(
            root,
            f'expected at least two classes, but {train[0]!r} is the only one; '
            'to pretrain without labels put the images into DIR/train itself',
        )
    return os.path.join(root, 'train' if split == 'train' else held_out), tuple(train)


def _subfolders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _list_images(folder: str, extensions: tuple[str, ...]) -> list[str]:
    """The files with one of the extensions, at any depth, in torchvision's order."""

    def fail(error: OSError) -> None:  # os.walk and ImageFolder pass over what they cannot open
        raise error

    walk = []
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        walk.append((parent, folders, names))
        # A link to a folder around it would be walked forty times, or for ever.
        above = os.path.join(os.path.realpath(parent), '')
        around = [
            f
            for f in folders
            if os.path.islink(path := os.path.join(parent, f))
            and above.startswith(os.path.join(os.path.realpath(path), ''))
        ]
        if around:
            raise OSError(errno.ELOOP, 'a link to a folder around it', os.path.join(parent, around[0]))
    walk.sort()
    files = [os.path.join(parent, name) for parent, _, names in walk for name in sorted(names)]
    return [path for path in files if path.lower().endswith(extensions)]


class BadFiles:
    """Counts and lists the files of a split that cannot be read, up to the share that is allowed."""

    def __init__(self, files: Files, max_bad_fraction: float, listed: bool = True):
        self._files, self._max_bad_fraction, self._listed = files, max_bad_fraction, listed
        self._allowed = int(max_bad_fraction * len(files.paths))
        self.messages: dict[int, str] = {}

    def add(self, index: int, message: str) -> None:
        """Takes note of file `index`; `message` is that of `decoding.BadImage`.

        Raises:
          UserError: one more than allowed.
        """
        if index in self.messages:
            return
        self.messages[index] = message
        count = len(self.messages)
        if count > self._allowed:
            so_far = f' after {self._allowed} others' if self._allowed else ''
            raise root_error(
                self._files.root,
                f'{message}{so_far}; repair or remove it, or allow more than '
                f'config.dataset.max_bad_fraction={self._max_bad_fraction}',
            )
        if self._listed and count <= _SHOWN:
            more = f'; more files of {self._files.split} are skipped without a word' if count == _SHOWN else ''
            logging.warning('Skipped, %d of at most %d: %s%s', count, self._allowed, message, more)


def image_size(files: Files, source_size: int, grayscale: bool) -> tuple[int, int, int]:
    """(C, H, W) of the first file that can be read.

    Raises:
      UserError: there is none.
    """
    for path in files.paths:
        try:
            height, width, channels = decoding.decode_file(path, source_size, grayscale).shape
            return channels, height, width
        except decoding.BadImage as error:
            last = error
    raise root_error(files.root, f'{last}, nor any other of {files.split}')


def read(files: Files, source_size: int, grayscale: bool, max_bad_fraction: float) -> Dataset:
    """Reads all files into memory, leaving out those that cannot be read.

    Args:
      files: of a split.
      source_size: as in `decoding.decode_file`.
      grayscale: as there.
      max_bad_fraction: the share of files that may be left out.

    Raises:
      UserError: sizes differ, or there are too many bad files.
    """
    channels, height, width = image_size(files, source_size, grayscale)
    images = np.empty((len(files.paths), channels, height, width), np.uint8)
    bad = BadFiles(files, max_bad_fraction)
    for i, pixels in decode_all(files, source_size, grayscale, bad):
        if pixels.shape[:2] != (height, width):
            size = f'{pixels.shape[1]} x {pixels.shape[0]}'
            raise UserError(
                f'config.dataset.source_size=0: {files.paths[0]!r} is {width} x {height} pixels, '
                f'{files.paths[i]!r} is {size}; set config.dataset.source_size to resize them to one size, '
                'or config.dataset.max_gib=0 to read each when it is needed'
            )
        images[i] = pixels.transpose(2, 0, 1)
    return without_bad(torch.from_numpy(images), files, bad.messages)


def without_bad(images: torch.Tensor, files: Files, bad: Mapping[int, str]) -> Dataset:
    """The images of all files but the bad ones; a UserError if a class is left without any."""
    dataset = Dataset(images, files.labels, files.class_names, files)
    if bad:
        dataset = dataset.take(good_ones(files, bad))
    check_classes(files, dataset.positions)
    return dataset


def good_ones(files: Files, bad: Mapping[int, str], among: torch.Tensor | None = None) -> torch.Tensor:
    """The places of the files that are not bad, int64 `[M]`, among those given; a UserError if there is none."""
    asked = range(len(files.paths)) if among is None else among.tolist()
    good = [i for i in asked if i not in bad]
    if not good:
        raise root_error(files.root, f'{list(bad.values())[-1]}, nor any other of {files.split}')
    return torch.tensor(good)


def check_classes(files: Files, positions: torch.Tensor) -> None:
    """Raises a UserError if a class that has files has none at these places."""
    lost = sorted(set(files.labels.tolist()) - set(files.labels[positions].tolist()))
    if files.class_names and lost:
        name = files.class_names[lost[0]]
        raise root_error(files.root, f'no images of the class {name!r}, expected at least one of each class')


def decode_all(files: Files, source_size: int, grayscale: bool, bad: BadFiles) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (index, uint8 `[H, W, C]`) of every file that can be read, in order, and tells how far it is."""
    done = _decode_chunks(files, source_size, grayscale)
    for first, chunk in console.watch(done, f'Reading {files.split}', len(files.paths), lambda item: len(item[1])):
        for i, pixels in enumerate(chunk, first):
            if isinstance(pixels, decoding.BadImage):
                bad.add(i, str(pixels))
            else:
                yield i, pixels


def _num_cpus() -> int:
    """Those this process may use: batch systems and containers give it a part of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _decode_chunks(
    files: Files, source_size: int, grayscale: bool
) -> Iterator[tuple[int, list[np.ndarray | decoding.BadImage]]]:
    """Yields the index of a chunk's first file, and what comes of its files."""

    def decode_chunk(start: int) -> list[np.ndarray | decoding.BadImage]:
        return [_decode_or_error(path, source_size, grayscale) for path in files.paths[start : start + _CHUNK]]

    # On tiny files Pillow holds the interpreter's lock nearly all the time: threads would slow it.
    # The first file may be a link to nothing: decoding tells so.
    size = os.path.getsize(files.paths[0]) if os.path.exists(files.paths[0]) else 0
    workers = _num_cpus() if size > 4096 else 1
    starts = range(0, len(files.paths), _CHUNK)
    with ThreadPoolExecutor(workers) as pool:
        waiting = []
        for start in [*starts, *[None] * (2 * workers)]:  # not all at once: decoded images are large
            if start is not None:
                waiting.append((start, pool.submit(decode_chunk, start)))
            if waiting and (start is None or len(waiting) > 2 * workers):
                first, task = waiting.pop(0)
                yield first, task.result()


def _decode_or_error(path: str, source_size: int, grayscale: bool) -> np.ndarray | decoding.BadImage:
    try:
        return decoding.decode_file(path, source_size, grayscale)
    except decoding.BadImage as error:
        return error
