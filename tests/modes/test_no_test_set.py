"""A folder of classes without a test set: a part of the training set is evaluated on, or the labels are left aside."""

import json

import numpy as np
import pytest

from byol_func.utils import dataset
from cli import run_launch, succeed, tiny_digits
from image_folders import flags, make_folder

SOURCE = dict(source_size=0, grayscale=False, max_bad_fraction=0.0, num_workers=0, cache_dir='')
PART = dict(fraction=1.0, val_fraction=0.34)


@pytest.fixture
def root(tmp_path):
    """train/a and train/b with six images each."""
    folder = make_folder(tmp_path / 'images', lambda rng: (24, 24))
    for path in sorted((folder / 'test').rglob('*.*')):
        path.unlink()
    for path in (folder / 'test/a', folder / 'test/b', folder / 'test'):
        path.rmdir()
    return folder


@pytest.mark.parametrize('directly', [False, True], ids=['DIR/train/CLASS', 'DIR/CLASS'])
def test_a_part_of_every_class_is_held_out(root, directly, tmp_path):
    small = dict(dataset__val_fraction=0.34, final_linear_eval=True, dataset__source_size=20, dataset__max_gib=1.0)
    run = [*flags(root / 'train' if directly else root, **small), '--workdir=run']
    outcome = succeed(*run, cwd=tmp_path)
    assert 'no test set; 34 % of every class are held out' in outcome.stderr
    summary = json.loads((tmp_path / 'run/summary.json').read_text())
    assert summary['eval_split'] == 'val' and 'val/linear_top1' in summary
    assert json.loads((tmp_path / 'run/config.json').read_text())['dataset']['eval_split'] == 'val'
    assert 'held out to evaluate' not in succeed('--workdir=run', '--mode=knn', cwd=tmp_path).stderr
    assert 'resum' not in succeed(*run, cwd=tmp_path).stdout.lower()  # The same command finds its own run.


def test_a_misspelt_test_set_is_not_passed_over(root, tmp_path):
    (make_folder(tmp_path / 'more', lambda rng: (24, 24)) / 'test').rename(root / 'tset')
    outcome = run_launch(*flags(root), cwd=tmp_path)
    assert outcome.code == 1 and "found 'tset'" in outcome.stderr.splitlines()[-1]


@pytest.mark.parametrize('max_gib', [0.0, 1.0], ids=['stream', 'memory'])
def test_labels_are_left_aside(root, max_gib):
    train, test = dataset.load_train_and_test(
        name='folder', root=str(root), eval_split='none', max_gib=max_gib, **SOURCE | PART
    )
    assert test is None and (train.num_examples, train.num_classes) == (12, 0)
    assert set(train.labels.tolist()) == {0} and len(train.paths) == 12


def test_a_run_without_labels_embeds_all_images(root, tmp_path):
    outcome = succeed(*flags(root, dataset__eval_split='none'), '--workdir=run', cwd=tmp_path)
    assert 'Pre-trained without labels' in outcome.stdout and 'held out' not in outcome.stderr
    succeed('--workdir=run', '--mode=embed', cwd=tmp_path)
    with np.load(tmp_path / 'run/embeddings.train.npz') as file:
        assert len(file['features']) == len(set(file['path'].tolist())) == 12 and not len(file['labels'])
    outcome = run_launch('--workdir=run', '--mode=knn', cwd=tmp_path)
    assert outcome.code == 1 and 'there are no labels' in outcome.stderr.splitlines()[-1]


def test_other_data_sets_can_do_without_labels_too(tmp_path):
    succeed(*tiny_digits(dataset__eval_split='none'), '--workdir=run', cwd=tmp_path)
    assert not [key for key in json.loads((tmp_path / 'run/summary.json').read_text()) if 'top1' in key]
