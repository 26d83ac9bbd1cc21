"""Tells one training set from another, for runs that go on after an interruption."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from byol_func.data.examples import Examples

_MOST_SIZES = 10_000  # Asking for the size of each of a million files takes minutes on a network disk.


def fingerprint(data: Examples) -> dict[str, Any]:
    """How many examples a set has, and a digest of their labels and of names and sizes of their files.

    Where the folder lies does not matter. Of sets that came as arrays the digest holds the labels alone.

    Returns:
      `{'num_examples', 'class_names', 'digest'}`, as JSON has it.
    """
    digest = hashlib.blake2b(data.labels.cpu().numpy().tobytes(), digest_size=16)
    files = data.files
    if files is not None:
        places = range(len(files.paths)) if data.part is None else data.part.tolist()
        root = os.path.join(files.root, '')
        for place in places:
            digest.update(os.fsencode(files.paths[place].removeprefix(root)) + b'\0')
        for place in places[:: -(-len(places) // _MOST_SIZES) or 1]:
            digest.update(b'%d\0' % _size(files.paths[place]))
    return {
        'num_examples': data.num_examples,
        'class_names': list(data.class_names),
        'digest': digest.hexdigest(),
    }


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # Whoever reads the file says so.
        return -1


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What two fingerprints do not share, in words; '' where they are equal or the old one is empty."""
    if not old or old == new:
        return ''
    if old['num_examples'] != new['num_examples']:
        return f'{old["num_examples"]} images, not {new["num_examples"]}'
    if old['class_names'] != new['class_names']:
        gone, come = (sorted({*a['class_names']} - {*b['class_names']}) for a, b in ((old, new), (new, old)))
        if gone or come:
            return f'classes that are called {", ".join(gone) or "-"}, not {", ".join(come) or "-"}'
        return 'classes in another order'
    return 'images with other names, sizes or labels'
