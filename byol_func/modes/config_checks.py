"""Checks of the command line and of config files; each mistake is reported in one line."""

import itertools
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from absl import logging
from ml_collections import ConfigDict

from byol_func.cli import article, unknown_field
from byol_func.errors import UserError, counted, one_of
from byol_func.runtime import compilers, launchers
from byol_func.runtime.precision import DTYPES
from byol_func.utils import variants


def check_fields(config: ConfigDict, reference: ConfigDict) -> None:
    """Checks that a config has exactly the fields of a reference, with the same types.

    Raises:
      UserError: a field is unknown, is missing or has another type.
    """
    _check_section(config, reference, reference, 'config')


def _check_section(config: ConfigDict, reference: ConfigDict, whole: ConfigDict, prefix: str) -> None:
    for key in config:
        if key not in reference:
            raise unknown_field(f'{prefix}.{key}', whole)
    for key, expected in reference.items():
        if key not in config:
            raise UserError(f'{prefix}.{key}: missing')
        value = config[key]
        if not _same_type(value, expected):
            raise UserError(f'{prefix}.{key}={value!r}: expected {article(type(expected).__name__)}')
        if isinstance(expected, ConfigDict):
            _check_section(value, expected, whole, f'{prefix}.{key}')


def check_variant(config: ConfigDict, reference: ConfigDict) -> None:
    """Fills in the options and the digest of `config.variant`, and adds the variant's options to the reference.

    Raises:
      UserError: the variant's file cannot be used.
    """
    if not isinstance(config.get('variant'), str) or not config.variant:
        return
    defaults = variants.options(variants.load(config.variant), config.variant)
    config.variant = variants.stored_path(variants.find(config.variant))
    reference.variant_config = ConfigDict(defaults)
    config.variant_config = ConfigDict(defaults | dict(config.get('variant_config', {})))
    config.variant_digest = variants.digest(config.variant)


def _same_type(value: Any, expected: Any) -> bool:
    if isinstance(expected, ConfigDict) or isinstance(value, ConfigDict):
        return isinstance(value, ConfigDict) and isinstance(expected, ConfigDict)
    if expected is None or value is None:  # A placeholder: None selects a default rule.
        return True
    return type(value) is type(expected) or (type(expected) is float and type(value) is int)


def check_values(config: ConfigDict) -> None:
    """Checks numbers that no other function checks, and names that would otherwise be checked late in a run.

    Raises:
      UserError: a number is out of its range, or a name is unknown.
    """
    for field, low, high in _RANGES:
        value = config
        for key in field.split('.'):
            value = value[key]
        if value is not None and not (low <= value and (high is None or value <= high)):
            accepted = f'at least {low}' if high is None else f'{low} to {high}'
            raise UserError(f'config.{field}={value!r}: expected {accepted}')
    one_of('config.checkpointing.best_is', config.checkpointing.best_is, ('auto', 'highest', 'lowest'))
    one_of('config.precision', config.precision, tuple(DTYPES))
    for section in ('', 'linear_eval.', 'fine_tune.'):
        fields = config[section[:-1]] if section else config
        one_of(f'config.{section}optimizer', fields['optimizer'], tuple(fields['optimizer_config']))
        schedule = fields['lr_schedule']['name']
        one_of(f'config.{section}lr_schedule.name', schedule, ('cosine', 'constant'))
        if section and fields['cache_features'] and not fields['freeze_backbone']:
            field = f'config.{section}cache_features'
            raise UserError(f'{field}=True: expected False unless freeze_backbone=True')
        if section:
            _check_sweep(config, section[:-1])
    for section in LABELLED:
        path, fraction = config[section].label_files, config[section].label_fraction
        if path and fraction < 1.0:
            raise UserError(
                f"config.{section}.label_files={path!r}: expected '' beside config.{section}.label_fraction={fraction}"
            )


# The sections of a config that say which labels to use, and the modes that heed them.
LABELLED = {'linear_eval': ('linear_eval', 'pretrain'), 'fine_tune': ('fine_tune',), 'evaluation': ('knn', 'logistic')}


def check_labels(mode: str, config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Checks, before images are read, which labels a mode is told to use.

    Raises:
      UserError: the list of labelled files does not exist, or the user has set the field of another mode. A
        `label_fraction` of the other protocol may stand among flags that several commands share.
    """
    own = [section for section, modes in LABELLED.items() if mode in modes]
    for section in own:
        path = config[section].label_files
        if path and not os.path.isfile(os.path.expanduser(path)):
            expected = 'expected a text file, one image file name per line'
            raise UserError(f'config.{section}.label_files={path!r}: No such file or directory; {expected}')
    for section, field in itertools.product(LABELLED, ('label_files', 'label_fraction')):
        matters = mode in ('knn', 'logistic') or (own and mode != 'pretrain' and field == 'label_files')
        if matters and section not in own and f'{section}.{field}' in overrides:
            value = overrides[f'{section}.{field}']
            raise UserError(
                f'config.{section}.{field}={value!r}: --mode={mode} does not use it; expected config.{own[0]}.{field}'
            )


def _check_sweep(config: ConfigDict, mode: str) -> None:
    for name, values in config[mode].sweep.items():
        numbers = all(isinstance(v, (int, float)) and math.isfinite(v) and v >= 0 for v in values)
        if not numbers or len(set(values)) < len(values):
            raise UserError(
                f'config.{mode}.sweep.{name}={tuple(values)!r}: expected distinct numbers of at least 0, '
                'such as (0.1,0.3,1.0), or ()'
            )


_SHARE = 0.1  # The share of a run that replaces a warm-up longer than the whole run.


def shorten_warmups(config: ConfigDict, mode: str) -> None:
    """Shortens every warm-up that is longer than its run to a tenth of the run; warns of those that `mode` trains with.

    It also warns of warm-ups of more than half the run.
    """
    trained = {'pretrain': ('', 'linear_eval.'), 'linear_eval': ('linear_eval.',), 'fine_tune': ('fine_tune.',)}

    def warn(section: str, words: str, *values: object) -> None:
        if section in trained.get(mode, ()):
            logging.warning(words, *values)

    for section in ('', 'linear_eval.', 'fine_tune.'):
        fields = config[section[:-1]] if section else config
        warmup, epochs = fields.lr_schedule.warmup_epochs, fields.num_epochs
        if warmup > epochs:
            fields.lr_schedule.warmup_epochs = _SHARE * epochs
            warn(
                section,
                'config.%slr_schedule.warmup_epochs=%g: longer than config.%snum_epochs=%g, shortened to %s',
                section,
                warmup,
                section,
                epochs,
                counted(_SHARE * epochs, 'epoch', 'g'),
            )
        elif warmup > epochs / 2:
            warn(
                section,
                'config.%slr_schedule.warmup_epochs=%g: the learning rate rises for %.0f %% of config.%snum_epochs=%g; '
                'a tenth would be %s',
                section,
                warmup,
                100 * warmup / epochs,
                section,
                epochs,
                counted(_SHARE * epochs, 'epoch', 'g'),
            )


# The largest decay of a moving average. With 1, or a value that float32 rounds to 1, it would never change.
_MAX_DECAY = 0.999999
_MAX_EPOCHS = 1e9
_RANGES = (
    ('random_seed', 0, None),
    ('num_seeds', 1, None),
    ('num_epochs', 0, _MAX_EPOCHS),
    ('max_images', 0, None),
    ('batch_size', 2, None),
    ('accumulate_steps', 1, None),
    ('gradient_bucket_mb', 0.0, None),
    ('image_size', 1, None),
    ('view_size', 0, None),
    ('eval_crop_fraction', 0.01, 1.0),
    ('base_target_ema', 0.0, 1.0),
    ('lr_schedule.base_learning_rate', 0.0, None),
    ('network.projector_depth', 0, 16),
    ('network.projector_hidden_size', 1, None),
    ('network.projector_output_size', 1, None),
    ('network.predictor_depth', 0, 16),
    ('network.predictor_hidden_size', 1, None),
    ('network.bn_config.decay_rate', 0.0, _MAX_DECAY),
    ('network.bn_config.eps', 0.0, None),
    ('log_every_steps', 1, None),
    ('dataset.max_bad_fraction', 0.0, 1.0),
    ('dataset.max_gib', 0.0, None),
    ('preview.num_images', 0, 64),
    ('preview.num_draws', 1, 16),
    ('dataset.num_workers', 0, None),
    ('dataset.channels', 0, None),
    ('evaluation.batch_size', 1, None),
    ('evaluation.label_fraction', 1e-6, 1.0),
    ('eval_every_epochs', 0.0, None),
    ('monitoring.health_every_steps', 1, None),
    ('monitoring.health_images', 2, None),
    ('monitoring.knn_bank_size', 1, None),
    ('checkpointing.save_every_seconds', 0.0, None),
    ('checkpointing.save_every_steps', 0, None),
    ('checkpointing.keep', 1, None),
    ('checkpointing.keep_every_epochs', 0.0, None),
    *(
        (f'{mode}.{field}', low, high)
        for mode in ('linear_eval', 'fine_tune')
        for field, low, high in (
            ('num_epochs', 0, _MAX_EPOCHS),
            ('batch_size', 1, None),
            ('label_fraction', 1e-6, 1.0),
            ('lr_schedule.base_learning_rate', 0.0, None),
            ('bn_config.decay_rate', 0.0, _MAX_DECAY),
        )
    ),
)


def pick_device(name: str) -> torch.device:
    """Returns the device with a given name; 'auto' is a GPU if there is one, and otherwise the CPU.

    Under torchrun each process takes the GPU of its local rank.

    Raises:
      UserError: this machine has no such device.
    """
    if name == 'auto':
        device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    else:
        try:
            device = torch.device(name)
        except RuntimeError:
            device = None
    if device is None or device.type not in ('cpu', 'cuda'):
        raise UserError(f'--device={name}: expected auto, cpu, cuda or cuda:N')
    if device.type == 'cuda':
        _check_gpu(name, device.index)
    return device


def _check_gpu(name: str, index: int | None) -> None:
    world = launchers.find()
    if world and index is not None:
        raise UserError(f'--device={name}: every torchrun process would use that GPU; expected auto, cpu or cuda')
    found = torch.cuda.device_count()
    gpus = counted(found, 'GPU')
    if (index or 0) >= found:
        raise UserError(f'--device={name}: {gpus} found; expected auto, cpu or cuda:N with N below that')
    if world and world.local_rank >= found:
        raise UserError(f'--device={name}: {gpus} found; expected torchrun --nproc-per-node={found} or less')


def check_compiler(compiled: bool | None, device: torch.device) -> None:
    """Checks that steps can be compiled on this machine if `config.compile` is True.

    Raises:
      UserError: a required program is missing, or the GPU is too old.
    """
    cache = os.environ.get('TORCHINDUCTOR_CACHE_DIR')
    try:
        if cache:  # PyTorch creates it, whether or not anything is compiled.
            os.makedirs(cache, exist_ok=True)
    except OSError as error:
        raise UserError(f'TORCHINDUCTOR_CACHE_DIR={cache}: cannot write there ({error.strerror})') from error
    missing = compilers.missing(device) if compiled else None
    if missing:
        raise UserError(f'config.compile=True: expected {missing}; to run without it set --config.compile=False')
