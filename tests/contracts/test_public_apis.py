"""The package uses public names of its dependencies; the exceptions stand in one file, with their reasons."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

from cli import ROOT

EXCEPTIONS = ROOT / 'byol_func' / 'runtime' / 'torch_internals.py'
SOURCES = sorted({*(ROOT / 'byol_func').rglob('*.py'), ROOT / 'launch.py', *(ROOT / 'configs').rglob('*.py')})
EXPERIMENTAL = ('torch.fx.experimental',)
# Documented in spite of the underscore: a NamedTuple's methods, and those of a ConfigDict.
DOCUMENTED = {'_replace', '_asdict', '_fields', '_make', '_field_defaults'}


def private_names(source: str) -> set[str]:
    """Imports and attributes of other packages that begin with an underscore or are called experimental."""
    tree = ast.parse(source)
    own = {'self', 'cls'}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if _is_private(alias.name)}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(('byol_func', 'configs')):
            found |= {name for alias in node.names if _is_private(name := f'{node.module}.{alias.name}')}
        elif isinstance(node, ast.Attribute) and _is_underscored(node.attr):
            is_own = isinstance(node.value, ast.Name) and node.value.id in own
            if not is_own and node.attr not in DOCUMENTED and not _is_defined(node.attr, tree):
                found.add(node.attr)
    return found


def _is_private(name: str) -> bool:
    return name.startswith(EXPERIMENTAL) or any(map(_is_underscored, name.split('.')))


def _is_underscored(name: str) -> bool:
    return name.startswith('_') and not name.startswith('__')


def _is_defined(name: str, tree: ast.Module) -> bool:
    """Whether a file defines the name itself, as a method or an attribute of its own classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return True
        if isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Store):
            return True
    return False


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_of_dependencies_are_public(path: pathlib.Path):
    if path != EXCEPTIONS:
        assert not private_names(path.read_text())


@pytest.mark.parametrize(
    'source',
    [
        'import torch._inductor',
        'from torch import _foreach_add',
        'from torch.fx.experimental import proxy_tensor',
        'import torch\ntorch._foreach_add([], 1)',
        'def f(x):\n    return x.untyped_storage()._cdata',
    ],
)
def test_private_names_are_found(source):
    assert private_names(source)


@pytest.mark.parametrize('module, setting', [('byol_func', None), ('launch', None), ('launch', 'active')])
def test_threads_wait_passively_unless_the_user_says_otherwise(module, setting):
    """OpenMP itself tells what it was started with."""
    environment = {name: value for name, value in os.environ.items() if name != 'OMP_WAIT_POLICY'}
    environment |= {'OMP_DISPLAY_ENV': 'TRUE'} | ({'OMP_WAIT_POLICY': setting} if setting else {})
    done = subprocess.run(
        [sys.executable, '-c', f'import {module}, torch'], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (line,) = {line.split('=')[1].strip() for line in done.stderr.splitlines() if 'OMP_WAIT_POLICY' in line}
    assert line == f"'{(setting or 'passive').upper()}'"
