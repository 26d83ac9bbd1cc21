"""A split whose images are decoded when they are needed, by worker processes.

PyTorch's DataLoader carries it: one of its "indices" is the job of a whole step, and jobs are done in
order whatever the number of workers. What is in a job follows from (seed, step) alone.
"""

import contextlib
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
from byol_func.errors import UserError
from byol_func.runtime.windows import center_window, crop_windows

# What multiprocessing says where a process may open no more files.
_NO_DESCRIPTORS = ('Too many open files', 'items of ancdata')


_SHARED = '/dev/shm'  # where workers put their batches, on Linux


class _Source(NamedTuple):
    files: Files  # of the whole split
    form: decoding.Form
    max_bad_fraction: float
    num_workers: int
    cache: Cache | None = None
    device: torch.device = torch.device('cpu')  # of the batches
    center_crop: tuple[int, float] | None = None  # image_size and fraction, for images of own sizes
    part: torch.Tensor | None = None


class Stream(_Source, Examples):
    """One split, read from its files or from a cache of decoded images while it is used.

    With a `source_size` the batches hold squares of that side, the very pixels of a `Dataset`, and
    views are cut from them on the device. Without, images have their own sizes: views are cut by the
    workers, and rounded to whole levels of 255.
    """

    @property
    def source_size(self) -> int:
        """The side of the stored squares; 0 if images have their own sizes."""
        return self.form.source_size

    @property
    def labels(self) -> torch.Tensor:
        """int64 `[N]` on the CPU."""
        return self.files.labels if self.part is None else self.files.labels[self.part]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the labels; none without labels."""
        return self.files.class_names

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        """(C, H, W) of every image; H and W are None if images have their own sizes."""
        side = self.source_size or None
        return (1 if self.form.grayscale else 3, side, side)

    def take(self, indices: torch.Tensor) -> Self:
        """The examples of these indices, int64 `[M]`, in that order."""
        return self._replace(part=self.positions[indices.cpu()])

    def batch(self, indices: torch.Tensor) -> Batch:
        """The examples of these indices, int64 `[B]` on the CPU, read in this process.

        Returns:
          {'images', 'labels'}; of images of own sizes their centre crops as 'view'.
        """
        (batch,) = batches(self._replace(num_workers=0), [Job(indices.numpy(), {}, {})])
        return batch

    def to_device(self, device: torch.device | str) -> Self:
        """The same stream with its batches on `device`."""
        return self._replace(device=torch.device(device))


class Job(NamedTuple):
    """What a worker does at once: the examples of a batch and how they are cut."""

    indices: np.ndarray  # int64 [B]
    crops: dict[str, np.ndarray]  # view -> [B, 4] of `sampling.sample_crops`
    sizes: Mapping[str, int]  # view -> the side of its squares


def batches(stream: Stream, jobs: Iterable[Job], skip_bad: bool = False) -> Iterator[Batch]:
    """Yields `{'images' or the views, 'labels'}` of every job, in order, on the stream's device.

    A file that cannot be read is counted and listed in this process. Of the whole split as many may
    be bad as `max_bad_fraction` says, whatever part of it the stream is.

    Args:
      stream: a split or a part of one.
      jobs: what to read.
      skip_bad: a bad file is left out, as it is where a split is read into memory, and 'rows', int64
        `[B]`, tells which examples there are; otherwise the next one of its class takes its place.

    Raises:
      UserError: there are too many bad files, nothing else is left of a class, or a worker was ended
        from outside.
    """
    bad = BadFiles(stream.files, stream.max_bad_fraction)
    settings: dict[str, Any] = {}
    if stream.num_workers:
        if os.path.isdir(_SHARED) and not os.access(_SHARED, os.W_OK):
            raise UserError(
                f'config.dataset.num_workers={stream.num_workers}: workers need {_SHARED}, which cannot be written '
                'here; expected 0, or a container with a writable one'
            )
        # Started in another way than by fork, each worker would import everything anew.
        method = 'fork' if 'fork' in multiprocessing.get_all_start_methods() else None
        settings = dict(num_workers=stream.num_workers, prefetch_factor=2, multiprocessing_context=method)
    with warnings.catch_warnings(), _signal_handlers_kept():
        warnings.simplefilter('ignore')  # PyTorch's advice on the number of workers: it is the user's.
        loader = torch.utils.data.DataLoader(
            _Reader(stream, skip_bad),
            sampler=jobs,
            batch_size=None,
            collate_fn=_as_it_is,
            pin_memory=stream.device.type == 'cuda',
            **settings,
        )
        try:
            done = iter(loader)
        except OSError as error:
            raise UserError(
                f'config.dataset.num_workers={stream.num_workers}: cannot start them ({error.strerror or error}); '
                'expected fewer'
            ) from error
    told = False
    while True:
        try:
            batch, found = next(done)
        except StopIteration:
            if skip_bad and bad.messages:
                good = good_ones(stream.files, bad.messages, stream.positions)
                if stream.part is None:
                    check_classes(stream.files, good)
            return
        except (RuntimeError, OSError, EOFError) as error:  # The last two: its memory went with it.
            if stream.num_workers and any(sign in str(error) for sign in _NO_DESCRIPTORS):
                raise UserError(
                    f'config.dataset.num_workers={stream.num_workers}: too many open files; expected fewer, '
                    'or a higher limit by ulimit -n'
                ) from error
            if not stream.num_workers or isinstance(error, RuntimeError) and 'DataLoader worker' not in str(error):
                raise
            raise UserError(
                f'config.dataset.num_workers={stream.num_workers}: a worker process was ended from outside; '
                'fewer workers need less memory'
            ) from error
        if batch and stream.num_workers and not told and not _has_tensors(batch):
            told = True
            logging.warning(
                '%s has too little room for %d workers (config.dataset.num_workers): images come through pipes, which '
                'is slower; more room is given by docker run --shm-size=2g',
                _SHARED,
                stream.num_workers,
            )
        for index, message in found:
            bad.add(index, message)
        if batch is None and skip_bad:
            continue
        if batch is None:
            raise root_error(stream.files.root, f'{found[-1][1]}, nor any other of its class')
        yield {name: torch.as_tensor(value).to(stream.device, non_blocking=True) for name, value in batch.items()}


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """PyTorch's handler would raise the end of a worker anywhere; waiting for a batch finds it too."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) != before:  # Then this is the main thread.
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _share(batch: dict[str, Any]) -> dict[str, Any]:
    """Puts the images of a batch into shared memory, as tensors, if there is room for a batch of every worker.

    Arrays travel through a pipe instead, as labels always do: a tensor of a worker keeps two files open for
    as long as somebody keeps it.
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
    """Does jobs, in whichever process."""

    def __init__(self, stream: Stream, skip_bad: bool):
        self._skip_bad, self._positions = skip_bad, stream.positions.numpy()
        # One array: workers share its memory, while counting references would copy a tuple's.
        self._paths = np.array([os.fsencode(stream.files.paths[i]) for i in self._positions])
        self._labels = stream.labels.numpy()
        self._form = stream.form
        self._cache = stream.cache
        self._images: np.ndarray | None = None
        self._center_crop = stream.center_crop

    def __getitem__(self, job: Job) -> tuple[dict[str, Any] | None, list[tuple[int, str]]]:
        """The batch, or None if nothing is readable that could be in it; and the bad files met."""
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
        if job.crops:
            windows = {
                name: crop_windows(torch.from_numpy(crops), sizes).int().tolist() for name, crops in job.crops.items()
            }
        else:
            windows = {'view': [center_window(height, width, own_fraction) for height, width in sizes.tolist()]}
        for name, of_images in windows.items():
            size = job.sizes.get(name) or own_size
            views = [cutting.cut(p, w, size) for p, w in zip(images, of_images, strict=True)]
            batch[name] = np.stack(views)
        return _share(batch), found

    def _first_readable(self, index: int, found: list[tuple[int, str]]) -> np.ndarray | None:
        """Pixels of the file or, if it is bad and not to be skipped, of the next good one of its class."""
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
        if self._cache is None:
            return decoding.decode_file(os.fsdecode(self._paths[index]), self._form)
        position = int(self._positions[index])
        if position in self._cache.bad:
            raise decoding.BadImage(self._cache.bad[position])
        if self._images is None:  # Every process maps the file for itself.
            self._images = self._cache.images()
        return self._images[position].transpose(1, 2, 0)
