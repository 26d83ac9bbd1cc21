"""Indexes a tar shard: the names, offsets and sizes of its images, and their classes.

The members are images, or an image KEY.jpg and a text KEY.cls with its class, as WebDataset writes them. KEY is a name
up to its first dot. A shard is read once; its index is kept by `index_cache` until its size or time changes.
"""

import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

import numpy as np

from byol_func.data import index_cache
from byol_func.data.places import Names, Shard
from byol_func.data.walking import Kind, endings_of, formats, is_hidden

COMPRESSED = ('.tar.gz', '.tgz', '.tar.bz2', '.tbz2', '.tar.xz', '.txz', '.tar.zst', '.tar.lz4')
_MAGIC = (
    b'\x1f\x8b',
    b'BZh',
    b'\xfd7zXZ',
    b'\x28\xb5\x2f\xfd',
    b'\x04\x22\x4d\x18',
)  # What compressed files begin with.
_VERSION = 1  # Increment it when an index has other contents.
_BLOCK = 512  # bytes of a header and of the padding of data
_AFTER_THE_END = 2**20  # bytes after the end mark that must be zero: another tar appended there would begin earlier
_STRETCH = 10_000  # members that are read by one TarFile, since it keeps a kilobyte of each
_LONGEST_CLASS = 200  # bytes of a class file
_OTHER_NUMBER = re.compile(r'[+-]?[\d.]+(e[+-]?\d+)?|[+-]?(nan|inf)', re.IGNORECASE)  # Or one from 0 on.
WHY_PLAIN = (
    'images are read at their offsets, which needs a plain .tar: unpack the compression (of images it saves nothing)'
)


class BadShard(Exception):
    """Raised for a shard that cannot be indexed; the message is one line that says why."""


class Index(NamedTuple):
    """The images of one shard, in its order; -1 stands for no folder or no class."""

    shard: Shard
    names: Names
    offsets: np.ndarray  # int64 [N]
    sizes: np.ndarray  # int64 [N]
    folders: tuple[str, ...]  # the first folders in the names
    folder_of: np.ndarray  # int32 [N]
    classes: tuple[str, ...]  # the contents of class files
    class_of: np.ndarray  # int32 [N]
    num_hidden: int
    others: Mapping[str, int]  # the number of members with each other ending


def index(path: str, wanted: Kind) -> Index:
    """Returns the index of a shard, the one of an earlier run if the size and the time of the file are the same.

    `wanted` says which members are images.

    Raises:
      BadShard: the file is no complete, plain tar, or its members are not as expected.
      OSError: it cannot be read.
    """
    stat = os.stat(path)
    shard, key = Shard(path, stat.st_size, stat.st_mtime_ns), os.path.abspath(path)
    stamp = [_VERSION, formats(wanted), shard.size, shard.mtime_ns]
    found = index_cache.load('shards', key)
    if found and found[0]['stamp'] == stamp:
        known, arrays = found
        return Index(
            shard,
            Names.from_block(arrays['names'].tobytes()),
            arrays['offsets'],
            arrays['sizes'],
            tuple(known['folders']),
            arrays['folder_of'],
            tuple(known['classes']),
            arrays['class_of'],
            known['num_hidden'],
            known['others'],
        )
    made = _read(shard, wanted)
    description = {name: getattr(made, name) for name in ('folders', 'classes', 'num_hidden', 'others')}
    arrays = {name: getattr(made, name) for name in ('offsets', 'sizes', 'folder_of', 'class_of')}
    arrays['names'] = np.frombuffer(made.names.block, np.uint8)
    index_cache.save('shards', key, {'stamp': stamp, **description}, arrays)
    return made


def _read(shard: Shard, wanted: Kind) -> Index:
    names: list[str] = []
    places: list[tuple[int, int]] = []
    classes: dict[str, str] = {}
    others: Counter[str] = Counter()
    seen: set[str] = set()
    num_hidden = 0
    with open(shard.path, 'rb') as file:
        for member in _members(shard, file):
            name = member.name.removeprefix('./').lstrip('/')
            if any(map(is_hidden, name.split('/'))):
                num_hidden += 1
                continue
            if name in seen:
                raise BadShard(f'two members are called {name!r}')
            seen.add(name)
            is_class = name.endswith('.cls')
            if not (is_class or name.lower().endswith(wanted.endings)):
                others.update(endings_of([name]))
                continue
            if not member.isreg():
                raise BadShard(
                    f'{name!r} is a link; expected a plain file (tar --dereference --hard-dereference writes one)'
                )
            if is_class:
                classes[key_of(name)] = _class(name, file, member)
            else:
                names.append(name)
                places.append((member.offset_data, member.size))
    if classes:
        _check_keys(names, classes)
    folders = [name.split('/', 1)[0] if '/' in name else None for name in names]
    offsets, sizes = np.array(places, np.int64).reshape(-1, 2).T.copy()
    return Index(
        shard,
        Names.of(names),
        offsets,
        sizes,
        *_numbered(folders),
        *_numbered([classes.get(key_of(name)) for name in names]),
        num_hidden,
        others,
    )


def _members(shard: Shard, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yields the members that are no folders, and checks that the tar is complete."""
    if file.read(8).startswith(_MAGIC):
        raise BadShard('it is compressed; ' + WHY_PLAIN)
    file.seek(0)
    end = count = stop = 0
    try:
        while count == stop:
            file.seek(end)
            stop += _STRETCH
            with tarfile.open(fileobj=file, mode='r:') as tar:
                for member in itertools.islice(iter(tar.next, None), _STRETCH):
                    count += 1
                    if member.issparse():
                        raise BadShard(f'{member.name!r} is stored as a sparse file; expected plain files')
                    end = member.offset_data + (0 if _has_no_data(member) else member.size)
                    if end > shard.size:
                        raise BadShard(f'it is truncated: {member.name!r} is not complete')
                    end += -end % _BLOCK
                    if not member.isdir():
                        yield member
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        where = f' after {count} members' if count else ''
        raise BadShard(f'it is no tar file, or it is damaged{where} ({" ".join(str(error).split())})') from error
    file.seek(end)
    after = file.read(_AFTER_THE_END)
    if len(after) < _BLOCK:
        raise BadShard(f'it is truncated after {count} members: its end mark is missing')
    if after[:_BLOCK].strip(b'\0'):
        raise BadShard(f'it is damaged after {count} members: the next header cannot be read')
    if after.strip(b'\0'):
        raise BadShard(
            f'more data follows after {count} members and the end mark; expected one tar, not several joined'
        )


def _has_no_data(member: tarfile.TarInfo) -> bool:
    return member.isdir() or member.issym() or member.islnk() or member.isdev()


def key_of(name: str) -> str:
    """Returns the key of a member: its name up to the first dot of the last part."""
    parent, slash, last = name.rpartition('/')
    return f'{parent}{slash}{last.split(".", 1)[0]}'


def _class(name: str, file: BinaryIO, member: tarfile.TarInfo) -> str:
    """Returns the class in a class file: a number from 0 on without leading zeros, or a name."""
    before = file.tell()
    file.seek(member.offset_data)
    data = file.read(min(member.size, _LONGEST_CLASS + 1))
    file.seek(before)
    text = data.decode('utf-8', 'replace').strip()
    is_odd = not text.isprintable() or '\ufffd' in text or len(data) > _LONGEST_CLASS
    if not text or is_odd or _OTHER_NUMBER.fullmatch(text) and not is_number(text):
        shown = ascii(text[:40]) + ('...' if len(text) > 40 else '')
        raise BadShard(f'the class file {name!r} holds {shown}; expected a number, such as 7, or the name of a class')
    return str(int(text)) if is_number(text) else text


def is_number(text: str) -> bool:
    """Returns whether the text of a class is a number."""
    return text.isascii() and text.isdecimal()


def _check_keys(names: list[str], classes: dict[str, str]) -> None:
    """Checks that every key has one image and one class."""
    of_key: dict[str, str] = {}
    for name in names:
        key = key_of(name)
        if key in of_key:
            raise BadShard(f'{of_key[key]!r} and {name!r} have the same key {key!r}, so one class file stands for both')
        if key not in classes:
            raise BadShard(f'{name!r} has no class file {key + ".cls"!r}, but other images have one')
        of_key[key] = name
    lone = next((key for key in classes if key not in of_key), None)
    if lone is not None:
        raise BadShard(f'the class file {lone + ".cls"!r} has no image')


def _numbered(values: list[str | None]) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns the distinct values and the index of each value among them, int32 `[N]`; -1 for None."""
    known: dict[str, int] = {}
    numbers = [-1 if value is None else known.setdefault(value, len(known)) for value in values]
    return tuple(known), np.array(numbers, np.int32)
