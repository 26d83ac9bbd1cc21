"""BYOL on Imagenette: 9,469 + 3,925 photographs of 10 classes of ImageNet, the official README's fast recipe.

Command:   python launch.py --config=configs/imagenette.py
Data:      torchvision downloads imagenette2-160 (94 MiB) into ~/data once. For a copy elsewhere, add
           --config.dataset.root=DIR with DIR/train/WNID/*.JPEG and DIR/val/WNID/*.JPEG.
Hardware:  one GPU; not measured yet.
Expected:  the official README reports about 92.3 % for the online classifier after 1000 epochs. Not
           measured with this code.
"""

import ml_collections

from configs import folder


def get_config() -> ml_collections.ConfigDict:
    """Returns ResNet-18, views of 128 pixels from squares of 160, batch 256, LARS at a base rate of 2.0, 1000 epochs.

    `configs/folder.py` has the same recipe. It is written out here so that changes there do not reach this one.
    """
    config = folder.get_config()
    config.num_epochs = 1000
    config.batch_size = 256
    config.image_size = 128
    config.base_target_ema = 0.996
    config.dataset.name = 'imagenette'
    config.dataset.root = '~/data'
    config.dataset.source_size = 160
    config.dataset.exif_orientation = False
    config.network.encoder_class = 'ResNet18'
    config.optimizer_config.lars.weight_decay = 1e-6
    config.lr_schedule.base_learning_rate = 2.0
    return config
