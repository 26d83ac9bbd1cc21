"""Which files of a folder are read: hidden ones, other formats, spellings of a class, and layouts."""

import shutil
import unicodedata

import pytest
import torch
from PIL import Image

import runs
from byol_func.data import label_files, listing
from byol_func.data.examples import Dataset


def save_image(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (4, 4), (9, 8, 7)).save(path, **options)


def files_of(root, split='train'):
    files = listing.list_files(split, str(root))
    return files and (files.class_names, files.below_root(torch.arange(len(files.paths))))


def error_of(root, split='train'):
    message = runs.error_of(listing.list_files, split, str(root))
    assert message.startswith(f'config.dataset.root={str(root)!r}: ')
    return message


@pytest.fixture
def root(tmp_path):
    for split in ('train', 'test'):
        for name in 'ab':
            save_image(tmp_path / split / name / '0.png')
    return tmp_path


def messages(caplog):
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_hidden_files_and_folders_are_passed_over_and_counted_in_one_line(root, caplog):
    expected = files_of(root)
    assert not messages(caplog)
    save_image(root / 'train' / '.ipynb_checkpoints' / 'copy.png')
    save_image(root / 'train' / '@eaDir' / 'thumbnail.jpg')
    save_image(root / 'train' / '#recycle' / 'deleted.jpg')
    save_image(root / 'train' / 'a' / '__MACOSX' / '0.png')
    (root / 'train' / 'a' / '._0.jpg').write_bytes(b'resource fork')
    (root / 'train' / 'b' / 'Thumbs.db').write_bytes(b'thumbnails')
    with caplog.at_level('INFO', logger='absl'):
        assert files_of(root) == expected
    (line,) = messages(caplog)
    assert 'ignored hidden files and folders, 6 in all' in line and "'#recycle', '.ipynb_checkpoints'" in line
    assert files_of(root, 'test') == (('a', 'b'), ('test/a/0.png', 'test/b/0.png'))


def test_hidden_files_without_labels(tmp_path):
    for name in ('0.png', '._0.png', '.trash/1.png'):
        save_image(tmp_path / 'train' / name)
    assert files_of(tmp_path) == ((), ('train/0.png',))


def test_a_root_that_is_itself_below_a_hidden_folder(root):
    moved = root / '.cache' / 'set'
    shutil.copytree(root / 'train', moved / 'train')
    assert files_of(moved)[0] == ('a', 'b')


@pytest.mark.parametrize('ending, kind', [('jfif', 'JPEG'), ('gif', 'GIF'), ('jp2', 'JPEG2000'), ('tga', 'TGA')])
def test_what_pillow_reads_is_read(root, ending, kind, caplog):
    save_image(root / 'train' / 'b' / f'1.{ending.upper()}', format=kind)
    assert files_of(root)[1][-1] == f'train/b/1.{ending.upper()}' and not messages(caplog)


def test_what_pillow_does_not_read_is_counted_by_its_ending(root, caplog):
    for name in ('1.xcf', '2.xcf', '3.txt', 'README'):
        (root / 'train' / 'b' / name).write_bytes(b'')
    (root / 'train' / 'labels.csv').write_text('')  # Beside the class folders nobody expects images alone.
    save_image(root / 'train' / 'c.png')
    files_of(root)
    left_out, beside = messages(caplog)
    assert left_out.endswith(
        'ignored files without the ending of an image format; found 2 of .xcf, 1 of .txt, 1 of no ending'
    )
    assert beside.endswith("ignored 1 image beside the class folders: 'c.png'")


@pytest.mark.parametrize('name', ['Vögel', 'Ångström', '가방'])
def test_one_class_whatever_the_unicode_form(root, name, caplog):
    composed, decomposed = (unicodedata.normalize(form, name) for form in ('NFC', 'NFD'))
    assert composed != decomposed
    save_image(root / 'train' / decomposed / '0.png')
    save_image(root / 'test' / composed / '0.png')
    trained, tested = files_of(root)[0], files_of(root, 'test')[0]
    assert trained == tested == tuple(sorted(('a', 'b', decomposed))) and not messages(caplog)
    save_image(root / 'train' / composed / '1.png')
    files = listing.list_files('train', str(root))
    assert len(files.class_names) == 3 and sorted(files.labels.bincount().tolist()) == [1, 1, 2]
    (line,) = messages(caplog)
    listing.list_files('test', str(root))  # It reads the names of both sets.
    assert not messages(caplog)
    assert f'{ascii(decomposed)} and {ascii(composed)}' in line or f'{ascii(composed)} and {ascii(decomposed)}' in line


@pytest.mark.parametrize('train', ['Train', 'training', 'TRAIN'])
@pytest.mark.parametrize('test', ['Test', 'valid', 'validation', 'Val'])
def test_other_names_of_the_splits(root, train, test):
    (root / 'train').rename(root / train)
    (root / 'test').rename(root / test)
    assert files_of(root) == (('a', 'b'), (f'{train}/a/0.png', f'{train}/b/0.png'))
    assert files_of(root, 'test') == (('a', 'b'), (f'{test}/a/0.png', f'{test}/b/0.png'))


def test_two_names_of_one_split(root):
    shutil.copytree(root / 'train', root / 'Training')
    assert files_of(root)[1][0] == 'train/a/0.png'
    (root / 'train').rename(root / 'TRAIN')
    assert "'TRAIN', 'Training' have the same meaning" in error_of(root)

    (root / 'TRAIN').rename(root / 'training')
    assert "'Training', 'training' have the same meaning" in error_of(root)


def test_class_folders_called_like_splits(root, caplog):
    """Vehicles sorted into bus, car and train; COCO's names."""
    shutil.rmtree(root / 'test')
    for path in ('train/0.png', 'bus/0.png', 'car/0.png', 'testing/0.png'):
        save_image(root / path)
    for name in 'ab':
        shutil.rmtree(root / 'train' / name)
    assert files_of(root) == ((), ('train/0.png',))
    assert messages(caplog) == [f"{root}/train: images without labels; ignored those beside it, in 'bus', 'car'"]
    for old, new in (('bus', 'train2017'), ('car', 'val2017')):
        (root / old).rename(root / new)
    shutil.rmtree(root / 'train')
    shutil.rmtree(root / 'testing')
    assert "rename 'train2017' to train and 'val2017' to test" in error_of(root)


def test_what_was_found_in_place_of_a_test_set(root):
    (root / 'test').rename(root / 'dev')
    assert error_of(root, 'test').endswith("config.dataset.eval_split=val to do without it; found 'dev'")
    save_image(root / 'test' / 'unknown' / '0.png')
    message = error_of(root, 'test')
    assert "'unknown' (only in test)" in message and 'config.dataset.eval_split=val' in message


def test_a_test_set_without_labels(root, caplog):
    shutil.rmtree(root / 'test')
    save_image(root / 'test' / '1.png')
    assert files_of(root)[0] == ('a', 'b')
    message = error_of(root, 'test')
    assert f"1 image without labels in '{root}/test'" in message and 'config.dataset.eval_split=val' in message
    shutil.copytree(root / 'train', root / 'valid')
    with caplog.at_level('INFO', logger='absl'):
        assert files_of(root, 'test')[1] == ('valid/a/0.png', 'valid/b/0.png')
    assert messages(caplog) == [f'{root}/test has no labels; {root}/valid is the test set']


def test_class_folders_right_under_the_root(tmp_path):
    for name in 'cat', 'dog':
        save_image(tmp_path / name / '0.png')
    assert files_of(tmp_path) == (('cat', 'dog'), ('cat/0.png', 'dog/0.png'))
    assert 'config.dataset.eval_split=val' in error_of(tmp_path, 'test')


def test_images_right_under_the_root(tmp_path):
    save_image(tmp_path / '0.png')
    (tmp_path / 'notes').mkdir()
    assert files_of(tmp_path) == ((), ('0.png',)) and files_of(tmp_path, 'test') is None


def test_one_folder_too_high_or_a_single_folder(root, tmp_path):
    above = tmp_path / 'above'
    above.mkdir()
    shutil.copytree(root / 'train', above / 'set' / 'train')
    assert f"there is one in '{above}/set'" in error_of(above)
    shutil.rmtree(above / 'set' / 'train')
    save_image(above / 'set' / '0.png')
    assert f"only '{above}/set' holds images" in error_of(above)


def test_an_empty_root(tmp_path):
    assert 'there is no folder' in error_of(tmp_path)


@pytest.mark.parametrize('where', ['.', 'train'])
def test_lists_of_labels_name_images_below_the_folder_of_the_classes(root, tmp_path, where):
    (tmp_path / 'list.txt').write_text('b/0.png\n')
    files = listing.list_files('train', str(root / where))
    data = Dataset(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), files.labels, files.class_names, files)
    assert label_files.listed(data, str(tmp_path / 'list.txt'), 'field').tolist() == [1]
