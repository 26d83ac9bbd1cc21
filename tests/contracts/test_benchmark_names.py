"""The benchmarks use only names that the package has; most of them are too long to run in a test."""

import ast
import importlib
import pathlib
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def missing_names(source: str) -> list[str]:
    """Returns the attributes of modules of this project that a file uses, and that do not exist."""
    tree, modules, missing = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] in ('byol_func', 'configs'):
            home = importlib.import_module(node.module)
            for alias in node.names:
                try:
                    found = getattr(home, alias.name, None) or importlib.import_module(f'{node.module}.{alias.name}')
                except ImportError:
                    missing.append(f'{node.module}.{alias.name}')
                    continue
                if isinstance(found, types.ModuleType):
                    modules[alias.asname or alias.name] = found
    assigned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    for node in used:
        name = node.value.id
        if name in modules.keys() - assigned and not hasattr(modules[name], node.attr):
            missing.append(f'{name}.{node.attr}')
    return missing


@pytest.mark.parametrize('path', sorted((ROOT / 'benchmarks').glob('*.py')), ids=lambda path: path.name)
def test_every_name_exists(path):
    assert not missing_names(path.read_text())


def test_a_name_that_is_gone_is_found():
    source = 'from byol_func.runtime import precision, nothing\nprecision.resolve(1)\nprecision.fastest(2)'
    assert missing_names(source) == ['byol_func.runtime.nothing', 'precision.resolve']
