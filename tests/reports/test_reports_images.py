"""Other people's reports about images and folders, tried here; the numbers are those of README.md."""

import errno
import functools
import io
import os
import struct
import warnings

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import image_folders
import runs
from byol_func.data import decoding, folder, label_files, streaming
from byol_func.errors import UserError
from byol_func.utils import dataset

load = functools.partial(image_folders.load, source_size=0)
error_of = functools.partial(runs.error_of, errors=(UserError, decoding.BadImage))


def save(path, color='red', size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, color).save(path)


def noise(size=(32, 32)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


def jpeg(image=None):
    file = io.BytesIO()
    (image or noise()).save(file, 'JPEG', quality=95)
    return file.getvalue()


@pytest.fixture
def root(tmp_path):
    """Classes 'a' and 'b', three training images and one test image each."""
    for i, name in enumerate('ab'):
        for j in range(3):
            save(tmp_path / 'images/train' / name / f'{j}.png', (100 * i, j, 7))
        save(tmp_path / 'images/test' / name / '0.png', (100 * i, 50, 7))
    return tmp_path / 'images'


# --- files


def test_01_a_phone_saves_two_pictures_as_jpg(tmp_path):
    path = tmp_path / 'photo.jpg'
    Image.new('RGB', (8, 6), 'red').save(path, 'MPO', save_all=True, append_images=[Image.new('RGB', (4, 3), 'blue')])
    pixels = decoding.decode_file(str(path))
    assert pixels.shape == (6, 8, 3) and pixels[0, 0, 0] > 200 > 50 > pixels[0, 0, 2]


def test_02_a_large_image_is_no_warning(tmp_path, monkeypatch):
    save(tmp_path / 'large.png', size=(12, 12))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert decoding.decode_file(str(tmp_path / 'large.png')).shape == (12, 12, 3)


def test_03_too_large_an_image_is_named(tmp_path, monkeypatch):
    save(tmp_path / 'huge.png', size=(12, 12))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
    message = error_of(decoding.decode_file, str(tmp_path / 'huge.png'))
    assert 'huge.png' in message and '144 pixels' in message


def test_04_a_jpeg_with_a_giant_in_its_header_takes_no_memory(tmp_path, monkeypatch):
    data = bytearray(jpeg(Image.new('RGB', (16, 16))))
    place = data.find(b'\xff\xc0')
    data[place + 5 : place + 9] = struct.pack('>HH', 60000, 60000)
    (tmp_path / 'x.jpg').write_bytes(data)
    monkeypatch.setattr(torchvision.io, 'decode_jpeg', None)  # Which would take eleven gigabytes.
    assert '3600000000 pixels' in error_of(decoding.decode_file, str(tmp_path / 'x.jpg'))


@pytest.mark.parametrize('options', [{}, dict(progressive=True), dict(optimize=True), dict(comment=b'x' * 999)])
def test_04_ordinary_jpegs_still_take_the_fast_way(tmp_path, options, monkeypatch):
    noise().save(tmp_path / 'x.jpg', **options)
    monkeypatch.setattr(decoding, '_pillow', None)
    assert decoding.decode_file(str(tmp_path / 'x.jpg')).shape == (32, 32, 3)


@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
def test_05_the_orientation_of_a_photo_is_not_looked_at(tmp_path, suffix):
    image = noise((16, 32))
    exif = image.getexif()
    exif[0x112] = 6
    image.save(tmp_path / f'x{suffix}', exif=exif)
    assert decoding.decode_file(str(tmp_path / f'x{suffix}')).shape == (16, 32, 3)


def test_06_sixteen_bits_keep_their_range(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], '>u2')
    for name in ('x.png', 'x.tif'):
        Image.fromarray(values if name == 'x.tif' else values.astype(np.uint16)).save(tmp_path / name)
        assert decoding.decode_file(str(tmp_path / name))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_07_a_palette_with_transparency_is_no_warning(tmp_path):
    image = Image.new('P', (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / 'x.png', transparency=bytes([255, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert decoding.decode_file(str(tmp_path / 'x.png')).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'L', '1', 'CMYK', 'YCbCr'])
def test_08_whatever_the_channels_three_come_out(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / 'x.tif')
    assert decoding.decode_file(str(tmp_path / 'x.tif')).shape == (4, 4, 3)


@pytest.mark.parametrize('form', ['PNG', 'GIF', 'WEBP', 'BMP', 'TIFF'])
def test_09_another_format_under_the_name_of_a_jpeg(tmp_path, form):
    Image.new('RGB', (4, 4), (255, 0, 0)).save(tmp_path / 'x.jpg', form)
    assert abs(decoding.decode_file(str(tmp_path / 'x.jpg'))[0, 0].astype(int) - [255, 0, 0]).max() < 4


def test_10_a_jpeg_that_ends_too_early_is_bad(tmp_path):
    (tmp_path / 'x.jpg').write_bytes(jpeg()[:-200])
    assert 'truncated' in error_of(decoding.decode_file, str(tmp_path / 'x.jpg'))


def test_11_a_jpeg_with_a_hole_and_an_end_is_that_of_pillow(tmp_path):
    data = jpeg()
    (tmp_path / 'x.jpg').write_bytes(data[: len(data) // 2] + b'\xff\xd9')
    with Image.open(tmp_path / 'x.jpg') as image:
        np.testing.assert_array_equal(decoding.decode_file(str(tmp_path / 'x.jpg')), np.asarray(image))


def test_12_the_bad_file_is_named_on_one_line(root):
    (root / 'train/a/new\nline.png').write_text('no image')
    assert "new\\nline.png' (not in a format" in error_of(load, root)


@pytest.mark.parametrize('grayscale, channels', [(False, 3), (True, 1)])
def test_13_images_of_one_channel(root, grayscale, channels):
    for path in root.rglob('*.png'):
        Image.open(path).convert('L').save(path)
    assert load(root, grayscale=grayscale).images.shape == (6, channels, 4, 4)


# --- links


@pytest.mark.parametrize('place', ['0.png', '2.png'])
@pytest.mark.parametrize('how', ['memory', 'stream', 'cache'])
def test_14_a_link_to_nothing_is_a_bad_file(root, tmp_path, place, how):
    path = root / 'train/a' / place
    path.unlink()
    path.symlink_to(tmp_path / 'nowhere.png')
    kwargs = dict(memory={}, stream=dict(max_gib=0.0), cache=dict(source_size=4, cache_dir=str(tmp_path / 'cache')))
    if how != 'stream':  # Which is told when it is read.
        assert f"cannot read the image '{path}' (No such file or directory)" in error_of(load, root, **kwargs[how])
    data = load(root, max_bad_fraction=0.5, **kwargs[how])
    assert data.num_examples == (6 if how == 'stream' else 5)


def test_15_a_link_to_a_folder_elsewhere_is_followed(root, tmp_path):
    (root / 'train/b').rename(tmp_path / 'elsewhere')
    (root / 'train/b').symlink_to(tmp_path / 'elsewhere')
    assert dataset.class_counts(load(root)) == [3, 3]


@pytest.mark.parametrize('links', [['train/a/x'], ['train/a/x', 'train/b/x'], ['train/a/y/x']])
def test_16_a_link_to_a_folder_around_it_is_refused(root, links):
    for link in links:
        (root / link).parent.mkdir(exist_ok=True)
        (root / link).symlink_to(root / 'train')
    message = error_of(load, root)
    assert f"cannot read '{root / links[0]}' (a link to a folder that contains it)" in message


@pytest.mark.parametrize('kwargs', [{}, dict(max_gib=0.0, source_size=4)])
def test_17_a_pipe_with_the_name_of_an_image_is_a_bad_file(root, kwargs):
    os.mkfifo(root / 'train/a/x.png')
    data = load(root, max_bad_fraction=0.5, **kwargs)
    assert data.num_examples == 6 + bool(kwargs)
    if kwargs:
        batches = list(dataset.eval_batches(data, 4))
        assert sum(len(batch['labels']) for batch in batches) == 6
    else:
        assert "x.png' (not a file)" in error_of(load, root)


def test_18_links_to_images_are_read(root, tmp_path):
    for path in root.rglob('*.png'):
        target = tmp_path / f'{path.parent.name}{path.parent.parent.name}{path.name}'
        path.rename(target)
        path.symlink_to(target)
    assert load(root).images.shape == (6, 3, 4, 4)


# --- folders


def test_19_companions_that_macos_leaves_are_passed_over(root, caplog):
    caplog.set_level('INFO', logger='absl')
    (root / 'train/a/._0.png').write_bytes(b'\0\5\26\7\0\2\0\0Mac OS X')
    assert load(root).num_examples == 6
    assert '._0.png' in caplog.text


def test_20_what_a_run_writes_beside_the_images_is_no_class(root):
    save(root / 'runs/x/augmentations.png')
    assert load(root).class_names == ('a', 'b')


def test_21_a_list_of_labelled_files_may_leave_out_a_class(root, tmp_path):
    (tmp_path / 'list').write_text('a/0.png\r\na/2.png\r\n')
    data = load(root)
    part = data.take(label_files.listed(data, str(tmp_path / 'list'), 'config.fine_tune.label_files'))
    assert part.labels.tolist() == [0, 0] and part.num_classes == 2


def test_22_classes_are_sorted_as_words_and_named(tmp_path):
    for split in ('train', 'test'):
        for name in ('1', '2', '10'):
            save(tmp_path / split / name / 'x.png', (int(name), 0, 0))
    for split in ('train', 'test'):
        data = load(tmp_path, split)
        assert data.class_names == ('1', '10', '2')
        assert [data.class_names[label] for label in data.labels] == [str(int(i[0, 0, 0])) for i in data.images]


@pytest.mark.parametrize('empty', [False, True], ids=['23 missing', '24 empty'])
def test_23_24_a_class_without_test_images_moves_no_label(tmp_path, empty):
    for name in ('0', '180', '270', '90'):
        for split in ('train', 'test'):
            save(tmp_path / split / name / 'x.png')
    (tmp_path / 'test/180/x.png').unlink()
    if empty:
        assert f"no images in '{tmp_path / 'test/180'}'" in error_of(load, tmp_path, 'test')
    else:
        (tmp_path / 'test/180').rmdir()
    assert load(tmp_path, 'test', allow_empty=empty).labels.tolist() == [0, 2, 3]


def test_25_a_class_without_training_images_is_named(root):
    (root / 'train/c').mkdir()
    assert f"no images in '{root / 'train/c'}'" in error_of(load, root)


def test_26_27_28_images_without_labels(tmp_path):
    for i in range(10):
        save(tmp_path / f'train/{i}.png', (i, 0, 0))
    source = dict(
        name='folder',
        root=str(tmp_path),
        source_size=0,
        grayscale=False,
        max_gib=1.0,
        num_workers=0,
        max_bad_fraction=0.0,
        cache_dir='',
        eval_split='test',
        val_fraction=0.1,
    )
    train, test = dataset.load_train_and_test(fraction=1.0, **source)
    assert (train.num_examples, train.num_classes, test) == (10, 0, None)
    assert dataset.load_train_and_test(fraction=0.5, **source)[0].num_examples == 5


def test_29_the_folder_of_one_class_in_the_place_of_the_root(root):
    """Images right under the root have one meaning: images without labels."""
    data = load(root / 'train/a')
    assert (data.num_examples, data.num_classes) == (3, 0)


# --- reading


def test_30_a_last_batch_of_one_image_does_not_come(root):
    (root / 'train/a/0.png').unlink()
    data = load(root)
    batches = [dataset.train_batch(data, step, seed=0, batch_size=2) for step in range(5)]
    assert {len(batch['images']) for batch in batches} == {2}
    seen = torch.cat([batch['images'][:, :, 0, 0] for batch in batches])
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, data.images[:, :, 0, 0].tolist() * 2))


def test_31_as_many_threads_as_the_process_may_use_processors(root, monkeypatch):
    save(root / 'train/a/0.png')
    (root / 'train/a/0.bmp').write_bytes(b'x' * 5000)  # The first file, and a large one.
    asked = []

    class Pool(folder.ThreadPoolExecutor):
        def __init__(self, workers):
            asked.append(workers)
            super().__init__(1)

    monkeypatch.setattr(os, 'cpu_count', lambda: 192)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {3, 4, 5, 6}, raising=False)
    monkeypatch.setattr(folder, 'ThreadPoolExecutor', Pool)
    load(root, max_bad_fraction=0.5)
    assert asked == [4]


@pytest.mark.parametrize(
    'error, words',
    [
        (OSError(errno.EMFILE, 'Too many open files'), 'cannot start them (Too many open files); expected fewer'),
        (OSError(errno.ENOSPC, 'No space left on device'), 'device); expected 0, or more room in /dev/shm'),
    ],
    ids=['32 start', 'full /dev/shm'],
)
def test_32_workers_that_cannot_start(root, error, words, monkeypatch):
    def fail(loader):
        raise error

    monkeypatch.setattr(torch.utils.data.DataLoader, '__iter__', fail)
    data = load(root, max_gib=0.0, num_workers=2)
    assert words in error_of(lambda: list(dataset.eval_batches(data, 4)))


@pytest.mark.parametrize(
    'error',
    [
        OSError(errno.EMFILE, 'Too many open files'),
        RuntimeError('received 0 items of ancdata'),
        RuntimeError('Too many open files. Communication with the workers is no longer possible.'),
    ],
)
def test_33_too_many_open_files_later(root, error, monkeypatch):
    def fail(loader):
        raise error
        yield

    monkeypatch.setattr(torch.utils.data.DataLoader, '__iter__', fail)
    data = load(root, max_gib=0.0, num_workers=2)
    message = error_of(lambda: list(streaming.batches(data, [streaming.Job(np.array([0]), {}, 0)])))
    assert message.startswith('config.dataset.num_workers=2: too many open files') and 'ulimit -n' in message


def test_34_the_cache_does_without_posix_fallocate(root, tmp_path, monkeypatch):
    monkeypatch.delattr(os, 'posix_fallocate')
    for _ in range(2):
        assert load(root, source_size=4, cache_dir=str(tmp_path / 'cache')).images.shape == (6, 3, 4, 4)
