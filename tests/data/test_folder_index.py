"""The list of a large folder is kept, and made again as soon as any of its folders has changed."""

import os

import pytest
import torch

from byol_func.data import folder_index, listing
from image_folders import make_folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder that counts as large and has been at rest."""
    monkeypatch.setenv('BYOL_FUNC_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(folder_index, '_LEAST', 1)
    root = make_folder(tmp_path / 'images', lambda rng: (4, 4))
    (root / 'train/b/deep').mkdir()
    for name in (b'\xff.jpg', b'deep/0.jpg', b'.hidden.jpg', b'notes.txt'):
        with open(os.path.join(os.fsencode(root / 'train/b'), name), 'wb'):
            pass
    let_rest(root)
    return root


def let_rest(root):
    for folder in (root, *root.glob('**/')):
        os.utime(folder, (1, 1))


def names(root, split='train', **kwargs):
    files = listing.list_files(split, str(root), **kwargs)
    assert len(files.paths) == len(files.labels)
    return files.class_names, files.labels.tolist(), files.below_root(torch.arange(len(files.paths)))


def lines(caplog):
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_the_second_run_has_the_list_of_the_first(root, tmp_path, caplog):
    with caplog.at_level('INFO', logger='absl'):
        expected, said = names(root), lines(caplog)
        (folder := root / 'train/a').joinpath('0.jpg').rename(folder / '0.png')
        os.utime(folder, (1, 1))  # So that nothing seems changed.
        assert names(root) == expected  # Where it comes from shows, and what else was in the folder.
        first, *others = lines(caplog)
    assert len(expected[2]) == 14 and others == said and len(said) == 2
    assert first.startswith(f'{root}/train: the names of 14 images are those of an earlier run')
    assert len(list((tmp_path / 'cache/folders').iterdir())) == 1


@pytest.mark.parametrize('change', ['new file', 'renamed', 'removed', 'new folder', 'in a new folder', 'new class'])
def test_every_change_is_noticed(root, change):
    names(root)
    path = root / 'train/b/deep/0.jpg'
    match change:
        case 'new file':
            (root / 'train/a/new.jpg').touch()
        case 'renamed':
            path.rename(path.with_name('1.jpg'))
        case 'removed':
            path.unlink()
        case 'new folder':
            (root / 'train/b/deep/deeper').mkdir()
        case 'in a new folder':
            (root / 'train/b/deep/deeper').mkdir()
            names(root)
            (root / 'train/b/deep/deeper/x.jpg').touch()
        case 'new class':
            (root / 'train/c').mkdir()
            (root / 'train/c/x.jpg').touch()
    found = names(root)
    os.environ['BYOL_FUNC_CACHE'] += '/none'
    assert found == names(root)


def test_a_folder_that_may_still_change_is_not_kept(root, tmp_path, monkeypatch):
    (root / 'train/b/deep/new.jpg').touch()
    names(root)
    assert not (tmp_path / 'cache').exists()
    let_rest(root)
    monkeypatch.setattr(folder_index, '_LEAST', 100)
    names(root)
    assert not (tmp_path / 'cache').exists()


def test_without_labels_and_the_test_set(root, tmp_path):
    expected = names(root, 'test')
    assert names(root, 'test') == expected and expected[2][0] == 'test/a/0.jpg'
    for path in root.glob('train/a/*'):
        path.rename(tmp_path / 'images/train' / path.name)
    (root / 'train/a').rmdir()
    (root / 'train/b').rename(root / 'train/.b')
    let_rest(root)
    expected = names(root)
    assert names(root) == expected == ((), [0] * 6, tuple(f'train/{i}.jpg' for i in range(6)))
