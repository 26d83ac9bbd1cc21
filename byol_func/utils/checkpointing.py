"""Checkpoints as safetensors files. Namesake of the official `byol/utils/checkpointing.py`.

A file holds plain tensors named by their path in the tree, such as
`online_params/encoder/initial_conv/w`. Its header holds the step, the mode, a digest of the whole file, and, as
JSON, the config, the logged scalars, the class names and the fingerprint of the training set. Any safetensors
reader can open a checkpoint; nothing is ever unpickled.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import optree
import safetensors
import safetensors.torch
import torch

from byol_func.errors import UserError
from byol_func.runtime import atomic

FORMAT_VERSION = 2  # Version 1 had no digest.
_MAX_HEADER = 100_000_000  # Bytes, as in safetensors.
# Placeholder for the digest while it is computed.
_NO_DIGEST = '0' * 2 * hashlib.sha256().digest_size


class Checkpoint(NamedTuple):
    """The contents of a checkpoint; `step` is the index of the last finished update, as in the official code."""

    path: str
    mode: str
    step: int
    config: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]
    scalars: Mapping[str, float] = {}  # The numbers logged at that step.
    class_names: tuple[str, ...] = ()  # Of the training set; empty without labels and in older or imported files.
    data: Mapping[str, Any] = {}  # The fingerprint of the training set; empty in older and imported files.


def leaf_names(tree: Any) -> list[str]:
    """Returns the names of a tree's leaves: keys, field names and positions, joined by '/'."""
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
    scalars: Mapping[str, float] | None = None,
    class_names: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes `MODE_STEP.safetensors` atomically: a partly written checkpoint never has this name.

    The file is written under a temporary name, synced and renamed. Other checkpoints are not touched.

    Args:
      directory: the folder for the file; it is created if necessary.
      state: a tree of tensors.
      mode: the mode of the run.
      step: index of the last finished update.
      config: the resolved config, made of plain values.
      scalars: numbers logged at this step.
      class_names: the class names of the training set.
      data: the fingerprint of the training set.

    Returns:
      The path of the file.

    Raises:
      UserError: the directory cannot be written.
    """
    directory = pathlib.Path(directory)
    path = file_name(directory, mode, step)
    tensors = dict(zip(leaf_names(state), optree.tree_leaves(state), strict=True))
    contents = Checkpoint(
        os.fspath(path), mode, step, dict(config), tensors, scalars or {}, tuple(class_names), data or {}
    )
    try:
        write(contents)
    except OSError as error:
        raise UserError(
            f'--workdir={directory.parent}: the checkpoint of step {step} could not be written '
            f'({error.strerror or error}); earlier checkpoints are intact'
        ) from error
    return path


def write(checkpoint: Checkpoint) -> None:
    """Writes a checkpoint to its `path`, atomically.

    Raises:
      OSError: the file cannot be written.
    """
    metadata = {
        'format_version': str(FORMAT_VERSION),
        'mode': checkpoint.mode,
        'step': str(checkpoint.step),
        'config': json.dumps(checkpoint.config),
        'scalars': json.dumps(dict(checkpoint.scalars)),
        'class_names': json.dumps(list(checkpoint.class_names)),
        'data': json.dumps(dict(checkpoint.data)),
        'digest': _NO_DIGEST,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    content = memoryview(safetensors.torch.save(tensors, metadata))
    atomic.write_bytes(checkpoint.path, *_with_digest(content), durable=True)


def encoder_only(checkpoint: Checkpoint, path: str) -> Checkpoint:
    """Returns the encoder of a pre-training as a checkpoint of its own, for `path`: no heads, target or optimizer."""
    parts = ('online_params/encoder/', 'online_state/encoder/')
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(parts)}
    return checkpoint._replace(path=path, tensors=tensors)


def _with_digest(content: memoryview) -> tuple[bytes, memoryview]:
    """Returns the header, with the digest filled in, and the tensors of a file."""
    header, body = _split(content)
    digest = _digest(header, body)
    return header.replace(_quoted(_NO_DIGEST), _quoted(digest)), body


def _split(content: memoryview) -> tuple[bytes, memoryview]:
    """Splits a file into its header, including the 8 bytes of its length, and its tensors."""
    if len(content) < 8:
        raise ValueError('it is cut short')
    end = 8 + int.from_bytes(content[:8], 'little')
    if end > 8 + _MAX_HEADER:
        raise ValueError('it has no safetensors header')
    if end > len(content):
        raise ValueError('it is cut short')
    return bytes(content[:end]), content[end:]


def _digest(header: bytes, body: memoryview) -> str:
    """Returns the SHA-256 of a file whose header holds `_NO_DIGEST` in place of the digest."""
    digest = hashlib.sha256(header)
    digest.update(body)
    return digest.hexdigest()


def _quoted(digest: str) -> bytes:
    return f'"{digest}"'.encode()


def file_name(directory: str | os.PathLike, mode: str, step: int) -> pathlib.Path:
    """Returns the path of the checkpoint of a step."""
    return pathlib.Path(directory) / f'{mode}_{step:08d}.safetensors'


def list_checkpoints(directory: str | os.PathLike, mode: str) -> list[tuple[int, pathlib.Path]]:
    """Returns (step, path) of every checkpoint of a mode, the newest last."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return []
    pattern = re.compile(rf'{re.escape(mode)}_(\d+)\.safetensors')
    found = ((pattern.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def load(path: str | os.PathLike) -> Checkpoint:
    """Reads a checkpoint and verifies its digest.

    Raises:
      UserError: the file does not exist, is damaged, or is not a checkpoint of this format.
    """
    path = os.fspath(path)
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # Opening a pipe would block forever.
            raise ValueError('it is not a file')
        with open(path, 'rb') as file:
            content = file.read()
        header, body = _split(memoryview(content))
        metadata = _metadata(header, path)
        digest = metadata['digest']
        if header.count(_quoted(digest)) != 1 or digest != _digest(
            header.replace(_quoted(digest), _quoted(_NO_DIGEST)), body
        ):
            raise ValueError('its bytes have changed since it was written: the checksum differs')
        config, scalars = (json.loads(metadata[name]) for name in ('config', 'scalars'))
        class_names = json.loads(metadata.get('class_names', '[]'))  # Older files have none.
        data = json.loads(metadata.get('data', '{}'))
        step = int(metadata['step'])
        if not isinstance(config, dict) or not isinstance(scalars, dict) or step < 0:
            raise ValueError('its config, step or scalars are invalid')
        if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
            raise ValueError('its class names are invalid')
        if not isinstance(data, dict):
            raise ValueError('its fingerprint of the data is invalid')
        tensors = safetensors.torch.load(content)
        return Checkpoint(path, metadata['mode'], step, config, tensors, scalars, tuple(class_names), data)
    except FileNotFoundError:
        raise UserError(f'--checkpoint={path}: no such file') from None
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise _unreadable(path, error) from error


def load_scalars(path: str | os.PathLike) -> Mapping[str, float]:
    """Returns the numbers that were logged at the step of a checkpoint; reads only the header.

    Raises:
      UserError: the file does not exist, or its header is unreadable or of another format version.
    """
    return _load_header(path, 'scalars')


def load_config(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the config that a checkpoint was trained with; reads only the header.

    Raises:
      UserError: the file does not exist, or its header is unreadable or of another format version.
    """
    return _load_header(path, 'config')


def _load_header(path: str | os.PathLike, name: str) -> dict[str, Any]:
    path = os.fspath(path)
    try:
        with open(path, 'rb') as file:
            length = file.read(8)
            header = length + file.read(min(int.from_bytes(length, 'little'), _MAX_HEADER))
        return dict(json.loads(_metadata(header, path)[name]))
    except FileNotFoundError:
        raise UserError(f'--checkpoint={path}: no such file') from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _unreadable(path, error) from error


def _metadata(header: bytes, path: str) -> dict[str, str]:
    """Returns the metadata strings of a header.

    Raises:
      ValueError: it is not the header of a checkpoint.
      UserError: it has another format version.
    """
    fields = json.loads(header[8:])
    metadata = fields.get('__metadata__') if isinstance(fields, dict) else None
    if not isinstance(metadata, dict) or 'format_version' not in metadata:
        raise ValueError('another program wrote it')
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError('its header is not that of a safetensors file')
    version = int(metadata['format_version'])
    if version != FORMAT_VERSION:
        age = 'a newer' if version > FORMAT_VERSION else 'an older'
        raise UserError(
            f'--checkpoint={path}: written by {age} version of byol_func (format {version}), '
            f'expected format {FORMAT_VERSION}'
        )
    return metadata


def _unreadable(path: str, error: Exception) -> UserError:
    reason = f'its header lacks {error}' if isinstance(error, KeyError) else ' '.join(str(error).split())
    return UserError(f'--checkpoint={path}: not a readable checkpoint of byol_func ({reason})')


def restore(checkpoint: Checkpoint, template: Any, prefix: str = '') -> Any:
    """Restores a checkpoint's tensors into a tree with the structure, device and memory format of a template.

    Args:
      checkpoint: a loaded checkpoint.
      template: a tree of tensors; its values do not matter.
      prefix: the part of the checkpoint to use, such as 'online_params/'.

    Returns:
      A tree like the template.

    Raises:
      UserError: a tensor is missing, unexpected, or of another shape or dtype.
    """
    names = [prefix + name for name in leaf_names(template)]
    leaves, spec = optree.tree_flatten(template)
    problem = None
    for name, leaf in zip(names, leaves, strict=True):
        saved = checkpoint.tensors.get(name)
        if saved is None:
            problem = f'it has no {name}'
        elif saved.shape != leaf.shape or saved.dtype != leaf.dtype:
            problem = f'{name} is {list(saved.shape)} {saved.dtype}, expected {list(leaf.shape)} {leaf.dtype}'
        if problem:
            break
    # With a prefix, ignore tensors outside the template's roots: the template covers only part of the checkpoint.
    roots = tuple(f'{prefix}{root}/' for root in template) if prefix else ''
    left_over = {name for name in checkpoint.tensors if name.startswith(roots)} - set(names)
    if not problem and left_over:
        problem = f'it has {min(left_over)}, which the config does not describe'
    if problem:
        raise UserError(
            f'--checkpoint={checkpoint.path} does not fit the config: {problem} '
            '(see config.network, config.optimizer and config.dataset)'
        )
    restored = [
        torch.empty_like(leaf).copy_(checkpoint.tensors[name]) for name, leaf in zip(names, leaves, strict=True)
    ]
    return optree.tree_unflatten(spec, restored)
