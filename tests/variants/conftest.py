"""The files that `test_variant.py` is run on: those of --variant, the whole gallery, or a few of it.

python -m pytest tests/variants                      the rules of `FEW`, each of another kind
python -m pytest tests/variants --variant=gallery    all files of configs/variants, compiled too: an hour
python -m pytest tests/variants --variant=FILE       a file of your own
"""

import pathlib

import pytest

from cli import ROOT

GALLERY = sorted(path for path in (ROOT / 'configs/variants').glob('*.py') if path.stem != '__init__')
# No target network, a loss that couples the batch, another norm, several steps in one.
FEW = [path for path in GALLERY if path.stem in ('simsiam', 'vicreg', 'group_norm', 'accumulation')]


def _files(config: pytest.Config) -> list[pathlib.Path]:
    asked = config.getoption('variant')
    if asked == ['gallery']:
        return GALLERY
    return [pathlib.Path(path).resolve() for path in asked] or FEW


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if 'variant_file' in metafunc.fixturenames:
        files = _files(metafunc.config)
        metafunc.parametrize('variant_file', files, ids=[path.stem for path in files], scope='module')


@pytest.fixture(scope='session')
def variant_files(request) -> list[pathlib.Path]:
    return _files(request.config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Compiling takes a minute or two: of the few, one rule is compiled."""
    if config.getoption('variant'):
        return
    spared = [item for item in items if 'compiled_step' in item.name and 'simsiam' not in item.name]
    items[:] = [item for item in items if item not in spared or item.path.parent.name != 'variants']
