"""The job script of the documentation, with stand-ins for srun and scontrol that work on this machine."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from cli import ROOT, tiny_digits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != 'linux', reason='job scripts are for Linux'),
]
# Starts two tasks of one job step, writes their process ids, and returns the highest of their exit statuses.
_SRUN = """#!/bin/sh
shift
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost
for SLURM_PROCID in 0 1; do
    export SLURM_PROCID SLURM_LOCALID=$SLURM_PROCID
    "$@" &
    echo $! >> tasks
done
highest=0
for task in $(cat tasks); do
    wait $task || { status=$?; [ $status -gt $highest ] && highest=$status; }
done
rm tasks
exit $highest
"""
_SCONTROL = '#!/bin/sh\necho "$@" >> scontrol.log\n'


def test_a_job_that_is_warned_is_queued_again_and_goes_on(tmp_path):
    for name, script in (('srun', _SRUN), ('scontrol', _SCONTROL)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    (tmp_path / 'launch.py').symlink_to(ROOT / 'launch.py')
    environment = os.environ | {
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'PYTHON': sys.executable,
        'PYTHONPATH': str(ROOT),
        'OMP_NUM_THREADS': '1',
        'SLURM_JOB_ID': '7',
    }
    run = tiny_digits(num_epochs=3)
    job = [*('bash', ROOT / 'docs/train.sbatch'), *run, '--device=cpu', '--workdir=run']
    process = subprocess.Popen(job, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / 'run/metrics.jsonl', time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count('\n') > 1):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    for task in (tmp_path / 'tasks').read_text().split():  # Slurm sends it to the tasks of the step.
        os.kill(int(task), signal.SIGUSR1)
    messages = process.communicate(timeout=200)[1]
    assert process.returncode == 75 and 'Stopped by SIGUSR1' in messages, messages
    assert (tmp_path / 'scontrol.log').read_text() == 'requeue 7\n'
    assert list(pathlib.Path(tmp_path, 'run/checkpoints').iterdir())

    done = subprocess.run(job, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and 'Resuming from' in done.stderr, done.stderr
    assert (tmp_path / 'scontrol.log').read_text() == 'requeue 7\n'
    assert json.loads((tmp_path / 'run/summary.json').read_text())['mode'] == 'pretrain'
