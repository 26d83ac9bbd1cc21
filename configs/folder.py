"""BYOL on your own images: a folder with train/CLASS/* and test/CLASS/* (or val/CLASS/*).

Command:   python launch.py --config=configs/folder.py --config.dataset.root=DIR
Hardware:  one GPU; for a first look on a CPU add --config.network.encoder_class=TinyResNet.
Expected:  depends on the images. The recipe is the official README's for Imagenette (9,469 images of
           160 pixels in 10 classes, about 92.3 % online after 1000 epochs by that README).

Images of any format and size are read into memory once, as squares of `dataset.source_size` pixels;
views of `image_size` pixels are cut from them on the device. With images of 32 pixels set both to 32
and --config.network.encoder_config.stem=cifar.
"""

import ml_collections

from configs import byol


def get_config() -> ml_collections.ConfigDict:
    """Returns ResNet-18 on views of 128 pixels, batch 256, LARS at a base rate of 2.0, 1000 epochs."""
    config = byol.get_config('1000')
    config.batch_size = 256
    config.image_size = 128
    config.dataset.source_size = 160
    config.dataset.max_gib = 16.0
    config.dataset.exif_orientation = True  # A phone stores its photographs on their side.
    config.network.encoder_class = 'ResNet18'
    config.optimizer_config.lars.weight_decay = 1e-6
    config.lr_schedule.base_learning_rate = 2.0

    config.final_linear_eval = True
    config.linear_eval.cache_features = True
    config.linear_eval.compare_untrained = True
    config.linear_eval.batch_size = 256
    config.fine_tune.batch_size = 256
    return config
