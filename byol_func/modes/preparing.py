"""Checks a config and prepares this process for it, whoever starts the run: the program or a caller in Python."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from absl import logging
from ml_collections import ConfigDict

from byol_func import config_files
from byol_func.data import listing, shards
from byol_func.errors import UserError, one_of
from byol_func.modes import config_checks
from byol_func.runtime import collectives, memory, precision


def complete(config: ConfigDict, overrides: Mapping[str, Any], mode: str = '') -> None:
    """Checks every field of a config, and fills in what depends on others: its variant, presets and warm-ups.

    Args:
      config: changed in place.
      overrides: fields that the user has set, such as 'augmentations_preset' or 'optimizer_config.lars.eta'; those of
        a section override the preset of that section.
      mode: what runs with it, which decides of which warm-ups to warn; '' leaves them to the run.

    Raises:
      UserError: a field is unknown, is missing, or has another type or a value out of range.
    """
    from configs import augmentations, linear_evaluation
    from configs import byol as byol_config

    reference = byol_config.get_config()
    config_checks.check_variant(config, reference)
    config_checks.check_fields(config, reference)
    for section, presets in (('augmentations', augmentations), ('linear_eval', linear_evaluation)):
        field = f'{section}_preset'
        if field in overrides:
            presets.use(config, overrides[field])
            config.update_from_flattened_dict({name: v for name, v in overrides.items() if f'{section}.' in name})
        one_of(f'config.{field}', config[field], presets.PRESETS)
    config_checks.check_values(config)
    if mode:
        config_checks.shorten_warmups(config, mode)


def start(config: ConfigDict, device: torch.device, saved: str | None) -> str:
    """Joins the other replicas, if there are any, and sets what depends on the machine, its images and its device.

    Args:
      config: the config of the run, whose fields are set.
      device: the device of the run.
      saved: the file with the config of the run that this one continues or measures, if any (`find_config`). A
        precision of 'auto' is that of the earlier run, also on another machine.

    Returns:
      A description of this replica, '' if it is the only one.

    Raises:
      UserError: the replicas do not meet, or there is no compiler for config.compile=True.
    """
    replica = collectives.initialize(device)
    config_checks.check_compiler(config.compile, device)
    if config.precision == 'auto':
        config.precision = collectives.text_of_first_replica(_precision_of(saved) or precision.fastest(device))
    precision.set_backend(config.precision)
    memory.keep_freed_memory()
    _choose_evaluation_set(config.dataset)
    return replica


def _precision_of(saved: str | None) -> str:
    """Returns the precision in a saved config; '' if there is none, or none that can be read."""
    with contextlib.suppress(UserError):
        return config_files.load(config_files.find(saved), {}).precision if saved else ''
    return ''


def _choose_evaluation_set(data: ConfigDict) -> None:
    """Holds images out of the training set to evaluate on if a folder or shards have labels and no test set."""
    find = {'folder': listing.has_only_training_images, 'shards': shards.has_only_training_images}.get(data.name)
    if find is None or data.eval_split != 'test' or not data.root or not find(data.root, data.channels):
        return
    data.eval_split = 'val'
    if collectives.replica_index() == 0:
        logging.warning(
            'config.dataset.root=%r: no test set; %g %% of every class are held out to evaluate on '
            '(config.dataset.eval_split=val; none would train on all images, without labels)',
            data.root,
            100 * data.val_fraction,
        )
