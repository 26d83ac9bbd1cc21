"""BYOL on your own images: a folder with train/CLASS/* and test/CLASS/* (or val/CLASS/*).

Commands and presets:
  python launch.py --config=configs/folder.py --config.dataset.root=DIR         for a GPU
  python launch.py --config=configs/folder.py:small --config.dataset.root=DIR   a first look on a CPU

Expected:  depends on the images. The recipe is the official README's for Imagenette (9,469 images of
           160 pixels in 10 classes; that README reports about 92.3 % for the online classifier after 1000
           epochs). `small` is for 500 to 50,000 images of any size: ResNet-10 with 128 features on views of
           32 pixels, for 200 epochs or 100,000 images, whichever is less. On three folders the training took 6
           to 11 minutes of one core. A linear classifier then reached 73.6 % on 12,000 letters of EMNIST
           (untrained encoder 45.8 %, raw pixels 68.6 %, though 83.1 % by nearest neighbours), 52.2 % on
           Imagenette (32.8 %, 41.4 %) and 46.1 % on CIFAR-10 (32.2 %); see benchmarks/results/README.md.

Images of any format and size are read into memory once, as squares of `dataset.source_size` pixels;
views of `image_size` pixels are cut from them on the device. For images of 32 pixels, set both to 32
and use --config.network.encoder_config.stem=cifar.
"""

import ml_collections

from byol_func.errors import one_of
from configs import augmentations, byol

PRESETS = ('large', 'small')


def get_config(preset: str = 'large') -> ml_collections.ConfigDict:
    """Returns the preset 'large' or 'small'.

    'large' is ResNet-18 on views of 128 pixels, batch 256, LARS at a base rate of 2.0, 1000 epochs.
    """
    one_of('--config=configs/folder.py:PRESET, PRESET', preset, PRESETS)
    config = byol.get_config('1000')
    config.batch_size = 256
    config.image_size = 128
    config.dataset.source_size = 160
    config.dataset.max_gib = 16.0
    config.dataset.max_bad_fraction = 0.01  # Files that cannot be read; they are listed and left out.
    config.dataset.exif_orientation = True  # Phones store photographs sideways and note the rotation in EXIF.
    config.network.encoder_class = 'ResNet18'
    config.optimizer_config.lars.weight_decay = 1e-6
    config.lr_schedule.base_learning_rate = 2.0

    config.final_linear_eval = True
    config.linear_eval.cache_features = True
    config.linear_eval.compare_untrained = True
    config.linear_eval.batch_size = 256
    config.fine_tune.batch_size = 256
    if preset == 'small':
        _small(config)
    return config


def _small(config) -> None:
    # Epochs, warm-up and evaluation interval shrink together if 200 epochs exceed `max_images`.
    config.num_epochs = 200
    config.max_images = 100_000
    config.lr_schedule.warmup_epochs = 20.0
    config.eval_every_epochs = 50.0
    config.batch_size = 64
    config.base_target_ema = 0.97  # The official value for the shortest schedule.
    config.image_size = 32
    config.eval_crop_fraction = 1.0
    config.dataset.source_size = 40
    augmentations.use(config, 'cifar')
    augmentations.soften(config)
    config.network.encoder_class = 'ResNet10'
    config.network.encoder_config.width_multiplier = 0.25  # 128 features.
    config.network.encoder_config.stem = 'cifar'
    config.network.projector_hidden_size = 512
    config.network.projector_output_size = 128
    config.network.predictor_hidden_size = 512
    # Adam, because LARS needs more steps than a first look has.
    config.optimizer = 'adam'
    config.lr_schedule.base_learning_rate = 4e-3
    config.log_every_steps = 10
    config.monitoring.health_every_steps = 100
    config.monitoring.health_images = 64
    config.monitoring.knn_bank_size = 5_000
    config.linear_eval.num_epochs = 40
