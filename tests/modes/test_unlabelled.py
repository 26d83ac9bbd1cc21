"""Folders without labels: pre-training runs on them, and whatever needs labels says so in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from byol_func.errors import UserError
from byol_func.utils import dataset
from cli import TINY_NETWORK, config, run_launch, succeed
from runs import records


def noise(path, seed, size=(12, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    for i in range(8):
        noise(tmp_path / 'images' / 'train' / f'{i}.png', i)
    return tmp_path / 'images'


def flags(**overrides):
    small = dict(
        **TINY_NETWORK,
        dataset__root='images',
        dataset__source_size=0,
        image_size=8,
        batch_size=4,
        num_epochs=2,
        compile=False,
        log_every_steps=1,
        lr_schedule__warmup_epochs=0.0,
    )
    return config('folder.py', **small | overrides)


SOURCE = dict(
    name='folder', source_size=0, grayscale=False, max_gib=1.0, max_bad_fraction=0.0, num_workers=0, cache_dir=''
)


def test_a_set_without_labels(root):
    train, test = dataset.load_train_and_test(
        root=str(root), fraction=0.5, eval_split='test', val_fraction=0.1, **SOURCE
    )
    assert test is None
    assert (train.num_examples, train.num_classes, train.class_names) == (4, 0, ())
    assert set(train.labels.tolist()) == {0}


def test_class_folders_come_before_loose_files(root):
    for split in ('train', 'test'):
        for name in 'ab':
            noise(root / split / name / '0.png', 0)
    train = dataset.load('train', root=str(root), **SOURCE)
    assert (train.num_examples, train.class_names) == (2, ('a', 'b'))


@pytest.mark.parametrize('grayscale', [False, True])
def test_pretraining_prints_no_accuracy_and_the_encoder_can_be_evaluated_elsewhere(root, grayscale):
    cwd = root.parent
    outcome = succeed(*flags(dataset__grayscale=grayscale), '--workdir=run', cwd=cwd)
    assert 'Training set: 8 images without labels' in outcome.stderr
    assert 'top-1' not in outcome.stdout and 'Pre-trained without labels' in outcome.stdout
    lines = records(cwd / 'run')
    steps = [line for line in lines if 'repr_loss' in line]
    assert (
        len(steps) == 4 and 'health/effective_rank' in lines[-1] and len(lines) == 5
    )  # The last line is of the health.
    summary = json.loads((cwd / 'run/summary.json').read_text())
    assert not [name for name in {*summary, *lines[0]} if 'top1' in name or 'classif' in name]
    assert summary['num_classes'] == 0

    for split in ('train', 'test'):
        for i in range(4):
            noise(cwd / 'labelled' / split / 'ab'[i % 2] / f'{i}.png', i)
    evaluation = dict(
        dataset__root='labelled', dataset__grayscale=grayscale, linear_eval__num_epochs=1, linear_eval__batch_size=4
    )
    checkpoint = next((cwd / 'run/checkpoints').glob('pretrain_00000003*'))
    argv = ['--mode=linear_eval', f'--checkpoint={checkpoint}', '--workdir=evaluated']
    outcome = succeed(*flags(**evaluation), *argv, cwd=cwd)
    assert 'linear classifier on the BYOL encoder' in outcome.stdout


def test_evaluation_says_what_it_needs(root):
    succeed(*flags(num_epochs=1), '--workdir=run', cwd=root.parent)
    for mode in ('linear_eval', 'fine_tune', 'eval'):
        outcome = run_launch(*flags(num_epochs=1), '--workdir=run', f'--mode={mode}', cwd=root.parent)
        assert outcome.code == 1
        error = outcome.stderr.splitlines()[-1]
        assert error.startswith(
            "Error: config.dataset.root='images': this mode measures accuracy, and there are no labels"
        )
        assert 'expected DIR/train/CLASS/* and DIR/test/CLASS/*' in error


def test_held_out_images_without_labels_are_of_no_use(root):
    with pytest.raises(UserError, match="eval_split='val': no labels"):
        dataset.load_train_and_test(root=str(root), fraction=1.0, eval_split='val', val_fraction=0.1, **SOURCE)
