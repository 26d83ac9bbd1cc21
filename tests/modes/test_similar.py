"""`--mode=similar`: the images of a data set that look most like images of the user's choice."""

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import byol_func
from cli import assert_refused, config, run_launch, succeed, tiny_digits

_FLAGS = dict(
    dataset__root='images',
    dataset__source_size=0,
    batch_size=8,
    num_epochs=1,
    image_size=16,
    compile=False,
    precision='float32',
    pictures=False,
    lr_schedule__warmup_epochs=0.0,
    network__encoder_class='TinyResNet',
    network__encoder_config__stem='cifar',
    final_linear_eval=False,
)


def _save(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A run on unlabelled images of a flat folder, and photographs elsewhere: a copy, a new one and a broken one."""
    path = tmp_path_factory.mktemp('similar')
    (path / 'images').mkdir()
    (path / 'photos/more').mkdir(parents=True)
    for i in range(24):
        _save(path / f'images/{i:02d}.png', i)
    shutil.copy(path / 'images/07.png', path / 'images/copy.png')
    shutil.copy(path / 'images/11.png', path / 'photos/more/11.png')
    _save(path / 'photos/new.png', 99)
    (path / 'photos/broken.jpg').write_bytes(b'no image')
    succeed(*config('folder.py', **_FLAGS), '--workdir=run', cwd=path)
    return path


def _rows(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def test_a_folder_of_images(folder):
    flags = ['--workdir=run', '--mode=similar', '--config.pictures=True']
    outcome = succeed(*flags, '--images=photos', cwd=folder)
    assert 'run/similar.csv: the most similar of 25 images to 2 images; run/similar.png shows' in outcome.stdout
    assert '1 image left out' in outcome.stderr and 'broken.jpg' in outcome.stderr
    rows = _rows(folder / 'run/similar.csv')
    assert list(rows[0]) == ['image', 'rank', 'path', 'cosine'] and len(rows) == 2 * 25
    of_copy = [row for row in rows if row['image'] == 'more/11.png']
    assert of_copy[0]['path'] == '11.png' and float(of_copy[0]['cosine']) == pytest.approx(1.0, abs=1e-5)
    for name in ('new.png', 'more/11.png'):  # Equal to the same search from Python.
        mine = [row for row in rows if row['image'] == name]
        paths = [folder / 'images' / row['path'] for row in mine]
        assert len(set(paths)) == 25 and [row['rank'] for row in mine] == [str(i) for i in range(1, 26)]
        encoder = byol_func.load_encoder(folder / 'run')
        unit = torch.nn.functional.normalize(encoder.embed([folder / 'photos' / name, *paths]).double(), dim=1)
        cosines = unit[1:] @ unit[0]
        torch.testing.assert_close(
            cosines, torch.tensor([float(row['cosine']) for row in mine]).double(), atol=2e-6, rtol=0
        )
        assert (cosines.diff() < 1e-6).all()
    with Image.open(folder / 'run/similar.png') as picture:
        assert picture.width > 900


def test_an_image_of_the_data_set_is_not_similar_to_itself(folder):
    flags = ['--workdir=run', '--mode=similar', '--images=images/07.png', '--output=mine.csv']
    outcome = succeed(*flags, cwd=folder)
    rows = _rows(folder / 'mine.csv')
    assert len(rows) == 24 and rows[0] == {'image': '07.png', 'rank': '1', 'path': 'copy.png', 'cosine': '1.000000'}
    assert 'Most similar to 07.png: copy.png (1.000), ' in outcome.stdout and 'mine.png' not in outcome.stdout
    assert not (folder / 'mine.png').exists()  # config.pictures is False.


def test_a_data_set_without_files_and_a_split(folder, tmp_path):
    succeed(*tiny_digits(batch_size=512), '--workdir=run', cwd=tmp_path)
    flags = ['--workdir=run', '--mode=similar', f'--images={folder}/photos/new.png']
    succeed(*flags, '--config.pictures=True', cwd=tmp_path)
    rows = _rows(tmp_path / 'run/similar.csv')
    assert len(rows) == 100 and {row['path'].split('/')[0] for row in rows} == {'train', 'test'}
    assert (tmp_path / 'run/similar.png').exists()
    succeed(*flags, '--split=test', cwd=tmp_path)
    assert {row['path'].split('/')[0] for row in _rows(tmp_path / 'run/similar.csv')} == {'test'}


@pytest.mark.parametrize(
    'flags, words',
    [
        ([], ['--mode=similar: no images to compare', '--images=FOLDER']),
        (['--images=nowhere'], ['nowhere', 'No such file', 'a folder of images']),
        (['--images=photos/broken.jpg'], ['no image can be read', 'broken.jpg']),
        (['--images=photos', '--output=x.png'], ['--output=x.png', 'ends in .csv']),
        (['--images=photos', '--output=run/config.json/x.csv'], ['config.json is a file; expected a folder there']),
        (['--images=photos', '--output=images/07.csv'], ['--output=images/07.png: already exists; remove it']),
        (['--images=photos', '--format=parquet'], ['--format=parquet']),
    ],
)
def test_what_is_refused(folder, flags, words):
    before = sorted((folder / 'run').iterdir())
    assert_refused(run_launch('--workdir=run', '--mode=similar', *flags, cwd=folder), *words)
    assert sorted((folder / 'run').iterdir()) == before
