"""Other people's reports about the layout of a folder, tried here; the numbers are those of README.md."""

import shutil

import numpy as np
import pytest
from PIL import Image

import runs
from byol_func.data import listing
from byol_func.utils import dataset


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)


def load(root, eval_split='test', **options):
    options = (
        dict(source_size=0, grayscale=False, max_gib=1.0, max_bad_fraction=0.0, num_workers=0, cache_dir='') | options
    )
    where = dict(name='folder', root=str(root), fraction=1.0, eval_split=eval_split, val_fraction=0.5)
    return dataset.load_train_and_test(**where, **options)


@pytest.fixture
def root(tmp_path):
    for i, path in enumerate(('train/a/0', 'train/a/1', 'train/b/0', 'train/b/1', 'test/a/0', 'test/b/0')):
        save(tmp_path / f'{path}.png', i)
    return tmp_path


@pytest.mark.parametrize('size', [0, 6])
def test_67_test_images_that_are_training_images(root, size, caplog):
    load(root, source_size=size)
    assert not caplog.records
    shutil.copy(root / 'train/a/1.png', root / 'test/b/copy.png')
    load(root, source_size=size)
    (message,) = caplog.messages
    assert message.startswith('1 of the 3 images to evaluate on (test) are training images too')


def test_67_copies_within_the_training_set(root, caplog):
    for name in 'ab':
        shutil.copy(root / f'train/{name}/0.png', root / f'train/{name}/1.png')
    load(root, 'val')
    assert caplog.messages[0].startswith('2 of the 2 images to evaluate on (val)')


def test_68_classes_below_a_folder_of_another_name(root):
    shutil.copytree(root / 'train', root / 'set' / 'PetImages')
    message = runs.error_of(load, root / 'set' / 'PetImages')
    assert "found the class folders 'a', 'b'" in message and 'config.dataset.eval_split=val' in message
    train, test = load(root / 'set' / 'PetImages', 'val')
    assert train.class_names == test.class_names == ('a', 'b')


def test_69_a_folder_of_images_as_the_root(tmp_path):
    for split in ('train2014', 'val2014'):
        for i in range(3):
            save(tmp_path / split / f'{i}.png', i)
    train, test = load(tmp_path / 'train2014')
    assert (train.num_examples, train.class_names, test) == (3, (), None)
    assert "rename 'train2014' to train and 'val2014' to test" in runs.error_of(load, tmp_path)


def test_70_validate(root):
    (root / 'test').rename(root / 'validate')
    assert load(root)[1].num_examples == 2


def test_71_images_without_labels_have_no_class(root):
    for name in 'ab':
        shutil.move(root / f'train/{name}/0.png', root / f'train/{name}.png')
        shutil.rmtree(root / 'train' / name)
    files = listing.list_files('train', str(root))
    assert files.class_names == () and files.labels.tolist() == [0, 0]
