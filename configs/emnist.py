"""BYOL on EMNIST: handwritten letters and digits, 28 x 28 pixels, one channel, six splits.

Commands and presets:
  python launch.py --config=configs/emnist.py:letters        a..z: 124,800 + 20,800 images, 26 classes
  python launch.py --config=configs/emnist.py:balanced       112,800 + 18,800 images, 47 classes
  python launch.py --config=configs/emnist.py:byclass        697,932 + 116,323 images, 62 classes, unbalanced
  python launch.py --config=configs/emnist.py:bymerge        the same images, 47 classes, unbalanced
  python launch.py --config=configs/emnist.py:digits         240,000 + 40,000 images, 10 classes
  python launch.py --config=configs/emnist.py:mnist          60,000 + 10,000 images, 10 classes
  python launch.py --config=configs/emnist.py:letters_small  small encoder, four epochs, for a CPU

Hardware:  a GPU for the six splits; half an hour on one busy CPU core for `letters_small`, less on two.
Expected:  not measured for the six splits. `letters_small`, one seed, in bfloat16: a linear classifier reaches 50.1 %
           on the untrained encoder and 89.8 % after BYOL; on raw pixels logistic regression reaches 72.1 % and the
           nearest neighbours 88.8 %. Log and curves are in benchmarks/results/emnist_letters_cpu.

torchvision downloads the archive (536 MiB) into ~/data once. A copy with the same layout
(ROOT/EMNIST/raw/emnist-letters-train-images-idx3-ubyte, ...) is read as it is. Images are turned upright, and
the labels of letters count from 0.

The augmentations are the preset `glyphs`, explained in configs/augmentations.py.
"""

import ml_collections

from byol_func.errors import one_of
from configs import augmentations, byol

SPLITS = ('letters', 'balanced', 'byclass', 'bymerge', 'digits', 'mnist')
PRESETS = (*SPLITS, 'letters_small')


def get_config(preset: str = 'letters') -> ml_collections.ConfigDict:
    """Returns the config of one of the six splits, or 'letters_small'.

    ResNet-18 with the CIFAR stem, batch 512, 100 epochs, and LARS at a base rate of 2.0, which the official
    README uses for small data sets.
    """
    one_of('--config=configs/emnist.py:PRESET, PRESET', preset, PRESETS)
    config = byol.get_config('1000')
    config.num_epochs = 100
    config.batch_size = 512
    config.base_target_ema = 0.99  # The official value for 100 epochs.
    config.image_size = 28
    config.eval_crop_fraction = 1.0
    config.dataset.name = f'emnist_{preset.removesuffix("_small")}'
    config.dataset.root = '~/data'
    config.dataset.max_gib = 16.0
    augmentations.use(config, 'glyphs')
    config.network.encoder_class = 'ResNet18'
    config.network.encoder_config.stem = 'cifar'
    config.optimizer_config.lars.weight_decay = 1e-6
    config.lr_schedule.base_learning_rate = 2.0
    config.lr_schedule.warmup_epochs = 5.0

    config.final_linear_eval = True
    config.linear_eval.cache_features = True
    config.linear_eval.compare_untrained = True
    config.linear_eval.num_epochs = 20
    config.linear_eval.batch_size = 256
    config.fine_tune.batch_size = 256
    config.evaluation.batch_size = 500
    if preset == 'letters_small':
        _small(config)
    return config


def _small(config) -> None:
    config.num_epochs = 4
    config.batch_size = 64  # In a short run, more steps are worth more than larger batches.
    config.view_size = 20
    config.base_target_ema = 0.97
    config.network.encoder_class = 'ResNet10'
    config.network.encoder_config.width_multiplier = 0.25
    config.network.projector_hidden_size = 512
    config.network.projector_output_size = 128
    config.network.predictor_hidden_size = 512
    config.optimizer = 'adam'
    config.lr_schedule.base_learning_rate = 4e-3
    config.lr_schedule.warmup_epochs = 0.2
    config.linear_eval.num_epochs = 10
    config.eval_every_epochs = 1.0
    config.monitoring.health_every_steps = 500
    config.monitoring.health_images = 128
    config.monitoring.knn_bank_size = 5_000
    # Larger crops, and no change of contrast or blur: the letters differ by their strokes alone.
    for view in (config.augmentations.view1, config.augmentations.view2):
        view.random_crop.min_area = 0.6
        view.color_transform.apply_prob = 0.0
        view.gaussian_blur.apply_prob = 0.0
