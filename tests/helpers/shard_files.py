"""Tar shards of small images."""

import io
import tarfile

import numpy as np

from byol_func.data import listing, packing
from image_folders import smooth


def pack(root, output, images_per_shard=5, splits=('train', 'test')):
    """The shards of a folder's splits."""
    for split in splits:
        packing.pack(listing.list_files(split, str(root)), split, str(output), images_per_shard)
    return output


def jpeg(seed: int, size=(24, 24)) -> bytes:
    """The bytes of an image."""
    file = io.BytesIO()
    smooth(np.random.default_rng(seed), *size).save(file, 'jpeg')
    return file.getvalue()


def write_tar(path, members):
    """A tar of these members: names and contents, or whole `TarInfo`s without contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
