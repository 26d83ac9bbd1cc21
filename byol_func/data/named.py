"""The data sets that have a name, beside folders of images: their sizes, and which loader reads them."""

import os

from byol_func.data import arrays, stl10, tiny_imagenet
from byol_func.data.examples import Dataset

# The side of their images, which are read into memory.
SIDES = {
    'digits': 8,
    'cifar10': 32,
    'cifar100': 32,
    **{f'emnist_{split}': 28 for split in arrays.EMNIST_SPLITS},
    'stl10': stl10.SIDE,
    'stl10_labeled': stl10.SIDE,
    'tiny_imagenet': tiny_imagenet.SIDE,
}
# Those that are images of any size, in folders or, for 'shards', in tar files.
FOLDERS = ('folder', 'shards', 'imagenette')
# Images without labels to pre-train on, and the set with labels that evaluates the encoder.
LABELLED = {'stl10': 'stl10_labeled'}
_IMAGENETTE = arrays.Archive(
    'Imagenette',
    'https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz',
    'e793b78cc4c9e9a4ccc0c1155377a412',
    'imagenette2-160',
)


def load(split: str, name: str, root: str, max_gib: float) -> Dataset | None:
    """Loads a split of one of `SIDES`; the arguments are those of `dataset.load`.

    Returns:
      The split; None for the test split of one of `LABELLED`.

    Raises:
      UserError: it cannot be read or downloaded, or does not fit `max_gib`.
    """
    if name == 'digits':
        return arrays.load_digits(split, max_gib)
    if name.startswith('cifar'):
        return arrays.load_cifar(split, name, root, max_gib)
    if name.startswith('emnist'):
        return arrays.load_emnist(split, name, root, max_gib)
    if name == 'tiny_imagenet':
        return tiny_imagenet.load(split, root, max_gib)
    if name == 'stl10_labeled':
        return stl10.load_labelled(split, root, max_gib)
    return stl10.load_unlabelled(root, max_gib) if split == 'train' else None


def folder_of(name: str, root: str) -> str:
    """Returns the folder with the images of one of `FOLDERS`.

    For 'folder' and 'shards' it is `root`. For 'imagenette' it is `root` if that holds a folder `train`, else
    `root/imagenette2-160`, which is downloaded if it is not there.

    Raises:
      UserError: it cannot be downloaded.
    """
    if name in ('folder', 'shards') or os.path.isdir(os.path.join(root, 'train')):
        return root
    found = os.path.join(root, _IMAGENETTE.folder)
    return found if os.path.isdir(found) else arrays.fetch(root, _IMAGENETTE, 'train and val')
