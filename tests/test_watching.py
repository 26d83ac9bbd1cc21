"""How long phases tell their progress: real processes."""

import subprocess
import sys

from cli import ROOT

_PHASE = """
import sys, time
from absl import logging
from byol_func.data import watching
logging.set_verbosity(logging.INFO)
logging.use_absl_handler()
if len(sys.argv) > 1:
    watching.set_pace(float(sys.argv[1]))
seen = []
for batch in watching.watch([[1, 2], [3, 4], [5, 6], [7]], 'Evaluating', 7, len):
    seen += batch
    time.sleep(0.6)
assert seen == [1, 2, 3, 4, 5, 6, 7]
"""


def _run(*argv: str, **streams) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', _PHASE, *argv], cwd=ROOT, timeout=120, check=True, **streams)


def test_lines_where_there_is_no_terminal():
    stderr = _run('0', stderr=subprocess.PIPE, text=True).stderr
    lines = [line for line in stderr.splitlines() if 'WARNING' not in line]  # absl's own, about flags.
    assert [line.split('] ')[-1].split(',')[0] for line in lines] == [
        f'Evaluating: {done} of 7 images' for done in (2, 4, 6)]
    assert all('left' in line for line in lines)


def test_short_phases_say_nothing():
    assert _run(stderr=subprocess.PIPE, text=True).stderr == ''  # Shorter than the ten seconds between lines.
