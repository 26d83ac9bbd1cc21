"""Every mode on tiny data, from the command line to the files of the workdir."""

import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file

from cli import ROOT, TINY_NETWORK, config, succeed, tiny_digits
from runs import step_records

pytestmark = pytest.mark.slow

CLASSES = ('blue', 'green', 'red')
TRAIN, TEST = 16, 4  # images per class


def _read(path: pathlib.Path):
    return json.loads(path.read_text())


def _checkpoint(workdir: pathlib.Path, mode: str) -> pathlib.Path:
    return max(workdir.glob(f'checkpoints/{mode}_*.safetensors'))


def _check_steps(workdir: pathlib.Path, mode: str, steps: int, every: int = 1) -> None:
    """The metrics of a mode: from the first step to the last, none twice, all numbers finite."""
    records = step_records(workdir, mode)
    logged = [record['step'] for record in records]
    assert logged == sorted({0, *range(every - 1, steps, every), steps - 1})
    for record in records:
        assert all(math.isfinite(value) for name, value in record.items() if name != 'mode')
    epochs = [record['epoch'] for record in records]
    assert epochs == sorted(epochs)


def _metrics_of(summary: dict) -> dict[str, float]:
    return {name: value for name, value in summary.items() if '/' in name}


def _check_summary(workdir: pathlib.Path, mode: str, **expected) -> dict:
    summary = _read(workdir / 'summary.json')
    assert summary == _read(workdir / f'summary.{mode}.json')
    assert summary['mode'] == mode
    for name, value in expected.items():
        assert summary[name] == value, name
    assert summary['epochs'] > 0
    assert 'cpu' in summary['device']
    assert summary['torch_version'] == torch.__version__
    if mode != 'eval':
        assert summary['images_per_second'] > 0 and summary['seconds'] > 0
    for name, value in _metrics_of(summary).items():
        assert math.isfinite(value)
        assert 0 <= value <= 1 or not name.startswith('test/') or 'top' not in name
    return summary


def _check_config(workdir: pathlib.Path, mode: str, **expected) -> None:
    saved = _read(workdir / 'config.json')
    assert saved == _read(workdir / f'config.{mode}.json')
    for field, value in expected.items():
        node = saved
        for key in field.split('__'):
            node = node[key]
        assert node == value, field


# Digits: the quick start in short.

# A recipe of its own, so that tuning the config does not touch the test.
DIGITS = config(
    'digits.py',
    num_seeds=1,
    random_seed=2,
    num_epochs=10,
    batch_size=64,
    base_target_ema=0.97,
    optimizer='adam',
    lr_schedule__name='cosine',
    lr_schedule__base_learning_rate=8e-3,
    lr_schedule__warmup_epochs=2.0,
    network__encoder_class='ResNet10',
    network__encoder_config__width_multiplier=0.125,
    network__projector_hidden_size=256,
    network__projector_output_size=64,
    network__predictor_hidden_size=256,
    linear_eval__num_epochs=40,
    linear_eval__batch_size=256,
    linear_eval__compare_pixels=False,
    pictures=False,
    log_every_steps=10,
)
TRAIN_DIGITS = 1442


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """The outcome and the workdir of the quick start, shortened."""
    workdir = tmp_path_factory.mktemp('digits')
    return succeed(*DIGITS, f'--workdir={workdir}', cwd=workdir), workdir


def test_pretraining_learns(digits):
    metrics = _read(digits[1] / 'summary.json')
    assert metrics['test/untrained_linear_top1'] > 0.3  # A fair baseline, well above chance.
    assert metrics['test/linear_top1'] > metrics['test/untrained_linear_top1'] + 0.05


def test_digits_files(digits):
    outcome, workdir = digits
    summary = _check_summary(
        workdir,
        'pretrain',
        dataset='digits',
        encoder='ResNet10',
        seed=2,
        num_classes=10,
        batch_size=64,
        steps=225,
    )
    assert summary['epochs'] == pytest.approx(225 * 64 / TRAIN_DIGITS)
    assert {'test/online_top1', 'test/online_top5', 'test/linear_top5', 'train/loss'} <= set(summary)
    _check_config(workdir, 'pretrain', num_epochs=10, dataset__name='digits', linear_eval__batch_size=256)
    _check_steps(workdir, 'pretrain', 225, every=10)
    _check_steps(workdir, 'linear_eval_untrained', 225, every=10)
    _check_steps(workdir, 'linear_eval', 225, every=10)
    rates = [record['learning_rate'] for record in step_records(workdir, 'pretrain')]
    assert rates[0] == 0.0 and max(rates) == pytest.approx(2e-3, rel=0.05) and rates[-1] < 1e-5
    taus = [record['tau'] for record in step_records(workdir, 'pretrain')]
    assert taus == sorted(taus) and taus[0] == pytest.approx(0.97) and taus[-1] > 0.9999
    for row in ('the untrained encoder', 'the BYOL encoder', 'online classifier'):
        assert row in outcome.stdout
    assert f'{100 * summary["test/linear_top1"]:.2f}' in outcome.stdout
    assert 'pretrain: 64 of' in outcome.stderr  # The first line, which knows no rate yet.


def test_checkpoint_is_plain_safetensors(digits):
    with safetensors.safe_open(_checkpoint(digits[1], 'pretrain'), framework='numpy') as file:
        metadata, names = file.metadata(), set(file.keys())
        weights = file.get_tensor('online_params/encoder/initial_conv/w')
    assert weights.shape == (8, 1, 3, 3) and weights.dtype == np.float32
    assert metadata['mode'] == 'pretrain' and metadata['step'] == '224'
    assert json.loads(metadata['config'])['num_epochs'] == 10
    assert {name.split('/')[0] for name in names} == {
        'online_params',
        'target_params',
        'online_state',
        'target_state',
        'opt_state',
    }
    assert 'online_state/encoder/initial_batchnorm/mean_ema/average' in names


def test_eval_after_the_quick_start(digits):
    """The newest checkpoint holds a classifier that was trained on cached features."""
    workdir = digits[1]
    expected = _read(workdir / 'summary.pretrain.json')['test/linear_top1']
    succeed(*DIGITS, '--mode=eval', f'--workdir={workdir}', cwd=workdir)
    assert _check_summary(workdir, 'eval')['test/linear_top1'] == expected


def test_launch_as_a_process(digits, tmp_path):
    """`python launch.py` itself, in the folder of the repository."""
    checkpoint = _checkpoint(digits[1], 'pretrain')
    argv = ['--config=configs/digits.py', *DIGITS[1:], '--mode=eval']
    argv += [f'--checkpoint={checkpoint}', f'--workdir={tmp_path}/run']
    subprocess.run([sys.executable, 'launch.py', *argv], cwd=ROOT, check=True, capture_output=True)
    expected = _read(digits[1] / 'summary.pretrain.json')
    metrics = _metrics_of(_check_summary(tmp_path / 'run', 'eval', checkpoint=str(checkpoint)))
    assert 0 <= metrics.pop('test/calibration_error') <= 1
    assert metrics == {name: expected[name] for name in metrics} and len(metrics) == 3


# Several seeds.


@pytest.fixture(scope='module')
def two_seeds(tmp_path_factory):
    """Outcome, workdir and flags of two seeds of two steps."""
    workdir = tmp_path_factory.mktemp('two_seeds')
    argv = tiny_digits(num_seeds=2, random_seed=3, batch_size=512, linear_eval__compare_untrained=True)
    return succeed(*argv, f'--workdir={workdir}', cwd=workdir), workdir, argv


def _check_spread(workdir: pathlib.Path, mode: str) -> dict:
    merged = _check_summary(workdir, mode, seed=[3, 4], steps=2 if mode == 'pretrain' else 5)
    seeds = [_read(workdir / f'seed_{i}/summary.{mode}.json') for i in range(2)]
    assert [summary['seed'] for summary in seeds] == [3, 4]
    for name, mean in _metrics_of(merged).items():
        values = [summary[name] for summary in seeds]
        spread = merged['over_seeds'][name]
        assert spread['values'] == values
        assert spread['mean'] == mean == pytest.approx(np.mean(values))
        assert spread['std'] == pytest.approx(np.std(values, ddof=1))
    return merged['over_seeds']


def test_seeds(two_seeds):
    outcome, workdir, _ = two_seeds
    spread = _check_spread(workdir, 'pretrain')
    assert len(set(spread['train/loss']['values'])) == 2
    _check_config(workdir, 'pretrain', num_seeds=2, random_seed=3)
    for i in range(2):
        _check_config(workdir / f'seed_{i}', 'pretrain', num_seeds=1, random_seed=3 + i)
        _check_steps(workdir / f'seed_{i}', 'pretrain', 2)
    assert 'std' in outcome.stdout and 'each seed' in outcome.stdout
    assert not (workdir / 'checkpoints').exists()
    names = {'test/online_knn_top1', *(f'test/online_{x}' for x in ('top1', 'top5', 'loss'))}
    assert {name for name in spread if name.startswith('test/')} == names  # No linear evaluation.


def test_seeds_in_linear_evaluation(two_seeds):
    _, workdir, argv = two_seeds
    succeed(*argv, '--mode=linear_eval', f'--workdir={workdir}', cwd=workdir)
    spread = _check_spread(workdir, 'linear_eval')
    assert {'test/linear_top1', 'test/untrained_linear_top1'} <= set(spread)
    assert _read(workdir / 'summary.pretrain.json')['mode'] == 'pretrain'  # Still there.


# A folder of images.


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> pathlib.Path:
    """A folder of noise in three colours, of several sizes."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, count in (('train', TRAIN), ('test', TEST)):
        for channel, name in enumerate(reversed(CLASSES)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (20 + i % 3, 24, 3), np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(root / split / name / f'{i}.png')
    return root


@pytest.fixture(scope='module')
def folder_argv(images) -> list[str]:
    """The flags of a run of one epoch on the folder."""
    evaluation = {
        f'{mode}__{field}': value
        for mode in ('linear_eval', 'fine_tune')
        for field, value in dict(num_epochs=2, batch_size=16).items()
    }
    return config(
        'folder.py',
        **TINY_NETWORK,
        **evaluation,
        num_epochs=1,
        batch_size=16,
        image_size=16,
        lr_schedule__warmup_epochs=0.0,
        compile=False,
        log_every_steps=1,
        dataset__source_size=20,
        dataset__root=images,
        final_linear_eval=False,
        evaluation__batch_size=5,
        linear_eval__compare_untrained=False,
        linear_eval__cache_features=False,
        pictures=False,
    )


@pytest.fixture(scope='module')
def folder(folder_argv, tmp_path_factory) -> pathlib.Path:
    """The workdir of a pre-training, a linear evaluation and a fine-tuning."""
    workdir = tmp_path_factory.mktemp('folder')
    for mode in ('pretrain', 'linear_eval', 'fine_tune'):
        succeed(*folder_argv, f'--mode={mode}', f'--workdir={workdir}', cwd=workdir)
    return workdir


_NAMES = {'pretrain': 'online', 'linear_eval': 'linear', 'fine_tune': 'fine_tuned'}


@pytest.mark.parametrize('mode, steps', [('pretrain', 3), ('linear_eval', 6), ('fine_tune', 6)])
def test_modes_share_a_workdir(folder, mode, steps):
    _check_steps(folder, mode, steps)
    summary = _read(folder / f'summary.{mode}.json')
    assert (summary['mode'], summary['steps'], summary['batch_size']) == (mode, steps, 16)
    assert (summary['dataset'], summary['num_classes']) == ('folder', len(CLASSES))
    found = {name for name in summary if name.startswith('test/')}
    knn = {'test/online_knn_top1'} if mode == 'pretrain' else set()
    assert found == knn | {f'test/{_NAMES[mode]}_{x}' for x in ('top1', 'top5', 'loss')}
    assert summary[f'test/{_NAMES[mode]}_top5'] == 1.0  # Of three classes.
    assert _checkpoint(folder, mode).name == f'{mode}_{steps - 1:08d}.safetensors'
    if mode != 'pretrain':
        assert summary['checkpoint'] == str(_checkpoint(folder, 'pretrain'))


def test_plain_names_belong_to_the_latest_mode(folder):
    _check_summary(folder, 'fine_tune', encoder='TinyResNet', seed=0)
    _check_config(folder, 'fine_tune', image_size=16, fine_tune__num_epochs=2)


def test_only_fine_tuning_changes_the_encoder(folder):
    tensors = {mode: load_file(_checkpoint(folder, mode)) for mode in _NAMES}
    encoder = {
        name.removeprefix('online_params/'): value
        for name, value in tensors['pretrain'].items()
        if name.startswith('online_params/encoder/')
    }
    assert len(encoder) > 20
    for name, value in encoder.items():
        assert torch.equal(value, tensors['linear_eval'][f'backbone_params/{name}'])
        assert not torch.equal(value, tensors['fine_tune'][f'backbone_params/{name}'])


@pytest.mark.parametrize('mode', _NAMES)
def test_eval_repeats_the_accuracies(folder, folder_argv, mode, tmp_path):
    argv = ['--mode=eval', f'--checkpoint={_checkpoint(folder, mode)}', f'--workdir={tmp_path}/run']
    succeed(*folder_argv, *argv, cwd=tmp_path)
    metrics = _metrics_of(_check_summary(tmp_path / 'run', 'eval', dataset='folder'))
    expected = _read(folder / f'summary.{mode}.json')
    assert metrics.pop('test/calibration_error') >= 0
    assert metrics == {n: v for n, v in expected.items() if n.startswith('test/') and n != 'test/online_knn_top1'}


def test_eval_takes_the_newest_of_a_workdir(folder, folder_argv):
    succeed(*folder_argv, '--mode=eval', f'--workdir={folder}', cwd=folder)
    assert 'test/fine_tuned_top1' in _read(folder / 'summary.eval.json')
    _read(folder / 'summary.fine_tune.json')


def test_linear_evaluation_on_cached_features_of_a_checkpoint(folder, folder_argv, tmp_path):
    argv = ['--mode=linear_eval', f'--checkpoint={_checkpoint(folder, "pretrain")}']
    argv += ['--config.linear_eval.cache_features=True', '--config.linear_eval.num_epochs=30']
    succeed(*folder_argv, *argv, cwd=tmp_path)  # Into a new folder of its own.
    (workdir,) = (tmp_path / 'runs').iterdir()
    assert workdir.name.startswith('folder-')
    _check_steps(workdir, 'linear_eval', 90)
    summary = _check_summary(workdir, 'linear_eval', steps=90)
    assert summary['test/linear_top1'] > 1.2 / len(CLASSES)  # It has learnt something.
    # The checkpoint is complete: evaluated on images, its encoder gives what the cached features gave.
    checkpoint = _checkpoint(workdir, 'linear_eval')
    argv = ['--mode=eval', f'--checkpoint={checkpoint}', f'--workdir={tmp_path / "eval"}']
    succeed(*folder_argv, *argv, cwd=tmp_path)
    evaluated = _metrics_of(_check_summary(tmp_path / 'eval', 'eval', checkpoint=str(checkpoint)))
    assert evaluated['test/linear_top1'] == summary['test/linear_top1']
    assert evaluated['test/linear_loss'] == pytest.approx(summary['test/linear_loss'], rel=1e-4)
