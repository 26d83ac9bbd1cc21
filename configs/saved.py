"""The config of an earlier run, read from its workdir or from a checkpoint.

Commands:
  python launch.py --workdir=WORKDIR --mode=knn                 reads the config of the workdir
  python launch.py --config=WORKDIR/config.json --workdir=NEW   runs the same experiment again
  python launch.py --config=configs/saved.py:WORKDIR/config.pretrain.json   the long form of the latter

Fields that are missing from the file, because an earlier version wrote it, take their values from
`configs/byol.py`.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import ml_collections

from byol_func.bridge import exports
from byol_func.cli import article
from byol_func.errors import UserError
from configs import byol

# What checkpoints record beside the fields of a config.
_RECORDS = ('backbone', 'chosen', 'imported')


def get_config(path: str) -> ml_collections.ConfigDict:
    """Returns the config in `path`, a config*.json of a workdir or a checkpoint.

    Raises:
      UserError: the file cannot be read, or holds something else.
    """
    config = byol.get_config()
    _fill(config, _read(path), path)
    return config


def _read(path: str) -> Mapping[str, Any]:
    if path.endswith('.safetensors'):
        return {name: value for name, value in exports.load_config(path).items() if name not in _RECORDS}
    try:
        with open(os.path.expanduser(path), encoding='utf-8') as file:
            saved = json.load(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or f'not JSON: {error}'
        raise UserError(f'--config={path}: {reason}') from error
    if isinstance(saved, dict) and isinstance(saved.get('byol_func'), dict):  # Of a folder that --format=hub wrote.
        saved = saved['byol_func']
    if not isinstance(saved, dict) or 'network' not in saved:
        raise UserError(f'--config={path}: not the config of a run, expected WORKDIR/config.json')
    return saved


def _fill(config: ml_collections.ConfigDict, saved: Mapping[str, Any], path: str, prefix: str = 'config') -> None:
    for name, value in saved.items():
        where = f'--config={path}: {prefix}.{name}={value!r}'
        if name == 'variant_config':  # Its fields are those of the variant's file.
            config.variant_config = ml_collections.ConfigDict(value)
            continue
        if name not in config:
            raise UserError(f'{where}: unknown field')
        if isinstance(config[name], ml_collections.ConfigDict):
            if not isinstance(value, Mapping):
                raise UserError(f'{where}: expected fields')
            _fill(config[name], value, path, f'{prefix}.{name}')
            continue
        try:
            config[name] = value
        except TypeError as error:
            raise UserError(f'{where}: expected {article(type(config[name]).__name__)}') from error
