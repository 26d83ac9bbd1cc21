"""k steps + restore + k steps = 2k steps, bit for bit, however the first process ended."""

import json
import os
import pathlib
import shlex
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from byol_func.utils import checkpointing
from cli import run_launch, start_launch, succeed, tiny_digits
from runs import step_records, without_rates

pytestmark = pytest.mark.slow

# Two epochs that do not divide into batches, batch norm, warm-up, LARS with
# momentum, rising tau and falling rate: everything that a step depends on.
_RUN = tiny_digits(
    num_epochs=2,
    batch_size=256,
    checkpointing__save_every_steps=2,
    checkpointing__keep=2,
    final_linear_eval=True,
    linear_eval__num_epochs=2,
    linear_eval__cache_features=False,
    linear_eval__augmentations__random_crop__min_area=0.5,
    linear_eval__compare_untrained=False,
    lr_schedule__warmup_epochs=0.5,
)
_STEPS = {'pretrain': 11, 'linear_eval': 11}


def _newest(workdir: pathlib.Path, mode: str) -> pathlib.Path:
    return max(workdir.glob(f'checkpoints/{mode}_*.safetensors'))


def _kill_after(step: int, mode: str, workdir: pathlib.Path) -> None:
    """Starts the run and kills it as soon as a step is logged, which is before it is saved."""
    running = start_launch(*_RUN, f'--workdir={workdir}', cwd=workdir)
    deadline = time.monotonic() + 400
    awaited = f'{{"mode": "{mode}", "step": {step}, '
    path = workdir / 'metrics.jsonl'
    while not (path.exists() and awaited in path.read_text()):
        assert running.process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(running.process.pid, signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory) -> pathlib.Path:
    """The workdir of a run without a break."""
    workdir = tmp_path_factory.mktemp('undisturbed')
    succeed(*_RUN, f'--workdir={workdir}', cwd=workdir)
    return workdir


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory) -> pathlib.Path:
    """The workdir of the same run, killed twice in pre-training and once in the evaluation."""
    workdir = tmp_path_factory.mktemp('interrupted')
    for mode, step in (('pretrain', 2), ('pretrain', 6), ('linear_eval', 4)):
        _kill_after(step, mode, workdir)
    # What a process leaves that dies while it writes.
    with open(workdir / 'metrics.jsonl', 'a') as file:
        file.write('{"mode": "linear_eval", "step": 10, "trai')
    (workdir / 'checkpoints/linear_eval_00000010.safetensors.tmp').write_bytes(b'half')
    succeed(*_RUN, f'--workdir={workdir}', cwd=workdir)
    return workdir


@pytest.mark.parametrize('mode', _STEPS)
def test_final_state_is_equal(undisturbed, interrupted, mode):
    expected, actual = (load_file(_newest(workdir, mode)) for workdir in (undisturbed, interrupted))
    assert _newest(undisturbed, mode).name == _newest(interrupted, mode).name
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name


def test_pretraining_moved_everything(undisturbed):
    """Equality would mean little for numbers that never change."""
    path = _newest(undisturbed, 'pretrain')
    before, after = load_file(path.with_name('pretrain_00000009.safetensors')), load_file(path)
    for name in after:
        # A bias in front of a batch norm has no gradient but rounding.
        assert not torch.equal(before[name], after[name]) or name.endswith('linear/b'), name


def test_metrics_are_equal_without_gaps_and_doubles(undisturbed, interrupted):
    for workdir in (undisturbed, interrupted):
        steps = [(record['mode'], record['step']) for record in step_records(workdir)]
        assert steps == [(mode, step) for mode, count in _STEPS.items() for step in range(count)]
    assert without_rates(step_records(undisturbed)) == without_rates(step_records(interrupted))
    losses = {record['loss'] for record in step_records(undisturbed) if record['mode'] == 'pretrain'}
    assert len(losses) == _STEPS['pretrain']


def test_summaries_are_equal(undisturbed, interrupted):
    expected, actual = (json.loads((w / 'summary.json').read_text()) for w in (undisturbed, interrupted))
    names = [name for name in expected if '/' in name]
    assert 'test/online_top1' in names
    assert [expected[name] for name in names] == [actual[name] for name in names]
    assert expected['steps'] == actual['steps'] == _STEPS['pretrain']


def test_seconds_cover_all_parts(interrupted):
    """Those of a resumed run go on from the checkpoint; one that had finished adds nothing."""
    saved = [
        checkpointing.load_scalars(path)['seconds'] for path in sorted(interrupted.glob('checkpoints/pretrain_*.saf*'))
    ]
    summary = json.loads((interrupted / 'summary.pretrain.json').read_text())
    assert 0 < saved[0] < saved[-1] <= summary['seconds']


def test_only_the_newest_checkpoints_are_kept(interrupted):
    names = sorted(path.name for path in (interrupted / 'checkpoints').glob('*.safetensors'))
    assert names == [f'{mode}_{step:08d}.safetensors' for mode in sorted(_STEPS) for step in (9, 10)]


def test_finished_run_is_not_repeated(interrupted):
    """The same command once more trains nothing and tells the same."""
    before = {name: (interrupted / name).read_text() for name in ('metrics.jsonl', 'config.json')}
    stamps = {path: path.stat().st_mtime_ns for path in interrupted.glob('checkpoints/*.safetensors')}
    metrics = json.loads((interrupted / 'summary.json').read_text())
    told = succeed(*_RUN, f'--workdir={interrupted}', cwd=interrupted).stderr
    assert 'pretrain had finished before: nothing is trained; only the results are measured again' in told
    assert before == {name: (interrupted / name).read_text() for name in before}
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    again = json.loads((interrupted / 'summary.json').read_text())
    assert {n: v for n, v in metrics.items() if n.startswith('test/')} == {
        n: v for n, v in again.items() if n.startswith('test/')
    }


_OTHER = {
    'batch_size': 128,
    'random_seed': 1,
    'num_epochs': 3,
    'lr_schedule.base_learning_rate': 0.5,
    'optimizer': 'sgd',
    'network.encoder_config.width_multiplier': 2.0,
    'augmentations.view2.solarize.apply_prob': 0.2,
}


@pytest.mark.parametrize('field, value', _OTHER.items(), ids=_OTHER)
def test_another_config_is_refused(undisturbed, field, value):
    """One line, and every file is as it was."""

    def contents():
        return {path: path.read_bytes() for path in undisturbed.rglob('*') if path.is_file()}

    before = contents()
    argv = [*_RUN, f'--config.{field}={value}', f'--workdir={undisturbed}']
    outcome = run_launch(*argv, cwd=undisturbed)
    assert outcome.code == 1 and 'Traceback' not in outcome.stderr
    error = outcome.stderr.splitlines()[-1]
    assert error.startswith(f'Error: --workdir={undisturbed}: ')
    assert f'config.{field}=' in error and repr(value) in error
    after = contents()
    assert [path.name for path in before if before[path] != after[path]] == []
    assert after.keys() == before.keys()


def test_fields_that_touch_no_number_may_change(undisturbed):
    argv = [*_RUN, '--config.log_every_steps=3', '--config.evaluation.batch_size=50', '--config.compile=True']
    succeed(*argv, f'--workdir={undisturbed}', cwd=undisturbed)


@pytest.mark.parametrize('num_seeds', [1, 2])
def test_two_fine_tunings_of_one_pre_training(tmp_path, num_seeds):
    """The second one is refused where the first is, by flags that lead to both."""
    argv = [*tiny_digits(batch_size=512, num_seeds=num_seeds, fine_tune__batch_size=50)]
    at = f'--workdir={tmp_path}/a run'
    succeed(*argv, at, cwd=tmp_path)
    part = '--config.fine_tune.label_fraction='
    succeed(*argv, at, '--mode=fine_tune', f'{part}0.1', cwd=tmp_path)
    second = [*argv, at, '--mode=fine_tune', f'{part}0.05']
    error = run_launch(*second, cwd=tmp_path).stderr.splitlines()[-1]
    before, flags = error.split(' or keep both by running the same command with ')
    assert before.endswith('holds a run with config.fine_tune.label_fraction=0.1, not 0.05; resume with the same value')
    flags = shlex.split(flags)
    workdir = pathlib.Path(flags[1].removeprefix('--workdir='))
    assert workdir == tmp_path / ('a run-2' if num_seeds == 1 else 'a run-2/seed_0')
    succeed(*second, *flags, cwd=tmp_path)
    saved, first = (
        json.loads((folder / 'config.json').read_text())
        for folder in (workdir, tmp_path / 'a run' / workdir.name if num_seeds > 1 else tmp_path / 'a run')
    )
    assert (saved['fine_tune']['label_fraction'], first['fine_tune']['label_fraction']) == (0.05, 0.1)
    assert saved['random_seed'] == first['random_seed']
