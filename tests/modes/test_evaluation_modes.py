"""The modes that evaluate a checkpoint: their files, their numbers, and what they refuse."""

import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
import optree
import pandas as pd
import pytest
import torch
from PIL import Image

from byol_func.errors import UserError
from byol_func.evaluation import knn, metrics
from byol_func.modes import embed, inputs, on_top
from byol_func.utils import checkpointing, dataset
from byol_func.workdir.run import Run
from cli import TINY_NETWORK, config, run_launch, succeed, tiny_digits
from configs import digits

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


HELD_OUT = [*FAST, '--config.dataset.eval_split=val', '--config.dataset.val_fraction=0.1']


@pytest.fixture(scope='module')
def held_out(tmp_path_factory) -> pathlib.Path:
    """A pre-training that has never seen its validation set."""
    path = tmp_path_factory.mktemp('held_out')
    succeed(*HELD_OUT, f'--workdir={path}', cwd=path)
    return path


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_eval_of_a_split(request, split):
    workdir = request.getfixturevalue('held_out' if split == 'val' else 'workdir')
    outcome = succeed(*FAST, '--mode=eval', f'--split={split}', f'--workdir={workdir}', cwd=workdir)
    report, summary = _read(workdir / f'eval.{split}.json'), _read(workdir / 'summary.eval.json')
    with np.load(workdir / f'predictions.{split}.npz', allow_pickle=False) as file:
        saved = dict(file)
    size = len(saved['label'])
    assert abs(size - SIZES[split]) <= 5 and 'path' not in saved
    # Of a part of the training set the places in it.
    whole, _ = dataset.load_train_and_test(**digits.get_config().dataset)
    if split == 'val':
        assert saved['label'].tolist() == whole.labels[torch.from_numpy(saved['index'])].tolist()
        assert (np.diff(saved['index']) > 0).all() and saved['index'].max() > 2 * size
    else:
        assert saved['index'].tolist() == list(range(size))
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
    trained = _read(workdir / 'summary.pretrain.json')
    for name in ('steps', 'epochs', 'batch_size'):
        assert trained[name] == summary[name], name
    if split != 'train':
        names = (f'{split}/online_top1', f'{split}/online_top5')
        assert all(trained[name] == summary[name] for name in names)
    assert ('seen_in_training' in report) == ('seen_in_training' in summary) == (split == 'val')
    assert report.get('seen_in_training', False) is False


def test_what_was_trained_on_is_no_validation_set(workdir, held_out, tmp_path):
    (checkpoint,), (other,) = (path.glob('checkpoints/pretrain_*') for path in (workdir, held_out))
    at, val = [f'--checkpoint={checkpoint}', f'--workdir={tmp_path}/run'], '--config.dataset.eval_split=val'
    for flags in (['--split=val'], [val]):
        error = _error(*FAST, '--mode=eval', *flags, *at, cwd=tmp_path)
        assert f'Error: --checkpoint={checkpoint}: trained on images of this validation set' in error
        assert "eval_split='test'" in error and '--config.dataset.eval_split=val' in error
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints' / checkpoint.name).write_bytes(checkpoint.read_bytes())
    error = _error(*FAST, val, '--mode=eval', '--follow', f'--workdir={tmp_path}', cwd=tmp_path)
    assert 'trained on images of this validation set' in error
    assert 'images of this validation set' in succeed(*FAST, '--mode=embed', '--split=val', *at, cwd=tmp_path).stderr
    # Parts are nested: of a smaller one nothing was trained on, of a larger one something.
    at = [f'--checkpoint={other}', f'--workdir={tmp_path}/run', '--mode=eval', '--split=val']
    succeed(*FAST, '--config.dataset.val_fraction=0.05', *at, cwd=tmp_path)
    error = _error(*FAST, '--config.dataset.val_fraction=0.3', *at, cwd=tmp_path)
    assert 'val_fraction=0.1)' in error and '--config.dataset.val_fraction=0.3' in error


@pytest.mark.parametrize(
    'record',
    [
        dict(imported=True),
        dict(dataset=None),
        dict(dataset=dict(name='folder', root='x', eval_split='test')),
    ],
    ids=['imported', 'no record', 'other data'],
)
def test_a_checkpoint_that_does_not_tell_is_evaluated(workdir, record, tmp_path):
    loaded = checkpointing.load(next(workdir.glob('checkpoints/pretrain_*')))
    path = checkpointing.save(
        tmp_path / 'other', dict(loaded.tensors), mode='pretrain', step=loaded.step, config=loaded.config | record
    )
    outcome = succeed(*FAST, '--mode=eval', '--split=val', f'--checkpoint={path}', '--workdir=run', cwd=tmp_path)
    assert outcome.stderr.count('does not say whether it was trained on this validation set') == 1
    report, summary = _read(tmp_path / 'run/eval.val.json'), _read(tmp_path / 'run/summary.json')
    assert report['seen_in_training'] is None and summary['seen_in_training'] is None
    assert summary['epochs'] is None and summary['steps'] == loaded.step + 1


def test_a_split_of_the_training_set_as_the_run_saw_it(held_out, tmp_path):
    (checkpoint,) = held_out.glob('checkpoints/pretrain_*')
    at = [f'--checkpoint={checkpoint}', f'--workdir={tmp_path}', '--mode=embed', '--split=train']
    succeed(*HELD_OUT, *at, cwd=tmp_path)
    with np.load(tmp_path / 'embeddings.train.npz', allow_pickle=False) as file:
        assert len(file['features']) == SIZES['train'] - 143


def test_only_encoder_and_classifier_need_to_fit(workdir, tmp_path):
    """Another optimiser, other heads and a batch larger than the data: nothing of them is used."""
    (checkpoint,) = workdir.glob('checkpoints/pretrain_*')
    other = tiny_digits(
        batch_size=4096,
        optimizer='adam',
        lr_schedule__warmup_epochs=1e6,
        network__projector_hidden_size=32,
        linear_eval__cache_features=True,
        linear_eval__compare_untrained=True,
    )
    trained = _read(workdir / 'summary.pretrain.json')
    for mode in ('eval', 'knn', 'logistic', 'linear_eval'):
        succeed(*other, f'--mode={mode}', f'--checkpoint={checkpoint}', f'--workdir={tmp_path}', cwd=tmp_path)
        summary = _read(tmp_path / f'summary.{mode}.json')
        if mode != 'linear_eval':
            assert all(summary[name] == trained[name] for name in ('steps', 'epochs', 'batch_size'))
        if mode == 'eval':
            assert summary['test/online_loss'] == trained['test/online_loss']


def test_another_depth_is_refused(tmp_path):
    """The blocks of ResNet-10 have namesakes in ResNet-18, and would fit."""
    flags = dict(batch_size=512, network__encoder_config__width_multiplier=0.125)
    deep, flat = (tiny_digits(**{**flags, 'network__encoder_class': name}) for name in ('ResNet18', 'ResNet10'))
    succeed(*deep, f'--workdir={tmp_path}', cwd=tmp_path)
    for mode in ('eval', 'knn'):
        error = _error(*flat, f'--mode={mode}', f'--workdir={tmp_path}', cwd=tmp_path)
        assert "config.network.encoder_class='ResNet10'" in error and "was trained with 'ResNet18'" in error


def test_the_untrained_encoder_is_that_of_the_first_step(tmp_path):
    """It is drawn without the heads that come after it."""
    config = digits.get_config()
    for field, value in TINY_NETWORK.items():
        config.update_from_flattened_dict({field.replace('__', '.'): value})
    config.precision = 'float32'
    run = Run(config, str(tmp_path), torch.device('cpu'), None, 1.0)
    train = dataset.load_train_and_test(**config.dataset)[0]
    params, _ = on_top.untrained_encoder(run, train)
    expected = inputs.encoder_part(inputs.make_byol(run.config, train).init().online_params)
    assert all(map(torch.equal, optree.tree_leaves(params), optree.tree_leaves(expected)))


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
    succeed(*FAST, *argv, '--split=test', '--format=parquet', cwd=tmp_path)
    frame = pd.read_parquet(tmp_path / 'embeddings.test.parquet')
    assert list(frame) == ['index', 'label', 'class', 'features']
    assert np.array_equal(np.stack(frame['features']), test['features'])
    assert frame['label'].tolist() == test['labels'].tolist() == frame['class'].astype(int).tolist()
    # They are what the nearest neighbours are found among.
    succeed(*FAST, '--mode=knn', f'--checkpoint={checkpoint}', f'--workdir={tmp_path}/knn', cwd=tmp_path)
    summary = _read(tmp_path / 'knn/summary.knn.json')
    chosen = {name: summary['chosen'][name] for name in ('k', 'temperature')}
    tensors = [torch.tensor(d[name]) for d in (test, train) for name in ('features', 'labels')]
    assert summary['test/knn_top1'] == knn.accuracy(*tensors, num_classes=10, **chosen) > 0.2


def test_formats_of_embeddings(tmp_path, monkeypatch):
    run = Run(digits.get_config(), str(tmp_path), torch.device('cpu'), None, 1.0, format='csv')
    with pytest.raises(UserError, match="--format='csv': expected one of npz, parquet"):
        embed.embed(run)
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(UserError, match="--format=parquet: .*; pip install pyarrow, or 'byol_func"):
        embed.embed(run._replace(format='parquet'))


def _write_grays(folder: pathlib.Path, classes: Sequence[str] = ('',) * 6) -> None:
    """Image i, of one gray, below the folder of its class."""
    for i, name in enumerate(classes):
        path = folder / name / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(path)


_SMALL = dict(
    dataset__root='images',
    batch_size=2,
    num_epochs=1,
    image_size=8,
    dataset__source_size=0,
    compile=False,
    lr_schedule__warmup_epochs=0.0,
    network__encoder_class='TinyResNet',
)


def test_embeddings_without_labels(tmp_path):
    _write_grays(tmp_path / 'images/train')
    argv = [*config('folder.py', **_SMALL), '--workdir=run']
    succeed(*argv, cwd=tmp_path)
    outcome = succeed(*argv, '--mode=embed', cwd=tmp_path)
    with np.load(tmp_path / 'run/embeddings.train.npz', allow_pickle=False) as file:
        assert len(file['features']) == 6 and not len(file['labels']) and not len(file['class_names'])
        assert file['index'].tolist() == list(range(6))
        paths = file['path'].tolist()
    assert paths == [f'train/{i}.png' for i in range(6)]
    first, *others = (tmp_path / 'run/odd_images.train.csv').read_text().splitlines()
    assert first == 'image,pair,cosine' and len(others) == 3 + 6  # Pairs and outliers.
    assert (tmp_path / 'run/odd_images.train.png').exists() and 'run/odd_images.train.png: nearest' in outcome.stdout
    succeed(*argv, '--mode=embed', '--format=parquet', cwd=tmp_path)
    frame = pd.read_parquet(tmp_path / 'run/embeddings.train.parquet')
    assert list(frame) == ['index', 'path', 'features'] and frame['path'].tolist() == paths
    assert not (tmp_path / 'run/embeddings.test.npz').exists()
    for mode in ('knn', 'logistic', 'eval'):
        assert 'no labels' in _error(*argv, f'--mode={mode}', cwd=tmp_path)
    for split in ('train', 'test'):
        _write_grays(tmp_path / 'labelled' / split, 'abab')
    for flags in ([], ['--follow']):
        error = _error(*argv, '--mode=eval', '--config.dataset.root=labelled', *flags, cwd=tmp_path)
        assert 'holds no classifier (trained without labels' in error and '--mode=linear_eval, knn' in error
    assert '--split=test' in _error(*argv, '--mode=embed', '--split=test', cwd=tmp_path)


def test_logistic_regression(workdir):
    outcome = succeed(*FAST, '--mode=logistic', f'--workdir={workdir}', cwd=workdir)
    summary = _read(workdir / 'summary.logistic.json')
    assert summary['test/logistic_top1'] > 0.2 and summary['chosen']['penalty'] > 0
    assert 'logistic regression on the BYOL encoder' in outcome.stdout
    saved = f'--checkpoint={next((workdir / "checkpoints").glob("logistic_*.safetensors"))}'
    succeed(*FAST, '--mode=eval', saved, f'--workdir={workdir}', cwd=workdir)
    assert _read(workdir / 'summary.eval.json')['test/logistic_top1'] == summary['test/logistic_top1']


def test_an_encoder_that_was_fine_tuned_is_called_so(workdir, tmp_path):
    argv = [f'--workdir={tmp_path}/tuned', '--config.fine_tune.num_epochs=1']
    succeed(*FAST, *argv, '--mode=fine_tune', f'--checkpoint={workdir}', cwd=tmp_path)
    outcome = succeed(*FAST, *argv, '--mode=knn', cwd=tmp_path)
    assert 'nearest neighbours on the fine-tuned encoder' in outcome.stdout and 'on the BYOL' not in outcome.stdout
    summary = _read(tmp_path / 'tuned/summary.knn.json')
    assert 'test/fine_tuned_knn_top1' in summary and 'test/knn_top1' not in summary


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
    assert files == [
        f'seed_{i}/embeddings.{split}.npz'
        for i, splits in enumerate([('test', 'train'), ('test', 'train', 'val')])
        for split in splits
    ]
    first, second = (np.load(tmp_path / f'seed_{i}/embeddings.test.npz')['features'] for i in (0, 1))
    assert first.shape == second.shape and not np.array_equal(first, second)


def test_refusals(workdir, tmp_path):
    (checkpoint,) = workdir.glob('checkpoints/pretrain_*')
    at = [f'--checkpoint={checkpoint}', f'--workdir={tmp_path}/run']
    assert "--split='all': expected one of train, val, test" in _error(
        *FAST, '--mode=eval', '--split=all', *at, cwd=tmp_path
    )
    wide = tiny_digits(network__encoder_config__width_multiplier=2.0)
    for mode in ('eval', 'embed', 'knn', 'logistic'):
        error = _error(*wide, f'--mode={mode}', *at, cwd=tmp_path)
        assert str(checkpoint) in error and 'config.network.encoder_config.width_multiplier=2.0: ' in error
    loaded = checkpointing.load(checkpoint)
    tensors = {n: t[..., :7] if '/classifier/' in n else t for n, t in loaded.tensors.items()}
    other = checkpointing.save(tmp_path / 'seven', tensors, mode='pretrain', step=0, config=loaded.config)
    error = _error(*FAST, '--mode=eval', f'--checkpoint={other}', f'--workdir={tmp_path}/run', cwd=tmp_path)
    assert 'its classifier has 7 classes, the data set has 10' in error
    assert loaded.class_names == tuple('0123456789')
    for names, refused in ((('0', '1', 'two', *'3456789'), True), ((), False)):  # None: a file of before.
        other = checkpointing.save(
            tmp_path / 'named', dict(loaded.tensors), mode='pretrain', step=0, config=loaded.config, class_names=names
        )
        argv = [*FAST, '--mode=eval', f'--checkpoint={other}', f'--workdir={tmp_path}/run']
        if refused:
            error = _error(*argv, cwd=tmp_path)
            assert "class 2 is 'two' in its classifier and '2' in the data set; expected the data" in error
        else:
            succeed(*argv, cwd=tmp_path)


def test_class_too_small_to_be_divided(tmp_path):
    for split in ('train', 'test'):
        _write_grays(tmp_path / 'images' / split, 'aab')
    argv = [*config('folder.py', **_SMALL, final_linear_eval=False), '--workdir=run']
    succeed(*argv, cwd=tmp_path)
    for mode in ('knn', 'logistic'):
        error = _error(*argv, f'--mode={mode}', cwd=tmp_path)
        assert "the class 'b' has 1 training image; expected at least two" in error
