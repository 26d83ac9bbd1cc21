"""BYOL on Tiny ImageNet: 100,000 + 10,000 photographs of 64 pixels, 200 classes of ImageNet.

Command:   python launch.py --config=configs/tiny_imagenet.py
Data:      the archive (237 MiB) is downloaded into ~/data once. Unpacked files are read as they are
           (ROOT/tiny-imagenet-200/train/WNID/images/*.JPEG, .../val/val_annotations.txt, ...); the validation set is
           the test set, since the labels of the other one are not published. In memory the images take 1.3 GiB.
Hardware:  one GPU; not measured yet.
Expected:  not measured with this code.
"""

import ml_collections

from configs import stl10


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe of `configs/stl10.py` with views of 64 pixels and the CIFAR stem."""
    config = stl10.get_config()
    config.image_size = 64
    config.dataset.name = 'tiny_imagenet'
    config.network.encoder_config.stem = 'cifar'
    return config
