"""Finds the image files and the classes of a split in a folder."""

import os
import unicodedata
from collections.abc import Collection, Iterable, Sequence

import torch
from absl import logging

from byol_func import console
from byol_func.data import folder_index
from byol_func.data.arrays import root_error
from byol_func.data.examples import Files
from byol_func.data.places import FilePlaces, Names
from byol_func.data.walking import (
    Contents,
    Kind,
    entries,
    image_kind,
    instead,
    is_hidden,
    listed,
    no_images,
    sorted_out,
    walk,
)
from byol_func.errors import UserError, counted

LAYOUT = 'expected DIR/train/CLASS/* and DIR/test/CLASS/*'
TRAIN, TEST, VAL = ('train', 'training'), ('test', 'testing'), ('val', 'valid', 'validate', 'validation')
Classes = dict[str, list[str]]  # Maps the normalised name of a class to its folders.


def images_below(path: str, channels: int = 0) -> list[str]:
    """Returns the images in a folder and the folders in it, in a fixed order; or the path itself if it is a file.

    `channels` is `config.dataset.channels`.

    Raises:
      UserError: there is no such path, it cannot be read, or there is no image.
    """
    if os.path.isfile(path):
        return [path]
    wanted = image_kind(channels)
    try:
        found = walk(wanted, path)
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}; expected an image, or a folder of images') from error
    if not found.images:
        raise UserError(f'{path}: {no_images(wanted, path, found.others)}')
    return list(found.images)


def list_files(split: str, root: str, allow_empty: bool = False, channels: int = 0) -> Files | None:
    """Finds the files of a split, sorted by class and path as in torchvision's ImageFolder.

    Hidden files and files of other formats are skipped; each kind is reported in one log line.
    Folders whose names differ only in Unicode normalisation form one class.

    Args:
      split: 'train' or 'test'; the latter is DIR/val if there is no DIR/test with labels.
      root: a folder with DIR/train/CLASS/* and DIR/test/CLASS/*, or DIR/CLASS/* without a test set, or
        DIR/train/* or DIR/* without labels.
      allow_empty: whether class folders may be empty. An empty folder in the training set then does not count
        as a class.
      channels: `config.dataset.channels`, which determines the formats of the images.

    Returns:
      The files; None if the split is 'test' and the folder has no labels.

    Raises:
      UserError: a folder is missing, empty or unreadable, or the classes are not as expected.
    """
    try:
        return _list_files(split, root, allow_empty, image_kind(channels))
    except OSError as error:
        what = f'cannot read {error.filename!r} ({error.strerror})'
        raise root_error(root, f'{what}; {LAYOUT}') from error


def _list_files(split: str, root: str, allow_empty: bool, wanted: Kind) -> Files | None:
    folder = _train_folder(root, wanted)
    classes = _classes(folder)
    if (
        not classes
        or folder == root
        and not any(walk(wanted, path).images for path in _paths(folder, classes.values()))
    ):
        return _unlabelled(split, root, folder, wanted)
    given, known = classes, classes
    if split == 'test':
        if allow_empty:
            known = {
                name: of_class for name, of_class in classes.items() if walk(wanted, *_paths(folder, [of_class])).images
            }
        _check_several(root, folder, known)
        folder = _test_folder(root, folder, wanted)
        given = _classes(folder)
    paths_of = {name: _paths(folder, [of_class]) for name, of_class in given.items()}
    found = folder_index.walk_all(wanted, folder, paths_of)
    check_same(root, known, [name for name in found if found[name].images or name in classes], os.path.basename(folder))
    empty = [name for name, contents in found.items() if not contents.images]
    if empty and (not allow_empty or len(empty) == len(found)):
        others = [path for contents in found.values() for path in contents.others]
        flag = '' if len(empty) == len(found) else '; config.dataset.allow_empty=True leaves it out'
        raise root_error(root, no_images(wanted, os.path.join(folder, given[empty[0]][0]), others) + flag)
    if split == 'train':
        if empty:
            logging.warning('%s: left out classes without images: %s', folder, listed(empty))
        known = {name: of_class for name, of_class in classes.items() if name not in empty}
        _check_several(root, folder, known)
    elif missing := [name for name in known if name in empty or name not in found]:
        logging.warning('%s has no images of %s; accuracies cover only the other classes', folder, listed(missing))
    for names in given.values():
        if len(names) > 1:
            spellings = ' and '.join(map(ascii, names))
            logging.warning('%s: %s are one class whose name is encoded in two ways', folder, spellings)
    _tell(folder, list(found.values()), wanted, beside=sorted_out(wanted, entries(folder, folders=False)))
    images = [found[name].images if name in found else Names.of([]) for name in known]
    labels = torch.arange(len(images)).repeat_interleave(torch.tensor([len(of_class) for of_class in images]))
    shown = tuple(console.readable(names[0]) for names in known.values())
    return Files(root, split, _places(root, folder, images), labels, shown)


def _places(root: str, folder: str, images: Sequence[Names]) -> FilePlaces:
    base = os.path.join(root, '')
    return FilePlaces(base, Names.join(images).below(base), folder.removeprefix(base) if folder != root else '')


def _check_several(root: str, folder: str, classes: Classes) -> None:
    if len(classes) == 1:
        ((name, names),) = classes.items()
        raise root_error(
            root,
            f'expected at least two classes, but {name!r} is the only one; to pretrain without labels '
            f'put the images directly into DIR/train, or set config.dataset.root={os.path.join(folder, names[0])}',
        )


def _unlabelled(split: str, root: str, folder: str, wanted: Kind) -> Files | None:
    found = folder_index.walk_all(wanted, folder, {'': [folder]})['']
    if not found.images:
        what = f'no class folders in {folder!r}; {LAYOUT}, or DIR/train/* without labels'
        raise root_error(root, what + instead(found.others))
    if split == 'test':
        return None
    # DIR/train may be a class: vehicles are sorted into bus, car and train.
    others = [path for path in entries(root) if path != folder and not _one_called(root, [path], (*TEST, *VAL))]
    ignored = [os.path.basename(path) for path in others if folder != root and walk(wanted, path).images]
    if ignored:
        logging.warning('%s: images without labels; ignored those beside it, in %s', folder, listed(ignored))
    _tell(folder, [found], wanted)
    labels = torch.zeros(len(found.images), dtype=torch.int64)
    return Files(root, split, _places(root, folder, [found.images]), labels, ())


def _train_folder(root: str, wanted: Kind) -> str:
    """Returns DIR/train under any of its names, or DIR itself if it holds class folders, or only images."""
    present = entries(root)
    train = _one_called(root, present, TRAIN)
    if train:
        return train
    missing = f'there is no folder {os.path.join(root, "train")!r}'
    names = [os.path.basename(path) for path in present]
    if not _one_called(root, present, (*TEST, *VAL)):
        nested = [path for path in present if _one_called(root, entries(path), TRAIN)]
        if nested:
            raise root_error(
                root, f'{missing}, but there is one in {nested[0]!r}; expected that as config.dataset.root'
            )
        with_images = [path for path in present if walk(wanted, path).images]
        like = [
            [path for path in with_images if part in os.path.basename(path).lower()]
            for part in ('train', 'test', 'val')
        ]
        if like[0] and (evaluated := like[1] or like[2]):  # COCO: train2017 and val2017.
            renamed = f'rename {os.path.basename(like[0][0])!r} to train and {os.path.basename(evaluated[0])!r} to test'
            raise root_error(root, f'{missing}; {renamed}')
        if len(with_images) > 1 or not with_images and walk(wanted, root).images:
            return root
        if with_images:
            missing += f', and only {with_images[0]!r} holds images; as config.dataset.root it would have no labels'
    found = f'; found {listed(names)}' if names else ''
    raise root_error(root, f'{missing}; {LAYOUT}{found}')


def has_only_training_images(root: str, channels: int = 0) -> bool:
    """Returns whether a folder holds classes to train on, DIR/CLASS/* or DIR/train/CLASS/*, and no other folder."""
    try:
        root = os.path.expanduser(root)
        folder = _train_folder(root, image_kind(channels))
        return bool(_classes(folder)) and (folder == root or entries(root) == [folder])
    except (OSError, UserError):  # Loading the images explains it.
        return False


def _test_folder(root: str, train_folder: str, wanted: Kind) -> str:
    """Returns DIR/test under any of its names, or DIR/val if there is no DIR/test or it has no labels."""
    present = entries(root) if train_folder != root else []
    folders = [_one_called(root, present, names) for names in (TEST, VAL)]
    there = [folder for folder in folders if folder]
    flag = f'{LAYOUT}, or config.dataset.eval_split=val'
    if not there:
        missing = os.path.join(root, 'test')
        names = listed(os.path.basename(path) for path in entries(root) if path != train_folder)
        found = f'; found {"the class folders " * (train_folder == root)}{names}' if names else ''
        raise root_error(root, f'there is no folder {missing!r}; {flag} to do without it{found}')
    labelled = [folder for folder in there if _classes(folder)]
    if labelled:
        if labelled[0] != there[0]:
            logging.info('%s has no labels; %s is the test set', there[0], labelled[0])
        return labelled[0]
    images = walk(wanted, there[0]).images
    if images:
        what = f'{counted(len(images), "image")} without labels in {there[0]!r}'
        raise root_error(root, f'{what}; {flag} to hold out a part of the training set')
    raise root_error(root, f'no class folders in {there[0]!r}; {LAYOUT}')


def _one_called(root: str, folders: Iterable[str], names: Sequence[str]) -> str | None:
    """Returns the folder with one of these names, ignoring case; the first of the names wins."""
    found = [path for path in folders if os.path.basename(path).lower() in names]
    exact = [path for path in found if os.path.basename(path) == names[0]]
    if len(found) > 1 and not exact:
        raise root_error(root, f'{listed(map(os.path.basename, found))} have the same meaning; {LAYOUT}')
    return next(iter(exact or found), None)


def _classes(folder: str) -> Classes:
    """Returns the classes of a split and their folders; a class has two if Unicode spells its name in two ways."""
    classes: Classes = {}
    for path in entries(folder):
        name = os.path.basename(path)
        classes.setdefault(normalised(console.readable(name)), []).append(name)
    return classes


def normalised(name: str) -> str:
    """Composes the characters of a name: macOS stores 'ö' as an o and two dots, other systems as one character."""
    return unicodedata.normalize('NFC', name)


def _paths(folder: str, classes: Iterable[Sequence[str]]) -> list[str]:
    return [os.path.join(folder, name) for names in classes for name in names]


def check_same(root: str, train: Collection[str], test: Collection[str], folder: str) -> None:
    """Raises a UserError if the test set, in `folder`, has classes that the training set lacks."""
    if set(test) - set(train):
        lone = sorted(set(train) ^ set(test))
        shown = ', '.join(f'{name!r} (only in {"train" if name in train else folder})' for name in lone[:3])
        more = ', ...' * (len(lone) > 3)
        without = ', or config.dataset.eval_split=val to hold out a part of the training set'
        raise root_error(root, f'the splits differ in classes: {shown}{more}; {LAYOUT}{without}')


def _tell(folder: str, found: Sequence[Contents], wanted: Kind, beside: Contents | None = None) -> None:
    """Logs one line for each kind of file that is not read."""
    with os.scandir(folder) as entries:
        hidden = [entry.path for entry in entries if entry.is_dir() and is_hidden(entry.name)]
    beside = beside or Contents(Names.of([]), [], [])
    hidden = list(dict.fromkeys([*hidden, *beside.hidden, *(path for one in found for path in one.hidden)]))
    others = [path for one in found for path in one.others]
    if hidden:
        names = [os.path.basename(path) for path in hidden]
        logging.info('%s: ignored hidden files and folders, %d in all: %s', folder, len(names), listed(names))
    if others:
        logging.warning('%s: ignored files %s%s', folder, wanted.others, instead(others))
    if beside.images:
        names = [os.path.basename(path) for path in beside.images]
        what = counted(len(names), 'image')
        logging.warning('%s: ignored %s beside the class folders: %s', folder, what, listed(names))
