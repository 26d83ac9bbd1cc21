"""A real divergence: the step is kept, and once more it shows where its numbers stop being finite."""

import pathlib
import re
import shutil

import pytest
import torch

from byol_func.training import replay
from byol_func.utils import checkpointing
from cli import run_launch, succeed, tiny_digits


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> pathlib.Path:
    """The workdir of a pre-training that ended well; nobody writes there."""
    workdir = tmp_path_factory.mktemp('finished')
    succeed(*tiny_digits(), f'--workdir={workdir}', cwd=workdir)
    return workdir


@pytest.fixture
def pretrained(finished, tmp_path) -> None:
    """A copy of it in `run`."""
    shutil.copytree(finished, tmp_path / 'run')


def _diverging(mode, tmp_path, **overrides):
    argv = [*tiny_digits(**overrides), f'--mode={mode}', f'--workdir={tmp_path}/run']
    return argv, run_launch(*argv, cwd=tmp_path)


@pytest.mark.parametrize('every, rate', [(0, 1e25), (1, 3e38)], ids=['without a checkpoint', 'from a checkpoint'])
def test_pretraining(every, rate, tmp_path):
    """The state before the step is made once more, from the start or from the last checkpoint."""
    argv, outcome = _diverging(
        'pretrain',
        tmp_path,
        lr_schedule__base_learning_rate=rate,
        checkpointing__save_every_steps=every,
        lr_schedule__warmup_epochs=0.6,
    )
    error = outcome.stderr.splitlines()[-1]
    assert outcome.code == 1 and 'Traceback' not in outcome.stderr, outcome.stderr
    step, path = re.search(r'Error: step (\d+): .* --mode=replay --checkpoint=(\S+)$', error).groups()
    kept = checkpointing.load(path)
    assert kept.mode == 'diverged_pretrain' and kept.step == int(step) > 0
    assert all(t.isfinite().all() for n, t in kept.tensors.items() if n.startswith('state/'))
    for flags in ([f'--checkpoint={path}'], []):  # Without one: the newest of the workdir.
        told = succeed(*argv, '--mode=replay', *flags, cwd=tmp_path).stdout
        assert f'Step {step} of pretrain' in told and 'not finite in the state before the step: nothing' in told
        assert re.search(r'not finite in the state after the step: \w+/', told)
        assert re.search(r'infinity or NaN: aten\.\S+, \S+byol_func\S+\.py:\d+: ', told), told
        assert re.search(r'encoder/initial_conv +\S+', told)
    assert ('loss nan' in told) == ('loss=nan' in error), told
    other = run_launch(*argv, '--mode=replay', '--config.random_seed=1', cwd=tmp_path)
    assert other.code == 1 and 'its step used other images' in other.stderr.splitlines()[-1]
    refused = run_launch(*argv, '--mode=linear_eval', f'--checkpoint={path}', cwd=tmp_path)
    assert refused.code == 1 and 'written by --mode=diverged_pretrain' in refused.stderr


def test_fine_tuning(pretrained, tmp_path):
    argv, outcome = _diverging(
        'fine_tune', tmp_path, fine_tune__lr_schedule__base_learning_rate=1e25, fine_tune__batch_size=128
    )
    assert outcome.code == 1 and 'config.fine_tune.lr_schedule.base_learning_rate' in outcome.stderr
    told = succeed(*argv, '--mode=replay', cwd=tmp_path).stdout
    assert ' of fine_tune, replayed' in told and 'infinity or NaN: aten.' in told


@pytest.mark.parametrize(
    'mode, overrides',
    [
        ('linear_eval', dict(cache_features=True)),
        ('linear_eval', dict(cache_features=False, label_fraction=0.5)),
        ('fine_tune', dict(label_fraction=0.3)),
    ],
    ids=['cached features', 'frozen encoder', 'a part of the labels'],
)
def test_protocols(mode, overrides, pretrained, tmp_path):
    overrides = dict(overrides, batch_size=64, lr_schedule__base_learning_rate=3e38, compare_untrained=False)
    argv, outcome = _diverging(mode, tmp_path, **{f'{mode}__{name}': value for name, value in overrides.items()})
    error = outcome.stderr.splitlines()[-1]
    assert outcome.code == 1 and '--mode=replay' in error, outcome.stderr
    told = succeed(*argv, '--mode=replay', cwd=tmp_path).stdout
    assert f' of {mode}, replayed' in told and 'not finite in the state before the step: nothing' in told
    assert 'infinity or NaN: aten.' in told


def test_after_a_sweep_the_step_is_that_of_the_chosen_rate(pretrained, tmp_path):
    """The file says what was chosen: the config alone has another rate."""
    argv, outcome = _diverging(
        'fine_tune', tmp_path, fine_tune__lr_schedule__base_learning_rate=1e25, fine_tune__batch_size=128
    )
    (path,) = (tmp_path / 'run/diverged').glob('*')
    kept = checkpointing.load(path)
    told = {}
    for rate in (1e25, 0.0):
        config = kept.config | {'chosen': [rate, 0.0]}
        other = checkpointing.save(
            tmp_path / str(rate), dict(kept.tensors), mode=kept.mode, step=kept.step, config=config
        )
        told[rate] = succeed(*argv, '--mode=replay', f'--checkpoint={other}', cwd=tmp_path).stdout
    assert 'learning_rate 0\n' in told[0.0] and 'learning_rate 0\n' not in told[1e25]
    sweep = checkpointing.save(
        tmp_path / 'sweep', dict(kept.tensors), mode=f'{kept.mode}_sweep_3', step=kept.step, config=kept.config
    )
    refused = run_launch(*argv, '--mode=replay', f'--checkpoint={sweep}', cwd=tmp_path)
    assert refused.code == 1 and 'holds a step of fine_tune_sweep_3, expected one of pretrain' in refused.stderr


def test_nothing_to_replay(tmp_path):
    outcome = run_launch(*tiny_digits(), '--mode=replay', f'--workdir={tmp_path}', cwd=tmp_path)
    assert outcome.code == 1 and 'a run writes one when its numbers are not finite' in outcome.stderr


def test_the_step_of_a_seed(tmp_path):
    argv, outcome = _diverging(
        'pretrain', tmp_path, num_seeds=2, lr_schedule__base_learning_rate=1e25, lr_schedule__warmup_epochs=0.6
    )
    assert outcome.code == 1
    (tmp_path / 'run/seed_0/diverged').rename(tmp_path / 'aside')
    (tmp_path / 'run/seed_1').mkdir()
    assert 'a run writes one when' in run_launch(*argv, '--mode=replay', cwd=tmp_path).stderr
    (tmp_path / 'aside').rename(tmp_path / 'run/seed_0/diverged')
    error = run_launch(*argv, '--mode=replay', cwd=tmp_path).stderr.splitlines()[-1]
    assert error.endswith(f'each seed has its own folder: give --workdir={tmp_path}/run/seed_0')
    told = succeed(*argv[:-1], '--mode=replay', f'--workdir={tmp_path}/run/seed_0', cwd=tmp_path).stdout
    assert 'of pretrain, replayed from' in told
    # Of a later seed, the flags in the error say which it was.
    rates = dict(lr_schedule__base_learning_rate=1e25, lr_schedule__warmup_epochs=0.6)
    error = run_launch(
        *tiny_digits(random_seed=8, **rates), f'--workdir={tmp_path}/seed_1', cwd=tmp_path
    ).stderr.splitlines()[-1]
    assert error.endswith(' --config.random_seed=8')
    flags = error[error.index('--mode=replay') :].split()
    assert 'of pretrain, replayed from' in succeed(*tiny_digits(**rates), *flags, cwd=tmp_path).stdout


def test_the_first_operation_is_found():
    with replay.FirstNotFinite() as first:
        x = torch.tensor([1.0, 0.0])
        (x.exp() + torch.log(x)).sum() * float('inf')
    assert first.found.startswith('aten.log.default')
    with replay.FirstNotFinite() as first:
        torch.ones(3) / 2
    assert first.found is None


def test_norms_are_those_of_the_modules():
    tree = {'a': {'w': torch.tensor([3.0, 0.0]), 'b': torch.tensor([4.0])}, 'c': {'d': {'w': torch.ones(4)}}}
    assert replay.norms_by_path(tree) == {'a': 5.0, 'c/d': 2.0}
