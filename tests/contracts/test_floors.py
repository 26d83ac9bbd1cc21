"""Who may know whom: the layers of the package, read off its source."""

import ast
import pathlib

import pytest

from cli import ROOT

PACKAGE = ROOT / 'byol_func'
FILES = sorted(PACKAGE.rglob('*.py'))
SOURCES = [*FILES, ROOT / 'launch.py', *sorted((ROOT / 'configs').glob('*.py'))]
MAX_LINES = 350

# The floors of the house, from the ground up. A module knows the floors below its own; rooms that share a
# floor do not know each other.
FLOORS = (
    {'errors'},
    {'runtime'},
    {'console'},
    {'cli'},
    {'config_files'},
    {'data'},
    {'utils'},
    {'experiment', 'forward'},
    {'byol_experiment', 'eval_experiment'},
    {'workdir'},
    {'training', 'evaluation', 'report', 'bridge', 'tracking'},
    {'main_loop', 'library'},
    {'modes'},
    {'program', 'interface'},
)
# What each module of byol_func/utils may import of its siblings.
SIBLINGS = {
    'optimizers': {'transformations'},
    'augmentations': {'color_space', 'sampling', 'torchvision_jitter'},
    'torchvision_jitter': {'color_space', 'sampling'},
}
# A clock, or a word to the user, belongs where a run is steered.
WORLDLY = {'time', 'datetime', 'logging', 'absl', 'tqdm'}
STEERING = {
    'main_loop',
    'modes',
    'training',
    'workdir',
    'tracking',
    'console',
    'cli',
    'endings',
    'rendezvous',
    'folder',
    'listing',
    'shards',
    'packing',
    'index_cache',
    'folder_index',
    'own_images',
    'streaming',
    'cache',
    'dataset',
    'checkpointing',
    'embeddings',
    'compare',
    'program',
}


def _steers(path: pathlib.Path) -> bool:
    return path.stem in STEERING or path.parent.name in STEERING


def _name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def _tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


def _imports(path: pathlib.Path) -> set[str]:
    """The dotted names of everything a file imports, also inside of functions."""
    names = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{_name(path)}: relative import'
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
    return names


def _own(path: pathlib.Path) -> set[str]:
    """The parts of the package that a file imports, such as 'utils.helpers'."""
    prefix = 'byol_func.'
    return {name.removeprefix(prefix) for name in _imports(path) if name.startswith(prefix)}


def _room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def _floor(room: str) -> int:
    (floor,) = (i for i, rooms in enumerate(FLOORS) if room in rooms)
    return floor


INSIDE = [path for path in FILES if path != PACKAGE / '__init__.py']


@pytest.mark.parametrize('path', INSIDE, ids=_name)
def test_imports_lead_downstairs(path):
    room = _room(path)
    for name in _own(path):
        other = name.split('.')[0]
        if other != room:
            assert _floor(other) < _floor(room), f'{_name(path)} imports {name}'


def test_every_room_has_a_floor():
    assert {_room(path) for path in INSIDE} == set().union(*FLOORS)


@pytest.mark.parametrize('path', sorted((PACKAGE / 'utils').glob('*.py')), ids=lambda path: path.stem)
def test_utils_stand_alone(path):
    siblings = {name.split('.')[1] for name in _own(path) if name.startswith('utils.')}
    assert siblings <= SIBLINGS.get(path.stem, set())


@pytest.mark.parametrize('path', sorted((PACKAGE / 'evaluation').glob('*.py')), ids=lambda path: path.stem)
def test_evaluation_reads_no_files(path):
    """Features in, numbers out."""
    assert not _own(path) & {'utils.checkpointing'} and not any(n.startswith('workdir') for n in _own(path))


def test_only_programs_read_flags():
    for path in SOURCES:
        if path.name not in ('program.py', 'cli.py', 'compare.py'):
            assert not any(n.startswith(('absl.flags', 'absl.app')) for n in _imports(path)), _name(path)
            assert not any('argparse' in n for n in _imports(path)), _name(path)


def test_only_steering_modules_know_time_and_messages():
    for path in FILES:
        worldly = {name.split('.')[0] for name in _imports(path)} & WORLDLY
        assert not worldly or _steers(path), f'{_name(path)}: {worldly}'


def test_nobody_but_the_steering_prints():
    for path in FILES:
        calls = [n.func.id for n in ast.walk(_tree(path)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        assert 'print' not in calls or _steers(path), _name(path)


def test_nothing_is_unpickled():
    for path in SOURCES:
        assert not {name.split('.')[0] for name in _imports(path)} & {'pickle', 'dill'}, _name(path)
        attributes = {
            f'{node.value.id}.{node.attr}'
            for node in ast.walk(_tree(path))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        assert not attributes & {'torch.load', 'np.load'}, _name(path)


@pytest.mark.parametrize('path', SOURCES, ids=_name)
def test_files_are_short_and_explained(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_LINES
    assert all(len(line) <= 120 for line in lines)
    tree = _tree(path)
    assert ast.get_docstring(tree), 'no docstring of the module'
    definitions = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, definitions) and node.name[0] != '_']
    missing = [node.name for node in public if not ast.get_docstring(node)]
    assert not missing
