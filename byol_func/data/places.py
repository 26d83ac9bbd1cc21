"""Where the images of a split are: files of a folder or members of tar shards, in a few arrays.

A million paths as Python strings take hundreds of megabytes, and every worker process would copy them when it counts
references. Arrays take a third of that, and all workers share them.
"""

import abc
import functools
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np

from byol_func.data import decoding

_AT_ONCE = 10_000  # names that are Python objects at the same time


class Names(Sequence[str]):
    """N file names in one block of bytes, each followed by a zero byte; indexing decodes one of them.

    Args:
      block: the names without the prefix.
      ends: where each name ends, after its zero byte, int64 `[N]`.
      prefix: what all names begin with.
    """

    def __init__(self, block: bytes, ends: np.ndarray, prefix: bytes = b''):
        self._block, self._ends, self._prefix = block, ends, prefix

    @classmethod
    def of(cls, names: Iterable[str], prefix: str = '') -> 'Names':
        """Stores these names, which all begin with `prefix`."""
        start = os.fsencode(prefix)
        return cls._of((os.fsencode(name).removeprefix(start) for name in names), start)

    @classmethod
    def _of(cls, encoded: Iterable[bytes], prefix: bytes) -> 'Names':
        block, lengths, names = io.BytesIO(), [np.zeros(0, np.int64)], iter(encoded)
        while some := [name + b'\0' for name in itertools.islice(names, _AT_ONCE)]:
            block.write(b''.join(some))
            lengths.append(np.fromiter(map(len, some), np.int64, len(some)))
        return cls(block.getvalue(), np.cumsum(np.concatenate(lengths)), prefix)

    @classmethod
    def from_block(cls, block: bytes, prefix: str = '') -> 'Names':
        """Reads a block, as `block` returns it."""
        return cls(block, np.flatnonzero(np.frombuffer(block, np.uint8) == 0) + 1, os.fsencode(prefix))

    @classmethod
    def join(cls, parts: Sequence['Names']) -> 'Names':
        """Returns the names of all parts, one part after the other; they have the same prefix."""
        parts = [part for part in parts if len(part)]
        (prefix,) = {part._prefix for part in parts} or {b''}
        starts = itertools.accumulate((len(part.block) for part in parts), initial=0)
        ends = [part._ends + start for part, start in zip(parts, starts, strict=False)]
        return cls(b''.join(part.block for part in parts), np.concatenate([np.zeros(0, np.int64), *ends]), prefix)

    @property
    def block(self) -> bytes:
        """All names without the prefix, each followed by a zero byte."""
        return self._block

    def below(self, base: str) -> 'Names':
        """Returns the same names relative to `base`, with which the prefix begins."""
        return Names(self._block, self._ends, self._prefix.removeprefix(os.fsencode(base)))

    def between(self, start: int, stop: int) -> 'Names':
        """Returns the names from `start` to `stop` - 1."""
        first, last = (int(self._ends[i - 1]) if i else 0 for i in (start, stop))
        return Names(self._block[first:last], self._ends[start:stop] - first, self._prefix)

    def raw(self, index: int) -> bytes:
        """Returns one name as the bytes that are on disk."""
        return self._prefix + self._block[self._ends[index - 1] if index else 0 : self._ends[index] - 1]

    def take(self, indices: np.ndarray) -> 'Names':
        """Returns the names at these indices, int64 `[M]`, in that order."""
        without = Names(self._block, self._ends)
        return self._of((without.raw(i) for i in indices.tolist()), self._prefix)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self.raw(index % len(self)))

    def __iter__(self) -> Iterator[str]:
        return (os.fsdecode(self.raw(i)) for i in range(len(self)))


class Places(Sequence[str], abc.ABC):
    """Where N images are; as a sequence, their full paths, which messages show.

    Args:
      base: the path of what `relative` is relative to, with a separator at its end.
      names: the name of each image below `base` or, for members, inside of its shard.
    """

    def __init__(self, base: str, names: Names):
        self.base, self.names = base, names

    @abc.abstractmethod
    def relative(self, index: int) -> str:
        """Returns the path of an image below `base`, such as 'train/cat/3.png' or 'train-000000.tar/cat/3.png'."""

    @abc.abstractmethod
    def in_split(self, index: int) -> str:
        """Returns the path of an image inside of its split, such as 'cat/3.png'."""

    @abc.abstractmethod
    def read(self, index: int) -> bytes:
        """Returns the contents of an image file.

        Raises:
          OSError, ValueError: it cannot be read.
        """

    @abc.abstractmethod
    def size(self, index: int) -> int:
        """Returns the size of an image file in bytes; -1 if it cannot be read."""

    @abc.abstractmethod
    def stamp(self, index: int) -> str:
        """Returns a text that changes when an image file does."""

    def decode(self, index: int, form: decoding.Form) -> np.ndarray:
        """Returns the pixels of an image, see `decoding.decode`."""
        return decoding.decode(functools.partial(self.read, index), self[index], form)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.base + self.relative(index)


class FilePlaces(Places):
    """Files below a folder; `folder` is that of the split relative to `base`, such as 'train', or ''."""

    def __init__(self, base: str, names: Names, folder: str = ''):
        super().__init__(base, names)
        self._folder = os.path.join(folder, '')

    def relative(self, index: int) -> str:
        """Returns the path of an image below `base`."""
        return self.names[index]

    def in_split(self, index: int) -> str:
        """Returns the path of an image below the folder of the split."""
        return self.names[index].removeprefix(self._folder)

    def read(self, index: int) -> bytes:
        """Returns the contents of a file; raises an OSError or a ValueError if it cannot be read."""
        return decoding.read_file(self[index])

    def size(self, index: int) -> int:
        """Returns the size of a file in bytes; -1 if it cannot be read."""
        try:
            return os.path.getsize(self[index])
        except OSError:  # Decoding reports unreadable files.
            return -1

    def stamp(self, index: int) -> str:
        """Returns the size and the time of a file."""
        try:
            stat = os.stat(self[index])
        except OSError:  # A broken link; decoding reports it as a bad file.
            stat = os.lstat(self[index])
        return f'{stat.st_size}\0{stat.st_mtime_ns}'


class Shard(NamedTuple):
    """A tar file, as it was when it was indexed."""

    path: str
    size: int
    mtime_ns: int


class MemberPlaces(Places):
    """Members of tar shards, which are read at their offsets.

    Args:
      base: the folder that holds all shards, with a separator at its end.
      names: the names of the members.
      shards: the shards.
      shard_of: the index of each member's shard, int32 `[N]`.
      offsets: where the data of each member begins in its shard, int64 `[N]`.
      sizes: the sizes of the members in bytes, int64 `[N]`.
    """

    def __init__(
        self,
        base: str,
        names: Names,
        shards: Sequence[Shard],
        shard_of: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
    ):
        super().__init__(base, names)
        self._shards, self._shard_of, self._offsets, self._sizes = tuple(shards), shard_of, offsets, sizes

    def relative(self, index: int) -> str:
        """Returns the path of a member's shard below `base`, followed by the name of the member."""
        return f'{self._shard(index).path.removeprefix(self.base)}/{self.names[index]}'

    def in_split(self, index: int) -> str:
        """Returns the name of a member."""
        return self.names[index]

    def read(self, index: int) -> bytes:
        """Returns the contents of a member; raises an OSError or a ValueError if it cannot be read."""
        return _open_shard(self._shard(index)).read(int(self._offsets[index]), int(self._sizes[index]))

    def size(self, index: int) -> int:
        """Returns the size of a member in bytes."""
        return int(self._sizes[index])

    def stamp(self, index: int) -> str:
        """Returns the offset and the size of a member, and the size and the time of its shard."""
        _, size, mtime_ns = self._shard(index)
        return f'{self._offsets[index]}\0{self._sizes[index]}\0{size}\0{mtime_ns}'

    def _shard(self, index: int) -> Shard:
        return self._shards[self._shard_of[index]]


class _OpenShard:
    """An open shard, which several threads and processes may read at once."""

    def __init__(self, shard: Shard):
        self._shard = shard
        self._file = open(shard.path, 'rb', buffering=0)  # noqa: SIM115 (it stays open)

    def read(self, offset: int, size: int) -> bytes:
        stat = os.fstat(self._file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != self._shard[1:]:
            raise ValueError(
                'its shard has changed or was touched since it was indexed: start the command again to index it anew'
            )
        if hasattr(os, 'pread'):
            data = os.pread(self._file.fileno(), size, offset)
        else:  # Windows.
            with open(self._file.name, 'rb') as file:
                file.seek(offset)
                data = file.read(size)
        if len(data) < size:
            raise ValueError('its shard ends before it')
        return data

    def __del__(self):
        if hasattr(self, '_file'):
            self._file.close()


@functools.lru_cache(maxsize=64)  # A process may open 1,024 files, and a worker is one of several.
def _open_shard(shard: Shard) -> _OpenShard:
    return _OpenShard(shard)
