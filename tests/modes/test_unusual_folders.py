"""Folders that are a little out of the ordinary: a whole run ends well, or is refused in one line."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cli import ROOT, run_launch, succeed
from image_folders import flags, make_folder

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


@pytest.mark.parametrize('grayscale, max_gib', [(False, 1.0), (True, 0.0)])
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


def test_names_in_other_bytes_than_utf8(tmp_path):
    """Latin-1 bytes in the names of a class, of the folder and of the workdir, on a terminal that takes ASCII only."""
    root = make_folder(tmp_path / os.fsdecode(b'f\xfcr'), lambda rng: (24, 24))
    for split in ('train', 'test'):
        os.rename(root / split / 'a', os.fsencode(root / split) + b'/V\xf6gel')  # Latin-1.
        (root / split / 'b').rename(root / split / 'Käfer')  # UTF-8.
    workdir = os.fsdecode(b'l\xe4uft')
    argv = [*flags(root, num_epochs=1, pictures=True, dataset__source_size=20), f'--workdir={workdir}']
    succeed(*argv, cwd=tmp_path)
    ascii_only = {**os.environ, 'PYTHONIOENCODING': 'ascii:strict'}
    command = [sys.executable, f'{ROOT}/launch.py', *argv, '--mode=eval']
    outcome = subprocess.run(command, cwd=tmp_path, env=ascii_only, capture_output=True, text=True)
    assert outcome.returncode == 0 and 'could not be made' not in outcome.stderr, outcome.stderr
    assert r'V\xf6gel' in outcome.stdout and r'K\xe4fer' in outcome.stdout
    report = json.loads((tmp_path / workdir / 'eval.test.json').read_text())
    assert sorted(row['name'] for row in report['per_class']) == ['Käfer', r'V\xf6gel']
    with np.load(tmp_path / workdir / 'predictions.test.npz') as file:
        assert r'V\xf6gel' in file['class_names']
        assert all(os.path.exists(root / path) for path in file['path'])  # Paths stay what they are on disk.
    for name in ('confusion_matrix.linear.test.png', 'embedding_map.png', 'neighbours.png', 'report.html'):
        assert (tmp_path / workdir / name).exists(), name
    assert r'l\xe4uft' in (tmp_path / workdir / 'report.html').read_text()


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
        f'to pretrain without labels put the images directly into DIR/train, or set config.dataset.root={root}/train/a'
    )
