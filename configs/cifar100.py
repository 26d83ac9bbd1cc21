"""BYOL on CIFAR-100, with the recipes and presets of `configs/cifar10.py`.

Command:   python launch.py --config=configs/cifar100.py    or the presets :adam and :small
Data:      downloaded into ~/data.
Hardware:  one GPU; `:small` is for 2 CPU cores.
Expected:  not measured with this code.
"""

import ml_collections

from configs import cifar10

PRESETS = cifar10.PRESETS


def get_config(preset: str = 'lars') -> ml_collections.ConfigDict:
    """Returns the preset 'lars', 'adam', 'small' or 'cpu'."""
    config = cifar10.get_config(preset)
    config.dataset.name = 'cifar100'
    return config
