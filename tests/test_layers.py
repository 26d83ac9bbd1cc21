"""Who may know whom: the layers of the package, read off its source."""

import ast
import pathlib

import pytest

from cli import ROOT

PACKAGE = ROOT / 'byol_func'
FILES = sorted(PACKAGE.rglob('*.py'))
SOURCES = [*FILES, ROOT / 'launch.py', *sorted((ROOT / 'configs').glob('*.py'))]
MAX_LINES = 350

# What each module of byol_func/utils may import of its siblings. Networks know the layers of the
# runtime, checkpointing knows trees; beside that every one stands alone.
SIBLINGS = {
    'augmentations': {'color_space', 'helpers', 'sampling', 'torchvision_jitter'},
    'torchvision_jitter': {'color_space', 'sampling'},
}
# `dataset` chooses among the sources of `byol_func/data`, which know nothing above themselves.
ALLOWED = {'dataset': {f'data.{name}' for name in ('arrays', 'cache', 'examples', 'folder', 'streaming', 'watching')}}
# A clock, or a word to the user, belongs where a run is steered.
WORLDLY = {'time', 'datetime', 'logging', 'absl', 'tqdm'}
STEERING = {
    'main_loop',
    'modes',
    'reporting',
    'records',
    'resuming',
    'saving',
    'stopping',
    'divergence',
    'config_checks',
    'folder',
    'cache',
    'dataset',
    'checkpointing',
    'runs',
    'tracking',
    'pictures',
    'compare_runs',
    'watching',
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
    names = {name.removeprefix(prefix) for name in _imports(path) if name.startswith(prefix)}
    layers = {'data', 'utils', 'runtime', 'evaluation'}
    return {'.'.join(n.split('.')[: 2 if n.split('.')[0] in layers else 1]) for n in names}


@pytest.mark.parametrize('path', sorted((PACKAGE / 'utils').glob('*.py')), ids=lambda path: path.stem)
def test_utils_know_helpers_and_the_runtime_only(path):
    allowed = {f'utils.{name}' for name in {'helpers'} | SIBLINGS.get(path.stem, set())}
    allowed |= ALLOWED.get(path.stem, set())
    assert {n for n in _own(path) if not n.startswith('runtime.')} <= allowed


@pytest.mark.parametrize('path', sorted((PACKAGE / 'data').glob('*.py')), ids=lambda path: path.stem)
def test_data_knows_helpers_the_sampler_and_the_runtime_only(path):
    known = {'utils.helpers', 'utils.sampling'}
    assert all(name.startswith(('data.', 'runtime.')) or name in known for name in _own(path))


@pytest.mark.parametrize('path', sorted((PACKAGE / 'runtime').glob('*.py')), ids=lambda path: path.stem)
def test_runtime_knows_nothing_of_the_method(path):
    assert all(name.startswith('runtime.') for name in _own(path))


def test_the_algorithm_knows_nothing_of_runs():
    """Experiments and everything below them never look at flags, workdirs or loops."""
    steering = {
        'main_loop',
        'loop_config',
        'modes',
        'reporting',
        'records',
        'resuming',
        'saving',
        'stopping',
        'divergence',
        'workdir_lock',
        'config_checks',
        'runs',
        'utils.checkpointing',
    }
    pure = [PACKAGE / 'byol_experiment.py', PACKAGE / 'eval_experiment.py', *PACKAGE.glob('evaluation/*.py')]
    for path in pure:
        assert not _own(path) & steering, _name(path)


def test_only_programs_read_flags():
    for path in SOURCES:
        if path.name not in ('launch.py', 'config_checks.py', 'compare_runs.py'):
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
