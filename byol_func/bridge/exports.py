"""Reads the encoder back from the folder that `--mode=export --format=hub` writes for timm."""

import json
import os
from typing import Any

import safetensors
import safetensors.torch

from byol_func.bridge import resnets
from byol_func.utils import checkpointing


def load(path: str | os.PathLike) -> checkpointing.Checkpoint:
    """Reads a checkpoint, or a file of weights under timm's names that holds the config of its run too.

    The latter is returned as the encoder of a pre-training: without heads, class names and a record of the data, and
    without a step (-1) if an earlier version wrote it.

    Raises:
      UserError: the file is neither, or it is damaged.
    """
    described = _describes_its_run(path)
    if not described:
        return checkpointing.load(path)
    leaves, _ = resnets.from_state_dict(safetensors.torch.load_file(path))
    tensors = {f'online_{"state" if "_ema/" in name else "params"}/{name}': leaf for name, leaf in leaves.items()}
    step = int(described.get('step', -1))
    return checkpointing.Checkpoint(os.fspath(path), 'pretrain', step, described['config'], tensors)


def load_config(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the config in the header of what `load` reads.

    Raises:
      UserError: there is none.
    """
    described = _describes_its_run(path)
    return described['config'] if described else checkpointing.load_config(path)


def _describes_its_run(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the header of a file for timm, its config parsed; an empty one for any other file."""
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            header = file.metadata() or {}
        config = json.loads(header['config']) if 'format_version' not in header else None
        int(header.get('step', 0))
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, RecursionError):
        return {}
    return {**header, 'config': config} if isinstance(config, dict) and 'network' in config else {}
