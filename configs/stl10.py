"""BYOL on STL-10: 105,000 images of 96 pixels to pre-train on, 5,000 + 8,000 with labels of ten classes to evaluate.

Command:   python launch.py --config=configs/stl10.py
Data:      torchvision downloads the archive (2.5 GiB) into ~/data once. Unpacked files are read as they are
           (ROOT/stl10_binary/unlabeled_X.bin, ...). In memory the images take 2.7 GiB, and the labelled ones 0.3.
Hardware:  one GPU; not measured yet.
Expected:  not measured with this code.

Pre-training takes the 100,000 images without labels, and the 5,000 training images without their labels. Nearest
neighbours while training, the linear evaluation at its end and every mode on top train on the 5,000 and test on the
8,000; there is no online classifier. With --config.dataset.name=stl10_labeled the 5,000 images are all there is.
"""

import ml_collections

from configs import byol


def get_config() -> ml_collections.ConfigDict:
    """Returns ResNet-18, views of 96 pixels, batch 512, 100 epochs, and LARS at a base rate of 2.0.

    The official README uses this rate for small data sets.
    """
    config = byol.get_config('1000')
    config.num_epochs = 100
    config.batch_size = 512
    config.base_target_ema = 0.99  # The official value for 100 epochs.
    config.image_size = 96
    config.eval_crop_fraction = 1.0
    config.dataset.name = 'stl10'
    config.dataset.root = '~/data'
    config.dataset.max_gib = 16.0
    config.network.encoder_class = 'ResNet18'
    config.optimizer_config.lars.weight_decay = 1e-6
    config.lr_schedule.base_learning_rate = 2.0

    config.final_linear_eval = True
    config.linear_eval.cache_features = True
    config.linear_eval.compare_untrained = True
    config.linear_eval.batch_size = 256
    config.fine_tune.batch_size = 256
    config.evaluation.batch_size = 500
    return config
