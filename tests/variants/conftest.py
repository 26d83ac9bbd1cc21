"""The files that `test_variant.py` is run on: those of --variant, or the gallery."""

import pathlib

import pytest

from cli import ROOT

GALLERY = sorted(path for path in (ROOT / 'configs/variants').glob('*.py') if path.stem != '__init__')


def _files(config: pytest.Config) -> list[pathlib.Path]:
    return [pathlib.Path(path).resolve() for path in config.getoption('variant')] or GALLERY


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if 'variant_file' in metafunc.fixturenames:
        files = _files(metafunc.config)
        metafunc.parametrize('variant_file', files, ids=[path.stem for path in files], scope='module')


@pytest.fixture(scope='session')
def variant_files(request) -> list[pathlib.Path]:
    return _files(request.config)
