"""Checkpoints that are damaged, foreign, missing, in use or impossible to write."""

import os
import pathlib
import resource
import shutil
import signal
import threading
import time

import optree
import pytest
import safetensors.torch
import torch

from byol_func.errors import UserError
from byol_func.training import saving
from byol_func.utils import checkpointing
from cli import run_launch, start_launch, succeed, tiny_digits
from runs import loop_settings, records, without_rates

_RUN = tiny_digits(batch_size=256, checkpointing__save_every_steps=1, checkpointing__keep=3)  # 5 or 6 steps.


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> pathlib.Path:
    """The workdir of a run that has ended; nobody writes there."""
    workdir = tmp_path_factory.mktemp('finished')
    succeed(*_RUN, f'--workdir={workdir}', cwd=workdir)
    return workdir


@pytest.fixture
def workdir(finished, tmp_path) -> pathlib.Path:
    """A copy of it."""
    return pathlib.Path(shutil.copytree(finished, tmp_path / 'run'))


def _checkpoints(workdir: pathlib.Path) -> list[pathlib.Path]:
    return sorted(workdir.glob('checkpoints/pretrain_*.safetensors'))


def _numbers(workdir: pathlib.Path) -> list[dict]:
    return without_rates(records(workdir))


def _flip(path: pathlib.Path, where: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def _cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _foreign(path: pathlib.Path) -> None:
    safetensors.torch.save_file({'w': torch.zeros(3)}, path, {'by': 'another program'})


def _newer(path: pathlib.Path) -> None:
    version = f'"format_version":"{checkpointing.FORMAT_VERSION}"'.encode()
    content = path.read_bytes()
    assert content.count(version) == 1
    path.write_bytes(content.replace(version, b'"format_version":"9"'))


_DAMAGES = {
    'a bit of a tensor': (lambda path: _flip(path, 0.9), 'the checksum differs'),
    'a bit of the last tensor': (lambda path: _flip(path, 1.0), 'the checksum differs'),
    'cut': (_cut, 'the checksum differs'),
    'empty': (lambda path: path.write_bytes(b''), 'cut short'),
    'foreign': (_foreign, 'another program wrote it'),
    'newer': (_newer, 'written by a newer version of byol_func (format 9)'),
}


@pytest.mark.parametrize('damage, words', _DAMAGES.values(), ids=_DAMAGES)
def test_auto_goes_on_from_the_newest_good_one(finished, workdir, damage, words):
    """It names the bad one, keeps it, and ends with the numbers of the undisturbed run."""
    path = _checkpoints(workdir)[-1]
    damage(path)
    bad = path.read_bytes()
    outcome = succeed(*_RUN, f'--workdir={workdir}', cwd=workdir)
    assert f'--checkpoint={path}: ' in outcome.stderr and words in outcome.stderr
    assert path.with_name(path.name + '.unusable').read_bytes() == bad
    assert _numbers(workdir) == _numbers(finished)
    expected, actual = (checkpointing.load(_checkpoints(w)[-1]) for w in (finished, workdir))
    assert expected.step == actual.step
    assert all(torch.equal(expected.tensors[name], actual.tensors[name]) for name in expected.tensors)


def test_must_stops_at_a_damaged_one_and_where_there_is_none(workdir, tmp_path):
    path = _checkpoints(workdir)[-1]
    _flip(path, 0.5)
    before = {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
    outcome = run_launch(*_RUN, f'--workdir={workdir}', '--resume=must', cwd=tmp_path)
    assert outcome.code == 1 and outcome.stderr.splitlines()[-1].startswith(f'Error: --checkpoint={path}: ')
    assert before == {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
    outcome = run_launch(*_RUN, f'--workdir={tmp_path}/new', '--resume=must', cwd=tmp_path)
    assert outcome.code == 1 and 'Error: --resume=must: expected a checkpoint of pretrain' in outcome.stderr
    assert not (tmp_path / 'new/metrics.jsonl').exists()


def test_never_overwrites_nothing(workdir, tmp_path):
    before = {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
    outcome = run_launch(*_RUN, f'--workdir={workdir}', '--resume=never', cwd=tmp_path)
    assert outcome.code == 1 and 'Error: --resume=never: ' in outcome.stderr
    assert before == {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
    succeed(*_RUN, f'--workdir={tmp_path}/new', '--resume=never', '--config.final_linear_eval=True', cwd=tmp_path)
    outcome = run_launch(*_RUN, f'--workdir={workdir}', '--resume=perhaps', cwd=tmp_path)
    assert outcome.code == 1 and "--resume='perhaps'" in outcome.stderr


def test_no_good_one_is_no_reason_to_start_anew(workdir, tmp_path):
    for path in _checkpoints(workdir):
        _cut(path)
    before = {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
    outcome = run_launch(*_RUN, f'--workdir={workdir}', cwd=tmp_path)
    assert outcome.code == 1 and 'nor is any older checkpoint of pretrain' in outcome.stderr.splitlines()[-1]
    assert before == {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}


def test_two_runs_on_one_workdir(tmp_path):
    """The second is refused as long as the first lives, and not longer."""
    long = [*_RUN, '--config.num_epochs=500', f'--workdir={tmp_path}']
    first = start_launch(*long, cwd=tmp_path)
    while not (tmp_path / 'metrics.jsonl').exists():
        assert first.process.is_alive()
        time.sleep(0.01)
    outcome = run_launch(*long, cwd=tmp_path)
    error = outcome.stderr.splitlines()[-1]
    assert outcome.code == 1 and f'Error: --workdir={tmp_path}: another run is using it (process ' in error
    assert str(first.process.pid) in error
    os.kill(first.process.pid, signal.SIGKILL)
    assert first.wait().code == -signal.SIGKILL
    third = start_launch(*long, cwd=tmp_path)
    lines = len(_numbers(tmp_path))
    while len((tmp_path / 'metrics.jsonl').read_text().splitlines()) <= lines + 3:
        assert third.process.is_alive()
        time.sleep(0.01)
    os.kill(third.process.pid, signal.SIGTERM)
    assert third.wait().code == 75


def test_full_disk(tmp_path):
    """The third checkpoint does not fit, for real: the device says so. The first two stay whole."""
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints/pretrain_00000002.safetensors.tmp').symlink_to('/dev/full')
    saving_step = lambda step: checkpointing.save(
        tmp_path / 'checkpoints', {'w': torch.full((9,), float(step))}, mode='pretrain', step=step, config={}
    )
    for step in range(2):
        saving_step(step)
    with pytest.raises(UserError, match=r'step 2 could not be written \(No space left on device\); earlier'):
        saving_step(2)
    assert [path.name[-13:-12] for path in _checkpoints(tmp_path)] == ['0', '1']
    assert all(checkpointing.load(path).tensors['w'][0] == step for step, path in enumerate(_checkpoints(tmp_path)))


def _limited(workdir: str, argv: list[str]) -> None:
    """A process whose files may not grow beyond 130,000 bytes: the checkpoints are larger."""
    import contextlib
    import sys

    import launch

    resource.setrlimit(resource.RLIMIT_FSIZE, (130_000, 130_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.argv = ['launch.py', *argv]
    with open(os.path.join(workdir, 'stderr'), 'w') as file, contextlib.redirect_stderr(file):
        launch.run()


def test_a_disk_that_fills_up_is_told_in_one_line(tmp_path):
    import multiprocessing

    context = multiprocessing.get_context('forkserver')
    argv = [*_RUN, f'--workdir={tmp_path}/run']
    process = context.Process(target=_limited, args=(str(tmp_path), argv))
    process.start()
    process.join()
    error = (tmp_path / 'stderr').read_text().splitlines()[-1]
    assert process.exitcode == 1
    assert error.startswith(f'Error: --workdir={tmp_path}/run: the checkpoint of step 0 could not be written')
    assert not list((tmp_path / 'run/checkpoints').iterdir())


def test_a_workdir_that_cannot_be_written(tmp_path):
    for workdir in ('/proc/run', '/dev/null/run'):
        outcome = run_launch(*_RUN, f'--workdir={workdir}', cwd=tmp_path)
        assert outcome.code == 1
        assert outcome.stderr.splitlines()[-1].startswith(f'Error: --workdir={workdir}: cannot write there')


def test_an_unknown_best_metric_is_found_out_after_one_step(tmp_path):
    argv = [*_RUN, '--config.checkpointing.best_metric=knn', f'--workdir={tmp_path}']
    outcome = run_launch(*argv, cwd=tmp_path)
    assert outcome.code == 1
    assert "config.checkpointing.best_metric='knn': expected one of " in outcome.stderr
    assert ' repr_loss, ' in outcome.stderr


def test_what_is_kept():
    values = dict(zip(range(0, 60, 10), (3.0, 1.0, None, float('nan'), 2.0, 1.0), strict=False))
    keep = lambda **how: sorted(saving.steps_to_keep(values, **({'keep': 1, 'milestones': set()} | how)))
    assert keep(highest=False) == [10, 50]  # Of two equal ones the first.
    assert keep(highest=True) == [0, 50]
    assert keep(highest=True, milestones={20, 40}, keep=2) == [0, 20, 40, 50]
    assert saving.steps_to_keep({}, keep=1, highest=True, milestones={5}) == set()
    assert not saving.highest_is_best('test/knn_error', 'auto') and saving.highest_is_best('top1_accuracy', 'auto')
    assert saving.highest_is_best('loss', 'highest') and not saving.highest_is_best('top1', 'lowest')


def _saver(workdir: pathlib.Path) -> saving.Saver:
    loop = loop_settings(workdir, save_every_steps=1, keep=100)
    return saving.Saver(loop, batch_size=1, num_examples=1, max_steps=100, first_step=0, is_writer=True)


def test_no_state_is_torn(tmp_path):
    """The tensors are overwritten at once after each save, as a donating step does it."""
    state = {'a': torch.zeros(400_000), 'b': torch.zeros(1000, 400).t(), 'n': torch.zeros((), dtype=torch.int64)}
    saver = _saver(tmp_path)
    for step in range(20):
        optree.tree_map_(lambda x, value=step: x.fill_(value), state)
        saver.save(state, step, {})
    saver.wait()
    saver.close()
    assert len(_checkpoints(tmp_path)) == 20
    for step, path in enumerate(_checkpoints(tmp_path)):
        assert all((leaf == step).all() for leaf in checkpointing.load(path).tensors.values()), path


def test_a_write_that_fails_is_told_by_the_next_call(tmp_path):
    (tmp_path / 'checkpoints').write_text('in the way')
    saver = _saver(tmp_path)
    saver.save({'w': torch.zeros(1)}, 0, {})
    with pytest.raises(UserError, match='the checkpoint of step 0 could not be written'):
        while True:
            saver.check()
    saver.close()
    assert not [t for t in threading.enumerate() if t.name.startswith('checkpoint')]
