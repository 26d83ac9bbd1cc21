"""What holds for all tests: they run on the CPU, also where there is a GPU.

They compare numbers bit for bit and know what a CPU's run says; GPUs are checked by `benchmarks/gpu.py`.
"""

import os
import tempfile
from collections.abc import Iterator

import pytest

os.environ['CUDA_VISIBLE_DEVICES'] = ''  # Before anything asks for them, also in the processes of tests.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # Before a test imports torch; the package sets it, but later.
os.environ |= {'MLFLOW_DISABLE_TELEMETRY': 'true', 'MLFLOW_SERVER_ENABLE_JOB_EXECUTION': 'false'}  # For the servers.
_CACHE = tempfile.TemporaryDirectory()  # Of the indexes of data sets; removed when the tests are through.
os.environ['BYOL_FUNC_CACHE'] = _CACHE.name
# Files and folders that take most of the time.
LONG = {'modes', 'tracking', 'test_examples.py', 'test_variant.py', 'test_kills.py', 'test_resume.py'}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`python -m pytest tests/variants --variant=FILE` tests the update rule of a file."""
    parser.addoption('--variant', action='append', default=[], help='An update rule to test; more than once: several.')
    parser.addoption('--all-networks', action='store_true', help='Look for crashes in both versions of every network.')


@pytest.hookimpl(tryfirst=True)  # Before -m and -k choose.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of the folder `golden` bears the marker of that name; the longest files come first.

    A process takes the next file whenever it is through with one: at the end nobody waits for a long one.
    """
    for item in items:
        if item.path.parent.name == 'golden':
            item.add_marker('golden')
    items.sort(key=lambda item: not LONG & {item.path.name, item.path.parent.name})


@pytest.fixture(scope='session')
def server(tmp_path_factory) -> Iterator:
    """A tracking server for all tests that leave it alive; it starts when one asks for it."""
    import mlflow_server

    server = mlflow_server.serve(tmp_path_factory.mktemp('server'), mlflow_server.free_port())
    yield server
    server.kill()


@pytest.fixture(scope='session')
def browser() -> Iterator:
    """Chromium for all tests that look at a page; it starts when one asks for it."""
    import browser

    driver = browser.open_browser()
    yield driver
    driver.quit()
