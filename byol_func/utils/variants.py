"""Variants of the update rule: files with a function `variant(parts, *, option=default) -> parts`.

The official code has no counterpart. A config names its file in `config.variant` and the options in
`config.variant_config`; `byol_experiment.make` applies the function to the parts of BYOL.
"""

import ast
import hashlib
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from byol_func.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
LOGS = 'variant/'  # Prefix of the names of a variant's own logs.
_TYPES = (bool, int, float, str, tuple)
_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD


def stored_path(path: str | os.PathLike) -> str:
    """Returns a path as stored in configs: relative to the repository root if it is inside, else absolute."""
    resolved = pathlib.Path(path).expanduser().resolve()
    return resolved.relative_to(ROOT).as_posix() if resolved.is_relative_to(ROOT) else str(resolved)


def find(path: str) -> pathlib.Path:
    """Finds the file of `config.variant`.

    The path may be absolute, or relative to the working directory, the repository root or the package.

    Raises:
      UserError: the file does not exist.
    """
    for folder in (pathlib.Path(), ROOT, ROOT / 'byol_func'):  # The last one is for an installed package.
        found = folder / pathlib.Path(path).expanduser()
        if found.is_file():
            return found.resolve()
    raise UserError(f'config.variant={path!r}: no such file; expected one like configs/variants/simsiam.py')


def label(config: Mapping[str, Any]) -> str:
    """Returns the name of a config's update rule in tables and plots: 'BYOL', or the variant's file name."""
    path = config.get('variant')
    return pathlib.PurePath(path).stem if path else 'BYOL'


def load(path: str) -> Callable[..., Any]:
    """Loads the function `variant` from a file.

    Raises:
      UserError: the file does not exist, raises an error or has no such function.
    """
    file = find(path)
    name = f'variant_{hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()}'
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f'config.variant={path!r}: expected a Python file whose name ends in .py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # `inspect` and `dataclasses` look it up there.
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # The user's file may raise anything.
        raise failure(path, error) from error
    function = getattr(module, 'variant', None)
    if not inspect.isfunction(function):
        raise UserError(f'config.variant={path!r}: it has no function variant(parts, *, option=default)')
    return function


def failure(path: str, error: Exception) -> UserError:
    """Returns a one-line UserError for an error in a variant, with the last line of its file in the traceback."""
    file = str(find(path))
    if isinstance(error, SyntaxError):
        return UserError(f'config.variant={path!r}: line {error.lineno}: {error.msg}')
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f'line {lines[-1]}: ' if lines else ''
    return UserError(f'config.variant={path!r}: {where}{type(error).__name__}: {error}')


def options(variant: Callable[..., Any], path: str) -> dict[str, Any]:
    """Returns the options of a variant: its keyword-only arguments and their defaults.

    Raises:
      UserError: it takes arguments other than the parts and keyword-only options with defaults.
    """
    parameters = list(inspect.signature(variant).parameters.values())
    field, rest = f'config.variant={path!r}', parameters[1:]
    if not parameters or parameters[0].kind not in (inspect.Parameter.POSITIONAL_ONLY, _POSITIONAL):
        raise UserError(f'{field}: variant() takes no parts; expected variant(parts, *, option=default)')
    for parameter in rest:
        if parameter.kind is not parameter.KEYWORD_ONLY or not isinstance(parameter.default, _TYPES):
            raise UserError(
                f'{field}: the argument {parameter.name} of variant(): expected a keyword-only argument with a '
                'default that is a bool, int, float, str or tuple'
            )
    return {parameter.name: parameter.default for parameter in rest}


def apply(path: str, parts: Any, config: Mapping[str, Any]) -> Any:
    """Applies a variant to `parts`, with the options `config`, and returns the new parts.

    Raises:
      UserError: the file cannot be loaded, or the function raises an error or returns another type.
    """
    variant = load(path)
    try:
        new_parts = variant(parts, **config)
    except UserError:
        raise
    except Exception as error:  # The user's function may raise anything.
        raise failure(path, error) from error
    if type(new_parts) is not type(parts):
        found = type(new_parts).__name__
        raise UserError(f'config.variant={path!r}: variant() returned {found}, expected parts._replace(...)')
    return new_parts


def loss_and_logs(found: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the loss of a `repr_loss_fn` and its logs, if it returned `(loss, logs)`, under 'variant/NAME'.

    Raises:
      UserError: a log is not a 0-d tensor.
    """
    loss, logs = found if isinstance(found, tuple) else (found, {})
    for name, value in logs.items():
        if not isinstance(value, torch.Tensor) or value.ndim:
            what = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise UserError(f'repr_loss_fn returned {what} as its log {name!r}; expected a 0-d tensor')
    return loss, {f'{LOGS}{name}': value.to(loss.dtype) for name, value in logs.items()}


def check_accumulates(path: str, parts: Any, new_parts: Any) -> None:
    """Checks that the `new_parts` of a variant take their gradient by the `grad` of `parts`.

    Raises:
      UserError: they bypass it, so `config.accumulate_steps` would have no effect.
    """
    asks = 'grad' in inspect.signature(new_parts.update_fn).parameters
    if not asks or new_parts.grad is not parts.grad:
        how = 'replaces `grad`' if asks else 'has an update_fn that does not ask for `grad`'
        raise UserError(f'config.variant={path!r}: {how}; expected config.accumulate_steps=1 with it')


def digest(path: str) -> str:
    """Returns a string that identifies a variant's version: 'FILE:DIGEST' of its file and of the files it imports.

    Only imports from the repository and from the folder of the file count. Comments, docstrings and formatting
    do not.
    """
    file = find(path)
    files = [file, *sorted(_imported(file))]
    return ' '.join(f'{stored_path(f)}:{_digest_of(f)}' for f in files)


def _digest_of(file: pathlib.Path) -> str:
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.blake2b(ast.dump(tree).encode(), digest_size=4).hexdigest()


def _imported(file: pathlib.Path) -> set[pathlib.Path]:
    """Returns the files that a file imports, following imports only through files in its own folder."""
    found: set[pathlib.Path] = set()
    todo = [file]
    while todo:
        current = todo.pop()
        for name in _import_names(current):
            for folder in (ROOT, file.parent):
                path = folder.joinpath(*name.split('.')).with_suffix('.py').resolve()
                if path.is_file() and path != file and path not in found:
                    found.add(path)
                    todo += [path] if path.parent == file.parent else []
    return found


def _import_names(file: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return names


def edited(old: str, new: str) -> list[str]:
    """Returns the files whose digests differ between two results of `digest`."""
    before, after = (dict(pair.rsplit(':', 1) for pair in text.split()) for text in (old, new))
    return sorted(file for file in {*before, *after} if before.get(file) != after.get(file))
