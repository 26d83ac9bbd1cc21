"""Walks through folders and sorts the files in them: images, hidden files, and files of other formats."""

import contextlib
import errno
import functools
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from byol_func import console
from byol_func.data.places import Names

# Files and folders created by file managers and operating systems; hidden like names that start with a dot.
_LEFT_BEHIND = (
    '@eaDir',
    '#recycle',
    '#snapshot',
    '__MACOSX',
    '$RECYCLE.BIN',
    'System Volume Information',
    'lost+found',
    'Thumbs.db',
    'desktop.ini',
)
# Formats that Pillow identifies but cannot decode without plug-ins.
_STUBS = ('BUFR', 'EPS', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'WMF')


class Contents(NamedTuple):
    """The files below a folder: images, hidden files and folders, which are skipped, and files of other formats."""

    images: Names
    hidden: list[str]
    others: list[str]


class Kind(NamedTuple):
    """Which files are images: the endings of their names, such as '.jpg', and both in words."""

    endings: tuple[str, ...]
    accepted: str
    others: str


@functools.cache
def image_kind(channels: int = 0) -> Kind:
    """Returns which files are images for a `config.dataset.channels`.

    These are the formats that Pillow decodes, including HEIC if its plug-in is installed. For 1 or 3 channels, arrays
    are images too; for other numbers but 0, only arrays and TIFF are.
    """
    from PIL import Image

    if channels not in (0, 1, 3):
        names = '.tif, .tiff or .npy'
        return Kind(
            ('.tif', '.tiff', '.npy'),
            f'expected files with the ending {names}, because of config.dataset.channels={channels}',
            f'with other endings than {names}, because of config.dataset.channels={channels}',
        )
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    formats = Image.registered_extensions().items()
    endings = tuple(ending for ending, name in formats if name in Image.OPEN and name not in _STUBS)
    return Kind(
        (*endings, '.npy') if channels else endings,
        'expected files that Pillow reads, such as .jpg, .png, .tif or .webp',
        'without the ending of an image format',
    )


def formats(wanted: Kind) -> int:
    """Returns a number that changes when other files count as images: a plug-in of Pillow may add some."""
    return zlib.crc32(' '.join(sorted(wanted.endings)).encode())


def walk(wanted: Kind, *tops: str, below: str = '', visit: Callable[[str], None] = lambda folder: None) -> Contents:
    """Finds everything below the folders, in torchvision's order.

    Args:
      wanted: which files are images.
      tops: the folders.
      below: what the paths of all of them begin with.
      visit: called with every folder that is read.

    Raises:
      OSError: a folder cannot be read, or a link leads to a folder that contains it.
    """

    def fail(error: OSError) -> None:  # os.walk and ImageFolder skip unreadable folders.
        raise error

    images: list[Names] = []
    found = Contents(Names.of([]), [], [])
    for top in tops:
        visited = []
        for parent, folders, names in os.walk(top, onerror=fail, followlinks=True):
            found.hidden.extend(os.path.join(parent, name) for name in folders if is_hidden(name))
            folders[:] = [name for name in folders if not is_hidden(name)]
            above = os.path.join(os.path.realpath(parent), '')
            for path in (os.path.join(parent, name) for name in folders):
                # A link to one of its parent folders would be followed forty times, or forever.
                if os.path.islink(path) and above.startswith(os.path.join(os.path.realpath(path), '')):
                    raise OSError(errno.ELOOP, 'a link to a folder that contains it', path)
            visit(parent)
            visited.append((parent, names))
        for parent, names in sorted(visited):
            more = sorted_out(wanted, (os.path.join(parent, name) for name in sorted(names)), below)
            images.append(more.images)
            found.hidden.extend(more.hidden)
            found.others.extend(more.others)
    return found._replace(images=Names.join(images))


def sorted_out(wanted: Kind, paths: Iterable[str], below: str = '') -> Contents:
    """Sorts paths, which all begin with `below`, by their names."""
    images: list[str] = []
    hidden: list[str] = []
    others: list[str] = []
    endings = frozenset(wanted.endings)
    for path in paths:
        is_image = '.' in path and f'.{path.rpartition(".")[2].lower()}' in endings
        part = hidden if is_hidden(os.path.basename(path)) else images if is_image else others
        part.append(path)
    return Contents(Names.of(images, below), hidden, others)


def entries(folder: str, folders: bool = True) -> list[str]:
    """Returns the sorted paths of the visible folders in a folder, or of everything else if `folders` is False."""
    with os.scandir(folder) as found:
        names = sorted(entry.name for entry in found if entry.is_dir() == folders)
    return [os.path.join(folder, name) for name in names if not (folders and is_hidden(name))]


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder of this name is hidden, or left behind by a system."""
    return name.startswith('.') or name in _LEFT_BEHIND


def no_images(wanted: Kind, folder: str, others: Sequence[str]) -> str:
    """Returns a clause that says that there are no images in a folder, and what there is instead."""
    return f'no images in {folder!r}; {wanted.accepted}{instead(others)}'


def instead(others: Sequence[str]) -> str:
    """Returns the part of a message that counts non-image files: '; found 3 of .txt, 1 of .heic'."""
    return in_words(endings_of(others))


def endings_of(names: Iterable[str]) -> Counter[str]:
    """Counts the endings of names, such as '.txt'."""
    return Counter(os.path.splitext(name)[1].lower() or 'no ending' for name in names)


def in_words(counts: Counter[str]) -> str:
    """Returns the most frequent endings as the part of a message: '; found 3 of .txt, 1 of .heic'."""
    most = [f'{count} of {console.readable(ending)}' for ending, count in counts.most_common(5)]
    return f'; found {", ".join(most)}' if most else ''


def listed(names: Iterable[str]) -> str:
    """Joins the first three names, followed by '...' if there are more."""
    shown = list(dict.fromkeys(console.readable(name) for name in names))
    return ', '.join(map(repr, shown[:3])) + ', ...' * (len(shown) > 3)
