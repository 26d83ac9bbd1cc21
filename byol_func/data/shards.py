"""Finds the images and the classes of a split in tar shards, in the layouts of WebDataset.

The images of a split have the order that they would have in a folder, by class and name, however they are spread over
the shards. Training draws from that order, so it reads the same images from shards as from a folder.
"""

import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from absl import logging

from byol_func import console
from byol_func.data import shard_lists, tar_index
from byol_func.data.arrays import root_error
from byol_func.data.examples import Files
from byol_func.data.listing import check_same, normalised
from byol_func.data.places import MemberPlaces, Names
from byol_func.data.walking import Kind, image_kind, in_words, listed
from byol_func.errors import UserError

LAYOUT = 'expected members CLASS/KEY.jpg; or KEY.jpg and KEY.cls, a text with the class; or, without labels, KEY.jpg'


def list_shards(split: str, root: str, channels: int = 0) -> Files | None:
    """Finds the images of a split, sorted by class and name.

    Class files with numbers make the classes with these numbers, in their order; others are the names of classes.

    Args:
      split: 'train' or 'test'; the latter is the split val if there is no test split with labels.
      root: a folder of shards, the path of a list of shards, or a pattern, see `shard_lists.find`.
      channels: `config.dataset.channels`, which determines the formats of the images.

    Returns:
      The images; None if the split is 'test' and the training set has no labels.

    Raises:
      UserError: a shard is missing, damaged or compressed, or the classes are not as expected.
    """
    base, shards = shard_lists.find(root)
    for path in shard_lists.skipped(shards['train']) if split == 'train' else ():
        logging.warning(
            'config.dataset.root=%r: no shard %r, although there are later ones; it is left out', root, path
        )
    wanted = image_kind(channels)
    train = _Members(wanted, root, 'train', shards['train'])
    names = train.class_names()
    if split == 'train':
        if len(names) == 1:
            raise root_error(
                root,
                f'expected at least two classes, but {names[0]!r} is the only one; without labels, expected members '
                'KEY.jpg in no folder',
            )
        return train.files(base, split, names)
    if not names:
        return None
    there = [name for name in ('test', 'val') if name in shards]
    if not there:
        raise root_error(
            root,
            'no shards of a test set; expected test or val in the names of some of them, or '
            'config.dataset.eval_split=val to do without it',
        )
    found = [_Members(wanted, root, name, shards[name]) for name in there]
    labelled = [members for members in found if members.class_names()]
    if not labelled:
        raise root_error(root, f'the shards of {there[0]} have no labels; {LAYOUT}')
    test = labelled[0]
    check_same(root, names, test.class_names(), test.split)
    if missing := sorted({*names} - {*test.class_names()}):
        what = '%s has no images of %s; accuracies cover only the other classes'
        logging.warning(what, f'The split {test.split}', listed(missing))
    return test.files(base, split, names)


def has_only_training_images(root: str, channels: int = 0) -> bool:
    """Returns whether a root names shards with labels, all of them for training."""
    try:
        root = os.path.expanduser(root)
        _, shards = shard_lists.find(root)
        return set(shards) == {'train'} and bool(
            _Members(image_kind(channels), root, 'train', shards['train'][:1]).class_names()
        )
    except (OSError, UserError):  # Loading the images explains it.
        return False


class _Members:
    """The images in the shards of one split, in the order of the shards.

    Raises:
      UserError: a shard cannot be indexed, there are no images, or only some of them have a class.
    """

    def __init__(self, wanted: Kind, root: str, split: str, paths: Sequence[str]):
        self._wanted, self._root, self.split = wanted, root, split
        watched = console.watch(paths, f'Indexing {split}', len(paths), unit='shard')
        indexes = [self._index(path) for path in watched]
        self._others = sum((Counter(index.others) for index in indexes), Counter())
        self._num_hidden = sum(index.num_hidden for index in indexes)
        if not any(len(index.names) for index in indexes):
            raise root_error(root, f'no images in {listed(paths)}; {LAYOUT}{in_words(self._others)}')
        with_class_files = any(index.classes for index in indexes)
        self._texts, self._text_of = self._classes(indexes, with_class_files)
        self._has_numbers = with_class_files and all(map(tar_index.is_number, self._texts))
        # The arrays of all shards together; those of each one are not kept.
        self._shards = [index.shard for index in indexes]
        self._names = Names.join([index.names for index in indexes])
        self._offsets, self._sizes = (np.concatenate([getattr(i, f) for i in indexes]) for f in ('offsets', 'sizes'))
        self._shard_of = np.repeat(np.arange(len(indexes), dtype=np.int32), [len(index.names) for index in indexes])

    def _classes(self, indexes: Sequence[tar_index.Index], with_class_files: bool) -> tuple[list[str], np.ndarray]:
        """Returns the distinct texts of classes, and the number of each image's text, int32 `[N]`; -1 for none."""
        known: dict[str, int] = {}
        of_image = []
        for index in indexes:
            if with_class_files:
                texts, number_of = index.classes, index.class_of
            else:
                texts, number_of = index.folders, index.folder_of
            numbers = np.array([known.setdefault(text, len(known)) for text in texts] + [-1], np.int32)
            of_image.append(numbers[number_of])
            lone = np.flatnonzero(number_of < 0)
            if len(lone) and (with_class_files or any(other.folders for other in indexes)):
                name = f'{index.shard.path}/{index.names[lone[0]]}'
                raise root_error(self._root, f'{name!r} has no class, but other images have one; {LAYOUT}')
        return list(known), np.concatenate(of_image)

    def _index(self, path: str) -> tar_index.Index:
        try:
            return tar_index.index(path, self._wanted)
        except tar_index.BadShard as error:
            raise root_error(self._root, f'the shard {path!r}: {error}') from error
        except OSError as error:
            raise root_error(self._root, f'cannot read {path!r} ({error.strerror})') from error

    def _sorted_texts(self) -> list[str]:
        return sorted(self._texts, key=int if self._has_numbers else None)

    def class_names(self) -> tuple[str, ...]:
        """Returns the normalised names of the classes in their order; empty without labels."""
        return tuple(dict.fromkeys(map(_normalised, self._sorted_texts())))

    def files(self, base: str, split: str, class_names: Sequence[str]) -> Files:
        """Returns the images, sorted, with their labels among these normalised classes."""
        self._tell()
        label_of = {name: label for label, name in enumerate(class_names)}
        # As in a folder, where one class may have two folders whose names are spelled in two ways.
        texts = sorted(self._sorted_texts(), key=lambda text: label_of.get(_normalised(text), 0))
        ranks = {text: rank for rank, text in enumerate(texts)}
        # Sort one folder after the other, since the names of all images as strings would take much memory.
        of_image = np.array([ranks[text] for text in self._texts] or [0], np.int32)[self._text_of]
        by_rank = np.argsort(of_image, kind='stable')
        groups = np.split(by_rank, np.searchsorted(of_image[by_rank], np.arange(1, max(len(ranks), 1))))
        order = np.concatenate([self._by_name(group) for group in groups])
        labels = np.array([label_of[_normalised(text)] for text in self._texts] or [0])[self._text_of[order]]
        shown: dict[str, str] = {}
        for text in texts:
            shown.setdefault(_normalised(text), console.readable(text))
        arrays = (values[order] for values in (self._shard_of, self._offsets, self._sizes))
        places = MemberPlaces(base, self._names.take(order), self._shards, *arrays)
        readable = tuple(shown.get(name, name) for name in class_names)
        return Files(self._root, split, places, torch.from_numpy(labels.astype(np.int64)), readable)

    def _by_name(self, group: np.ndarray) -> np.ndarray:
        """Sorts images by folder and name, as torchvision's ImageFolder does."""
        return np.array(sorted(group.tolist(), key=lambda i: self._names[i].rpartition('/')), np.int64)

    def _tell(self) -> None:
        """Logs one line for each kind of member that is not read."""
        if self._num_hidden:
            logging.info('%s: ignored hidden members, %d in all', self.split, self._num_hidden)
        if self._others:
            logging.info('%s: ignored members %s%s', self.split, self._wanted.others, in_words(self._others))


def _normalised(name: str) -> str:
    return normalised(console.readable(name))
