"""Two real processes: one trains, the other evaluates its checkpoints as they appear."""

import json
import os
import pathlib
import signal
import time

import pytest

from cli import run_launch, start_launch, succeed, tiny_digits

_RUN = tiny_digits(
    num_epochs=3,
    batch_size=128,
    checkpointing__save_every_steps=3,
    checkpointing__keep=100,
    eval_every_epochs=0.0,
    monitoring__knn_bank_size=200,
)
_LAST = 32


def _records(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _until(condition) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope='module')
def followed(tmp_path_factory):
    """The workdir of a training that was followed, and the follower's outcome."""
    workdir = tmp_path_factory.mktemp('followed')
    follower = start_launch(*_RUN, '--mode=eval', '--follow', f'--workdir={workdir}', cwd=workdir)
    training = start_launch(*_RUN, f'--workdir={workdir}', cwd=workdir)
    trained, outcome = training.wait(), follower.wait()
    assert trained.code == 0 and outcome.code == 0, trained.stderr + outcome.stderr
    return workdir, outcome


def test_every_checkpoint_is_evaluated_while_training_goes_on(followed):
    workdir, outcome = followed
    records = _records(workdir / 'eval.jsonl')
    assert sorted(r['step'] for r in records) == [*range(2, _LAST, 3), _LAST]
    (last,) = (r for r in records if r['step'] == _LAST)
    summary = json.loads((workdir / 'summary.json').read_text())
    names = ('test/online_top1', 'test/online_top5', 'test/online_loss', 'test/online_knn_top1')
    assert {name: last[name] for name in names} == {name: summary[name] for name in names}
    assert len({r['test/online_loss'] for r in records}) == len(records)
    assert f'Step {_LAST}, epoch ' in outcome.stderr and f'Step {_LAST}, the last of ' in outcome.stderr


def test_the_follower_leaves_the_files_of_the_training_alone(followed):
    workdir, _ = followed
    assert json.loads((workdir / 'summary.json').read_text())['mode'] == 'pretrain'
    assert not [path.name for path in workdir.iterdir() if path.name in ('config.eval.json', 'summary.eval.json')]
    assert {r['mode'] for r in _records(workdir / 'metrics.jsonl')} == {'pretrain'}


def test_following_again_evaluates_nothing_twice(followed):
    workdir, _ = followed
    before = (workdir / 'eval.jsonl').read_bytes()
    succeed(*_RUN, '--mode=eval', '--follow', f'--workdir={workdir}', cwd=workdir)
    assert (workdir / 'eval.jsonl').read_bytes() == before


def test_an_interrupt_ends_it_and_it_goes_on_later(followed, tmp_path):
    workdir, _ = followed
    (tmp_path / 'checkpoints').mkdir()
    files = sorted((workdir / 'checkpoints').iterdir())
    os.link(files[0], tmp_path / 'checkpoints' / files[0].name)
    argv = [*_RUN, '--mode=eval', '--follow', f'--workdir={tmp_path}']
    follower = start_launch(*argv, cwd=tmp_path)
    _until(lambda: _records(tmp_path / 'eval.jsonl'))
    os.kill(follower.process.pid, signal.SIGINT)
    outcome = follower.wait()
    assert outcome.code == 0 and 'Stopped following' in outcome.stderr and 'Traceback' not in outcome.stderr
    os.link(files[-1], tmp_path / 'checkpoints' / files[-1].name)
    succeed(*argv, cwd=tmp_path)
    assert [r['step'] for r in _records(tmp_path / 'eval.jsonl')] == [2, _LAST]


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--follow'], 'Error: --follow=True: only with --mode=eval, not --mode=pretrain'),
        (['--follow', '--mode=eval', '--checkpoint=x'], 'Error: --follow: expected --workdir, not --checkpoint=x'),
        (['--follow', '--mode=eval', '--split=val'], 'Error: --follow: expected config.dataset.eval_split'),
    ],
)
def test_flags_that_do_not_go_together(flags, message, tmp_path):
    outcome = run_launch(*_RUN, *flags, f'--workdir={tmp_path}/run', cwd=tmp_path)
    assert outcome.code == 1 and message in outcome.stderr
