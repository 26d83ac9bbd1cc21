"""Update rules other than BYOL's own, one per file with `variant(parts, *, options)` and `get_config(base)`."""

import importlib
from collections.abc import Callable
from typing import Any

import ml_collections

from byol_func.errors import UserError
from byol_func.utils import variants


def config_of(variant: Callable[..., Any], base: str, **fields: Any) -> ml_collections.ConfigDict:
    """Returns the config `configs/BASE.py` with another update rule.

    Args:
      variant: the `variant` function of the calling file; its keyword-only arguments become `config.variant_config`.
      base: a file in `configs/`, optionally with a preset: 'digits', 'cifar10', 'byol:300'.
      **fields: further fields of the config, with '__' for the dots in their names.

    Raises:
      UserError: the base does not exist.
    """
    name, _, preset = base.partition(':')
    try:
        module = importlib.import_module(f'configs.{name}')
        config = module.get_config(preset) if preset else module.get_config()
    except (ImportError, AttributeError):
        raise UserError(f'--config=FILE:{base}: no such base; expected a file of configs/, such as digits') from None
    path = variant.__code__.co_filename
    config.variant = variants.stored_path(path)
    config.variant_config = ml_collections.ConfigDict(variants.options(variant, path))
    config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
    return config
