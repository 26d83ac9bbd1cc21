"""`--mode=shards`: writes the images of a folder as tar shards, in the layout that WebDataset reads.

The folder is `config.dataset.root`. `--output` gets `train-000000.tar`, ... and, if there is a test set, its shards:
`test-000000.tar` or `val-000000.tar`, after the name of its folder. The members are the files as they are, called
CLASS/NAME, or NAME without labels.
"""

import os

from byol_func.data import listing, packing
from byol_func.data.examples import Files
from byol_func.errors import UserError, counted, one_of
from byol_func.modes import given
from byol_func.runtime import collectives
from byol_func.workdir.run import Run


def make_shards(run: Run) -> None:
    """Writes the shards to --output, with --images_per_shard images in each; the first replica does it alone.

    Raises:
      UserError: a flag is missing or out of range, the folder is not as expected, an image cannot be read, or the
        shards cannot be written.
    """
    data = run.config.dataset
    one_of('config.dataset.name', data.name, ('folder',))
    if not run.output:
        raise UserError('--mode=shards: expected --output=FOLDER, where the shards are written')
    given.check_output(run.output, 'folder')
    if run.images_per_shard < 1:
        raise UserError(f'--images_per_shard={run.images_per_shard}: expected at least 1')
    if collectives.replica_index() > 0:
        return
    root = os.path.expanduser(data.root)
    splits = ('train', 'test') if data.eval_split == 'test' else ('train',)  # `preparing` knows if there is a test set.
    found = [listing.list_files(split, root, data.allow_empty, data.channels) for split in splits]
    for files in found:
        if files is not None:
            name = _name(files)
            paths = packing.pack(files, name, run.output, run.images_per_shard, data.channels)
            images, shards = counted(len(files.paths), 'image'), counted(len(paths), 'shard')
            print(f'{name}: {images} in {shards}, {paths[0]}{" to " * (len(paths) > 1)}{paths[-1] * (len(paths) > 1)}')
    print(f'Train on them with --config=configs/shards.py --config.dataset.root={run.output}')


def _name(files: Files) -> str:
    """Returns 'train', or 'test' or 'val' after the name of the test set's folder."""
    if files.split == 'train':
        return 'train'
    folder = files.paths.relative(0).split(os.sep)[0].lower()
    return 'val' if folder in listing.VAL else 'test'
