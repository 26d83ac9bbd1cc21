"""Fingerprints of training sets, which let a resumed run check that its data has not changed."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from byol_func.data.examples import Examples
from byol_func.data.listing import normalised
from byol_func.errors import counted

_MOST_SIZES = 10_000  # Querying the sizes of a million files takes minutes on a network disk.


def fingerprint(data: Examples) -> dict[str, Any]:
    """Computes the fingerprint of a dataset from its labels and the names and sizes of its files.

    The location of the folder does not matter. For datasets that came as arrays the digest covers only the
    labels. Of more than 10,000 files, all names count but only the sizes of a regular sample.

    Returns:
      `{'num_examples', 'class_names', 'digest'}`, with values that JSON can represent.
    """
    digest = hashlib.blake2b(data.labels.cpu().numpy().tobytes(), digest_size=16)
    files = data.files
    if files is not None:
        places = range(len(files.paths)) if data.part is None else data.part.tolist()
        for place in places:
            digest.update(os.fsencode(files.paths.relative(place)) + b'\0')
        for place in places[:: -(-len(places) // _MOST_SIZES) or 1]:
            digest.update(b'%d\0' % files.paths.size(place))
    return {'num_examples': data.num_examples, 'class_names': list(data.class_names), 'digest': digest.hexdigest()}


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Describes how two fingerprints differ; returns '' if they are equal or the old one is empty."""
    if not old or old == new:
        return ''
    if old['num_examples'] != new['num_examples']:
        return f'{counted(old["num_examples"], "image")}, not {new["num_examples"]}'
    before, after = ([normalised(name) for name in found['class_names']] for found in (old, new))
    if before != after:
        gone, come = sorted({*before} - {*after}), sorted({*after} - {*before})
        if gone or come:
            return f'classes named {", ".join(gone) or "-"}, not {", ".join(come) or "-"}'
        return 'classes in another order'
    return 'images with other names, sizes or labels'
