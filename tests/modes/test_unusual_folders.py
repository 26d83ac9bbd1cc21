"""Folders that are a little out of the ordinary: a whole run ends well, or is refused in one line."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from test_streaming import flags, make_folder

from cli import run_launch, succeed

MODES = ('linear_eval', 'fine_tune', 'knn', 'logistic', 'eval', 'embed')


def run_all(root, tmp_path, **overrides):
    """A pre-training and every mode on top of it."""
    argv = [
        *flags(
            root, num_epochs=1, fine_tune__num_epochs=1, fine_tune__batch_size=4, dataset__source_size=20, **overrides
        ),
        '--workdir=run',
    ]
    succeed(*argv, cwd=tmp_path)
    for mode in MODES:
        outcome = succeed(*argv, f'--mode={mode}', cwd=tmp_path)
        assert 'nan' not in outcome.stdout
    return json.loads((tmp_path / 'run/eval.test.json').read_text())


@pytest.mark.parametrize('grayscale, max_gib', [(False, 1.0), (True, 1.0), (True, 0.0)])
def test_images_of_one_channel(tmp_path, grayscale, max_gib):
    root = make_folder(tmp_path / 'images', lambda rng: (24, 24), suffix='.png')
    for path in root.rglob('*.png'):
        Image.open(path).convert('L').save(path)
    run_all(root, tmp_path, dataset__grayscale=grayscale, dataset__max_gib=max_gib)
    assert (tmp_path / 'run/augmentations.png').exists()


@pytest.mark.parametrize('max_gib', [0.0, 1.0])
def test_a_test_set_smaller_than_the_batch_of_the_evaluation(tmp_path, max_gib):
    root = make_folder(tmp_path / 'images', lambda rng: (24, 24))
    for path in [*root.glob('test/*/1.jpg'), *root.glob('test/*/2.jpg')]:
        path.unlink()
    report = run_all(root, tmp_path, dataset__max_gib=max_gib)
    assert np.sum(report['confusion_matrix']) == 2 and report['top1'] in (0.0, 0.5, 1.0)
    with np.load(tmp_path / 'run/predictions.test.npz') as file:
        assert file['path'].tolist() == ['test/a/0.jpg', 'test/b/0.jpg']


@pytest.mark.parametrize('mode', ['pretrain', 'preview', 'linear_eval'])
def test_one_class(tmp_path, mode):
    root = make_folder(tmp_path / 'images', lambda rng: (24, 24))
    checkpoint = []
    if mode == 'linear_eval':  # An encoder of two classes, to be evaluated on one.
        succeed(*flags(root, num_epochs=1, final_linear_eval=False), '--workdir=run', cwd=tmp_path)
        checkpoint = [f'--checkpoint={next(tmp_path.glob("run/checkpoints/pretrain_*"))}']
    for split in ('train', 'test'):
        shutil.rmtree(root / split / 'b')
    outcome = run_launch(*flags(root), f'--mode={mode}', '--workdir=new', *checkpoint, cwd=tmp_path)
    assert outcome.code == 1 and 'Traceback' not in outcome.stderr
    assert outcome.stderr.splitlines()[-1] == (
        f"Error: config.dataset.root='{root}': expected at least two classes, but 'a' is the only one; "
        'to pretrain without labels put the images into DIR/train itself'
    )
