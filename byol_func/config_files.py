"""Finds and loads configs: the folder configs/ of a checkout, which the installed package contains."""

import difflib
import importlib.util
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import ml_collections

from byol_func.cli import article, check_is_config, explain_file, unknown_field
from byol_func.errors import UserError

_PACKAGE = pathlib.Path(__file__).resolve().parent
# An installed package contains the configs; in a checkout they are beside the package.
FOLDER = _PACKAGE / 'configs' if (_PACKAGE / 'configs').is_dir() else _PACKAGE.parent / 'configs'
SAVED = str(FOLDER / 'saved.py')


def register() -> None:
    """Makes the configs importable as `configs`, the name by which they, and configs of users, import each other.

    Raises:
      UserError: another package of that name has been imported.
    """
    known = sys.modules.get('configs')
    if known is not None and getattr(known, '__file__', None):
        if pathlib.Path(str(known.__file__)).resolve().parent != FOLDER:
            raise UserError(f'{known.__file__}: a package called configs has been imported; byol_func has its own')
        return
    spec = importlib.util.spec_from_file_location(
        'configs', FOLDER / '__init__.py', submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules['configs'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules['configs'])


def find(argument: str) -> str:
    """Returns 'FILE' or 'FILE:PRESET' for the value of --config.

    A saved config, JSON or a checkpoint, is read by `configs/saved.py`. Any other name is that of an existing file, or
    else of one of our configs, such as 'digits' or 'cifar10:small'.
    """
    if argument.endswith(('.json', '.safetensors')) and '.py:' not in argument:
        return f'{SAVED}:{argument}'
    path, colon, preset = argument.partition(':')
    own = FOLDER / f'{path.removeprefix("configs/").removesuffix(".py")}.py'
    return argument if os.path.isfile(path) or not path or not own.is_file() else f'{own}{colon}{preset}'


def no_such(name: str) -> str:
    """Returns what to say about the name of a config that `find` does not find."""
    ours = [file.stem for file in FOLDER.glob('*.py') if 'def get_config' in file.read_text() and str(file) != SAVED]
    ours += [f'variants/{file.stem}' for file in FOLDER.glob('variants/[!_]*.py')]
    given = name.partition(':')[0].removeprefix('configs/').removesuffix('.py')
    near = difflib.get_close_matches(given, ours, 1) or [each for each in ours if each.endswith(f'/{given}')]
    names = ', '.join(sorted(name for name in ours if '/' not in name))
    hint = f'did you mean {near[0]}?' if near else f'expected a path, or one of {names}'
    return f'no such file; {hint}'


def load(name: str, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Returns the config of a file, with some fields replaced; neither is checked further.

    Args:
      name: as for `find`.
      overrides: the values of fields such as 'num_epochs' and 'dataset.root', or of sections, as for `flat`.

    Raises:
      UserError: there is no such file or field, or a value has another type.
    """
    register()
    path, colon, preset = find(name).partition(':')
    if not os.path.isfile(path):
        raise UserError(f'config {name!r}: {no_such(name)}')
    spec = importlib.util.spec_from_file_location('byol_func_config', path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*([preset] if colon else []))
    except Exception as error:  # A user's file may raise anything.
        raise UserError(explain_file(error, name, path)) from error
    check_is_config(config, name)
    for field, value in flat(overrides, config).items():
        *sections, last = field.split('.')
        inside: Any = config
        for section in sections:
            inside = inside.get(section) if isinstance(inside, ml_collections.ConfigDict) else None
        if not isinstance(inside, ml_collections.ConfigDict) or last not in inside:
            raise unknown_field(f'config.{field}', config)
        if value is None and inside[last] is not None:
            raise UserError(f'config.{field}=None: expected {article(type(inside[last]).__name__)}')
        try:
            inside[last] = tuple(value) if isinstance(value, list) else value
        except TypeError as error:
            raise UserError(f'config.{field}={value!r}: expected {article(type(inside[last]).__name__)}') from error
    return config


def flat(overrides: Mapping[str, Any], section: Any, prefix: str = '') -> dict[str, Any]:
    """Returns overrides by their full names: `{'dataset': {'root': DIR}}` changes one field of its section."""
    found: dict[str, Any] = {}
    for name, value in overrides.items():
        inner = section
        for part in name.split('.'):
            inner = inner.get(part) if isinstance(inner, ml_collections.ConfigDict) else None
        nested = isinstance(value, (Mapping, ml_collections.ConfigDict)) and isinstance(
            inner, ml_collections.ConfigDict
        )
        if nested and name != 'variant_config':  # Its fields are those of the variant's file.
            found |= flat(value, inner, f'{prefix}{name}.')
        else:
            found[f'{prefix}{name}'] = value
    return found
