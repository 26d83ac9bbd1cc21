"""BYOL on scikit-learn's handwritten digits: the quick start, with nothing to download.

Command:   python launch.py --config=configs/digits.py
Hardware:  2 CPU cores, 3 minutes.
Expected:  a linear classifier reaches 82.8 % on the untrained encoder and 98.3 % after BYOL; logistic
           regression on raw pixels reaches 95.2 %. Log and curves are in benchmarks/results/digits_cpu.
"""

import ml_collections

from configs import augmentations, byol


def get_config() -> ml_collections.ConfigDict:
    """Returns a small network on 8 x 8 images with a linear evaluation at the end."""
    config = byol.get_config('1000')
    config.num_epochs = 100
    config.batch_size = 64
    config.base_target_ema = 0.97
    config.image_size = 8
    config.precision = 'float32'  # Networks as small as this one gain nothing from bfloat16.
    config.eval_crop_fraction = 1.0
    config.dataset.name = 'digits'
    config.dataset.max_gib = 16.0

    augmentations.use(config, 'glyphs')

    config.network.encoder_class = 'ResNet10'
    config.network.encoder_config.width_multiplier = 0.25
    config.network.encoder_config.stem = 'cifar'
    config.network.projector_hidden_size = 256
    config.network.projector_output_size = 64
    config.network.predictor_hidden_size = 256
    config.optimizer = 'adam'  # LARS needs more steps than a quick start has.
    config.lr_schedule.base_learning_rate = 8e-3
    config.lr_schedule.warmup_epochs = 2.0

    config.final_linear_eval = True
    config.linear_eval.cache_features = True
    config.linear_eval.compare_pixels = True
    config.linear_eval.compare_untrained = True
    config.linear_eval.num_epochs = 80
    config.linear_eval.batch_size = 256
    config.log_every_steps = 10
    config.eval_every_epochs = 25.0
    config.monitoring.health_every_steps = 50
    config.monitoring.health_images = 32
    config.monitoring.knn_bank_size = 500
    return config
