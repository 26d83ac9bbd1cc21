"""Reads the files of a split into memory and keeps track of those that cannot be read."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from absl import logging

from byol_func import console
from byol_func.data import decoding, levels
from byol_func.data.arrays import root_error
from byol_func.data.examples import Dataset, Files
from byol_func.errors import UserError, counted

_CHUNK = 64  # images per task of the thread pool; a single 32 px image is too little work for one
_SHOWN = 20  # number of bad files that are logged one by one
_LOOKED_AT = 8  # number of files whose range of values is checked
_Chunk = tuple[int, list[np.ndarray | decoding.BadImage]]


class BadFiles:
    """Counts and logs the files of a split that cannot be read, up to the allowed fraction."""

    def __init__(self, files: Files, max_bad_fraction: float, listed: bool = True):
        self._files, self._max_bad_fraction, self._listed = files, max_bad_fraction, listed
        self._allowed = int(max_bad_fraction * len(files.paths))
        self.messages: dict[int, str] = {}

    def add(self, index: int, message: str) -> None:
        """Records file `index` as bad; `message` is that of the `decoding.BadImage`.

        Raises:
          UserError: more files are bad than allowed.
        """
        if index in self.messages:
            return
        self.messages[index] = message
        count = len(self.messages)
        if count > self._allowed:
            so_far = f' after {counted(self._allowed, "other")}' if self._allowed else ''
            raise root_error(
                self._files.root,
                f'{message}{so_far}; repair or remove it, or allow more than '
                f'config.dataset.max_bad_fraction={self._max_bad_fraction}',
            )
        if self._listed and count <= _SHOWN:
            more = f'; further bad files of {self._files.split} are skipped silently' if count == _SHOWN else ''
            logging.warning('Skipped bad file %d of at most %d: %s%s', count, self._allowed, message, more)


def warn_of_range(files: Files, form: decoding.Form) -> None:
    """Warns about files of more than 8 bits that would become nearly black, or white where they leave the range."""
    step = -(-len(files.paths) // _LOOKED_AT)
    looked_at = range(0, len(files.paths), step)
    largest = {files.paths[i]: decoding.largest_values(functools.partial(files.paths.read, i), form) for i in looked_at}
    found = {path: values for path, values in largest.items() if values is not None}
    halved = [files.paths[i] for i in looked_at if decoding.drops_bits(functools.partial(files.paths.read, i), form)]
    if halved:
        logging.warning(
            '%s has colours of 16 bits, of which only the upper 8 are read, whatever config.dataset.value_range is; to '
            'read them in full, convert other files than TIFF to TIFF and set config.dataset.channels=3',
            halved[0],
        )
    if form.value_range:
        above = {path: levels.excess(values, form.value_range) for path, values in found.items()}
        path = max(above, key=above.__getitem__, default='')
        if found and above[path][0] > 0:
            channel = above[path][1]
            logging.warning(
                '%s has values of up to %d%s; all above config.dataset.value_range=%s become white',
                path,
                found[path][channel],
                f' in channel {channel} of 0 to {count - 1}' if (count := len(found[path])) > 1 else '',
                form.value_range,
            )
        return
    if not found or len(found) < len(largest):
        return
    path = max(found, key=lambda path: max(found[path]))
    value = max(found[path])
    bits = max(value.bit_length(), 8)
    if bits < 16:
        logging.warning(
            '%s has 16 bits, but values of at most %d of 65535, so its images are dark; set '
            'config.dataset.value_range=(0,%d) if they have %d bits',
            path,
            value,
            2**bits - 1,
            bits,
        )


def warn_of_copies(train: Dataset, test: Dataset, split: str) -> None:
    """Warns of images of `test`, which is called `split`, that are in `train` too, pixel by pixel."""
    if train.image_shape != test.image_shape:
        return
    step = -(-train.images[0].numel() // 64)  # Few pixels tell most images apart.
    few = [[row.tobytes() for row in data.images.flatten(1)[:, ::step].numpy()] for data in (train, test)]
    shared = set(few[0]) & set(few[1])
    trained, tested = (
        [hashlib.blake2b(data.images[i].numpy().tobytes()).digest() for i, row in enumerate(rows) if row in shared]
        for data, rows in zip((train, test), few, strict=True)
    )
    known = set(trained)
    copies = sum(image in known for image in tested)
    if copies:
        logging.warning(
            '%d of the %s to evaluate on (%s) are training images too; accuracies on those prove nothing',
            copies,
            counted(test.num_examples, 'image'),
            split,
        )


def image_size(files: Files, form: decoding.Form) -> tuple[int, int, int]:
    """Returns (C, H, W) of the first readable file, which is not resized for that: a wrong size may be huge.

    Raises:
      UserError: no file can be read.
    """
    for i in range(len(files.paths)):
        try:
            height, width, channels = files.paths.decode(i, form._replace(source_size=0)).shape
            return channels, form.source_size or height, form.source_size or width
        except decoding.BadImage as error:
            last = error
    raise root_error(files.root, f'{last}, nor any other image of {files.split}')


def read(files: Files, form: decoding.Form, max_bad_fraction: float) -> Dataset:
    """Reads all files of a split into memory, leaving out at most `max_bad_fraction` that cannot be read.

    Raises:
      UserError: the images differ in size, there are too many bad files, or a class has no readable image.
    """
    channels, height, width = image_size(files, form)
    images = np.empty((len(files.paths), channels, height, width), np.uint8)
    bad = BadFiles(files, max_bad_fraction)
    with contextlib.closing(decode_all(files, form, bad)) as decoded:
        for i, pixels in decoded:
            if pixels.shape[:2] != (height, width):
                size = f'{pixels.shape[1]} x {pixels.shape[0]}'
                raise UserError(
                    f'config.dataset.source_size=0: {files.paths[0]!r} is {width} x {height} pixels, '
                    f'{files.paths[i]!r} is {size}; set config.dataset.source_size to resize them to one size, '
                    'or config.dataset.max_gib=0 to read them on demand'
                )
            images[i] = pixels.transpose(2, 0, 1)
    return without_bad(torch.from_numpy(images), files, bad.messages)


def without_bad(images: torch.Tensor, files: Files, bad: Mapping[int, str]) -> Dataset:
    """Returns the dataset without the bad files; raises a UserError if a class is left without images."""
    dataset = Dataset(images, files.labels, files.class_names, files)
    if bad:
        dataset = dataset.take(good_ones(files, bad))
    check_classes(files, dataset.positions)
    return dataset


def good_ones(files: Files, bad: Mapping[int, str], among: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the positions of the files, or of those in `among`, that are not bad, int64 `[M]`.

    Raises:
      UserError: all of them are bad.
    """
    asked = range(len(files.paths)) if among is None else among.tolist()
    good = [i for i in asked if i not in bad]
    if not good:
        raise root_error(files.root, f'{list(bad.values())[-1]}, nor any other image of {files.split}')
    return torch.tensor(good)


def check_classes(files: Files, positions: torch.Tensor) -> None:
    """Raises a UserError if a class that has files has none at these positions."""
    lost = sorted(set(files.labels.tolist()) - set(files.labels[positions].tolist()))
    if files.class_names and lost:
        name = files.class_names[lost[0]]
        raise root_error(files.root, f'no images of the class {name!r}, expected at least one of each class')


def decode_all(files: Files, form: decoding.Form, bad: BadFiles) -> Generator[tuple[int, np.ndarray], None, None]:
    """Yields (index, uint8 `[H, W, C]`) for every readable file in order, and shows the progress."""
    # Close the generators when an error ends the loop. Later the garbage collector would, maybe while it holds up the
    # start of a thread; to end the threads of the pool there waits forever.
    with (
        contextlib.closing(_decode_chunks(files, form)) as done,
        contextlib.closing(
            console.watch(done, f'Reading {files.split}', len(files.paths), lambda item: len(item[1]))
        ) as watched,
    ):
        for first, chunk in watched:
            for i, pixels in enumerate(chunk, first):
                if isinstance(pixels, decoding.BadImage):
                    bad.add(i, str(pixels))
                else:
                    yield i, pixels


def _num_cpus() -> int:
    """Returns the number of CPUs this process may use; batch systems and containers may restrict it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _decode_chunks(files: Files, form: decoding.Form) -> Generator[_Chunk, None, None]:
    """Yields the index of each chunk's first file, and the pixels or the error of each of its files."""

    def decode_chunk(start: int) -> list[np.ndarray | decoding.BadImage]:
        stop = min(start + _CHUNK, len(files.paths))
        return [_decode_or_error(files, i, form) for i in range(start, stop)]

    # For tiny files Pillow holds the interpreter lock nearly all the time, and threads would slow it down.
    workers = _num_cpus() if files.paths.size(0) > 4096 else 1
    starts = range(0, len(files.paths), _CHUNK)
    with ThreadPoolExecutor(workers) as pool:
        waiting = []
        for start in [*starts, *[None] * (2 * workers)]:  # Decoded images are large, so limit how many wait.
            if start is not None:
                waiting.append((start, pool.submit(decode_chunk, start)))
            if waiting and (start is None or len(waiting) > 2 * workers):
                first, task = waiting.pop(0)
                yield first, task.result()


def _decode_or_error(files: Files, index: int, form: decoding.Form) -> np.ndarray | decoding.BadImage:
    try:
        return files.paths.decode(index, form)
    except decoding.BadImage as error:
        return error
