"""BYOL on ImageNet, the official presets for 40, 100, 300 and 1000 epochs.

Command:   python launch.py --config=configs/byol.py:300 --config.dataset.root=DIR
Data:      DIR/train/WNID/*.JPEG and DIR/val/WNID/*.JPEG.
Hardware:  the paper used 512 TPU v3 cores for 8 hours (1000 epochs, batch 4096).
Expected:  linear top-1 on ImageNet by the paper: 72.5 % (300 epochs), 74.3 % (1000 epochs). Not
           measured with this code.

Every other config starts from this one: here is every field with its official value.
"""

import ml_collections
from ml_collections import config_dict

from byol_func.errors import one_of
from configs import augmentations

# epochs -> learning rate for a batch of 256, weight decay, base tau; the official table.
_PRESETS = {
    '40': dict(learning_rate=0.45, weight_decay=1e-6, base_target_ema=0.97),
    '100': dict(learning_rate=0.45, weight_decay=1e-6, base_target_ema=0.99),
    '300': dict(learning_rate=0.3, weight_decay=1e-6, base_target_ema=0.99),
    '1000': dict(learning_rate=0.2, weight_decay=1.5e-6, base_target_ema=0.996),
}


def get_config(preset: str = '1000') -> ml_collections.ConfigDict:
    """The official `configs/byol.py` and `configs/eval.py` in one tree.

    Args:
      preset: the number of epochs, 40, 100, 300 or 1000.
    """
    values = one_of('--config=configs/byol.py:PRESET, PRESET', preset, _PRESETS)
    config = ml_collections.ConfigDict()
    config.random_seed = 0
    config.num_seeds = 1  # More: run i has random_seed + i; the summary tells the spread.
    config.num_epochs = int(preset)
    config.batch_size = 4096  # Over all replicas.
    config.base_target_ema = values['base_target_ema']
    config.image_size = 224
    config.eval_crop_fraction = 0.875  # Side of the centre crop over the shorter side.
    # True compiles the steps, False runs them as the Python they are, for print and pdb. None does what ends
    # the run first: compiles where it is long enough, traces a shorter one, leaves a very short one alone.
    config.compile = config_dict.placeholder(bool)
    # float32, tf32 or bfloat16 for convolutions, products and activations of the steps that train; auto:
    # bfloat16 on a GPU. Accuracies and embeddings are computed in float32, whichever was trained with.
    config.precision = 'auto'

    config.dataset = ml_collections.ConfigDict(
        dict(
            name='folder',  # folder, digits, cifar10, cifar100, emnist_letters or another split of EMNIST
            root='',
            # Views are cut from whole images, decoded when they are needed. A source_size stores squares of that
            # side instead, in memory if they fit max_gib, as the other configs do.
            source_size=0,
            grayscale=False,  # Read a folder's images with one channel.
            max_gib=0.0,  # Memory for the images of one split; a larger folder is streamed.
            max_bad_fraction=0.0,  # Share of a folder's files that may be unreadable; they are left out.
            num_workers=4,  # Processes that decode a streamed folder; 0: none but this one.
            cache_dir='',  # Where a folder's decoded images are kept for the next run; '': nowhere.
            fraction=1.0,  # Share of each class of the training set that is used.
            eval_split='test',  # val: evaluate on a part held out of the training set.
            val_fraction=0.1,  # Share of each class that is held out for val.
        )
    )
    # What the fields below are before anything else: official, cifar, glyphs or none.
    config.augmentations_preset = 'official'
    config.augmentations = ml_collections.ConfigDict(augmentations.official())
    config.network = ml_collections.ConfigDict(
        dict(
            encoder_class='ResNet50',
            encoder_config=dict(resnet_v2=False, width_multiplier=1.0, stem='imagenet'),
            bn_config=dict(decay_rate=0.9, eps=1e-5, cross_replica=True),
            projector_hidden_size=4096,
            projector_output_size=256,
            predictor_hidden_size=4096,
        )
    )
    config.optimizer = 'lars'  # One of the keys below.
    config.optimizer_config = optimizer_configs(weight_decay=values['weight_decay'])
    config.lr_schedule = ml_collections.ConfigDict(
        dict(name='cosine', base_learning_rate=values['learning_rate'], warmup_epochs=10.0)
    )

    # What epochs, optimiser and schedule of linear_eval are before anything else: official or constant.
    config.linear_eval_preset = 'official'
    config.linear_eval = _evaluation_protocol(freeze_backbone=True, num_epochs=80, learning_rate=0.2)
    config.linear_eval.compare_pixels = False  # Logistic regression and nearest neighbours on raw pixels too.
    config.fine_tune = _evaluation_protocol(freeze_backbone=False, num_epochs=30, learning_rate=0.05)
    config.final_linear_eval = False  # Linear evaluation right after pre-training.
    config.evaluation = ml_collections.ConfigDict(dict(batch_size=100))
    config.eval_every_epochs = 10.0  # Online classifier and k-NN on the eval_split; 0: at the end only.
    config.monitoring = ml_collections.ConfigDict(
        dict(
            health_every_steps=200,  # Spread, rank, norms (byol_func/evaluation/health.py); collapses are told.
            health_images=512,  # Of each replica's batch.
            knn_bank_size=50_000,  # Training images that vote; a random part of a larger set.
        )
    )
    config.checkpointing = ml_collections.ConfigDict(
        dict(
            save_every_seconds=300.0,
            save_every_steps=0,  # 0: by time only.
            keep=3,  # The newest so many stay; of the pre-training also those that the next fields choose.
            keep_every_epochs=0.0,  # One is saved and stays every so many epochs; 0: none.
            best_metric='',  # The one with the best value of a name in metrics.jsonl stays; '': none.
            best_is='auto',  # highest or lowest; auto: lowest where the name has 'loss' or 'error' in it.
        )
    )
    config.log_every_steps = 50
    # The sheet of augmentations that every pre-training writes, and --mode=preview; 0 images: none.
    config.preview = ml_collections.ConfigDict(dict(num_images=6, num_draws=3))
    config.pictures = True  # Pictures and report.html at the end of a run.
    return config


def optimizer_configs(weight_decay: float) -> ml_collections.ConfigDict:
    """The keyword arguments of every optimiser, so that choosing one is a single override."""
    decay = dict(weight_decay=weight_decay, weight_decay_filter='exclude_bias_and_norm')
    moments = dict(b1=0.9, b2=0.999, eps=1e-8)
    return ml_collections.ConfigDict(
        dict(
            lars=dict(momentum=0.9, eta=1e-3, lars_adaptation_filter='exclude_bias_and_norm', **decay),
            sgd=dict(momentum=0.9, nesterov=True, **decay),
            adam=dict(**moments, **decay),
            adamw=dict(**moments, **decay),
        )
    )


def _evaluation_protocol(freeze_backbone, num_epochs, learning_rate) -> ml_collections.ConfigDict:
    """Random crop and flip, SGD with Nesterov momentum, cosine rate, no weight decay."""
    return ml_collections.ConfigDict(
        dict(
            freeze_backbone=freeze_backbone,
            cache_features=False,  # Embed the centre crops once instead of augmenting; frozen only.
            compare_untrained=False,  # Repeat the protocol on an encoder that was never trained.
            num_epochs=num_epochs,
            batch_size=1024,
            label_fraction=1.0,  # Share of each class of the training set that is used: 0.1 and 0.01 in the paper.
            # Instead of a share: a text file with one image file name per line, as SimCLR's 1percent.txt; '': none.
            label_files='',
            # Base learning rates (none: that of lr_schedule) and weight decays (none: that of the optimiser) to
            # choose from on dataset.val_fraction of the training set; then all of it is trained on. Either will do.
            sweep=dict(learning_rates=(), weight_decays=()),
            # None: the paper's max(1 - 10 / steps per epoch, 0.9). As in the official code a replica's statistics are
            # its own, and the averages of the first one are saved and evaluated.
            bn_config=dict(decay_rate=config_dict.placeholder(float), eps=1e-5, cross_replica=False),
            augmentations=augmentations.crop_and_flip(augmentations.official()),
            optimizer='sgd',
            optimizer_config=optimizer_configs(weight_decay=0.0),
            lr_schedule=dict(name='cosine', base_learning_rate=learning_rate, warmup_epochs=0.0),
        )
    )
