"""What a start costs: mistakes are told before torch is loaded, and nothing is loaded that is not needed."""

import subprocess
import sys

import pytest

from cli import ROOT


def _python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize('flags', [['--mode=nonsense'], ['--mode=pretrian', '--config=configs/digits.py']])
def test_an_unknown_mode_is_told_before_torch_is_loaded(flags):
    code = (
        'import sys, launch\n'
        f'sys.argv = ["launch.py", *{flags}]\n'
        'try: launch.run()\n'
        'finally: print("torch" in sys.modules)\n'
    )
    done = _python(code)
    assert (done.returncode, done.stdout) == (1, 'False\n')
    assert done.stderr.startswith("Error: --mode='") and done.stderr.count('\n') == 1


def test_a_start_loads_what_it_needs():
    """Seconds each, and not needed to say what is wrong with a config or to read arrays."""
    slow = ('torchvision', 'sklearn', 'matplotlib', 'mlflow', 'sympy', 'torch._dynamo', 'triton')
    code = f'import sys, launch, byol_func.modes.running; print([m for m in {slow} if m in sys.modules])'
    done = _python(code)
    assert done.stdout == '[]\n', done.stderr
