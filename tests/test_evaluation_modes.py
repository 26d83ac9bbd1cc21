"""The modes that evaluate a checkpoint: their files, their numbers, and what they refuse."""

import json
import pathlib

import numpy as np
import pytest
import torch
from cli import config, run_launch, succeed, tiny_digits
from PIL import Image

from byol_func.evaluation import knn, metrics
from byol_func.utils import checkpointing

FAST = tiny_digits(batch_size=256, num_epochs=2, linear_eval__compare_untrained=False)
SIZES = {'train': 1442, 'val': 144, 'test': 355}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory) -> pathlib.Path:
    """A pre-training on the digits."""
    path = tmp_path_factory.mktemp('run')
    succeed(*FAST, f'--workdir={path}', cwd=path)
    return path


def _read(path: pathlib.Path) -> dict:
    return json.loads(path.read_text())


def _error(*argv, cwd) -> str:
    outcome = run_launch(*argv, cwd=cwd)
    assert outcome.code == 1 and 'Traceback' not in outcome.stderr, outcome.stderr
    return outcome.stderr.splitlines()[-1]


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_eval_of_a_split(workdir, split):
    outcome = succeed(*FAST, '--mode=eval', f'--split={split}', f'--workdir={workdir}', cwd=workdir)
    report, summary = _read(workdir / f'eval.{split}.json'), _read(workdir / 'summary.eval.json')
    with np.load(workdir / f'predictions.{split}.npz', allow_pickle=False) as file:
        saved = dict(file)
    size = len(saved['label'])
    assert abs(size - SIZES[split]) <= 5 and saved['index'].tolist() == list(range(size))
    assert saved['class_names'].tolist() == [row['name'] for row in report['per_class']]
    assert saved['probabilities'].dtype == np.float32
    np.testing.assert_allclose(saved['probabilities'].sum(1), 1.0, rtol=1e-5)
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (saved['label'], saved['prediction']), 1)
    assert report['confusion_matrix'] == confusion.tolist()
    assert report['top1'] == pytest.approx((saved['label'] == saved['prediction']).mean())
    assert report['top1'] == summary[f'{split}/online_top1'] and report['split'] == split
    error = metrics.expected_calibration_error(*map(torch.tensor, (saved['probabilities'], saved['label'])))
    assert report['calibration_error'] == pytest.approx(error, abs=1e-3)
    assert [row['examples'] for row in report['per_class']] == confusion.sum(1).tolist()
    assert f'{100 * report["top1"]:.2f} %' in outcome.stdout and 'recall %' in outcome.stdout
    if split == 'test':
        trained = _read(workdir / 'summary.pretrain.json')
        assert all(trained[name] == summary[name] for name in ('test/online_top1', 'test/online_top5'))


def test_embeddings_in_files(workdir, tmp_path):
    (checkpoint,) = workdir.glob('checkpoints/pretrain_*')
    argv = ['--mode=embed', f'--checkpoint={checkpoint}', f'--workdir={tmp_path}']
    succeed(*FAST, *argv, cwd=tmp_path)
    with np.load(tmp_path / 'embeddings.train.npz', allow_pickle=False) as file:
        train = dict(file)
    with np.load(tmp_path / 'embeddings.test.npz', allow_pickle=False) as file:
        test = dict(file)
    assert len(train['features']) == len(train['labels']) == SIZES['train']
    assert train['features'].dtype == np.float32 and train['class_names'].tolist() == list('0123456789')
    # They are what the nearest neighbours are found among.
    succeed(*FAST, '--mode=knn', f'--checkpoint={checkpoint}', f'--workdir={tmp_path}/knn', cwd=tmp_path)
    summary = _read(tmp_path / 'knn/summary.knn.json')
    chosen = {name: summary['chosen'][name] for name in ('k', 'temperature')}
    tensors = [torch.tensor(d[name]) for d in (test, train) for name in ('features', 'labels')]
    assert summary['test/knn_top1'] == knn.accuracy(*tensors, num_classes=10, **chosen) > 0.2


def test_embeddings_without_labels(tmp_path):
    for i in range(6):
        path = tmp_path / f'images/train/{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(path)
    small = dict(batch_size=2, num_epochs=1, image_size=8, dataset__source_size=0, compile=False,
                 lr_schedule__warmup_epochs=0.0, network__encoder_class='TinyResNet')
    argv = [*config('folder.py', dataset__root='images', **small), '--workdir=run']
    succeed(*argv, cwd=tmp_path)
    succeed(*argv, '--mode=embed', cwd=tmp_path)
    with np.load(tmp_path / 'run/embeddings.train.npz', allow_pickle=False) as file:
        assert len(file['features']) == 6 and not len(file['labels']) and not len(file['class_names'])
    assert not (tmp_path / 'run/embeddings.test.npz').exists()
    for mode in ('knn', 'logistic', 'eval'):
        assert 'no labels' in _error(*argv, f'--mode={mode}', cwd=tmp_path)
    assert '--split=test' in _error(*argv, '--mode=embed', '--split=test', cwd=tmp_path)


def test_logistic_regression(workdir):
    outcome = succeed(*FAST, '--mode=logistic', f'--workdir={workdir}', cwd=workdir)
    summary = _read(workdir / 'summary.logistic.json')
    assert summary['test/logistic_top1'] > 0.2 and summary['chosen']['penalty'] > 0
    assert 'logistic regression on the BYOL encoder' in outcome.stdout


def test_every_seed_chooses_for_itself(tmp_path):
    argv = tiny_digits(num_seeds=2, batch_size=512)
    succeed(*argv, f'--workdir={tmp_path}', cwd=tmp_path)
    outcome = succeed(*argv, '--mode=knn', f'--workdir={tmp_path}', cwd=tmp_path)
    summary = _read(tmp_path / 'summary.json')
    assert [chosen['k'] > 0 for chosen in summary['chosen']] == [True, True]
    assert len(summary['over_seeds']['test/knn_top1']['values']) == 2
    assert 'nearest neighbours on the BYOL encoder' in outcome.stdout
    # The README's command, and a single seed's folder.
    succeed(*argv, '--mode=embed', f'--workdir={tmp_path}', cwd=tmp_path)
    succeed(*argv, '--mode=embed', '--split=val', f'--workdir={tmp_path}/seed_1', cwd=tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob('embeddings.*'))
    assert files == [f'seed_{i}/embeddings.{split}.npz' for i, splits in enumerate(
        [('test', 'train'), ('test', 'train', 'val')]) for split in splits]
    first, second = (np.load(tmp_path / f'seed_{i}/embeddings.test.npz')['features'] for i in (0, 1))
    assert first.shape == second.shape and not np.array_equal(first, second)


def test_refusals(workdir, tmp_path):
    (checkpoint,) = workdir.glob('checkpoints/pretrain_*')
    at = [f'--checkpoint={checkpoint}', f'--workdir={tmp_path}/run']
    assert "--split='all': expected one of train, val, test" in _error(
        *FAST, '--mode=eval', '--split=all', *at, cwd=tmp_path)
    wide = tiny_digits(network__encoder_config__width_multiplier=2.0)
    for mode in ('eval', 'embed', 'knn', 'logistic'):
        error = _error(*wide, f'--mode={mode}', *at, cwd=tmp_path)
        assert str(checkpoint) in error and 'does not fit the config' in error
    loaded = checkpointing.load(checkpoint)
    tensors = {n: t[..., :7] if '/classifier/' in n else t for n, t in loaded.tensors.items()}
    other = checkpointing.save(
        tmp_path / 'seven', tensors, mode='pretrain', step=0, config=loaded.config)
    error = _error(*FAST, '--mode=eval', f'--checkpoint={other}', f'--workdir={tmp_path}/run', cwd=tmp_path)
    assert 'its classifier has 7 classes, the data set has 10' in error


def test_class_too_small_to_be_divided(tmp_path):
    for split in ('train', 'test'):
        for i, name in enumerate('aab'):
            path = tmp_path / f'images/{split}/{name}/{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(path)
    small = dict(batch_size=2, num_epochs=1, image_size=8, dataset__source_size=0, compile=False,
                 lr_schedule__warmup_epochs=0.0, network__encoder_class='TinyResNet', final_linear_eval=False)
    argv = [*config('folder.py', dataset__root='images', **small), '--workdir=run']
    succeed(*argv, cwd=tmp_path)
    for mode in ('knn', 'logistic'):
        error = _error(*argv, f'--mode={mode}', cwd=tmp_path)
        assert "the class 'b' has 1 training images; expected at least two" in error
