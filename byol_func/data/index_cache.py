"""Keeps indexes of data sets between runs: arrays and a description in one file, written atomically.

They lie in the folder that the environment variable BYOL_FUNC_CACHE names, by default `byol_func` in the user's cache
(`$XDG_CACHE_HOME` or `~/.cache`), never beside the data, which may be read-only or shared. An index that cannot be
kept is made again by the next run.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from byol_func.runtime import atomic

Index = tuple[dict[str, Any], dict[str, np.ndarray]]  # A description of JSON values, and arrays.


def folder() -> str:
    """Returns the folder of all indexes."""
    user = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return os.environ.get('BYOL_FUNC_CACHE') or os.path.join(user, 'byol_func')


def load(kind: str, key: str) -> Index | None:
    """Returns what was saved under this key; None if there is nothing, or if it cannot be read or is damaged.

    Args:
      kind: the name of a sub-folder.
      key: any text, such as the path of a shard.
    """
    path = _path(kind, key)
    try:
        with safetensors.safe_open(path, 'numpy') as file:
            found = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        description = found['description']
        if found['key'] != ascii(key) or found['digest'] != _digest(description, arrays):
            return None
        return json.loads(description), arrays
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
        return None


def save(kind: str, key: str, description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Saves a description, which must be JSON, and arrays; if that fails, one line says so."""
    path, text = _path(kind, key), json.dumps(description)
    metadata = {'key': ascii(key), 'description': text, 'digest': _digest(text, arrays)}
    try:
        with atomic.replacing(path, shared=True) as temporary:
            temporary.write_bytes(safetensors.numpy.save(dict(arrays), metadata))
    except OSError as error:
        _tell(error.strerror or str(error))


@functools.cache  # Once per process: there may be a thousand shards.
def _tell(why: str) -> None:
    logging.warning(
        'Cannot keep the index of the images in %s (%s), so the next run makes it again; the environment variable '
        'BYOL_FUNC_CACHE names another folder',
        folder(),
        why,
    )


def _path(kind: str, key: str) -> str:
    name = hashlib.blake2b(os.fsencode(key), digest_size=16).hexdigest()
    return os.path.join(folder(), kind, f'{name}.safetensors')


def _digest(description: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Returns a digest of the contents: a power cut may leave a file of the right length with other bytes."""
    digest = hashlib.blake2b(description.encode(), digest_size=16)
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    return digest.hexdigest()
