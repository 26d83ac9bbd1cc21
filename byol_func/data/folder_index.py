"""Lists the files of a large folder once: later runs take the list from `index_cache` if no folder has changed.

Adding, removing or renaming a file changes the time of its folder. To compare the times of a thousand folders takes
milliseconds; to list a million files takes seconds, or minutes on a network disk.
"""

import os
import time
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from byol_func.data import index_cache
from byol_func.data.places import Names
from byol_func.data.walking import Contents, Kind, formats, walk
from byol_func.errors import counted

_LEAST = 100_000  # images for which the list is kept
_VERSION = 1  # Increment it when the list has other contents.
# A folder that has changed within this many seconds may change again without a new time: clocks differ and are coarse.
_AT_REST = 60.0


def walk_all(wanted: Kind, folder: str, groups: Mapping[str, Sequence[str]]) -> dict[str, Contents]:
    """Returns what `walk` finds below the folders of each group, or what it found in an earlier run.

    Args:
      wanted: which files are images.
      folder: contains all other folders.
      groups: for each name, such as that of a class, the paths of its folders.

    Raises:
      OSError: see `walk`.
    """
    key = os.path.abspath(folder)
    asked = [_VERSION, formats(wanted), folder, [[name, *paths] for name, paths in groups.items()]]
    kept = index_cache.load('folders', key)
    if kept and kept[0]['asked'] == asked and all(_stamp(path) == stamp for path, stamp in kept[0]['stamps']):
        return _unpack(folder, *kept)
    stamps: list[tuple[str, list[int] | None]] = []
    newest = (time.time() - _AT_REST) * 1e9

    def visit(path: str) -> None:
        stamps.append((path, _stamp(path)))

    below = os.path.join(folder, '')
    found = {name: walk(wanted, *paths, below=below, visit=visit) for name, paths in groups.items()}
    at_rest = all(stamp is not None and 0 < stamp[0] < newest for _, stamp in stamps)
    if at_rest and sum(len(contents.images) for contents in found.values()) >= _LEAST:
        counts = [len(contents.images) for contents in found.values()]
        rest = {name: (contents.hidden, contents.others) for name, contents in found.items()}
        block = Names.join([contents.images for contents in found.values()]).block
        arrays = {'names': np.frombuffer(block, np.uint8), 'counts': np.array(counts)}
        index_cache.save('folders', key, {'asked': asked, 'stamps': stamps, 'rest': rest}, arrays)
    return found


def _unpack(folder: str, kept: Mapping, arrays: Mapping[str, np.ndarray]) -> dict[str, Contents]:
    names = Names.from_block(arrays['names'].tobytes(), os.path.join(folder, ''))
    stops = np.cumsum(arrays['counts']).tolist()
    starts = [0, *stops]
    logging.info(
        '%s: the names of %s are those of an earlier run, since no folder has changed (index in %s)',
        folder,
        counted(len(names), 'image'),
        index_cache.folder(),
    )
    parts = zip(kept['rest'].items(), starts, stops, strict=False)
    return {name: Contents(names.between(start, stop), *rest) for (name, rest), start, stop in parts}


def _stamp(path: str) -> list[int] | None:
    """Returns the time and the number of a folder; None if it cannot be read."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [stat.st_mtime_ns, stat.st_ino]
