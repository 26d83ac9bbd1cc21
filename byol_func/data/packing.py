"""Writes the images of a split as tar shards, CLASS/KEY.jpg, which this code and WebDataset read.

The files depend on nothing but the names and contents of the images: owners, rights and times are left out, and a
digest of its name chooses the place of an image. Every shard is thus a sample of all classes, as readers expect that
read shards from their beginning.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator

from absl import logging

from byol_func import console
from byol_func.data import tar_index
from byol_func.data.examples import Files
from byol_func.data.walking import image_kind
from byol_func.errors import UserError, counted
from byol_func.runtime import atomic


def pack(files: Files, name: str, output: str, images_per_shard: int, channels: int = 0) -> list[str]:
    """Writes `NAME-000000.tar`, `NAME-000001.tar`, ... to a folder; a shard is complete or absent.

    Shards of an earlier run that hold members of the expected names and sizes are kept, so an interrupted run goes on.

    Args:
      files: the images; their bytes are copied.
      name: the name of the split.
      output: the folder, which is created.
      images_per_shard: the number of images in each shard but the last one.
      channels: `config.dataset.channels`.

    Returns:
      The paths of the shards.

    Raises:
      UserError: an image cannot be read, the folder cannot be written, or it holds shards of other images.
    """
    num_images = len(files.paths)
    order = sorted(range(num_images), key=lambda i: _digest(files.paths.in_split(i)))
    parts = [order[start : start + images_per_shard] for start in range(0, num_images, images_per_shard)]
    paths = [os.path.join(output, f'{name}-{i:06}.tar') for i in range(len(parts))]
    try:
        os.makedirs(output, exist_ok=True)
        ours = [each for each in sorted(os.listdir(output)) if each.startswith(f'{name}-') and each.endswith('.tar')]
        for each in ours:
            path = os.path.join(output, each)
            if path not in paths or not _holds(path, files, parts[paths.index(path)], channels):
                raise UserError(f'--output={output}: holds {each!r} of other images; expected an empty folder')
        if ours:
            logging.info('%s of %s are in %s already', counted(len(ours), 'shard'), name, output)
        to_write = [(path, part) for path, part in zip(paths, parts, strict=True) if os.path.basename(path) not in ours]
        for _ in console.watch(_written(files, to_write), f'Packing {name}', sum(len(part) for _, part in to_write)):
            pass
    except OSError as error:
        raise UserError(f'--output={output}: cannot write it ({error.strerror or error})') from error
    _warn_of_keys(files, name)
    return paths


def _digest(name: str) -> bytes:
    return hashlib.blake2b(os.fsencode(name), digest_size=8).digest()


def _member(files: Files, index: int) -> str:
    return files.paths.in_split(index).replace(os.sep, '/')


def _holds(path: str, files: Files, part: list[int], channels: int) -> bool:
    """Returns whether a shard holds these images, by their names and sizes."""
    try:
        found = tar_index.index(path, image_kind(channels))
    except tar_index.BadShard:
        return False
    expected = [(_member(files, i), files.paths.size(i)) for i in part]
    return list(zip(found.names, found.sizes.tolist(), strict=True)) == expected


def _written(files: Files, to_write: list[tuple[str, list[int]]]) -> Iterator[int]:
    """Writes the shards, and yields the index of every image that is written."""
    for path, part in to_write:
        with atomic.replacing(path) as temporary, tarfile.open(temporary, 'w', format=tarfile.PAX_FORMAT) as tar:
            for index in part:
                try:
                    data = files.paths.read(index)
                except (OSError, ValueError) as error:
                    reason = getattr(error, 'strerror', None) or error
                    raise UserError(f'{files.paths[index]}: cannot be read ({reason}); repair or remove it') from error
                member = tarfile.TarInfo(_member(files, index))
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                yield index


def _warn_of_keys(files: Files, name: str) -> None:
    """Warns if other readers would take two images for parts of one example."""
    keys: set[str] = set()
    for index in range(len(files.paths)):
        key = tar_index.key_of(_member(files, index))
        if key in keys:
            logging.warning(
                '%s: %r is not the only image with the key %r (its name up to the first dot); byol_func reads all of '
                'them, but WebDataset would take them for one example',
                name,
                _member(files, index),
                key,
            )
            return
        keys.add(key)
