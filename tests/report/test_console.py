"""How long phases tell their progress: real processes, with a terminal and without."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
import torch
from PIL import Image

from byol_func import console
from byol_func.data import decoding, folder, listing
from byol_func.evaluation import knn, logistic
from cli import ROOT

_PHASE = """
import sys, time
from absl import logging
from byol_func import console
logging.set_verbosity(logging.INFO)
logging.use_absl_handler()
if len(sys.argv) > 1:
    console.set_pace(float(sys.argv[1]))
seen = []
for batch in console.watch([[1, 2], [3, 4], [5, 6], [7]], 'Evaluating', 7, len):
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
        f'Evaluating: {done} of 7 images' for done in (2, 4, 6)
    ]
    assert all('left' in line for line in lines)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch) -> None:
    """In this process no time passes between two lines."""
    monkeypatch.setattr(console, '_every_seconds', 0.0)


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line.split(',')[0] for line in caplog.messages]


def test_other_things_than_images_are_counted(caplog):
    caplog.set_level('INFO', logger='absl')
    assert list(console.watch('abc', 'Fitting', 3, unit='fit')) == ['a', 'b', 'c']
    assert _said(caplog) == ['Fitting: 1 of 3 fits', 'Fitting: 2 of 3 fits']


def test_a_search_and_its_fits_are_watched(caplog):
    caplog.set_level('INFO', logger='absl')
    features, labels, held_out = torch.randn(40, 3), torch.arange(40) % 2, torch.arange(40) < 8
    watch = lambda items, total: console.watch(items, 'Busy', total, unit='part')
    logistic.choose_and_predict(features, features, labels, held_out, num_classes=2, penalties=(0.1, 1.0), watch=watch)
    assert _said(caplog) == ['Busy: 1 of 3 parts', 'Busy: 2 of 3 parts']
    caplog.clear()
    knn.predict(torch.randn(1100, 3), features, labels, num_classes=2, k=5, watch=watch)
    assert _said(caplog) == ['Busy: 1 of 3 parts', 'Busy: 2 of 3 parts']


def test_reading_a_folder_is_watched(caplog, tmp_path):
    caplog.set_level('INFO', logger='absl')
    for split in ('train', 'test'):
        for name in 'ab':
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(70):
                Image.new('L', (4, 4), i).save(tmp_path / split / name / f'{i}.png')
    data = folder.read(listing.list_files('train', str(tmp_path)), decoding.Form(0, True), 0.0)
    assert data.num_examples == 140
    assert _said(caplog) == [f'Reading train: {done} of 140 images' for done in (64, 128)]


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
