"""A replica that ends takes the others with it, and each says in one line which one ended and why: real processes."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import filelock
from PIL import Image

from cli import ROOT, TINY_RUN, Outcome, config, run_launch, srun, tiny_digits


def _errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith('Error: ')]


def _images(root: pathlib.Path, count: int) -> pathlib.Path:
    for split in ('train', 'test'):
        for name in 'ab':
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new('RGB', (8, 8), (i, 90, 30)).save(root / split / name / f'{i:03d}.png')
    return root


def test_a_broken_image_of_one_replica_ends_both_with_one_line(tmp_path):
    broken = _images(tmp_path / 'images', 16) / 'train/b/007.png'
    broken.write_bytes(broken.read_bytes()[:40])
    sizes = dict(image_size=8, batch_size=16, linear_eval__batch_size=16, dataset__source_size=0, dataset__max_gib=0)
    run = config('folder.py', **{**TINY_RUN, **sizes, 'dataset__root': broken.parents[2]})
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', ROOT / 'launch.py']
        + [*run, '--device=cpu', '--workdir=run'],
        cwd=tmp_path,
        env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert 'byol_func/' not in done.stderr, 'the only traceback is that of torchrun itself'
    first, second = sorted(_errors(done.stderr))
    cause = f"config.dataset.root='{broken.parents[2]}': cannot read the image '{broken}'"
    assert first.startswith(f'Error: {cause}')
    assert re.match(rf'Error: replica [01] ended with an error: {re.escape(first.removeprefix("Error: "))}$', second)


def _outcomes(*argv: str, cwd: pathlib.Path) -> list[Outcome]:
    return [running.wait() for running in srun(*argv, cwd=cwd)]


def test_a_workdir_that_the_first_replica_cannot_use_ends_both_with_one_line(tmp_path):
    """The first replica alone takes the lock; without torchrun it also holds what the others read its message from."""
    (tmp_path / 'run').mkdir()
    with filelock.FileLock(tmp_path / 'run/.lock'):
        first, second = _outcomes(*tiny_digits(), '--workdir=run', cwd=tmp_path)
    assert (first.code, second.code) == (1, 1)
    (line,) = _errors(first.stderr)
    assert line.startswith('Error: --workdir=run: another run is using it')
    assert _errors(second.stderr) == [f'Error: replica 0 ended with an error: {line.removeprefix("Error: ")}']
    assert 'Traceback' not in first.stderr + second.stderr


def test_a_replica_that_cannot_start_ends_the_one_that_waits(tmp_path):
    """No group exists yet: the fault of one machine, here a GPU that is not there."""
    first, second = (running.wait() for running in srun(*tiny_digits(), cwd=tmp_path, second=['--device=cuda']))
    (line,) = _errors(second.stderr)
    assert line.startswith('Error: --device=cuda: ')
    assert _errors(first.stderr) == [f'Error: replica 1 ended with an error: {line.removeprefix("Error: ")}']
    assert (first.code, second.code) == (1, 1) and 'Traceback' not in first.stderr + second.stderr


def test_a_killed_replica_is_named_by_the_other(tmp_path):
    """The first replica holds the store; `test_elastic` kills the second one of torchrun."""
    first, second = srun(*tiny_digits(num_epochs=40, checkpointing__save_every_steps=2), '--workdir=run', cwd=tmp_path)
    deadline = time.monotonic() + 400
    while not list(tmp_path.glob('run/checkpoints/*.safetensors')):
        assert time.monotonic() < deadline and first.process.is_alive()
        time.sleep(0.05)
    os.kill(first.process.pid, signal.SIGKILL)
    assert first.wait().code == -signal.SIGKILL
    outcome = second.wait()
    assert outcome.code == 1 and 'Traceback' not in outcome.stderr and 'frame #' not in outcome.stderr, outcome.stderr
    assert _errors(outcome.stderr) == ['Error: replica 0 was lost; the same command resumes from the newest checkpoint']


def test_a_store_whose_process_is_killed_prints_no_stack_frames(tmp_path):
    """What happens in `test_a_killed_replica_is_named_by_the_other` if the store dies between two questions to it."""
    script = tmp_path / 'asks.py'
    script.write_text(
        'import byol_func.program, os, signal, subprocess, sys, time\n'
        'import torch.distributed as dist\n'
        'port = int(sys.argv[1]) if len(sys.argv) > 1 else 0\n'
        "store = dist.TCPStore('127.0.0.1', port, 2, port == 0, wait_for_workers=False)\n"
        'if port == 0:\n'
        '    asking = subprocess.Popen([sys.executable, __file__, str(store.port)])\n'
        "    store.wait(['asked'])\n"
        '    os.kill(os.getpid(), signal.SIGKILL)\n'
        "store.set('asked', '')\n"
        'for _ in range(200):\n'
        '    try:\n'
        "        store.check(['anything'])\n"
        '    except dist.DistNetworkError as error:\n'
        "        print('lost', flush=True)\n"
        '    time.sleep(0.02)\n'
    )
    environ = {name: value for name, value in os.environ.items() if name != 'TORCH_CPP_LOG_LEVEL'}
    with subprocess.Popen(
        [sys.executable, script],
        env=environ | {'PYTHONPATH': str(ROOT), 'WORLD_SIZE': '2'},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        printed, errors = process.communicate(timeout=120)  # Ends with the process that asks: it shares the pipes.
    assert process.returncode == -signal.SIGKILL
    assert 'lost' in printed and errors == ''


def test_srun_starts_one_run_in_one_folder(tmp_path):
    """A stand-in for srun, a command like any other, and no --workdir: the first replica names it for both."""
    script = tmp_path / 'srun'
    script.write_text(
        '#!/bin/sh\nshift 2\nexport SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost SLURM_JOB_ID=$$\n'
        'for SLURM_PROCID in 0 1; do export SLURM_PROCID SLURM_LOCALID=$SLURM_PROCID; "$@" & done\nwait\n'
    )
    script.chmod(0o755)
    done = subprocess.run(
        [script, '-n', '2', sys.executable, ROOT / 'launch.py', *tiny_digits(batch_size=512), '--device=cpu'],
        cwd=tmp_path,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=300,
    )
    for rank in range(2):
        assert f'replica {rank} of 2, started by srun' in done.stderr
    (workdir,) = (tmp_path / 'runs').iterdir()
    assert json.loads((workdir / 'summary.json').read_text())['mode'] == 'pretrain'
    assert 'Error' not in done.stderr and 'Warning' not in done.stderr, done.stderr


def test_a_port_that_another_run_uses_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        world = dict(WORLD_SIZE='2', RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        outcome = run_launch(*tiny_digits(), '--device=cpu', cwd=tmp_path, **world)
    assert outcome.code == 1 and 'Traceback' not in outcome.stderr
    assert _errors(outcome.stderr)[0].startswith(f'Error: MASTER_ADDR=127.0.0.1, MASTER_PORT={port}: cannot be opened')
