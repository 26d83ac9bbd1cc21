"""Images in memory, and batches as functions of (seed, step). Namesake of `byol/utils/dataset.py`.

The official code streams ImageNet and crops while it decodes. Here a split is one uint8 tensor;
which images make up step s follows from (seed, s) alone, so that resuming needs no iterator.
"""

import functools
import math
import os
import socket
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import NamedTuple

import numpy as np
import torch
import tqdm
from PIL import Image, ImageOps

from byol_func.runtime import prng
from byol_func.utils.helpers import UserError, one_of

Batch = dict[str, torch.Tensor]

MEAN_RGB = (0.485, 0.456, 0.406)
STDDEV_RGB = (0.229, 0.224, 0.225)

_CHUNK = 64  # images per task of the thread pool: one 32 px image is too little work for a task
_NETWORK_TIMEOUT = 20.0  # seconds without a byte
_LAYOUT = 'expected DIR/train/CLASS/* and DIR/test/CLASS/*'


class Dataset(NamedTuple):
    """One split, held in memory on one device."""

    images: torch.Tensor  # uint8 [N, C, H, W]
    labels: torch.Tensor  # int64 [N], in 0..num_classes-1
    class_names: tuple[str, ...]

    @property
    def num_examples(self) -> int:
        return self.images.shape[0]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def to_device(dataset: Dataset, device: torch.device | str) -> Dataset:
    """The same dataset on `device`."""
    return dataset._replace(images=dataset.images.to(device), labels=dataset.labels.to(device))


def class_counts(dataset: Dataset) -> list[int]:
    """How many examples each class has, in the order of `class_names`."""
    return torch.bincount(dataset.labels, minlength=dataset.num_classes).tolist()


def normalize_images(images: torch.Tensor) -> torch.Tensor:
    """(images - mean) / stddev with the statistics of ImageNet.

    Port of `dataset.normalize_images`; differences: channels come second, and images of one channel
    are accepted, with the averages over the colours (0.449 and 0.226).

    Args:
      images: float `[B, 3, H, W]` or `[B, 1, H, W]` in [0, 1].

    Raises:
      ValueError: another number of channels.
    """
    mean, stddev = MEAN_RGB, STDDEV_RGB
    if images.shape[1] == 1:
        mean, stddev = (sum(mean) / 3,), (sum(stddev) / 3,)
    elif images.shape[1] != 3:
        raise ValueError(f'images of shape {tuple(images.shape)}: expected 1 or 3 channels')
    mean, stddev = images.new_tensor((mean, stddev))[:, :, None, None]
    return (images - mean) / stddev


def load(split: str, *, name: str, root: str, source_size: int, max_gib: float) -> Dataset:
    """Reads a whole split into memory; the keyword arguments are `config.dataset`.

    Counterpart of `dataset.load`; differences: other datasets, held in memory; shuffling is left to
    `batch_indices`, cropping to `augmentations`.

    Args:
      split: 'train' or 'test'.
      name: 'digits' (scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, nothing to download),
        'cifar10' (downloaded into `root` if it is not there) or 'folder' (images in
        root/train/CLASS and root/test/CLASS, or root/val/CLASS if there is no root/test).
      root: the folder of the data; not used by 'digits'.
      source_size: 0 keeps the images' own size, which must be the same for all; otherwise the
        shorter side of a folder's images is resized to it, and the middle square is kept.
      max_gib: the most GiB that the images of one split may take.

    Raises:
      UserError: the data cannot be had as asked; the message says why and what would do.
    """
    one_of('split', split, ('train', 'test'))
    loader = one_of('config.dataset.name', name, _LOADERS)
    own_size = {'digits': 8, 'cifar10': 32}.get(name)
    if source_size < 0 or (own_size and source_size not in (0, own_size)):
        expected = f'expected 0 or {own_size or "a side in pixels"}'
        raise UserError(f'config.dataset.source_size={source_size}: {expected}')
    if not root and name != 'digits':
        raise _root_error(root, f'expected a folder, for config.dataset.name={name!r}')
    return loader(split, os.path.expanduser(root), source_size, max_gib)


def batch_indices(step: int, *, seed: int, num_examples: int, batch_size: int) -> torch.Tensor:
    """The examples of one step of an endless, reshuffled pass over the data.

    The permutations of the epochs 0, 1, 2, ... are laid end to end; step s takes the numbers
    s * batch_size to (s + 1) * batch_size - 1. So every epoch holds each example once, nothing is
    dropped at its end, and a batch may span epochs.

    Replaces `ds.shuffle` of the official `dataset.load`, which shuffles within ten batches.
    Returns int64 `[batch_size]` on the CPU, a function of the arguments and nothing else.
    """
    start, stop = step * batch_size, (step + 1) * batch_size
    pieces = []
    for epoch in range(start // num_examples, (stop - 1) // num_examples + 1):
        first = epoch * num_examples
        order = _permutation(seed, epoch, num_examples)
        pieces.append(order[max(start - first, 0) : stop - first])
    return torch.cat(pieces)  # a copy, so that the cached permutations stay as they are


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_examples: int) -> torch.Tensor:
    return torch.randperm(num_examples, generator=prng.fold_in(seed, 'permutation', epoch))


def check_batch_size(field: str, batch_size: int, num_examples: int, num_replicas: int = 1) -> None:
    """Raises a UserError about `field` unless the batch fits the data set and the replicas."""
    where = f'{field}={batch_size}'
    if not 1 <= batch_size <= num_examples:
        raise UserError(f'{where}: at most {num_examples}, the number of training images, and at least 1')
    if batch_size % num_replicas:
        raise UserError(f'{where}: expected a multiple of {num_replicas}, the number of replicas')


def train_batch(
    dataset: Dataset, step: int, *, seed: int, batch_size: int, rank: int = 0, num_replicas: int = 1
) -> Batch:
    """Replica `rank`'s part of a step's batch; in order of the ranks, the parts are the batch.

    Returns:
      {'images': uint8 `[batch_size / num_replicas, C, H, W]`, 'labels'}, on the dataset's device.

    Raises a UserError if the batch does not fit the data set or the replicas.
    """
    num_examples = dataset.num_examples
    check_batch_size('config.batch_size', batch_size, num_examples, num_replicas)
    indices = batch_indices(step, seed=seed, num_examples=num_examples, batch_size=batch_size)
    share = batch_size // num_replicas
    indices = indices[rank * share : (rank + 1) * share].to(dataset.images.device)
    return {'images': dataset.images[indices], 'labels': dataset.labels[indices]}


def eval_batches(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """Yields the whole dataset in order as {'images', 'labels'}; the last batch may be short."""
    for images, labels in zip(dataset.images.split(batch_size), dataset.labels.split(batch_size)):
        yield {'images': images, 'labels': labels}


def _load_digits(split: str, root: str, source_size: int, max_gib: float) -> Dataset:
    """The bundled digits: of each class the 5th, 10th, ... image is test, the others are train."""
    del root
    import sklearn.datasets  # slow to import, and only this loader needs it

    digits = sklearn.datasets.load_digits()
    is_test = np.zeros(len(digits.target), bool)
    for label in range(10):
        is_test[np.flatnonzero(digits.target == label)[4::5]] = True
    chosen = is_test if split == 'test' else ~is_test
    _check_memory(int(chosen.sum()), (1, 8, 8), max_gib)
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # 17 levels, 0..16
    return Dataset(
        images=torch.from_numpy(images[:, None]),
        labels=torch.from_numpy(digits.target[chosen].astype(np.int64)),
        class_names=tuple(str(name) for name in digits.target_names),
    )


def _load_cifar10(split: str, root: str, source_size: int, max_gib: float) -> Dataset:
    """CIFAR-10 in its original order; torchvision downloads it, shows progress and checks it."""
    import torchvision.datasets

    _check_memory(50_000 if split == 'train' else 10_000, (3, 32, 32), max_gib)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_NETWORK_TIMEOUT)  # torchvision sets none and might wait for ever
    try:
        # The files are pickles, but torchvision unpickles none whose md5 is not the official one.
        cifar10 = torchvision.datasets.CIFAR10(root, train=split == 'train', download=True)
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
        what = (
            f'cannot download CIFAR-10 ({_one_line(error)}); put cifar-10-python.tar.gz into '
            f'{os.path.abspath(root)!r}, or use class folders of images: '
            '--config=configs/folder.py --config.dataset.root=DIR'
        )
        raise _root_error(root, what) from error
    finally:
        socket.setdefaulttimeout(timeout)
    images = torch.from_numpy(cifar10.data).permute(0, 3, 1, 2).contiguous()
    return Dataset(images, torch.tensor(cifar10.targets), tuple(cifar10.classes))


def _load_folder(split: str, root: str, source_size: int, max_gib: float) -> Dataset:
    """Images in class folders, as RGB, in the order of `torchvision.datasets.ImageFolder`."""
    paths, labels, class_names = _list_folder(split, root)
    height, width = _decode(paths[0], source_size, root).shape[:2]
    _check_memory(len(paths), (3, height, width), max_gib)
    images = np.empty((len(paths), 3, height, width), np.uint8)

    def decode_chunk(start: int) -> int:
        chunk = paths[start : start + _CHUNK]
        for i, path in enumerate(chunk, start):
            pixels = _decode(path, source_size, root)
            if pixels.shape[:2] != (height, width):
                size = f'{pixels.shape[1]} x {pixels.shape[0]}'
                raise UserError(
                    f'config.dataset.source_size=0: {paths[0]!r} is {width} x {height} pixels, '
                    f'{path!r} is {size}; set config.dataset.source_size to resize them to one size'
                )
            images[i] = pixels.transpose(2, 0, 1)
        return len(chunk)

    # On tiny files Pillow holds the interpreter's lock nearly all the time: threads would slow it.
    workers = os.cpu_count() if os.path.getsize(paths[0]) > 4096 else 1
    bar = tqdm.tqdm(total=len(paths), desc=f'Reading {split}', unit=' images', disable=None)
    with ThreadPoolExecutor(workers) as pool, bar:  # disable=None: no bar except on a terminal
        for done in pool.map(decode_chunk, range(0, len(paths), _CHUNK)):
            bar.update(done)
    return Dataset(torch.from_numpy(images), torch.tensor(labels), class_names)


def _list_folder(split: str, root: str) -> tuple[list[str], list[int], tuple[str, ...]]:
    """The paths and labels of a split, sorted by class and path, and the names of the classes."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    try:
        folder, class_names = _find_classes(split, root)
        files = [_list_files(os.path.join(folder, n), IMG_EXTENSIONS) for n in class_names]
    except OSError as error:
        what = f'cannot read {error.filename!r} ({error.strerror})'
        raise _root_error(root, f'{what}; {_LAYOUT}') from error
    for name, found in zip(class_names, files):
        if not found:
            accepted = f'expected files ending in {", ".join(IMG_EXTENSIONS)}'
            raise _root_error(root, f'no images in {os.path.join(folder, name)!r}; {accepted}')
    paths = [path for found in files for path in found]
    labels = [label for label, found in enumerate(files) for _ in found]
    return paths, labels, class_names


def _find_classes(split: str, root: str) -> tuple[str, tuple[str, ...]]:
    """The folder of a split, and the classes, which train and test must have in common."""
    present = _subfolders(root)
    held_out = 'val' if 'val' in present and 'test' not in present else 'test'
    classes = {}
    for name in ('train', held_out):
        folder = os.path.join(root, name)
        if name not in present:
            raise _root_error(root, f'there is no folder {folder!r}; {_LAYOUT}')
        classes[name] = _subfolders(folder)
        if not classes[name]:
            raise _root_error(root, f'no class folders in {folder!r}; {_LAYOUT}')
    train, test = classes.values()
    if train != test:
        lone = sorted(set(train) ^ set(test))
        shown = [f'{n!r} (only in {"train" if n in train else held_out})' for n in lone[:3]]
        what = f'the splits differ in classes: {", ".join(shown)}{", ..." * (len(lone) > 3)}'
        raise _root_error(root, f'{what}; {_LAYOUT}')
    if len(train) == 1:
        raise _root_error(root, f'expected at least two classes, but {train[0]!r} is the only one')
    return os.path.join(root, 'train' if split == 'train' else held_out), tuple(train)


def _subfolders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _list_files(folder: str, extensions: tuple[str, ...]) -> list[str]:
    """The files with one of the extensions, at any depth, in torchvision's order."""

    def fail(error: OSError) -> None:  # os.walk and ImageFolder pass over what they cannot open
        raise error

    walk = sorted(os.walk(folder, onerror=fail, followlinks=True))
    files = [os.path.join(parent, name) for parent, _, names in walk for name in sorted(names)]
    return [path for path in files if path.lower().endswith(extensions)]


def _decode(path: str, source_size: int, root: str) -> np.ndarray:
    """Reads one image file as uint8 `[H, W, 3]`; `root` is for the error message."""
    try:
        with Image.open(path) as file:
            image = _to_rgb(file)
            if source_size:
                # Resizes the shorter side and keeps the middle, without resizing what is cut off.
                image = ImageOps.fit(image, (source_size, source_size), Image.Resampling.BICUBIC)
            return np.asarray(image)
    except Exception as error:  # on a damaged file Pillow's decoders raise what they stumble over
        what = f'cannot read the image {path!r} ({_one_line(error)})'
        raise _root_error(root, f'{what}; repair or remove it') from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB; ValueError for 32 bits, whose range is not known.

    Values of 16 bits are divided by 257, where Pillow would clip them at 255. Transparent images
    are laid on white, where Pillow (and ImageFolder) would bring out the hidden colours. The
    orientation noted in a photo's EXIF is ignored, as by ImageFolder and by the official code.
    """
    if image.mode.startswith(('I', 'F')):
        values = np.asarray(image)
        if image.mode == 'F' or values.min() < 0 or values.max() > 65535:
            raise ValueError(f'mode {image.mode}: expected at most 16 bits per channel')
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image if image.mode == 'RGB' else image.convert('RGB')


def _root_error(root: str, what: str) -> UserError:
    return UserError(f'config.dataset.root={root!r}: {what}')


def _check_memory(num_examples: int, shape: tuple[int, int, int], max_gib: float) -> None:
    gib = num_examples * math.prod(shape) / 2**30
    if gib > max_gib:
        size, needed = ' x '.join(map(str, shape)), math.ceil(gib * 1000) / 1000
        raise UserError(
            f'config.dataset.max_gib={max_gib}: at least {needed} GiB for {num_examples} images of '
            f'{size} bytes; for a folder, a smaller config.dataset.source_size needs less'
        )


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split()) or type(error).__name__


_LOADERS = {'digits': _load_digits, 'cifar10': _load_cifar10, 'folder': _load_folder}
