"""BYOL on millions of your own images: tar shards in the layout of WebDataset, streamed.

Command:   python launch.py --config=configs/shards.py --config.dataset.root=SHARDS
Data:      SHARDS/train-*.tar and SHARDS/val-*.tar with members CLASS/KEY.jpg, or KEY.jpg and KEY.cls; also a list of
           shards, or a pattern such as 'SHARDS/{train-{000000..000146},val-{000000..000006}}.tar'. To make them from a
           folder:
           python launch.py --config=configs/folder.py --config.dataset.root=DIR --mode=shards --output=SHARDS
Hardware:  GPUs; not measured.
Expected:  depends on the images. The recipe is that of configs/folder.py.

Nothing is unpacked: workers read each image at its place in a shard. Only the names, places and classes of the images
are in memory. Views are cut from squares of `dataset.source_size` pixels; 0 cuts them from the whole images, as
configs/byol.py does.
"""

import ml_collections

from configs import folder


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe of `configs/folder.py` on streamed shards."""
    config = folder.get_config()
    config.dataset.name = 'shards'
    config.dataset.max_gib = 0.0
    return config
