"""What surrounds a run: the file system of the compiler's cache, readers that go away, runs of the same second."""

import datetime
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from cli import ROOT, start_launch, tiny_digits

_COMPILE = """
import torch
from byol_func.errors import UserError
from byol_func.modes import config_checks
from byol_func.runtime import compilation, costs
try:
    config_checks.check_compiler(True, torch.device('cpu'))
except UserError as error:
    print(error)
costs._LEAST_CPU_FLOPS = 0  # Compiling always pays.
step = lambda state, x: ({'w': x @ state['w']}, {})
update = compilation.compile_update(step, compiled=None, num_steps=1000, warn=print)
for _ in range(2):
    state, _ = update({'w': torch.eye(2)}, 2 * torch.eye(2))
print(state['w'].sum().item())
"""


def _with_cache(option: str, tmp_path: pathlib.Path) -> list[str]:
    """The lines of `_COMPILE` where the cache is mounted with an option; the mount is seen by that process alone."""
    if not shutil.which('unshare') or subprocess.run(['unshare', '-m', 'true'], capture_output=True).returncode:
        pytest.skip('needs the right to mount')
    done = subprocess.run(
        ['unshare', '-m', 'sh', '-c', f'mount -t tmpfs -o {option} tmpfs "$0" && exec "$@"', str(tmp_path)]
        + [sys.executable, '-c', _COMPILE],
        env=os.environ | {'TORCHINDUCTOR_CACHE_DIR': f'{tmp_path}/cache', 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    return [*done.stdout.splitlines(), *done.stderr.splitlines()[-1:]]


def test_a_cache_that_runs_no_programs_is_named_and_the_step_is_traced(tmp_path):
    lines = _with_cache('noexec', tmp_path)
    assert [f'{tmp_path}/cache is mounted noexec' in line for line in lines[:2]] == [True, True], lines
    assert lines[0].startswith('config.compile=True: expected ') and lines[1].startswith('Steps are not compiled')
    assert lines[2] == '4.0'


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    lines = _with_cache('ro', tmp_path)
    assert lines[0] == f'TORCHINDUCTOR_CACHE_DIR={tmp_path}/cache: cannot write there (Read-only file system)', lines


@pytest.mark.parametrize('argv', [['--help'], [*tiny_digits(), '--dry_run', '--device=cpu']], ids=['help', 'dry run'])
def test_a_reader_that_goes_away(argv, tmp_path):
    """As `head -1` does: the pipe is closed before the first line."""
    process = subprocess.Popen(
        [sys.executable, ROOT / 'launch.py', *argv], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    messages = process.stderr.read().decode()
    assert process.wait(200) in (0, 1)
    assert 'Traceback' not in messages and 'BrokenPipeError' not in messages, messages


def test_two_runs_of_the_same_second_have_folders_of_their_own(tmp_path):
    now = datetime.datetime.now()
    for second in range(-1, 240):  # So that both meet a name that is taken, whenever they get there.
        (tmp_path / f'runs/digits-{now + datetime.timedelta(seconds=second):%Y%m%d-%H%M%S}').mkdir(parents=True)
    both = [start_launch(*tiny_digits(), '--mode=preview', cwd=tmp_path) for _ in range(2)]
    outcomes = [running.wait() for running in both]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    made = [path for path in (tmp_path / 'runs').iterdir() if list(path.iterdir())]
    assert len(made) == 2 and all(path.name.count('-') == 3 for path in made), made
