"""Images as cameras write them: turned by EXIF, or with fewer values than 16 bits can hold."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image

from byol_func.data import decoding, folder, listing
from byol_func.errors import UserError
from byol_func.utils import dataset
from cli import run_launch, succeed
from image_folders import flags, load, smooth

# What undoes each of EXIF's orientations, on [H, W, C].
_TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: np.rot90(x),
}


def save_turned(path, orientation, mode='RGB', seed=0):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    smooth(np.random.default_rng(seed), 24, 36).convert(mode).save(path, exif=exif)


@pytest.mark.parametrize('orientation', _TURNS)
@pytest.mark.parametrize('suffix, mode', [('.jpg', 'RGB'), ('.jpg', 'L'), ('.png', 'RGB'), ('.webp', 'RGB')])
def test_orientation(tmp_path, suffix, mode, orientation):
    path = tmp_path / f'photo{suffix}'
    save_turned(path, orientation, mode)
    stored = decoding.decode_file(str(path))
    turned = decoding.decode_file(str(path), decoding.Form(exif_orientation=True))
    assert stored.shape == (24, 36, 3)
    np.testing.assert_array_equal(turned, _TURNS[orientation](stored))


@pytest.fixture
def photographs(tmp_path):
    for split in ('train', 'test'):
        for i, name in enumerate('ab'):
            for j in range(4):
                save_turned(tmp_path / 'photos' / split / name / f'{j}.jpg', 1 + 4 * i + j, seed=4 * i + j)
    return tmp_path / 'photos'


def test_memory_cache_and_stream_agree(photographs, tmp_path):
    expected = load(photographs, exif_orientation=True).images
    assert not torch.equal(expected, load(photographs).images)
    cached = dict(exif_orientation=True, cache_dir=str(tmp_path / 'cache'))
    load(photographs, cache_dir=cached['cache_dir'])  # Of other pixels.
    for kwargs in (cached, cached, dict(exif_orientation=True, max_gib=0.0), cached | dict(max_gib=0.0)):
        found = torch.cat([batch['images'] for batch in dataset.eval_batches(load(photographs, **kwargs), 3)])
        assert torch.equal(found, expected)


def test_a_folder_is_turned_by_default_and_a_run_of_before_goes_on_with_the_flag(photographs, tmp_path):
    small = flags(photographs, dataset__num_workers=0, num_epochs=1, final_linear_eval=False)
    assert 'exif_orientation=False' not in ' '.join(small)
    succeed(*small, '--config.dataset.exif_orientation=False', '--workdir=run', cwd=tmp_path)
    refused = run_launch(*small, '--workdir=run', cwd=tmp_path)
    assert refused.code and 'config.dataset.exif_orientation=False, not True' in refused.stderr


def _save_twelve_bits(root, dtype=np.uint16):
    rng = np.random.default_rng(0)
    for split in ('train', 'test'):
        for name in 'ab':
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                values = rng.integers(0, 4096, (8, 8)).astype(dtype)
                values[0, :3] = 0, 4095, 2048
                Image.fromarray(values).save(root / split / name / f'{i}.tif')
    return root


def test_values_that_end_at_4095(tmp_path, caplog):
    root = _save_twelve_bits(tmp_path)
    assert load(root, source_size=0).images.max() == 16
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f'{root}/train/a/0.tif has 16 bits, but values of at most 4095' in warning
    assert 'config.dataset.value_range=(0,4095)' in warning
    caplog.clear()
    images = load(root, source_size=0, value_range=(0, 4095)).images
    assert images[0, :, 0, :3].tolist() == [[0, 255, 128]] * 3 and not caplog.records
    assert not caplog.records
    assert load(root, source_size=0, value_range=(2048, 4095)).images[0, 0, 0, :3].tolist() == [0, 255, 0]
    assert not caplog.records
    load(root, source_size=0, value_range=(0, 1023))
    assert 'values of up to 4095; all above config.dataset.value_range=(0, 1023) become white' in caplog.text


@pytest.mark.parametrize('dtype', [np.float32, np.int32])
def test_a_range_makes_thirty_two_bits_readable(tmp_path, dtype):
    root = _save_twelve_bits(tmp_path, dtype)
    assert load(root, source_size=0, value_range=(0, 4095)).images[0, 0, 0, :3].tolist() == [0, 255, 128]


@pytest.mark.parametrize('values', [(4095,), (5, 5), (9, 1)])
def test_a_range_that_is_none(tmp_path, values):
    with pytest.raises(UserError, match=r'config.dataset.value_range=.*expected the smallest and the largest value'):
        load(_save_twelve_bits(tmp_path), value_range=values)


def test_images_that_do_not_fit_the_machine(tmp_path, monkeypatch):
    root = _save_twelve_bits(tmp_path)
    monkeypatch.setattr('byol_func.runtime.memory.available_gib', lambda: 2e-6)  # One image and no more.
    with pytest.raises(UserError, match='max_gib=1.0: the images of train take .* GiB, but only 2e-06 GiB'):
        load(root)
    assert isinstance(load(root, max_gib=0.0), dataset.Stream)


def _png(values):
    """A PNG file of 16 bits, which Pillow cannot write."""
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in values)
    header = struct.pack('>IIBBBBB', values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    parts = chunk(b'IHDR', header), chunk(b'IDAT', zlib.compress(rows)), chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


@pytest.mark.parametrize(
    'ending, channels, warns', [('tif', 0, True), ('png', 0, True), ('tif', 3, False), ('png', 3, True)]
)
def test_colours_of_16_bits_are_reported(ending, channels, warns, tmp_path, caplog):
    """Pillow keeps the upper 8 bits, whatever value_range says."""
    values = np.random.default_rng(0).integers(0, 4096, (2, 8, 8, 3)).astype(np.uint16)
    for i, image in enumerate(values):
        path = tmp_path / f'{i}.{ending}'
        if ending == 'tif':
            tifffile.imwrite(path, image, photometric='rgb')
        else:
            path.write_bytes(_png(image))
    form = decoding.Form(channels=channels)
    files = listing.list_files('train', str(tmp_path), False, channels)
    folder.warn_of_range(files, form)
    assert ('has colours of 16 bits' in caplog.text and 'config.dataset.channels=3' in caplog.text) == warns
    pixels = decoding.decode_file(str(path), form)
    assert (pixels == values[1] >> 8).all() == warns
