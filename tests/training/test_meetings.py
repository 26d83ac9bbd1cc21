"""Replicas talk after few steps, and stop after the same one: real processes."""

import os
import pathlib
import signal
import time

import pytest
import torch

from byol_func import main_loop
from byol_func.experiment import Experiment
from byol_func.runtime import collectives
from byol_func.training import nonfinite
from byol_func.training.meetings import Meetings
from byol_func.utils import dataset
from cli import srun, tiny_digits
from configs import digits
from golden_processes import run_in_processes
from runs import assert_same_runs, loop_settings, records


def _steps_of_meetings(rank: int, seconds: float, flagged_at: int, steps: int) -> tuple[list[int], int | None]:
    """The steps after which a replica talks, and the one after which it hears of the flag of replica 1."""
    meetings, met = Meetings(), []
    for step in range(steps):
        time.sleep(seconds if rank == 1 else 0.0)
        if meetings.is_due():
            met.append(step)
            if meetings.any_replica(rank == 1 and step >= flagged_at):
                return met, step
    return met, None


def test_replicas_of_fast_steps_talk_after_few_of_them(tmp_path):
    first, second = run_in_processes(_steps_of_meetings, 2, tmp_path, 0.001, 200, 400)
    assert first == second
    met, heard = first
    assert met[:3] == [0, 2, 6] and len(met) < 30
    assert 200 <= heard < 200 + 32


def test_the_slowest_replica_decides_how_many_steps_lie_between(tmp_path):
    """A fast one, which would wait for it, may not put off a signal."""
    first, second = run_in_processes(_steps_of_meetings, 2, tmp_path, 0.2, 10, 20)
    assert first == second
    met, heard = first
    assert max(b - a for a, b in zip(met, met[1:], strict=False)) <= 2 and 10 <= heard <= 12


def test_one_process_stops_after_every_step():
    meetings = Meetings()
    assert all(meetings.is_due() and not meetings.any_replica(False) for _ in range(5))
    assert meetings.is_due() and meetings.any_replica(True)


def _trial(rank: int, workdir: str, diverges_at: int) -> tuple[str, list[str]]:
    """How a trial ends of which replica 1 alone sees a loss that is not finite."""

    def update(state, global_step, draws, inputs):
        del draws, inputs
        collectives.pmean(torch.zeros(2))  # Replicas that ended after different steps would wait here.
        loss = torch.where((global_step == diverges_at) & (rank == 1), float('inf'), 1.0)
        return {'x': state['x'] + 1}, {'loss': loss}

    data, _ = dataset.load_train_and_test(**digits.get_config().dataset)
    experiment = Experiment(
        init=lambda: {'x': torch.zeros(())},
        sample=lambda step: {},
        update=update,
        evaluate=None,
        predict=None,
        batch_size=4,
        max_steps=60,
    )
    loop = loop_settings(f'{workdir}/{rank}', is_trial=True, save_every_steps=1, keep=1000)
    with pytest.raises(nonfinite.Diverged) as caught:
        main_loop.train_loop(experiment, data, loop)
    collectives.barrier()  # The replicas are in step again.
    return str(caught.value), sorted(path.name for path in pathlib.Path(loop.checkpoint_dir).glob('*'))


@pytest.mark.parametrize('diverges_at', [25, 59])
def test_a_trial_ends_on_all_replicas_after_the_same_step(diverges_at, tmp_path):
    (first, _), (second, _) = found = run_in_processes(_trial, 2, tmp_path, str(tmp_path), diverges_at)
    assert second.startswith(f'step {diverges_at}: loss=inf: ')
    assert 'numbers of another replica' in first
    assert int(first.split(':')[0].split()[1]) - diverges_at in range(33)
    assert found[1][1] == []  # Replica 1 writes nothing.


@pytest.mark.slow
def test_a_signal_to_one_replica_stops_both_and_the_run_goes_on_bit_for_bit(tmp_path):
    run = tiny_digits(num_epochs=2, checkpointing__keep=1)
    for replica in srun(*run, '--workdir=undisturbed', cwd=tmp_path):
        assert replica.wait().code == 0
    first, second = srun(*run, '--workdir=stopped', cwd=tmp_path)
    path = tmp_path / 'stopped/metrics.jsonl'
    deadline = time.monotonic() + 400
    while not path.exists() or path.read_text().count('\n') < 4:
        assert time.monotonic() < deadline and first.process.is_alive()
        time.sleep(0.005)
    os.kill(second.process.pid, signal.SIGTERM)
    begin = time.monotonic()
    outcomes = first.wait(), second.wait()
    assert time.monotonic() - begin < 20
    assert [outcome.code for outcome in outcomes] == [75, 75], outcomes
    done = records(tmp_path / 'stopped')[-1]['step'] + 1
    assert f'Stopped by a signal to another replica after {done} of 22 steps' in outcomes[0].stderr
    for replica in srun(*run, '--workdir=stopped', cwd=tmp_path):
        assert replica.wait().code == 0
    assert_same_runs(tmp_path / 'undisturbed', tmp_path / 'stopped')
