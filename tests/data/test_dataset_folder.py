"""Folders of images: order, pixels of every kind of file, and errors in one line."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from byol_func.utils import dataset
from runs import error_of

LAYOUT = 'expected DIR/train/CLASS/* and DIR/test/CLASS/*'


def load(split='train', *, root='', source_size=0, max_gib=1.0, **kwargs):
    kwargs = dict(grayscale=False, max_bad_fraction=0.0, num_workers=0, cache_dir='') | kwargs
    return dataset.load(split, name='folder', root=str(root), source_size=source_size, max_gib=max_gib, **kwargs)


def save_image(path, size=(4, 4), color=(0, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, color).save(path)


@pytest.fixture
def root(tmp_path):
    """Classes 'a' and 'b' with three training images and one test image each, 4 x 4 pixels."""
    for i, name in enumerate('ab'):
        for j in range(3):
            save_image(tmp_path / 'train' / name / f'{j}.png', color=(100 * i, j, 7))
        save_image(tmp_path / 'test' / name / '0.png', color=(100 * i, 50, 7))
    return tmp_path


def test_folder_reads_both_splits(root):
    train, test = load('train', root=root), load('test', root=root)
    assert train.class_names == test.class_names == ('a', 'b')
    assert train.images.dtype == torch.uint8 and train.images.shape == (6, 3, 4, 4)
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 1]
    assert train.labels.dtype == torch.int64
    colors = train.images[:, :, 3, 3].tolist()
    assert colors == [[0, 0, 7], [0, 1, 7], [0, 2, 7], [100, 0, 7], [100, 1, 7], [100, 2, 7]]
    assert test.images[:, :, 0, 0].tolist() == [[0, 50, 7], [100, 50, 7]]
    assert (train.num_examples, train.num_classes) == (6, 2)
    assert dataset.class_counts(train) == [3, 3]


def test_folder_has_the_order_and_pixels_of_image_folder(root):
    rng = np.random.default_rng(0)
    for i in range(200):  # several tasks of the thread pool
        noise = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        folder = root / 'train' / 'ab'[i % 2] / ('deep', 'Z', '.')[i % 3]
        folder.mkdir(exist_ok=True)
        noise.save(folder / f'{i}.{("png", "JPEG")[i % 5 == 0]}')
    (root / 'train' / 'a' / 'notes.txt').write_text('not an image')
    ours, theirs = load(root=root), ImageFolder(root / 'train')
    assert ours.labels.tolist() == theirs.targets
    expected = np.stack([np.asarray(image) for image, _ in theirs])
    np.testing.assert_array_equal(ours.images.permute(0, 2, 3, 1), expected)


def test_folder_large_files_go_through_several_threads(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 100, 48, 48, 3), dtype=np.uint8)
    for label, images in enumerate(pixels):
        for split in ('train', 'test'):
            (tmp_path / split / str(label)).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / 'train' / str(label) / f'{i:03}.png')
    images = load(root=tmp_path).images.permute(0, 2, 3, 1)
    np.testing.assert_array_equal(images, pixels.reshape(-1, 48, 48, 3))


def test_folder_accepts_val_for_test_and_a_home_directory(root, monkeypatch):
    (root / 'test').rename(root / 'val')
    monkeypatch.setenv('HOME', str(root.parent))
    assert load('test', root=f'~/{root.name}').num_examples == 2


def test_folder_is_silent_where_stderr_is_no_terminal(root, capfd):
    load(root=root)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ''


def test_folder_keeps_images_that_are_not_square(root):
    for path in root.glob('*/*/*.png'):
        save_image(path, size=(6, 4))
    assert load(root=root).images.shape == (6, 3, 4, 6)


@pytest.mark.parametrize('size', [(80, 40), (40, 80), (40, 40), (20, 31)])
def test_folder_resizes_the_short_side_and_keeps_the_middle(root, size):
    """A picture that varies slowly: a wrong place or scale shows, a rounded border does not."""
    for path in root.glob('*/*/*.png'):
        x, y = np.meshgrid(*(np.arange(n) for n in size))
        channels = (2 * x + 10, 2 * y + 10, x + y)
        Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).save(path)
    image = load(root=root, source_size=20).images[0]
    scale = min(size) / 20
    centers = (np.arange(20) + 0.5 - 10) * scale  # in source pixels, about the middle
    x, y = np.meshgrid(centers + size[0] / 2 - 0.5, centers + size[1] / 2 - 0.5)
    expected = np.stack([2 * x + 10, 2 * y + 10, x + y])
    assert image.shape == (3, 20, 20)
    np.testing.assert_allclose(image[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], atol=1.5)


# --- conversion to RGB


def convert(tmp_path, image, suffix='.png', **options):
    """The pixels of an image after a round trip through a folder, `[H, W, 3]`."""
    for name in ('train/a', 'train/b', 'test/a', 'test/b'):
        (tmp_path / name).mkdir(parents=True)
        image.save(tmp_path / name / f'0{suffix}', **options)
    return load(root=tmp_path).images[0].permute(1, 2, 0).numpy()


def test_grayscale_is_repeated(tmp_path):
    gray = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    pixels = convert(tmp_path, Image.fromarray(gray))
    np.testing.assert_array_equal(pixels, gray[..., None].repeat(3, axis=2))


def test_black_and_white(tmp_path):
    pixels = convert(tmp_path, Image.fromarray(np.eye(4, dtype=bool)))
    np.testing.assert_array_equal(pixels[..., 0], np.eye(4) * 255)


def test_palette_gives_its_colors(tmp_path):
    image = Image.new('P', (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert convert(tmp_path, image).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_transparent_palette_entry_is_white(tmp_path):
    image = Image.new('P', (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    pixels = convert(tmp_path, image, transparency=0)
    assert pixels.tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_transparent_images_lie_on_white(tmp_path):
    colors = [[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]]
    pixels = convert(tmp_path, Image.fromarray(np.array(colors, np.uint8)))
    assert pixels.tolist() == [[[10, 20, 30], [255, 255, 255], [127, 127, 127]]]


def test_grayscale_with_alpha_lies_on_white(tmp_path):
    colors = np.array([[[10, 255], [10, 0]]], np.uint8)
    pixels = convert(tmp_path, Image.fromarray(colors))
    assert pixels.tolist() == [[[10] * 3, [255] * 3]]


def test_cmyk(tmp_path):
    image = Image.new('CMYK', (4, 4), (255, 0, 0, 0))
    assert convert(tmp_path, image, '.tif')[2, 2].tolist() == [0, 255, 255]
    (jpeg := tmp_path / 'jpeg').mkdir()
    np.testing.assert_allclose(convert(jpeg, image, '.jpg')[2, 2], [0, 255, 255], atol=3)


@pytest.mark.parametrize('suffix', ['.png', '.tif', '.pgm'])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    values = np.array([[0, 128, 129, 257, 300, 32896, 65535]], np.uint16)
    pixels = convert(tmp_path, Image.fromarray(values), suffix)
    assert pixels[0, :, 1].tolist() == [0, 0, 1, 1, 1, 128, 255]
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize('dtype', [np.float32, np.int32])
def test_thirty_two_bits_are_refused(tmp_path, dtype):
    image = Image.fromarray(np.full((4, 4), 70_000, dtype))
    assert 'config.dataset.value_range' in error_of(convert, tmp_path, image, '.tif')


# --- errors


def test_no_root():
    message = error_of(load)
    assert message == "config.dataset.root='': expected a folder, for config.dataset.name='folder'"


def test_root_does_not_exist(tmp_path):
    missing = tmp_path / 'nowhere'
    assert error_of(load, root=missing) == (
        f"config.dataset.root='{missing}': cannot read '{missing}' (No such file or directory); " + LAYOUT
    )


def test_root_is_a_file(root):
    file = root / 'train' / 'a' / '0.png'
    assert f"cannot read '{file}' (Not a directory)" in error_of(load, root=file)


@pytest.mark.parametrize('split', ['train', 'test'])
def test_split_is_missing(root, split):
    shutil.rmtree(root / split)
    without = ', or config.dataset.eval_split=val to do without it' if split == 'test' else ''
    found = "; found 'test'" if split == 'train' else ''
    assert error_of(load, split, root=root) == (
        f"config.dataset.root='{root}': there is no folder '{root / split}'; {LAYOUT}{without}{found}"
    )


def test_class_folders_right_under_the_root_are_named(root):
    assert error_of(load, 'test', root=root / 'train').endswith("; found the class folders 'a', 'b'")


def load_both(root, **kwargs):
    source = dict(grayscale=False, max_bad_fraction=0.0, num_workers=0, cache_dir='', source_size=0, max_gib=1.0)
    part = dict(fraction=1.0, eval_split='test', val_fraction=0.34)
    return dataset.load_train_and_test(name='folder', root=str(root), **source | part | kwargs)


@pytest.mark.parametrize('max_gib', [1.0, 0.0], ids=['memory', 'stream'])
def test_a_validation_set_needs_no_test_set(root, max_gib):
    shutil.rmtree(root / 'test')
    train, val = load_both(root, eval_split='val', max_gib=max_gib)
    assert (train.num_examples, val.num_examples) == (4, 2) and train.class_names == ('a', 'b')
    (root / 'train' / 'a' / '0.png').write_text('damaged')  # It is not read before the folder is found missing.
    assert f"there is no folder '{root / 'test'}'" in error_of(load_both, root)


@pytest.mark.parametrize('max_gib', [1.0, 0.0], ids=['memory', 'stream'])
@pytest.mark.parametrize('empty', [False, True])
def test_a_test_set_may_lack_a_class(root, empty, max_gib, caplog):
    for name in 'cd':
        for i in range(2):
            save_image(root / 'train' / name / f'{i}.png')
    save_image(root / 'test' / 'd' / '0.png', color=(9, 9, 9))
    shutil.rmtree(root / 'test' / 'b')
    if empty:
        (root / 'test' / 'b').mkdir()
    if empty:
        message = error_of(load_both, root, max_gib=max_gib, source_size=4)
        assert f"no images in '{root / 'test' / 'b'}'" in message and 'config.dataset.allow_empty=True' in message
    _, test = load_both(root, max_gib=max_gib, source_size=4, allow_empty=empty)
    assert test.class_names == tuple('abcd') and test.labels.tolist() == [0, 3]
    batches = list(dataset.eval_batches(test, 9))
    assert batches[0]['labels'].tolist() == [0, 3] and dataset.describe(test) == '2 images, 4 classes of 0 to 1'
    (warning,) = [r.getMessage() for r in caplog.records if 'no images of' in r.getMessage()]
    assert warning == f"{root / 'test'} has no images of 'b', 'c'; accuracies cover only the other classes"
    for path in root.glob('test/*/*.png'):
        path.unlink()
    assert f"no images in '{root / 'test' / 'a'}'" in error_of(load, 'test', root=root)


def test_no_classes(root):
    shutil.rmtree(root / 'train')
    (root / 'train').mkdir()
    (root / 'train' / 'notes.txt').write_text('soon')
    assert error_of(load, root=root) == (
        f"config.dataset.root='{root}': no class folders in '{root / 'train'}'; {LAYOUT}, or DIR/train/* "
        'without labels; found 1 of .txt'
    )


def test_class_without_images(root):
    folder = root / 'train' / 'b'
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / 'notes.txt').write_text('soon')
    message = error_of(load, root=root)
    assert message.startswith(f"config.dataset.root='{root}': no images in '{folder}'; expected")
    assert '.png' in message and 'found 1 of .txt' in message
    save_image(root / 'train' / 'c' / '0.png')
    shutil.rmtree(root / 'test' / 'b')
    save_image(root / 'test' / 'c' / '0.png')
    for split in ('train', 'test'):
        data = load(split, root=root, allow_empty=True)
        assert data.class_names == ('a', 'c') and data.labels.unique().tolist() == [0, 1]


def test_classes_differ(root):
    for name in 'cdef':
        save_image(root / 'train' / name / '0.png')
    (root / 'test' / 'b').rename(root / 'test' / 'B')
    assert error_of(load, 'test', root=root) == (
        f"config.dataset.root='{root}': the splits differ in classes: 'B' (only in test), "
        f"'b' (only in train), 'c' (only in train), ...; {LAYOUT}, "
        'or config.dataset.eval_split=val to hold out a part of the training set'
    )


def test_only_one_class(root):
    for split in ('train', 'test'):
        shutil.rmtree(root / split / 'b')
    shutil.rmtree(root / 'test')  # The missing test set is not what is wrong first.
    for split in ('train', 'test'):
        assert error_of(load, split, root=root) == (
            f"config.dataset.root='{root}': expected at least two classes, but 'a' is the only one; to pretrain "
            f'without labels put the images directly into DIR/train, or set config.dataset.root={root}/train/a'
        )


def test_sizes_differ(root):
    first, other = root / 'train' / 'a' / '0.png', root / 'train' / 'b' / '1.png'
    save_image(other, size=(6, 5))
    assert error_of(load, root=root) == (
        f"config.dataset.source_size=0: '{first}' is 4 x 4 pixels, '{other}' is 6 x 5; "
        'set config.dataset.source_size to resize them to one size, '
        'or config.dataset.max_gib=0 to read them on demand'
    )
    assert load(root=root, source_size=4).images.shape == (6, 3, 4, 4)


def test_images_far_larger_than_the_memory_are_refused_before_one_is_made(root):
    message = error_of(load, root=root, source_size=10**6, max_gib=0.0)
    assert message.startswith('config.dataset.source_size=1000000: one image takes 2.79e+03 GiB, but only')


@pytest.mark.parametrize('locked', ['.', 'train', 'train/b', 'train/b/1.png'])
def test_permission_denied(locked):
    folder = Path(tempfile.mkdtemp())  # tmp_path belongs to a folder that only its owner may enter
    try:
        folder.chmod(0o755)
        for split in ('train', 'test'):
            for name in 'ab':
                for i in range(2):
                    save_image(folder / split / name / f'{i}.png')
        path = folder / locked
        path.chmod(0)
        superuser = os.geteuid() == 0
        if superuser:  # to whom nothing is denied
            os.seteuid(65534)
        try:
            message = error_of(load, root=folder)
        finally:
            if superuser:
                os.seteuid(0)
        assert 'ermission denied' in message and repr(str(path)) in message
    finally:
        if path.is_dir():
            path.chmod(0o755)
        shutil.rmtree(folder)
