"""A run that is killed again and again, at random moments, ends as one that nobody touched."""

import multiprocessing
import os
import pathlib
import random
import shlex
import signal
import time

import pytest
import torch

from byol_func import byol_experiment, main_loop
from byol_func.utils import dataset
from cli import PRELOAD, run_launch, start_launch, succeed, tiny_digits
from configs import digits
from runs import assert_same_runs, loop_settings, metrics

pytestmark = pytest.mark.slow

# 123 steps that do not divide into epochs, every one logged and every third one saved.
_RUN = tiny_digits(
    num_epochs=11,
    batch_size=128,
    checkpointing__save_every_steps=3,
    checkpointing__keep=2,
    checkpointing__best_metric='repr_loss',
    lr_schedule__warmup_epochs=1.0,
)
STEPS = 11 * 1442 // 128
KILLS = 22  # And 6 more in the test with a probe.


def kill(process, workdir: pathlib.Path, rng: random.Random, in_write: bool) -> bool | None:
    """Kills a process some time after its first new line; True if a write was under way, None if it had ended.

    Args:
      process: just started.
      workdir: of its run.
      rng: for the moment.
      in_write: whether to wait for the next write of a checkpoint, too.
    """
    path = workdir / 'metrics.jsonl'
    # A run that goes on writes the file anew, in another inode.
    before = path.stat().st_ino if path.exists() else None
    deadline = time.monotonic() + 400
    while process.is_alive() and not (path.exists() and path.stat().st_ino != before):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.04))
    half = lambda: any(workdir.glob('checkpoints/*.tmp'))
    while in_write and process.is_alive() and not half():
        assert time.monotonic() < deadline
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return half() if process.exitcode == -signal.SIGKILL else None


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory) -> pathlib.Path:
    """The workdir of a run without a break."""
    workdir = tmp_path_factory.mktemp('undisturbed')
    succeed(*_RUN, f'--workdir={workdir}', cwd=workdir)
    steps = [record['step'] for record in metrics(workdir) if 'loss' in record]
    assert steps == list(range(STEPS))
    return workdir


def test_killed_runs_end_like_an_undisturbed_one(undisturbed, tmp_path):
    rng, kills, writes = random.Random(0), 0, 0
    for i in range(KILLS):
        running = start_launch(*_RUN, f'--workdir={tmp_path}', cwd=tmp_path)
        found = kill(running.process, tmp_path, rng, in_write=i % 2 == 1)
        running.output.cleanup()
        kills += found is not None
        writes += found is True
    print(f'{kills} kills, {writes} during a write')
    assert kills >= 20, 'the run ended before it was killed'
    assert writes >= 5, 'too few kills hit a write'
    succeed(*_RUN, f'--workdir={tmp_path}', cwd=tmp_path)
    assert_same_runs(undisturbed, tmp_path)


def test_sigterm_finishes_the_step_and_tells_how_to_go_on(undisturbed, tmp_path):
    for number, name in ((signal.SIGTERM, 'SIGTERM'), (signal.SIGINT, 'SIGINT')):
        running = start_launch(*_RUN, f'--workdir={tmp_path}', cwd=tmp_path)
        path = tmp_path / 'metrics.jsonl'
        before = len(path.read_text().splitlines()) if path.exists() else 0
        while not (path.exists() and len(path.read_text().splitlines()) > before + 1):
            assert running.process.is_alive()
            time.sleep(0.001)
        os.kill(running.process.pid, number)
        outcome = running.wait()
        assert outcome.code == 75 and 'Traceback' not in outcome.stderr, outcome
        last = outcome.stderr.splitlines()[-1]
        done = metrics(tmp_path)[-1]['step']
        assert f'Stopped by {name} after {done + 1} of {STEPS} steps of pretrain, saved in ' in last
        assert (tmp_path / f'checkpoints/pretrain_{done:08d}.safetensors').exists() and done < STEPS - 1
        go_on = shlex.split(last.split('Resume with: ')[1])
        assert go_on[:2] == ['python', 'launch.py'] and f'--workdir={tmp_path}' in go_on
    assert metrics(tmp_path) == [record for record in metrics(undisturbed) if record['step'] <= done]
    outcome = run_launch(*go_on[2:], '--resume=must', '--config.batch_size=64', cwd=tmp_path)
    assert 'holds a run with config.batch_size=128' in outcome.stderr


def _run_with_probe(workdir: str) -> None:
    torch.set_num_threads(1)
    config = digits.get_config()
    config.num_epochs, config.batch_size, config.network.encoder_class = 3, 128, 'TinyResNet'
    data, _ = dataset.load_train_and_test(**config.dataset)
    experiment = byol_experiment.make(
        config, num_examples=data.num_examples, num_classes=10, image_shape=data.images.shape[1:]
    )

    def measure(state, step, draws, inputs):
        del draws, inputs
        time.sleep(0.002)
        return {'test/norm': float(state.target_params['classifier']['w'].norm())}

    loop = loop_settings(workdir, save_every_steps=3, log_every_steps=2, keep_every_epochs=1.0, best_metric='test/norm')
    main_loop.train_loop(experiment, data, loop, [main_loop.Probe(4, measure)])


def test_probes_are_continued_and_the_best_checkpoint_stays(tmp_path):
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)

    def start(workdir):
        process = context.Process(target=_run_with_probe, args=(str(workdir),))
        process.start()
        return process

    undisturbed, killed = tmp_path / 'undisturbed', tmp_path / 'killed'
    process = start(undisturbed)
    process.join()
    assert process.exitcode == 0
    rng = random.Random(1)
    found = [kill(start(killed), killed, rng, in_write=False) for _ in range(6)]
    assert sum(f is not None for f in found) >= 4
    process = start(killed)
    process.join()
    assert process.exitcode == 0
    assert_same_runs(undisturbed, killed)
    probed = {r['step']: r['test/norm'] for r in metrics(killed) if 'test/norm' in r}
    assert list(probed) == [*range(3, 32, 4), 32]
    steps = {int(path.stem.split('_')[1]) for path in killed.glob('checkpoints/*')}
    last, milestones = max(probed), {11, 22}
    assert steps == {max(probed, key=probed.get), last, *milestones}
