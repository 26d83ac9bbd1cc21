"""The interface of labelled datasets, datasets in memory, and functions that split them."""

import os
from typing import NamedTuple, Protocol, Self, TypeVar

import torch

from byol_func.data.places import Places
from byol_func.errors import UserError, counted
from byol_func.runtime import prng, transfer

Batch = dict[str, torch.Tensor]


class Files(NamedTuple):
    """The image files of one split, sorted by class and path as in torchvision's ImageFolder."""

    root: str  # config.dataset.root
    split: str
    paths: Places
    labels: torch.Tensor  # int64 [N]
    class_names: tuple[str, ...]  # empty without labels

    def below_root(self, positions: torch.Tensor) -> tuple[str, ...]:
        """Returns the paths of the files at these positions relative to the root, such as 'test/cat/3.png'.

        Members of shards have the path of their shard before their name: 'test-000000.tar/cat/3.png'.
        """
        return tuple(self.paths.relative(i).replace(os.sep, '/') for i in positions.tolist())


class Examples(Protocol):
    """One split of labelled examples: a `Dataset`, a `streaming.Stream` or the `Features` of either.

    A dataset without labels has the label 0 for every example and no class names.
    """

    @property
    def labels(self) -> torch.Tensor:
        """The labels, int64 `[N]` in 0..num_classes-1."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; empty without labels."""
        ...

    @property
    def files(self) -> Files | None:
        """The files of the whole split; None if it came as arrays."""
        ...

    @property
    def part(self) -> torch.Tensor | None:
        """The examples' positions in the whole split, int64 `[N]` on the CPU; None if this is the whole split."""
        ...

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        """(C, H, W) of every image, (C, None, None) if the sizes vary, or (D,) for embeddings."""
        ...

    def take(self, indices: torch.Tensor) -> Self:
        """Returns the examples at these indices, int64 `[M]`, in that order."""
        ...

    def batch(self, indices: torch.Tensor) -> Batch:
        """Returns {'images', 'labels'} at these indices, int64 `[B]` on the CPU; the batch is on the set's device."""
        ...

    def to_device(self, device: torch.device | str) -> Self:
        """Returns the same dataset with its batches on `device`."""
        ...

    @property
    def positions(self) -> torch.Tensor:
        """The position of every example in the whole split, int64 `[N]` on the CPU, in the order of its source."""
        return torch.arange(self.num_examples) if self.part is None else self.part

    @property
    def paths(self) -> tuple[str, ...]:
        """The path of every example's file relative to the root; empty if there are no files."""
        return self.files.below_root(self.positions) if self.files else ()

    @property
    def num_examples(self) -> int:
        """The number of examples, N."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 without labels."""
        return len(self.class_names)


class _InMemory(NamedTuple):
    images: torch.Tensor  # uint8 [N, C, H, W]
    labels: torch.Tensor  # int64 [N]
    class_names: tuple[str, ...]
    files: Files | None = None
    part: torch.Tensor | None = None


class Dataset(_InMemory, Examples):
    """One split of images, uint8 `[N, C, H, W]`, held in memory on one device."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of every image."""
        return tuple(self.images.shape[1:])

    def take(self, indices: torch.Tensor) -> Self:
        """Returns the examples at these indices, int64 `[M]`, in that order."""
        part = self.positions[indices.cpu()]
        indices = indices.to(self.labels.device)
        return self._replace(images=self.images[indices], labels=self.labels[indices], part=part)

    def batch(self, indices: torch.Tensor) -> Batch:
        """Returns {'images', 'labels'} at these indices, int64 `[B]` on the CPU."""
        indices = transfer.to_device(indices, self.images.device)
        return {'images': self.images[indices], 'labels': self.labels[indices]}

    def to_device(self, device: torch.device | str) -> Self:
        """Returns the same dataset on `device`."""
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))


class _Embeddings(NamedTuple):
    embeddings: torch.Tensor  # float32 [N, D]
    labels: torch.Tensor  # int64 [N]
    class_names: tuple[str, ...]
    files: Files | None = None
    part: torch.Tensor | None = None


class Features(_Embeddings, Examples):
    """A frozen encoder's embeddings of a split, float32 `[N, D]`, on one device.

    Batches hold the embeddings under 'images', so that a classifier can be trained on them as on images.
    """

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(D,), since an embedding has no height and no width."""
        return tuple(self.embeddings.shape[1:])

    def take(self, indices: torch.Tensor) -> Self:
        """Returns the examples at these indices, int64 `[M]`, in that order."""
        part = self.positions[indices.cpu()]
        indices = indices.to(self.labels.device)
        return self._replace(embeddings=self.embeddings[indices], labels=self.labels[indices], part=part)

    def batch(self, indices: torch.Tensor) -> Batch:
        """Returns {'images': embeddings `[B, D]`, 'labels'} at these indices, int64 `[B]` on the CPU."""
        indices = transfer.to_device(indices, self.embeddings.device)
        return {'images': self.embeddings[indices], 'labels': self.labels[indices]}

    def to_device(self, device: torch.device | str) -> Self:
        """Returns the same dataset on `device`."""
        return self._replace(embeddings=self.embeddings.to(device), labels=self.labels.to(device))


def class_counts(dataset: Examples) -> list[int]:
    """Returns the number of examples of each class, in the order of `class_names`."""
    return torch.bincount(dataset.labels, minlength=dataset.num_classes).tolist()


def describe(dataset: Examples) -> str:
    """Describes the size and class balance in a few words, such as '1442 images, 10 classes of 143 to 147'."""
    images = counted(dataset.num_examples, 'image')
    if not dataset.num_classes:
        return f'{images} without labels'
    counts = class_counts(dataset)
    low, high = min(counts), max(counts)
    size = f'{low}' if low == high else f'{low} to {high}'
    return f'{images}, {counted(dataset.num_classes, "class")} of {size}'


AnyExamples = TypeVar('AnyExamples', bound=Examples)


def split_train(dataset: AnyExamples, fraction: float, seed: int = 0) -> tuple[AnyExamples, AnyExamples]:
    """Splits a dataset with `split_mask` into (part, rest); both keep the order of the dataset."""
    in_part = split_mask(dataset.labels.cpu(), fraction, seed)
    return dataset.take(in_part.nonzero()[:, 0]), dataset.take((~in_part).nonzero()[:, 0])


def split_mask(labels: torch.Tensor, fraction: float, seed: int = 0) -> torch.Tensor:
    """Returns a mask of a random part that is stratified by class.

    From a class of n images, round(fraction * n) go into the part: at least one, and, if the fraction is below 1
    and n is at least 2, at most n - 1. The same seed draws nested parts: the part of a smaller fraction is
    contained in that of a larger one. A dataset without labels counts as one class.

    Args:
      labels: int64 `[N]`.
      fraction: above 0, at most 1.
      seed: seed of the draw; runs with the same seed get the same images.

    Returns:
      bool `[N]`, on the device of the labels; True for examples in the part.

    Raises:
      ValueError: `fraction` is out of range.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f'fraction={fraction}: expected a number above 0, at most 1')
    on_cpu = labels.cpu()
    in_part = torch.zeros(len(on_cpu), dtype=torch.bool)
    for label in on_cpu.unique().tolist():
        members = (on_cpu == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=prng.fold_in(seed, 'split', label))
        count = max(1, round(fraction * len(members)))
        if fraction < 1.0 and len(members) > 1:
            count = min(count, len(members) - 1)
        in_part[members[order[:count]]] = True
    return in_part.to(labels.device)


def check_labels(field: str, labels: torch.Tensor, class_names: tuple[str, ...], low: int = 0) -> None:
    """Raises a UserError unless all labels are in range and every class has an image.

    Args:
      field: the user's setting, such as "config.dataset.root='DIR'", for the error message.
      labels: int64 `[N]`, as stored in the files.
      class_names: the names of the labels low, low + 1, ...
      low: the smallest label.
    """
    high = low + len(class_names) - 1
    outside = labels[(labels < low) | (labels > high)]
    if len(outside):
        raise UserError(
            f'{field}: {counted(len(outside), "label")} such as {int(outside[0])}: expected {low} to {high}'
        )
    counts = torch.bincount(labels - low, minlength=len(class_names))
    empty = [name for name, count in zip(class_names, counts.tolist(), strict=True) if not count]
    if empty:
        raise UserError(f'{field}: no images of the class {empty[0]!r}, expected at least one of each class')
