"""A rank that is killed is replaced by torchrun, and the run ends by itself."""

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
    pytest.mark.skipif(sys.platform != 'linux', reason='finds the rank in /proc'),
]


def pid_of_rank(rank: int, workdir: pathlib.Path) -> int | None:
    """The process of a rank, None if there is none."""
    for folder in pathlib.Path('/proc').glob('[0-9]*'):
        try:
            command, environment = ((folder / name).read_bytes() for name in ('cmdline', 'environ'))
        except OSError:  # It has just ended, or is somebody else's.
            continue
        if os.fsencode(workdir) in command and b'RANK=%d' % rank in environment.split(b'\0'):
            return int(folder.name)
    return None


@pytest.fixture
def torchrun():
    """Starts two processes under torchrun; what a failing test leaves behind is killed."""
    started = []

    def start(*argv):
        launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
        process = subprocess.Popen(
            [sys.executable, *launcher, *argv, '--device=cpu'],
            cwd=ROOT,
            env=os.environ | {'OMP_NUM_THREADS': '1'},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # torchrun passes it on; killing torchrun would leave its processes alone.
            process.communicate()


def test_a_killed_rank_is_replaced(torchrun, tmp_path):
    workdir = tmp_path / 'run'
    run = tiny_digits(num_epochs=1, checkpointing__save_every_steps=2)
    process = torchrun('--max-restarts=3', 'launch.py', *run, f'--workdir={workdir}')
    deadline = time.monotonic() + 400
    while not list(workdir.glob('checkpoints/*.safetensors')):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(pid_of_rank(1, workdir), signal.SIGKILL)
    messages = process.communicate(timeout=300)[1]
    assert process.returncode == 0, messages
    assert 'Error: replica 1 was lost; the same command resumes from the newest checkpoint' in messages
    assert 'Resuming from' in messages
    assert (workdir / f'checkpoints/pretrain_{1442 // 128 - 1:08d}.safetensors').exists()


def test_sigterm_to_the_agent_saves_within_its_grace_time(torchrun, tmp_path):
    """torchrun passes the signal on, and kills what is left after 30 s."""
    workdir = tmp_path / 'run'
    run = tiny_digits(num_epochs=200, checkpointing__save_every_seconds=1e6)
    process = torchrun('launch.py', *run, f'--workdir={workdir}')
    path = workdir / 'metrics.jsonl'
    deadline = time.monotonic() + 400
    while not path.exists() or path.read_text().count('\n') < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    assert not list(workdir.glob('checkpoints/*.safetensors'))
    process.send_signal(signal.SIGTERM)
    messages = process.communicate(timeout=100)[1]
    assert process.returncode == 1
    assert 'Stopped by SIGTERM after' in messages and 'Resume with: torchrun --nproc-per-node=2 ' in messages
    done = int(messages.split('Stopped by SIGTERM after ')[1].split()[0])
    assert (workdir / f'checkpoints/pretrain_{done - 1:08d}.safetensors').exists()
