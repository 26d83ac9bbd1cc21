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

from byol_func.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
_TYPES = (bool, int, float, str, tuple)
_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD


def stored_path(path: str | os.PathLike) -> str:
    """The path as a config keeps it: from the root of the repository if it is inside, else absolute."""
    resolved = pathlib.Path(path).expanduser().resolve()
    return resolved.relative_to(ROOT).as_posix() if resolved.is_relative_to(ROOT) else str(resolved)


def find(path: str) -> pathlib.Path:
    """The file of `config.variant`: an absolute path, or one from the working directory or the repository.

    Raises:
      UserError: there is no such file.
    """
    for folder in (pathlib.Path(), ROOT, ROOT / 'byol_func'):  # The last where the package is installed.
        found = folder / pathlib.Path(path).expanduser()
        if found.is_file():
            return found.resolve()
    raise UserError(f'config.variant={path!r}: no such file; expected one like configs/variants/simsiam.py')


def label(config: Mapping[str, Any]) -> str:
    """What tables and pictures call the update rule of a config: 'BYOL', or the name of the variant's file."""
    path = config.get('variant')
    return pathlib.PurePath(path).stem if path else 'BYOL'


def load(path: str) -> Callable[..., Any]:
    """The function `variant` of a file.

    Raises:
      UserError: there is no such file, it raises, or it has no such function.
    """
    file = find(path)
    name = f'variant_{hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()}'
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f'config.variant={path!r}: expected a file of Python, with a name that ends in .py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Where `inspect` and `dataclasses` look for it.
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # Whatever a user's file may raise.
        raise failure(path, error) from error
    function = getattr(module, 'variant', None)
    if not inspect.isfunction(function):
        raise UserError(f'config.variant={path!r}: it has no function variant(parts, *, option=default)')
    return function


def failure(path: str, error: Exception) -> UserError:
    """One line about an error that a variant's file raised, with the last of its lines on the way there."""
    file = str(find(path))
    if isinstance(error, SyntaxError):
        return UserError(f'config.variant={path!r}: line {error.lineno}: {error.msg}')
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f'line {lines[-1]}: ' if lines else ''
    return UserError(f'config.variant={path!r}: {where}{type(error).__name__}: {error}')


def options(variant: Callable[..., Any], path: str) -> dict[str, Any]:
    """The options of a variant: its keyword-only arguments and their defaults.

    Raises:
      UserError: it takes other arguments than the parts and options with defaults.
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
    """The parts that a variant makes of `parts`, with the options `config`.

    Raises:
      UserError: the file cannot be used, or the function raises or returns something else.
    """
    variant = load(path)
    try:
        new_parts = variant(parts, **config)
    except UserError:
        raise
    except Exception as error:  # Whatever a user's function may raise.
        raise failure(path, error) from error
    if type(new_parts) is not type(parts):
        found = type(new_parts).__name__
        raise UserError(f'config.variant={path!r}: variant() returned {found}, expected parts._replace(...)')
    return new_parts


def digest(path: str) -> str:
    """What tells one version of a variant from another: 'FILE:DIGEST' of it and of the files that it imports.

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
    """The files that a file imports, and those that they import in turn where these are variants too."""
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
    """The files whose digests differ between two answers of `digest`."""
    before, after = (dict(pair.rsplit(':', 1) for pair in text.split()) for text in (old, new))
    return sorted(file for file in {*before, *after} if before.get(file) != after.get(file))
