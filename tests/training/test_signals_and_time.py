"""What ends a run from outside, and what its clock counts: real processes, real signals."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from byol_func.errors import UserError
from byol_func.training.stopwatch import Stopwatch
from byol_func.utils import checkpointing
from byol_func.workdir import files, lock
from cli import Running, start_launch, succeed, tiny_digits
from runs import records

RUN = tiny_digits(num_epochs=200, batch_size=64, log_every_steps=1)


def _start(tmp_path: pathlib.Path, *more: str) -> tuple[Running, pathlib.Path]:
    running = start_launch(*RUN, '--workdir=run', *more, cwd=tmp_path)
    path = tmp_path / 'run' / 'metrics.jsonl'
    deadline = time.monotonic() + 400
    while not path.exists() or path.read_text().count('\n') < 3:
        assert time.monotonic() < deadline and running.process.is_alive()
        time.sleep(0.02)
    return running, path


@pytest.mark.parametrize('name', ['SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU', 'SIGINT'])
def test_signals_of_terminals_and_batch_systems_save(name, tmp_path):
    running, _ = _start(tmp_path)
    os.kill(running.process.pid, getattr(signal, name))
    outcome = running.wait()
    assert outcome.code == 75, outcome.stderr
    assert re.search(rf'Stopped by {name} after \d+ of \d+ steps of pretrain,', outcome.stderr)
    assert ('press Ctrl-C again' in outcome.stderr) == (name == 'SIGINT')
    assert list(tmp_path.glob('run/checkpoints/pretrain_*.safetensors'))


def test_a_workdir_that_is_removed_ends_the_run(tmp_path):
    running, path = _start(tmp_path)
    shutil.rmtree(path.parent)
    outcome = running.wait()
    assert outcome.code == 1
    assert outcome.stderr.splitlines()[-1] == ('Error: --workdir=run: was removed or moved during the run')


def test_a_workdir_that_is_removed_before_the_results_come(tmp_path):
    """By any mode: a file that is written then makes the folder anew."""
    workdir = tmp_path / 'run'
    with lock.locked(str(workdir)):
        lock.check_still_there(str(workdir))
        shutil.rmtree(workdir)
        files.write_json(workdir / 'summary.json', {})
        with pytest.raises(UserError, match='run: was removed or moved during the run'):
            lock.check_still_there(str(workdir))


def test_a_pause_does_not_count_in_the_rate():
    code = (
        'import time\n'
        'from byol_func.training.stopwatch import Stopwatch\n'
        'watch = Stopwatch()\n'
        'start, real = watch.now(), time.monotonic()\n'
        'print("ready", flush=True)\n'
        'time.sleep(1)\n'
        'print(watch.now() - start, time.monotonic() - real)\n'
    )
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'ready\n'
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(8)
    os.kill(process.pid, signal.SIGCONT)
    counted, real = map(float, process.communicate()[0].split())
    assert real > 7.9 and counted < real - 6


def test_waiting_is_no_pause():
    watch = Stopwatch()
    start, real = watch.now(), time.monotonic()
    time.sleep(4.5)
    counted = watch.now() - start
    watch.close()
    assert counted == pytest.approx(time.monotonic() - real, abs=0.5)


def test_lines_come_by_the_clock_and_the_first_says_what_is_known(tmp_path):
    """Between two logged steps too."""
    outcome = succeed(*tiny_digits(log_every_steps=1000), '--workdir=run', '--log_every_seconds=0', cwd=tmp_path)
    lines = [line.split('] ')[-1] for line in outcome.stderr.splitlines() if '] pretrain: ' in line]
    steps = [line for line in lines if ', loss ' in line]
    assert [int(line.split()[1]) for line in steps] == [128 * (i + 1) for i in range(11)]
    assert 'images/s' not in steps[0] and 'left' not in steps[0]
    assert all('images/s' in line and 'left' in line for line in steps[1:])
    logged = records(tmp_path / 'run')
    assert [line['step'] for line in logged if 'loss' in line] == [0, 10], 'the file keeps its own rhythm'


def test_the_seconds_of_a_resumed_run_cover_its_earlier_parts(tmp_path):
    """They go on from those in the checkpoint; one of an earlier version holds none."""
    flags = tiny_digits(batch_size=256, num_epochs=2, checkpointing__save_every_steps=3, checkpointing__keep=9)
    succeed(*flags, '--workdir=run', cwd=tmp_path)
    paths = sorted((tmp_path / 'run/checkpoints').glob('pretrain_*'))
    first = checkpointing.load(paths[0])._replace(path=str(paths[0]))
    for before, scalars in ((1000.0, {**first.scalars, 'seconds': 1000.0}), (0.0, {'epoch': first.scalars['epoch']})):
        for path in (*paths, *(tmp_path / 'run').glob('summary*')):
            path.unlink(missing_ok=True)
        checkpointing.write(first._replace(scalars=scalars))
        succeed(*flags, '--workdir=run', '--resume=must', cwd=tmp_path)
        seconds = json.loads((tmp_path / 'run/summary.json').read_text())['seconds']
        assert before < seconds < before + 100
