"""How long phases tell their progress: real processes, with a terminal and without."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

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


def test_a_bar_on_a_terminal():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))  # Rows and columns.
    _run('0', stderr=theirs)
    os.write(theirs, b'end')  # There is something to read, whatever the phase has said.
    text = os.read(ours, 1 << 16).decode()
    os.close(theirs)
    os.close(ours)
    assert 'Evaluating:' in text and '/7.00' in text and '\r' in text and ' of 7 images' not in text
