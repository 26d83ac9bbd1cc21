"""Streams a split: worker processes decode its images when they are needed.

This is built on PyTorch's DataLoader, with the job for a whole step in place of an index. Batches arrive in
the order of the jobs for any number of workers, and the contents of a job depend only on (seed, step).
"""

import contextlib
import errno
import functools
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from absl import logging

from byol_func.data import cutting, decoding
from byol_func.data.arrays import root_error
from byol_func.data.cache import Cache
from byol_func.data.examples import Batch, Examples, Files
from byol_func.data.folder import BadFiles, check_classes, good_ones
from byol_func.errors import UserError, counted
from byol_func.runtime.windows import center_window, crop_windows

# Parts of multiprocessing's error messages when the limit of open files is reached.
_NO_DESCRIPTORS = ('Too many open files', 'items of ancdata')


_SHARED = '/dev/shm'  # where workers store their batches on Linux


class _Source(NamedTuple):
    files: Files  # all files of the split
    form: decoding.Form
    max_bad_fraction: float
    num_workers: int
    cache: Cache | None = None
    device: torch.device = torch.device('cpu')  # where the batches are placed
    center_crop: tuple[int, float] | None = None  # image_size and fraction, for images of varying sizes
    part: torch.Tensor | None = None


class Stream(_Source, Examples):
    """One split that is read on demand from its files or from a cache of decoded images.

    With a `source_size`, batches hold squares of that side with the same pixels as a `Dataset`, and views are
    cropped on the device. Without it, images keep their varying sizes; the workers crop the views and round
    them to whole levels of 255.
    """

    @property
    def source_size(self) -> int:
        """The side of the stored squares; 0 if the sizes of the images vary."""
        return self.form.source_size

    @property
    def labels(self) -> torch.Tensor:
        """The labels, int64 `[N]` on the CPU."""
        return self.files.labels if self.part is None else self.files.labels[self.part]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; empty without labels."""
        return self.files.class_names

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        """(C, H, W) of every image; H and W are None if the sizes vary."""
        side = self.source_size or None
        return (self.form.num_channels, side, side)

    def take(self, indices: torch.Tensor) -> Self:
        """Returns the examples at these indices, int64 `[M]`, in that order."""
        return self._replace(part=self.positions[indices.cpu()])

    def batch(self, indices: torch.Tensor) -> Batch:
        """Reads the examples at these indices, int64 `[B]` on the CPU, in this process.

        Returns:
          {'images', 'labels'}; for images of varying sizes, 'view' with their centre crops replaces 'images'.
        """
        (batch,) = batches(self._replace(num_workers=0), [Job(indices.numpy(), {}, {})])
        return batch

    def to_device(self, device: torch.device | str) -> Self:
        """Returns the same stream with its batches on `device`."""
        return self._replace(device=torch.device(device))


class Job(NamedTuple):
    """One unit of work for a worker: the examples of a batch and how they are cropped."""

    indices: np.ndarray  # int64 [B]
    relative_crops: dict[str, np.ndarray]  # view -> [B, 4] from `sampling.sample_relative_crops`
    sizes: Mapping[str, int]  # view -> side of its crops


def batches(stream: Stream, jobs: Iterable[Job], skip_bad: bool = False) -> Iterator[Batch]:
    """Yields `{'images' or the views, 'labels'}` of every job, in order, on the stream's device.

    Files that cannot be read are counted and logged in this process. `max_bad_fraction` limits them relative to
    the whole split, even if the stream is a part of it.

    Args:
      stream: a split or a part of one.
      jobs: the jobs to run.
      skip_bad: whether to leave out bad files, as when a split is read into memory; 'rows', int64 `[B]`, then
        holds the indices of the examples in the batch. Otherwise the next file of the same class replaces a
        bad one.

    Raises:
      UserError: there are too many bad files, a class has no readable file, workers cannot be started, or a
        worker was killed.
    """
    bad = BadFiles(stream.files, stream.max_bad_fraction)
    done = _start(stream, jobs, skip_bad)
    while True:
        try:
            batch, found = next(done)
        except StopIteration:
            if skip_bad and bad.messages:
                good = good_ones(stream.files, bad.messages, stream.positions)
                if stream.part is None:
                    check_classes(stream.files, good)
            return
        except (RuntimeError, OSError, EOFError) as error:  # OSError, EOFError: a dead worker's shared memory.
            explained = _explain(error, stream.num_workers)
            if explained is None:
                raise
            raise explained from error
        if batch and stream.num_workers and not _has_tensors(batch):
            _tell_of_pipes(stream.num_workers)
        for index, message in found:
            bad.add(index, message)
        if batch is None and skip_bad:
            continue
        if batch is None:
            raise root_error(stream.files.root, f'{found[-1][1]}, nor any other image of its class')
        yield {name: torch.as_tensor(value).to(stream.device, non_blocking=True) for name, value in batch.items()}


@functools.cache  # Once per process: every evaluation streams anew.
def _tell_of_pipes(num_workers: int) -> None:
    logging.warning(
        '%s is too small for %s (config.dataset.num_workers), so images go through pipes, which '
        'is slower; docker run --shm-size=2g enlarges it',
        _SHARED,
        counted(num_workers, 'worker'),
    )


def _start(stream: Stream, jobs: Iterable[Job], skip_bad: bool) -> Iterator[Any]:
    """Starts the workers and returns the iterator over what `_Reader` returns for each job."""
    settings: dict[str, Any] = {}
    if stream.num_workers:
        if os.path.isdir(_SHARED) and not os.access(_SHARED, os.W_OK):
            raise UserError(
                f'config.dataset.num_workers={stream.num_workers}: workers need {_SHARED}, which is not writable '
                'here; expected 0, or a container in which it is'
            )
        # With any start method but fork, each worker would import everything again.
        method = 'fork' if 'fork' in multiprocessing.get_all_start_methods() else None
        settings = dict(num_workers=stream.num_workers, prefetch_factor=2, multiprocessing_context=method)
    with warnings.catch_warnings(), _signal_handlers_kept():
        warnings.simplefilter('ignore')  # Silence PyTorch's advice on num_workers: the user sets it.
        loader = torch.utils.data.DataLoader(
            _Reader(stream, skip_bad),
            sampler=jobs,
            batch_size=None,
            collate_fn=_as_it_is,
            pin_memory=stream.device.type == 'cuda',
            **settings,
        )
        try:
            return iter(loader)
        except OSError as error:
            accepted = f'0, or more room in {_SHARED}' if error.errno == errno.ENOSPC else 'fewer'
            raise UserError(
                f'config.dataset.num_workers={stream.num_workers}: cannot start them ({error.strerror or error}); '
                f'expected {accepted}'
            ) from error


def _explain(error: Exception, num_workers: int) -> UserError | None:
    """Returns the error to report if `error` is about worker processes; None for any other error."""
    if num_workers and any(sign in str(error) for sign in _NO_DESCRIPTORS):
        return UserError(
            f'config.dataset.num_workers={num_workers}: too many open files; expected fewer, '
            'or a higher limit by ulimit -n'
        )
    if not num_workers or isinstance(error, RuntimeError) and 'DataLoader worker' not in str(error):
        return None
    return UserError(
        f'config.dataset.num_workers={num_workers}: a worker process was killed; fewer workers need less memory'
    )


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Restores the SIGCHLD handler, because PyTorch's raises at any point when a worker dies.

    Waiting for a batch detects a dead worker too.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) != before:  # Only the main thread can get here.
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _share(batch: dict[str, Any]) -> dict[str, Any]:
    """Moves the images of a batch to shared memory, as tensors, if there is room for a batch from every worker.

    Otherwise they stay arrays, which are sent through a pipe. Labels always stay arrays, because each tensor
    from a worker keeps two files open for as long as it is referenced.
    """
    worker = torch.utils.data.get_worker_info()
    images = {name: value for name, value in batch.items() if name not in ('labels', 'rows')}
    if worker is not None and os.path.isdir(_SHARED):
        room = os.statvfs(_SHARED)
        needed = (worker.num_workers + 1) * sum(value.nbytes for value in images.values())
        if room.f_bavail * room.f_frsize < needed:
            return batch
    return batch | {name: torch.from_numpy(value) for name, value in images.items()}


def _has_tensors(batch: dict[str, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in batch.values())


def _as_it_is(example: Any) -> Any:
    return example


class _Reader(torch.utils.data.Dataset):
    """Runs jobs, in a worker or in the main process."""

    def __init__(self, stream: Stream, skip_bad: bool):
        self._skip_bad, self._positions = skip_bad, stream.positions.numpy()
        self._paths = stream.files.paths
        self._labels = stream.labels.numpy()
        self._form = stream.form
        self._cache = stream.cache
        self._images: np.ndarray | None = None
        self._center_crop = stream.center_crop

    def __getitem__(self, job: Job) -> tuple[dict[str, Any] | None, list[tuple[int, str]]]:
        """Returns the batch, or None if no readable file can fill it, and the bad files found."""
        found: list[tuple[int, str]] = []
        images, rows = [], []
        for index in job.indices.tolist():
            pixels = self._first_readable(index, found)
            if pixels is not None:
                images.append(pixels)
                rows.append(index)
            elif not self._skip_bad:
                return None, found
        if not images:
            return None, found
        batch = {'labels': self._labels[rows]}
        if self._skip_bad:
            batch['rows'] = np.array(rows)
        if self._form.source_size:
            batch['images'] = np.stack([pixels.transpose(2, 0, 1) for pixels in images])
            return _share(batch), found
        own_size, own_fraction = self._center_crop or (0, 1.0)
        sizes = torch.tensor([pixels.shape[:2] for pixels in images])
        if job.relative_crops:
            windows = {
                name: crop_windows(torch.from_numpy(crops), sizes).int().tolist()
                for name, crops in job.relative_crops.items()
            }
        else:
            windows = {'view': [center_window(height, width, own_fraction) for height, width in sizes.tolist()]}
        for name, of_images in windows.items():
            size = job.sizes.get(name) or own_size
            views = [cutting.cut(p, w, size) for p, w in zip(images, of_images, strict=True)]
            batch[name] = np.stack(views)
        return _share(batch), found

    def _first_readable(self, index: int, found: list[tuple[int, str]]) -> np.ndarray | None:
        """Returns the pixels of the file or, if it is bad and not to be skipped, of the next good one of its class."""
        for candidate in self._candidates(index):
            try:
                return self._read(candidate)
            except decoding.BadImage as error:
                found.append((int(self._positions[candidate]), str(error)))
        return None

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        if not self._skip_bad:
            members = np.flatnonzero(self._labels == self._labels[index])
            yield from np.roll(members, -int(np.searchsorted(members, index)))[1:].tolist()

    def _read(self, index: int) -> np.ndarray:
        position = int(self._positions[index])
        if self._cache is None:
            return self._paths.decode(position, self._form)
        if position in self._cache.bad:
            raise decoding.BadImage(self._cache.bad[position])
        if self._images is None:  # Each process maps the file itself.
            self._images = self._cache.images()
        return self._images[position].transpose(1, 2, 0)
