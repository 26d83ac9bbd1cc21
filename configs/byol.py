"""BYOL on ImageNet: the official presets for 40, 100, 300 and 1000 epochs.

Command:   python launch.py --config=configs/byol.py:300 --config.dataset.root=DIR
Data:      DIR/train/WNID/*.JPEG and DIR/val/WNID/*.JPEG.
Hardware:  the paper used 512 TPU v3 cores for 8 hours (1000 epochs, batch 4096).
Expected:  the paper reports a linear top-1 of 72.5 % (300 epochs) and 74.3 % (1000 epochs). Not measured
           with this code.

Every other config starts from this one, which has every field, with its official value.
"""

import ml_collections
from ml_collections import config_dict

from byol_func.errors import one_of
from configs import augmentations

# Epochs -> learning rate for a batch of 256, weight decay and base tau, from the official table.
PRESETS = {
    '40': dict(learning_rate=0.45, weight_decay=1e-6, base_target_ema=0.97),
    '100': dict(learning_rate=0.45, weight_decay=1e-6, base_target_ema=0.99),
    '300': dict(learning_rate=0.3, weight_decay=1e-6, base_target_ema=0.99),
    '1000': dict(learning_rate=0.2, weight_decay=1.5e-6, base_target_ema=0.996),
}


def get_config(preset: str = '1000') -> ml_collections.ConfigDict:
    """Returns the official `configs/byol.py` and `configs/eval.py` in one tree.

    Args:
      preset: the number of epochs, 40, 100, 300 or 1000.
    """
    values = one_of('--config=configs/byol.py:PRESET, PRESET', preset, PRESETS)
    config = ml_collections.ConfigDict()
    # Another update rule: a file with a function variant(parts, *, options), the options, and a digest of the file
    # that launch.py fills in. '' is BYOL itself. The gallery is in configs/variants.
    config.variant = ''
    config.variant_config = ml_collections.ConfigDict()
    config.variant_digest = ''
    # Continue the pre-training of an encoder: a checkpoint, an exported encoder or a workdir of byol_func, a checkpoint
    # of the official code, or a ResNet of torchvision or timm as safetensors; launch.py fills in the digest.
    config.init_from = ''
    config.init_digest = ''
    config.random_seed = 0
    config.num_seeds = 1  # Run i has the seed random_seed + i; the summary has mean and standard deviation.
    config.num_epochs = float(preset)  # A fraction such as 0.5 is a part of the images.
    # Most images to train on in all: num_epochs, warmup_epochs and eval_every_epochs shrink to keep to it. 0: no limit.
    config.max_images = 0
    config.batch_size = 4096  # Over all replicas.
    # Micro-batches that a replica splits its share of a batch into, one after the other, to save memory; their
    # gradients are averaged for one step. Batch statistics are those of a micro-batch.
    config.accumulate_steps = 1
    config.base_target_ema = values['base_target_ema']
    config.image_size = 224
    # Side of the views that pre-training learns from; 0: image_size, as in the official code. Smaller views cost less,
    # and an encoder is often more accurate on images somewhat larger than its views (arXiv 1906.06423).
    config.view_size = 0
    config.eval_crop_fraction = 0.875  # Side of the centre crop / shorter side of the image.
    # True compiles the training steps, False runs them as plain Python, for print and pdb. None chooses the
    # fastest for the length of the run: compiles a long one, traces a shorter one, leaves a very short one alone.
    config.compile = config_dict.placeholder(bool)
    # Size of the parts in which several replicas send their gradients while others are still computed, in MB; 0: in one
    # piece afterwards, as do steps that are neither traced nor compiled.
    config.gradient_bucket_mb = 0.0
    # Precision of convolutions, matrix products and activations in training: float32, tf32, bfloat16, or auto,
    # which is bfloat16 on a GPU and on a CPU with AMX, and float32 elsewhere; a resumed run keeps what it began with.
    # Evaluation always runs in float32.
    config.precision = 'auto'

    config.dataset = ml_collections.ConfigDict(
        dict(
            # folder, shards (of tar), digits, cifar10, cifar100, emnist_letters or another split of EMNIST, imagenette,
            # stl10, stl10_labeled or tiny_imagenet
            name='folder',
            root='',  # The folder of the data; for shards also a list of them or a pattern with braces.
            # 0 cuts views from whole images, which are decoded when needed. Another value stores each image as a
            # square of that side, in memory if all fit max_gib. The other configs do that.
            source_size=0,
            grayscale=False,  # Read the images of a folder with one channel.
            max_gib=0.0,  # Memory for the images of a split; a larger folder is streamed.
            max_bad_fraction=0.0,  # Share of files that may be unreadable; they are left out.
            num_workers=4,  # Processes that decode a streamed folder; 0: decode in this one.
            cache_dir='',  # Where decoded images are kept for the next run; '': nowhere.
            exif_orientation=False,  # Turn a folder's photographs as their EXIF says; the official code does not.
            # Number of channels that a folder's TIFF and .npy files have and keep. 0: all images are converted to three
            # channels, or to one by grayscale.
            channels=0,
            # Least and greatest value of files of more than 8 bits, such as (0, 4095), or one such pair for each of the
            # channels; (): (0, 65535).
            value_range=(),
            allow_empty=False,  # Whether the folder of a class may hold no images.
            fraction=1.0,  # Share of each class of the training set that is used.
            # val: evaluate on images held out of the training set; none: train on all images, without labels.
            eval_split='test',
            val_fraction=0.1,  # Share of each class that is held out for val.
        )
    )
    # Preset of the fields below: official, cifar, glyphs or none.
    config.augmentations_preset = 'official'
    config.augmentations = ml_collections.ConfigDict(augmentations.official())
    config.network = ml_collections.ConfigDict(
        dict(
            encoder_class='ResNet50',
            encoder_config=dict(resnet_v2=False, width_multiplier=1.0, stem='imagenet'),
            bn_config=dict(decay_rate=0.9, eps=1e-5, cross_replica=True),
            # batch_norm, group_norm (16 channels per group, with standardised weights), layer_norm or none.
            norm='batch_norm',  # In the encoder.
            head_norm='batch_norm',  # In projector and predictor.
            projector_depth=2,  # Linear layers; 0: the projection is the embedding.
            projector_hidden_size=4096,
            projector_output_size=256,
            predictor_depth=2,  # Linear layers; 0: the prediction is the projection.
            predictor_hidden_size=4096,
        )
    )
    config.optimizer = 'lars'  # One of the keys below.
    config.optimizer_config = optimizer_configs(weight_decay=values['weight_decay'])
    config.lr_schedule = ml_collections.ConfigDict(
        dict(name='cosine', base_learning_rate=values['learning_rate'], warmup_epochs=10.0)
    )

    # Preset of the epochs, optimiser and schedule of linear_eval: official or constant.
    config.linear_eval_preset = 'official'
    config.linear_eval = _evaluation_protocol(freeze_backbone=True, num_epochs=80, learning_rate=0.2)
    config.linear_eval.compare_pixels = False  # Logistic regression and nearest neighbours on raw pixels too.
    config.fine_tune = _evaluation_protocol(freeze_backbone=False, num_epochs=30, learning_rate=0.05)
    config.final_linear_eval = False  # Run the linear evaluation right after pre-training.
    # knn and logistic take the labels of these images, as label_files and label_fraction of linear_eval say.
    config.evaluation = ml_collections.ConfigDict(dict(batch_size=100, label_files='', label_fraction=1.0))
    config.eval_every_epochs = 10.0  # Online classifier and k-NN on eval_split; 0: only at the end.
    config.monitoring = ml_collections.ConfigDict(
        dict(
            health_every_steps=200,  # Spread, rank and norms; a collapse is reported.
            health_images=512,  # Taken from the batch of each replica.
            knn_bank_size=50_000,  # Training images that vote in k-NN, chosen at random.
        )
    )
    config.checkpointing = ml_collections.ConfigDict(
        dict(
            save_every_seconds=300.0,
            save_every_steps=0,  # 0: save by time only.
            keep=3,  # Keep this many; for pre-training also those of the next fields.
            keep_every_epochs=0.0,  # Save and keep one every so many epochs; 0: none.
            best_metric='',  # Keep the best by a name in metrics.jsonl; '': none.
            best_is='auto',  # highest, lowest, or auto: lowest for a name with 'loss' or 'error'.
        )
    )
    config.log_every_steps = 50
    # The contact sheet of augmentations that pre-training and --mode=preview write; 0 images: none.
    config.preview = ml_collections.ConfigDict(dict(num_images=6, num_draws=3))
    config.pictures = True  # Write pictures and report.html at the end of a run.
    return config


def optimizer_configs(weight_decay: float) -> ml_collections.ConfigDict:
    """Returns the keyword arguments of every optimiser, so that one override chooses among them."""
    decay = dict(weight_decay=weight_decay, weight_decay_filter='exclude_bias_and_norm')
    moments = dict(b1=0.9, b2=0.999, eps=1e-8)
    return ml_collections.ConfigDict(
        dict(
            lars=dict(momentum=0.9, eta=1e-3, lars_adaptation_filter='exclude_bias_and_norm', **decay),
            sgd=dict(momentum=0.9, nesterov=True, **decay),
            adam=dict(**moments, **decay),
            adamw=dict(**moments, **decay),
            lion=dict(b1=0.9, b2=0.99, **decay),
            muon=dict(momentum=0.95, nesterov=True, num_iterations=5, **moments, **decay),
        )
    )


def _evaluation_protocol(freeze_backbone, num_epochs, learning_rate) -> ml_collections.ConfigDict:
    """Returns the official protocol: random crop and flip, SGD with Nesterov momentum, cosine, no weight decay."""
    return ml_collections.ConfigDict(
        dict(
            freeze_backbone=freeze_backbone,
            cache_features=False,  # Embed the centre crops once, without augmentation; frozen only.
            compare_untrained=False,  # Run the protocol on an untrained encoder too.
            num_epochs=float(num_epochs),
            batch_size=1024,
            label_fraction=1.0,  # Share of each class to train on: 0.1 and 0.01 in the paper.
            # A text file with one image name per line, in place of a share, such as SimCLR's 1percent.txt.
            label_files='',
            # Learning rates and weight decays to choose from. The choice is made on dataset.val_fraction of the
            # training set; the classifier is then trained on all of it. An empty tuple: the single value below.
            sweep=dict(learning_rates=(), weight_decays=()),
            # decay_rate None is the paper's max(1 - 10 / steps per epoch, 0.9). As in the official code, each replica
            # has its own statistics, and the averages of the first one are saved and evaluated.
            bn_config=dict(decay_rate=config_dict.placeholder(float), eps=1e-5, cross_replica=False),
            augmentations=augmentations.crop_and_flip(augmentations.official()),
            optimizer='sgd',
            optimizer_config=optimizer_configs(weight_decay=0.0),
            lr_schedule=dict(name='cosine', base_learning_rate=learning_rate, warmup_epochs=0.0),
        )
    )
