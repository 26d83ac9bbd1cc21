"""Sets of labelled images: what a data set is to everything that reads one, and its parts."""

import os
from typing import NamedTuple

import torch

from byol_func.errors import UserError
from byol_func.runtime import prng


class Files(NamedTuple):
    """The image files of one split, sorted by class and path as by torchvision's ImageFolder."""

    root: str
    split: str
    paths: tuple[str, ...]
    labels: torch.Tensor  # int64 [N]
    class_names: tuple[str, ...]  # none without labels

    def below_root(self, positions: torch.Tensor) -> tuple[str, ...]:
        """The paths of these files without the root, such as 'test/cat/3.png'."""
        root = os.path.join(self.root, '')
        return tuple(self.paths[i].removeprefix(root).replace(os.sep, '/') for i in positions.tolist())


class Dataset(NamedTuple):
    """One split, held in memory on one device.

    A set without labels has the label 0 everywhere and no class names.
    """

    images: torch.Tensor  # uint8 [N, C, H, W]
    labels: torch.Tensor  # int64 [N], in 0..num_classes-1
    class_names: tuple[str, ...]
    files: Files | None = None  # Of the whole split; None: it came as arrays.
    part: torch.Tensor | None = None  # int64 [N] on the CPU, places in the whole split; None: it is the whole.

    @property
    def positions(self) -> torch.Tensor:
        """int64 `[N]` on the CPU: the place of every example in the whole split, as its source has it."""
        return torch.arange(self.num_examples) if self.part is None else self.part

    @property
    def paths(self) -> tuple[str, ...]:
        """The file of every example, relative to the root; none if there are no files."""
        return self.files.below_root(self.positions) if self.files else ()

    @property
    def num_examples(self) -> int:
        """N."""
        return self.images.shape[0]

    @property
    def num_classes(self) -> int:
        """How many classes there are; 0 without labels."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of every image."""
        return tuple(self.images.shape[1:])

    def take(self, indices: torch.Tensor) -> 'Dataset':
        """The examples of these indices, int64 `[M]`, in that order."""
        indices = indices.to(self.labels.device)
        return self._replace(
            images=self.images[indices], labels=self.labels[indices], part=self.positions[indices.cpu()]
        )


def class_counts(dataset: Dataset) -> list[int]:
    """How many examples each class has, in the order of `class_names`."""
    return torch.bincount(dataset.labels, minlength=dataset.num_classes).tolist()


def describe(dataset: Dataset) -> str:
    """Size and class balance in a few words, such as '1442 images, 10 classes of 143 to 147'."""
    if not dataset.num_classes:
        return f'{dataset.num_examples} images without labels'
    counts = class_counts(dataset)
    low, high = min(counts), max(counts)
    size = f'{low}' if low == high else f'{low} to {high}'
    return f'{dataset.num_examples} images, {dataset.num_classes} classes of {size}'


def split_train(dataset: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Draws a part of every class: (part, rest), both in the order of the data set.

    Of a class of n images, round(fraction * n) go into the part, at least one and, below a fraction
    of 1, not all if there are two or more. The same seed draws nested parts: a smaller fraction takes
    some of what a larger one takes. A set without labels counts as one class.

    Args:
      dataset: N images.
      fraction: above 0, at most 1.
      seed: of the draw; the same in every run that is to see the same images.

    Raises:
      ValueError: `fraction` is out of its range.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f'fraction={fraction}: expected a number above 0, at most 1')
    labels = dataset.labels.cpu()
    in_part = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=prng.fold_in(seed, 'split', label))
        count = max(1, round(fraction * len(members)))
        if fraction < 1.0 and len(members) > 1:
            count = min(count, len(members) - 1)
        in_part[members[order[:count]]] = True
    return dataset.take(in_part.nonzero()[:, 0]), dataset.take((~in_part).nonzero()[:, 0])


def check_labels(field: str, labels: torch.Tensor, class_names: tuple[str, ...], low: int = 0) -> None:
    """Raises a UserError unless all labels are in their range and every class has an image.

    Args:
      field: what the user gave, such as "config.dataset.root='DIR'".
      labels: int64 `[N]`, as they are written in the files.
      class_names: of the labels low, low + 1, ...
      low: the smallest label.
    """
    high = low + len(class_names) - 1
    outside = labels[(labels < low) | (labels > high)]
    if len(outside):
        raise UserError(f'{field}: {len(outside)} labels such as {int(outside[0])}: expected {low} to {high}')
    counts = torch.bincount(labels - low, minlength=len(class_names))
    empty = [name for name, count in zip(class_names, counts.tolist()) if not count]
    if empty:
        raise UserError(f'{field}: no images of the class {empty[0]!r}, expected at least one of each class')
