"""BYOL on CIFAR-10: ResNet-18 with the CIFAR stem, heads 4096/256.

Commands and presets:
  python launch.py --config=configs/cifar10.py         LARS, 1000 epochs; for a GPU
  python launch.py --config=configs/cifar10.py:adam    a recipe with a published accuracy of 91 %; for a GPU
  python launch.py --config=configs/cifar10.py:small   small encoder, views of 24 pixels, 6 epochs:
                                                       26 minutes on one busy CPU core
  python launch.py --config=configs/cifar10.py:cpu     the same encoder for 24 epochs: 85 minutes on one core

The data set is downloaded into ~/data. Without a network, use any copy as a folder of images:
add --config.dataset.name=folder --config.dataset.root=DIR (DIR/train/CLASS/*, DIR/test/CLASS/*).

`small` reaches 55.2 % with a linear classifier on a JPEG copy of the images (untrained 35.3 %, logistic regression
on raw pixels 41.4 %).

Expected: the best published online accuracy of BYOL with this network is 92.6 %. Accuracies measured with
this code are in benchmarks/results/README.md.

The LARS recipe is the official README's for a data set of similar size (Imagenette: base rate 2.0, decay
1e-6, batch 256, 1000 epochs, base tau 0.996), with a batch of 512 and the rate scaled linearly. The
augmentations are the official ones without blur.
"""

import ml_collections

from byol_func.errors import one_of
from configs import augmentations, byol, linear_evaluation


def get_config(preset: str = 'lars') -> ml_collections.ConfigDict:
    """Returns the preset 'lars', 'adam', 'small' or 'cpu'."""
    apply_preset = one_of('--config=configs/cifar10.py:PRESET, PRESET', preset, PRESETS)
    config = byol.get_config('1000')
    config.batch_size = 512
    config.image_size = 32
    config.eval_crop_fraction = 1.0
    config.dataset.name = 'cifar10'
    config.dataset.root = '~/data'
    config.dataset.max_gib = 16.0
    config.network.encoder_class = 'ResNet18'
    config.network.encoder_config.stem = 'cifar'
    augmentations.use(config, 'cifar')
    config.optimizer_config.lars.weight_decay = 1e-6
    config.lr_schedule.base_learning_rate = 2.0

    config.final_linear_eval = True
    config.linear_eval.cache_features = True
    config.linear_eval.compare_untrained = True
    config.linear_eval.num_epochs = 80
    config.linear_eval.batch_size = 256
    config.fine_tune.batch_size = 256
    config.evaluation.batch_size = 500
    apply_preset(config)
    return config


def _lars(config) -> None:
    """Leaves the config as it is."""


def _adam(config) -> None:
    config.base_target_ema = 0.99
    config.optimizer = 'adam'
    config.optimizer_config.adam.weight_decay = 1.5e-6
    config.optimizer_config.adam.weight_decay_filter = 'none'  # Decay on everything.
    config.lr_schedule.name = 'constant'
    config.lr_schedule.base_learning_rate = 3e-4
    config.lr_schedule.warmup_epochs = 0.0
    augmentations.use(config, 'official')
    config.augmentations.view2.solarize.apply_prob = 0.0
    linear_evaluation.use(config, 'constant')


def _small(config) -> None:
    config.num_epochs = 6
    config.batch_size = 64  # In a short run, more steps are worth more than larger batches.
    config.view_size = 24  # Views of 24 pixels cost half of what 32 do; the encoder is evaluated at 32.
    config.base_target_ema = 0.97  # The official value for the shortest run.
    config.network.encoder_class = 'ResNet10'
    config.network.encoder_config.width_multiplier = 0.5
    config.network.projector_hidden_size = 512
    config.network.projector_output_size = 128
    config.network.predictor_hidden_size = 512
    config.optimizer = 'adam'
    config.lr_schedule.base_learning_rate = 4e-3
    config.lr_schedule.warmup_epochs = 0.5
    config.eval_every_epochs = 2.0
    config.monitoring.health_every_steps = 200
    config.monitoring.health_images = 128
    config.monitoring.knn_bank_size = 5_000
    augmentations.soften(config)


def _cpu(config) -> None:
    _small(config)
    config.num_epochs = 24
    config.batch_size = 128
    config.base_target_ema = 0.99
    config.lr_schedule.base_learning_rate = 3e-3
    config.lr_schedule.warmup_epochs = 1.0
    config.eval_every_epochs = 3.0
    for view in (config.augmentations.view1, config.augmentations.view2):
        view.random_crop.min_area = 0.2


PRESETS = {'lars': _lars, 'adam': _adam, 'small': _small, 'cpu': _cpu}
