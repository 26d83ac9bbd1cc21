"""Checkpoints: one safetensors file each. Namesake of the official `byol/utils/checkpointing.py`.

A file holds plain tensors under the paths of their tree, such as
`online_params/encoder/initial_conv/w`, and in its header the step, the mode and the config as JSON.
Any safetensors reader opens it; nothing is ever unpickled.
"""

from collections.abc import Mapping
import contextlib
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import optree
import safetensors
import safetensors.torch
import torch

from byol_func.utils.helpers import UserError

FORMAT_VERSION = 1


class Checkpoint(NamedTuple):
    """What a file holds; `step` is the index of the last finished update, as in the official code."""

    path: str
    mode: str
    step: int
    config: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]


def leaf_names(tree: Any) -> list[str]:
    """The names of a tree's leaves: keys, field names and positions, joined by '/'."""
    return [
        '/'.join(str(getattr(entry, 'field', entry.entry)) for entry in accessor)
        for accessor in optree.tree_accessors(tree)
    ]


def save(
    directory: str | os.PathLike,
    state: Any,
    *,
    mode: str,
    step: int,
    config: Mapping[str, Any],
    keep: int,
) -> pathlib.Path:
    """Writes `MODE_STEP.safetensors` and removes all but the newest `keep` files of the mode.

    The file is written under another name, synced and renamed: at any moment either the whole
    checkpoint is there or none of it, and the older ones are untouched until it is.

    Args:
      directory: made if it is not there.
      state: a tree of tensors.
      mode: of the run.
      step: index of the last finished update.
      config: the resolved config, of plain values.
      keep: how many files to keep, at least 1.

    Returns:
      The path of the file.

    Raises:
      UserError: the directory cannot be written.
    """
    directory = pathlib.Path(directory)
    path = directory / f'{mode}_{step:08d}.safetensors'
    tensors = {
        name: leaf.detach().cpu().contiguous()
        for name, leaf in zip(leaf_names(state), optree.tree_leaves(state), strict=True)
    }
    metadata = {
        'format_version': str(FORMAT_VERSION),
        'mode': mode,
        'step': str(step),
        'config': json.dumps(config),
    }
    temporary = path.with_suffix('.tmp')
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'wb') as file:
            file.write(safetensors.torch.save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f'--workdir={directory.parent}: the checkpoint of step {step} could not be written '
            f'({error.strerror or error}); earlier checkpoints are untouched'
        ) from error
    for _, old in list_checkpoints(directory, mode)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def list_checkpoints(directory: str | os.PathLike, mode: str) -> list[tuple[int, pathlib.Path]]:
    """(step, path) of every checkpoint of a mode, the newest last."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return []
    pattern = re.compile(rf'{re.escape(mode)}_(\d+)\.safetensors')
    found = ((pattern.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def load(path: str | os.PathLike) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
      UserError: there is no such file, or it is none that this code can read.
    """
    path = os.fspath(path)
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        version = int(metadata['format_version'])
        if version > FORMAT_VERSION:
            raise UserError(
                f'--checkpoint={path}: written by a newer version of byol_func (format {version}), '
                f'expected format {FORMAT_VERSION} or older'
            )
        return Checkpoint(
            path, metadata['mode'], int(metadata['step']), json.loads(metadata['config']), tensors
        )
    except FileNotFoundError:
        raise UserError(f'--checkpoint={path}: no such file') from None
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(
            f'--checkpoint={path}: not a readable checkpoint of byol_func ({reason})'
        ) from error


def restore(checkpoint: Checkpoint, template: Any, prefix: str = '') -> Any:
    """The tensors of a checkpoint in the tree, on the device and in the memory format of a template.

    Args:
      checkpoint: a loaded checkpoint.
      template: a tree of tensors; its values do not matter.
      prefix: the part of the checkpoint to use, such as 'online_params/'.

    Returns:
      A tree like the template.

    Raises:
      UserError: a tensor is missing, left over or of another shape.
    """
    names = [prefix + name for name in leaf_names(template)]
    leaves, spec = optree.tree_flatten(template)
    problem = None
    for name, leaf in zip(names, leaves, strict=True):
        saved = checkpoint.tensors.get(name)
        if saved is None:
            problem = f'it has no {name}'
        elif saved.shape != leaf.shape or saved.dtype != leaf.dtype:
            problem = (
                f'{name} is {list(saved.shape)} {saved.dtype}, '
                f'expected {list(leaf.shape)} {leaf.dtype}'
            )
        if problem:
            break
    left_over = set(checkpoint.tensors) - set(names) if not prefix else ()
    if not problem and left_over:
        problem = f'it has {min(left_over)}, which the config has no use for'
    if problem:
        raise UserError(
            f'--checkpoint={checkpoint.path} does not fit the config: {problem} '
            '(look at config.network, config.optimizer and config.dataset)'
        )
    restored = [torch.empty_like(leaf).copy_(checkpoint.tensors[name]) for name, leaf in zip(names, leaves)]
    return optree.tree_unflatten(spec, restored)
