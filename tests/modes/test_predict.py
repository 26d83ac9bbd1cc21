"""`--mode=predict` and `byol_func.load_classifier`: classes of images without labels."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import byol_func
from byol_func.errors import UserError
from cli import assert_refused, config, run_launch, succeed

_GRAYS = {'dark': 10, 'light': 220}
_FLAGS = dict(
    dataset__root='images',
    dataset__source_size=0,
    batch_size=8,
    num_epochs=1,
    image_size=8,
    compile=False,
    precision='float32',
    pictures=False,
    lr_schedule__warmup_epochs=0.0,
    network__encoder_class='TinyResNet',
    linear_eval__num_epochs=20,
    linear_eval__batch_size=8,
    linear_eval__compare_untrained=False,
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A run that tells dark images from light ones, and photographs beside a broken file."""
    path = tmp_path_factory.mktemp('predict')
    for split in ('train', 'test'):
        for name, gray in _GRAYS.items():
            (path / 'images' / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = np.full((8, 8, 3), gray + i, np.uint8)
                Image.fromarray(pixels).save(path / 'images' / split / name / f'{i}.png')
    (path / 'photos/more').mkdir(parents=True)
    for name, gray in {'a.png': 20, 'more/b.png': 230, 'more/c.png': 15}.items():
        Image.fromarray(np.full((40, 30, 3), gray, np.uint8)).save(path / 'photos' / name)
    (path / 'photos/broken.jpg').write_bytes(b'no image')
    flags = config('folder.py', **_FLAGS)
    succeed(*flags, '--workdir=run', cwd=path)
    return path


def _rows(path):
    with open(path, newline='') as file:
        return {row['image']: (row['class'], float(row['probability'])) for row in csv.DictReader(file)}


def test_classes_in_a_table(folder):
    outcome = succeed('--workdir=run', '--mode=predict', '--images=photos', cwd=folder)
    assert 'run/predictions.csv: 3 images by the classifier of --mode=linear_eval; most often' in outcome.stdout
    assert '1 image left out' in outcome.stderr and 'broken.jpg' in outcome.stderr
    found = _rows(folder / 'run/predictions.csv')
    assert {name: label for name, (label, _) in found.items()} == {
        'a.png': 'dark',
        'more/b.png': 'light',
        'more/c.png': 'dark',
    }
    classifier = byol_func.load_classifier(folder / 'run')
    names, probabilities = classifier.predict([folder / 'photos' / name for name in found])
    assert names == [label for label, _ in found.values()]
    torch.testing.assert_close(
        probabilities.max(dim=1).values, torch.tensor([p for _, p in found.values()]), atol=1e-4, rtol=0
    )
    with pytest.raises(UserError, match='expected a list of images'):
        classifier.predict(str(folder / 'photos'))
    assert classifier.class_names == ('dark', 'light') and repr(classifier).startswith('Classifier(2 classes, Encoder(')


def test_a_single_image_and_another_table(folder):
    flags = ['--workdir=run', '--mode=predict', '--images=photos/more/b.png', '--output=mine.csv']
    succeed(*flags, cwd=folder)
    assert list(_rows(folder / 'mine.csv')) == ['b.png']


@pytest.mark.parametrize(
    'flags, words',
    [
        ([], ['--mode=predict', '--images=FOLDER']),
        (['--images=nowhere'], ['nowhere', 'No such file', 'a folder of images']),
        (['--images=run/checkpoints'], ['no images in', '.png']),
        (['--images=photos', '--split=test'], ['--split=test']),
        (['--images=photos/broken.jpg'], ['no image can be read', 'broken.jpg']),
        (['--images=photos', '--output=run/config.json/x.csv'], ['config.json is a file; expected a folder there']),
        (['--images=photos', '--output=photos'], ['--output=photos: already exists; remove it or choose another']),
        (['--images=photos', '--output=run/config.json'], ['--output=run/config.json: already exists; remove it']),
    ],
)
def test_what_is_refused(folder, flags, words):
    before = sorted((folder / 'run').iterdir())
    assert_refused(run_launch('--workdir=run', '--mode=predict', *flags, cwd=folder), *words)
    assert sorted((folder / 'run').iterdir()) == before


def test_an_encoder_without_a_classifier(folder, tmp_path):
    flags = config('folder.py', **{**_FLAGS, 'dataset__root': folder / 'photos/more'})
    # Without labels there is neither an online classifier nor an evaluation.
    succeed(*flags, '--config.batch_size=2', '--config.final_linear_eval=False', '--workdir=run', cwd=tmp_path)
    refused = run_launch('--workdir=run', '--mode=predict', f'--images={folder}/photos', cwd=tmp_path)
    assert_refused(refused, 'trained without labels', '--mode=linear_eval, logistic or fine_tune')
