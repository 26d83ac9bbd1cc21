"""Datasets by name, and batches as functions of (seed, step). Namesake of `byol/utils/dataset.py`.

The official code streams ImageNet and crops images while decoding them. Here a split is one uint8 tensor, or a
stream if it is too large for memory. The images of step s depend only on (seed, s), so resuming a run does not
need the state of an iterator. The modules in `byol_func/data` read the images.
"""

import functools
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch

from byol_func import console
from byol_func.data import arrays, decoding, folder, levels, named, own_images, streaming
from byol_func.data.examples import AnyExamples, class_counts, split_train
from byol_func.data.examples import Batch as Batch
from byol_func.data.examples import Dataset as Dataset
from byol_func.data.examples import Examples as Examples
from byol_func.data.examples import Features as Features
from byol_func.data.examples import describe as describe
from byol_func.data.examples import split_mask as split_mask
from byol_func.data.streaming import Stream
from byol_func.errors import UserError, one_of
from byol_func.runtime import prng, transfer

MEAN_RGB = (0.485, 0.456, 0.406)
STDDEV_RGB = (0.229, 0.224, 0.225)

NAMES = tuple(dict.fromkeys(('folder', *named.SIDES, *named.FOLDERS)))


def normalize_images(images: torch.Tensor) -> torch.Tensor:
    """Returns (images - mean) / stddev with the statistics of ImageNet.

    Port of `dataset.normalize_images`; differences: channels come second, and there may be any number of them. If
    there are not three, every channel uses the averages over the colours (0.449 and 0.226).

    Args:
      images: float `[B, C, H, W]` in [0, 1].
    """
    statistics: tuple[Sequence[float], Sequence[float]] = (MEAN_RGB, STDDEV_RGB)
    if images.shape[1] != 3:
        statistics = (sum(MEAN_RGB) / 3,), (sum(STDDEV_RGB) / 3,)
    mean, stddev = (transfer.constants(values, images)[:, None, None] for values in statistics)
    return (images - mean) / stddev


def load_train_and_test(
    *, fraction: float, eval_split: str, val_fraction: float, **source
) -> tuple[Examples, Examples | None]:
    """Loads the training set and the evaluation set; the keyword arguments are `config.dataset`.

    Args:
      fraction: the fraction of each class of the training set to use; `split_train` draws it.
      eval_split: 'test', or 'val' to evaluate on a held-out part of the training set, for choosing settings
        without using the test set; or 'none' to train on all images as if they had no labels.
      val_fraction: the fraction of each class that is held out for 'val'.
      **source: the arguments of `load`.

    Returns:
      Both sets; the second is None if there are no labels to evaluate with.

    Raises:
      UserError: `load` fails, a value is out of range, or a class is too small to be split.
    """
    one_of('config.dataset.eval_split', eval_split, ('test', 'val', 'none'))
    if not 0.0 < fraction <= 1.0:
        raise UserError(f'config.dataset.fraction={fraction}: expected a number above 0, at most 1')
    if not 0.0 < val_fraction < 1.0:
        raise UserError(f'config.dataset.val_fraction={val_fraction}: expected a number above 0, below 1')
    # Load the test set first: it is smaller, so its errors show sooner. 'val' does not need a test set.
    test: Examples | None = load('test', **source) if eval_split == 'test' else None
    train: Examples | None = load('train', **source)
    assert train is not None  # Only a test set may be None, if there are no labels.
    if eval_split == 'val':
        if not train.class_names:
            raise UserError(f"config.dataset.eval_split={eval_split!r}: no labels to evaluate with; expected 'test'")
        test, train = split_train(train, val_fraction)
        counts = class_counts(train)
        if 0 in counts:
            name = train.class_names[counts.index(0)]
            raise UserError(
                f'config.dataset.eval_split={eval_split!r}: the class {name!r} has a single image; '
                'expected at least two of each class'
            )
    if source['name'] in named.FOLDERS and isinstance(train, Dataset) and isinstance(test, Dataset):
        folder.warn_of_copies(train, test, eval_split)
    train = split_train(train, fraction)[0] if fraction < 1.0 else train
    return (_without_labels(train) if eval_split == 'none' else train), test


def _without_labels(data: Examples) -> Examples:
    assert isinstance(data, (Dataset, Stream))
    files = data.files._replace(labels=torch.zeros_like(data.files.labels), class_names=()) if data.files else None
    if isinstance(data, Dataset):
        return data._replace(labels=torch.zeros_like(data.labels), class_names=(), files=files)
    assert files is not None
    return data._replace(files=files)


def load(
    split: str,
    *,
    name: str,
    root: str,
    source_size: int,
    grayscale: bool,
    max_gib: float,
    max_bad_fraction: float,
    num_workers: int,
    cache_dir: str,
    exif_orientation: bool = False,
    value_range: Sequence[Any] = (),
    channels: int = 0,
    allow_empty: bool = False,
) -> Dataset | Stream | None:
    """Reads a whole split into memory, or prepares to stream a folder that is too large for that.

    Counterpart of `dataset.load`; differences: other datasets; `batch_indices` does the shuffling, and
    `augmentations` does the cropping if all images have one size.

    Args:
      split: 'train' or 'test'.
      name: 'digits' (scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, nothing to download);
        'cifar10', 'cifar100', 'emnist_letters' or another split of EMNIST, 'tiny_imagenet', 'imagenette',
        'stl10' (its images without labels and its training images, to pre-train on) or 'stl10_labeled' (its
        training and its test set), all downloaded into `root` if missing; or 'folder' (images in
        root/train/CLASS and, for test, root/test/CLASS, or root/val/CLASS if there is no root/test; or images
        without labels in root/train); or 'shards' (the same in tar files, see `shards.list_shards`), of which all
        holds that is said of a folder below.
      root: the folder of the data, or for shards a list or a pattern; 'digits' does not use it.
      source_size: 0 keeps the images' own size, which must be the same for all images in memory; otherwise a
        folder's images are resized so that the shorter side has this length, and the central square is kept.
      grayscale: whether to read a folder's images with one channel instead of three.
      max_gib: the largest size in GiB of the images of one split in memory; a larger folder is streamed.
      max_bad_fraction: the fraction of a folder's files that may be left out because they cannot be
        read; when training on a stream, the next file of the same class replaces them.
      num_workers: number of processes that decode a streamed folder; 0 decodes in this process.
      cache_dir: folder that caches the decoded images of a folder for later runs; '' for no cache.
      exif_orientation: whether to rotate a folder's photographs according to their EXIF data, as viewers do;
        the official code and torchvision's ImageFolder leave them as stored.
      value_range: the smallest and the largest value in a folder's files of more than 8 bits, such as
        (0, 4095) for a 12-bit camera, which become black and white; () for 0 and 65535. With `channels`, it may
        be such a pair for each channel.
      channels: the number of channels that a folder's TIFF and `.npy` files have and keep; with a number other than
        1 and 3, files of other formats are ignored. 0 converts all images to three channels, or one if `grayscale`.
      allow_empty: whether class folders may be empty.

    Returns:
      The split; None for the test split of a folder without labels, or of 'stl10'.

    Raises:
      UserError: the data cannot be loaded as requested; the message says why and what to change.
    """
    one_of('split', split, ('train', 'test'))
    one_of('config.dataset.name', name, NAMES)
    _check_options(name, source_size, grayscale, cache_dir, tuple(value_range), channels)
    if not root and name != 'digits':
        raise arrays.root_error(root, f'expected a folder, for config.dataset.name={name!r}')
    root = os.path.expanduser(root)
    if name in named.SIDES:
        return named.load(split, name, root, max_gib)
    form = decoding.Form(
        source_size, grayscale, exif_orientation, levels.as_range(tuple(value_range), channels), channels
    )
    return own_images.load_folder(
        split,
        name,
        named.folder_of(name, root),
        form,
        max_gib=max_gib,
        max_bad_fraction=max_bad_fraction,
        num_workers=num_workers,
        cache_dir=cache_dir,
        allow_empty=allow_empty,
    )


def _check_options(
    name: str, source_size: int, grayscale: bool, cache_dir: str, value_range: tuple[Any, ...], channels: int
) -> None:
    """Raises a UserError about an option of `load` that does not suit the data set."""
    own_size, is_folder = named.SIDES.get(name), name in named.FOLDERS
    unless = 'unless config.dataset.name is folder or shards'
    if source_size < 0 or (own_size and source_size not in (0, own_size)):
        expected = f'expected 0 or {own_size or "a side in pixels"}'
        raise UserError(f'config.dataset.source_size={source_size}: {expected}')
    if grayscale and not is_folder:
        raise UserError(f'config.dataset.grayscale=True: expected False {unless}')
    if value_range and not is_folder:
        raise UserError(f'config.dataset.value_range={value_range}: expected () {unless}')
    if channels and not is_folder:
        raise UserError(f'config.dataset.channels={channels}: expected 0 {unless}')
    if channels > 1 and grayscale:
        raise UserError(f'config.dataset.channels={channels}: expected 0 or 1 beside config.dataset.grayscale=True')
    if cache_dir and not (is_folder and source_size):
        raise UserError(f"config.dataset.cache_dir={cache_dir!r}: expected '' {unless}, with a source_size")


def batch_indices(step: int, *, seed: int, num_examples: int, batch_size: int) -> torch.Tensor:
    """Returns the example indices of one training step, in an endless stream of reshuffled epochs.

    The permutations of the epochs 0, 1, 2, ... are concatenated, and step s takes the entries
    s * batch_size to (s + 1) * batch_size - 1. Every epoch thus contains each example once, no examples are
    dropped at its end, and a batch may span epochs.

    Replaces `ds.shuffle` of the official `dataset.load`, which shuffles within ten batches.
    The result, int64 `[batch_size]` on the CPU, depends only on the arguments.
    """
    start, stop = step * batch_size, (step + 1) * batch_size
    pieces = []
    for epoch in range(start // num_examples, (stop - 1) // num_examples + 1):
        first = epoch * num_examples
        order = _permutation(seed, epoch, num_examples)
        pieces.append(order[max(start - first, 0) : stop - first])
    return torch.cat(pieces)  # a copy, which protects the cached permutations


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_examples: int) -> torch.Tensor:
    return torch.randperm(num_examples, generator=prng.fold_in(seed, 'permutation', epoch))


def check_batch_size(field: str, batch_size: int, num_examples: int, num_replicas: int = 1, k: int = 1) -> None:
    """Raises a UserError about `field` unless the batch fits the dataset and the k micro-batches of every replica."""
    where = f'{field}={batch_size}'
    if not 1 <= batch_size <= num_examples:
        raise UserError(f'{where}: expected 1 to {num_examples}, the number of training images')
    if batch_size % (parts := num_replicas * k):
        factors = ['the number of replicas'] * (num_replicas > 1) + [f'config.accumulate_steps={k}'] * (k > 1)
        raise UserError(f'{where}: expected a multiple of {parts}, {" times ".join(factors)}')


def train_batch(
    dataset: Examples, step: int, *, seed: int, batch_size: int, rank: int = 0, num_replicas: int = 1
) -> Batch:
    """Returns replica `rank`'s part of a step's batch; the parts in the order of the ranks form the batch.

    Returns:
      {'images': uint8 `[batch_size / num_replicas, C, H, W]`, 'labels'}, on the dataset's device; for a
      stream of images of varying sizes, 'view' with their centre crops replaces 'images'.

    Raises:
      UserError: the batch size does not fit the dataset or the number of replicas.
    """
    return dataset.batch(_indices_of(dataset, step, seed, batch_size, rank, num_replicas))


def _indices_of(dataset, step: int, seed: int, batch_size: int, rank: int, num_replicas: int) -> torch.Tensor:
    num_examples = dataset.num_examples
    check_batch_size('config.batch_size', batch_size, num_examples, num_replicas)
    indices = batch_indices(step, seed=seed, num_examples=num_examples, batch_size=batch_size)
    share = batch_size // num_replicas
    return indices[rank * share : (rank + 1) * share]


def train_batches(
    dataset: Examples,
    steps: range,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    num_replicas: int = 1,
    relative_crops: Callable[[int], Mapping[str, torch.Tensor]] | None = None,
    image_size: int | Mapping[str, int] = 0,
) -> Generator[Batch, None, None]:
    """Yields the `train_batch` of each step; a stream's workers prepare the next batches in the background.

    Args:
      dataset: the training set.
      steps: the steps to yield batches for.
      seed: seed of the shuffling.
      batch_size: total batch size over all replicas.
      rank: rank of this replica.
      num_replicas: number of replicas.
      relative_crops: step -> {view: `[batch_size, 4]` from `sampling.sample_relative_crops`}, used for a stream of
        images of varying sizes: its batches then hold these views, uint8 `[B, C, S, S]`.
      image_size: S, or view -> S.
    """
    if not isinstance(dataset, Stream):
        for step in steps:
            yield train_batch(dataset, step, seed=seed, batch_size=batch_size, rank=rank, num_replicas=num_replicas)
        return

    def job(step: int) -> streaming.Job:
        own = {}
        if relative_crops and not dataset.source_size:
            own = {name: of_all.chunk(num_replicas)[rank].numpy() for name, of_all in relative_crops(step).items()}
        sizes = image_size if isinstance(image_size, Mapping) else dict.fromkeys(own, image_size)
        indices = _indices_of(dataset, step, seed, batch_size, rank, num_replicas)
        return streaming.Job(indices.numpy(), own, sizes)

    yield from streaming.batches(dataset, _Lazily(job, steps))


class _Lazily:
    """An iterable of job(step) for every step, which computes each job on demand and can be iterated repeatedly."""

    def __init__(self, job: Callable[[int], streaming.Job], steps: range):
        self._job, self._steps = job, steps

    def __iter__(self) -> Iterator[streaming.Job]:
        return map(self._job, self._steps)

    def __len__(self) -> int:
        return len(self._steps)


def part_read(dataset: AnyExamples, rows: torch.Tensor) -> AnyExamples:
    """Returns the part of a dataset that `eval_batches` yielded, given the concatenated 'rows' of all batches."""
    return dataset if len(rows) == dataset.num_examples else dataset.take(rows)


def eval_batches(
    dataset: Examples, batch_size: int, what: str = 'Evaluating', *, rank: int = 0, num_replicas: int = 1
) -> Iterator[Batch]:
    """Yields the whole dataset in order as {'images', 'labels', 'rows'}; the last batch may be short.

    Replicas that share the work give their `rank` and get every `num_replicas`-th batch.

    'rows', int64 `[B]`, are the examples' indices in the dataset. Unreadable files of a stream are left out, so
    count the examples actually yielded.
    If it takes long, a progress bar or log lines show how far `what` has come.
    A stream of images of varying sizes yields their centre crops as 'view', uint8 `[B, C, S, S]`.
    """
    parts = torch.arange(dataset.num_examples).split(batch_size)[rank::num_replicas]
    if isinstance(dataset, Stream):
        jobs = [streaming.Job(rows.numpy(), {}, {}) for rows in parts]
        batches = streaming.batches(dataset, jobs, skip_bad=True) if jobs else iter(())
    else:
        batches = (dataset.batch(rows) | {'rows': rows.to(dataset.labels.device)} for rows in parts)
    yield from console.watch(batches, what, sum(map(len, parts)), lambda batch: len(batch['labels']))
