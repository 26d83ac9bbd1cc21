"""Images of any number of channels: TIFF in its layouts, arrays, ranges of values, and refusals in one line."""

import io
import itertools
import re
import sys

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from byol_func.data import decoding, stacks
from byol_func.utils import dataset
from image_folders import load
from runs import error_of

RANGE = (-200, 1000)


def values(channels=4, height=9, width=7, dtype=np.uint16, seed=0):
    """Values in 0..1000, `[C, H, W]`."""
    return np.random.default_rng(seed).integers(0, 1001, (channels, height, width)).astype(dtype)


def expected(array):
    """The definition: RANGE becomes 0..255, halves are rounded up; `[H, W, C]`."""
    return np.floor((array.transpose(1, 2, 0) + 200.0) * (255 / 1200) + 0.5)


def decode(path, channels=4, value_range=RANGE, **options):
    return decoding.decode_file(str(path), decoding.Form(value_range=value_range, channels=channels, **options))


def refusal(path, *arguments, **options):
    message = error_of(decode, path, *arguments, errors=decoding.BadImage, **options)
    assert message.startswith(f'cannot read the image {str(path)!r} (')
    return message


LAYOUTS = {
    'pages': dict(photometric='minisblack'),
    'imagej': dict(imagej=True, metadata={'axes': 'CYX'}),
    'ome': dict(ome=True, metadata={'axes': 'CYX'}),
    'planes': dict(photometric='minisblack', planarconfig='separate'),
    'pixels': dict(photometric='minisblack', planarconfig='contig'),
    'tiles': dict(photometric='minisblack', planarconfig='contig', tile=(16, 16), compression='zlib'),
    'big': dict(photometric='minisblack', bigtiff=True, byteorder='>'),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_of_tiff_gives_its_channels(tmp_path, layout):
    array, options = values(), LAYOUTS[layout]
    stored = array.transpose(1, 2, 0) if options.get('planarconfig') == 'contig' else array
    tifffile.imwrite(tmp_path / 'x.tif', stored, **options)
    np.testing.assert_array_equal(decode(tmp_path / 'x.tif'), expected(array))


def test_pages_that_pillow_wrote(tmp_path):
    pages = [Image.fromarray(page) for page in values()]
    pages[0].save(tmp_path / 'x.tif', save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(decode(tmp_path / 'x.tif'), expected(values()))


@pytest.mark.parametrize('dtype', ['uint16', '>u2', 'int16', 'uint32', 'int64', 'float32', 'float64'])
@pytest.mark.parametrize('axes', [(0, 1, 2), (1, 2, 0)])
def test_arrays_of_either_layout_and_any_type(tmp_path, dtype, axes):
    np.save(tmp_path / 'x.npy', values(dtype=dtype).transpose(axes))
    np.testing.assert_array_equal(decode(tmp_path / 'x.npy'), expected(values()))


def test_bytes_stay_as_they_are_and_16_bits_fill_them(tmp_path):
    array = values().astype(np.uint8)
    np.save(tmp_path / 'x.npy', array)
    np.testing.assert_array_equal(decode(tmp_path / 'x.npy'), array.transpose(1, 2, 0))
    np.save(tmp_path / 'x.npy', array.astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode(tmp_path / 'x.npy', value_range=()), array.transpose(1, 2, 0))


def test_a_range_for_each_channel(tmp_path):
    array = values(2)
    np.save(tmp_path / 'x.npy', np.stack([array[0], array[1] / 500]))
    found = decode(tmp_path / 'x.npy', 2, (RANGE, (-0.4, 2)))
    assert np.abs(found - expected(array)).max() <= 1  # The division may round a half down.


def test_one_and_three_channels(tmp_path):
    np.save(tmp_path / 'x.npy', values(1)[0])
    np.testing.assert_array_equal(decode(tmp_path / 'x.npy', 1), expected(values(1)))
    tifffile.imwrite(tmp_path / 'x.tif', values(3).transpose(1, 2, 0), photometric='rgb')
    np.testing.assert_array_equal(decode(tmp_path / 'x.tif', 3), expected(values(3)))
    for name in ('x.png', 'x.jpg'):
        Image.new('L', (8, 6), 77).save(tmp_path / name)
        assert decode(tmp_path / name, 3).tolist() == decode(tmp_path / name, 0).tolist()
        Image.new('RGB', (8, 6), (9, 8, 7)).save(tmp_path / name)
        grey = decoding.decode_file(str(tmp_path / name), decoding.Form(grayscale=True))
        np.testing.assert_array_equal(decode(tmp_path / name, 1), grey)


def test_channels_are_resized_as_pictures_are(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    np.save(tmp_path / 'x.npy', array)
    resized = decode(tmp_path / 'x.npy', source_size=16)
    picture = ImageOps.fit(Image.fromarray(array[:, :, :3]), (16, 16), Image.Resampling.BICUBIC)
    assert resized.shape == (16, 16, 4)
    np.testing.assert_array_equal(resized[:, :, :3], np.asarray(picture))


def test_other_numbers_of_channels_are_named(tmp_path):
    tifffile.imwrite(tmp_path / 'x.tif', values(5), photometric='minisblack')
    assert '(5 channels; expected 4, as config.dataset.channels says)' in refusal(tmp_path / 'x.tif')
    np.save(tmp_path / 'x.npy', values(5))
    assert '(5 channels in an array of 5 x 9 x 7; expected [4, H, W] or [H, W, 4])' in refusal(tmp_path / 'x.npy')
    tifffile.imwrite(tmp_path / 'x.tif', values(6).reshape(2, 3, 9, 7), imagej=True, metadata={'axes': 'ZCYX'})
    assert '(an array of 2 x 3 x 9 x 7 (ZCYX); expected a single image' in refusal(tmp_path / 'x.tif', 6)
    Image.new('RGBA', (8, 8)).save(tmp_path / 'x.png')
    expectation = '(neither TIFF nor .npy; expected one of them for config.dataset.channels=4)'
    assert expectation in refusal(tmp_path / 'x.png')


def test_values_that_have_no_level_are_refused(tmp_path):
    float_advice = 'float32 values need a config.dataset.value_range'
    for array, part in (
        (values(dtype=np.float32), float_advice),
        (values().astype(np.int16) - 9, 'int16 values outside 0..65535'),
        (values().astype(bool), 'values of type bool; expected integers or floats'),
        (values().astype(np.complex64), 'values of type complex64'),
        (values()[:, :0], 'an array of 4 x 0 x 7; expected [4, H, W]'),
        (values()[0], 'an array of 9 x 7; expected [4, H, W]'),
    ):
        np.save(tmp_path / 'x.npy', array)
        assert part in refusal(tmp_path / 'x.npy', value_range=())
    broken = values(dtype=np.float32)
    broken[1, 2, 3] = np.nan
    np.save(tmp_path / 'x.npy', broken)
    assert 'values that are not finite' in refusal(tmp_path / 'x.npy')


@pytest.mark.parametrize('photometric', ['palette', 'miniswhite'])
def test_values_of_tiff_that_are_no_intensities_are_refused(tmp_path, photometric):
    colormap = dict(colormap=np.zeros((3, 256), np.uint16)) if photometric == 'palette' else {}
    tifffile.imwrite(tmp_path / 'x.tif', values(1)[0].astype(np.uint8), photometric=photometric, **colormap)
    message = f'values of the kind {photometric.upper()}; expected MINISBLACK, RGB or SEPARATED'
    assert message in refusal(tmp_path / 'x.tif', 1)


class _Bomb:
    def __reduce__(self):
        return exec, ('import sys; sys.bombed = True',)


def test_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / 'x.npy', np.array([[[_Bomb()]]], dtype=object), allow_pickle=True)
    assert 'values of type object' in refusal(tmp_path / 'x.npy', 1)
    np.savez(tmp_path / 'x.npz', values())
    (tmp_path / 'x.npz').rename(tmp_path / 'y.npy')
    assert 'neither TIFF nor .npy' in refusal(tmp_path / 'y.npy')
    assert not hasattr(sys, 'bombed')


@pytest.mark.parametrize('ending', ['tif', 'npy'])
def test_damaged_files_are_refused(tmp_path, ending):
    path = tmp_path / f'x.{ending}'
    if ending == 'tif':  # The values come last.
        tifffile.imwrite(path, values().transpose(1, 2, 0), photometric='minisblack', planarconfig='contig')
    else:
        np.save(path, values())
    data = path.read_bytes()
    for size in (9, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        message = refusal(path)
        if ending == 'tif':
            assert 'a damaged or truncated TIFF file: ' in message
        elif size > 100:
            assert re.search(r'truncated: \d+ bytes of an array of 4 x 9 x 7; expected 504', message)
    whole = io.BytesIO()
    header = {'descr': '<u2', 'fortran_order': False, 'shape': (4, 2**20, 2**20)}
    np.lib.format.write_array_header_1_0(whole, header)
    path.write_bytes(whole.getvalue())  # Eight TiB that are not there.
    refusal(path)


def test_a_file_says_so_if_tifffile_is_missing(monkeypatch):
    stacks._tifffile.cache_clear()
    monkeypatch.setitem(sys.modules, 'tifffile', None)
    message = error_of(stacks.check_reader, ['a.npy', 'b.TIFF'], 4)
    assert message.startswith('config.dataset.channels=4: ') and "pip install tifffile, or 'byol_func[tiff]'" in message
    stacks.check_reader(['a.npy'], 4)
    stacks.check_reader(['a.tif'], 0)


# --- Folders


def make_folder(root, channels=4, **options):
    for (split, name), seed in zip(itertools.product(('train', 'test'), 'ab'), range(4), strict=True):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(2):
            array = values(channels, 24, 20, seed=10 * seed + i, **options)
            if i:
                np.save(folder / f'{i}.npy', array)
            else:
                tifffile.imwrite(folder / f'{i}.tif', array, photometric='minisblack')
    return root


@pytest.mark.parametrize('max_gib', [1.0, 0.0])
def test_a_folder_in_memory_and_streamed(tmp_path, max_gib):
    root = make_folder(tmp_path / 'images')
    data = load(root, channels=4, value_range=RANGE, max_gib=max_gib)
    assert data.image_shape == (4, 20, 20) and data.num_examples == 4
    images = data.batch(torch.arange(4))['images']
    np.testing.assert_array_equal(images[1].permute(1, 2, 0), decode(root / 'train/a/1.npy', source_size=20))
    cached = load(root, channels=4, value_range=RANGE, max_gib=max_gib, cache_dir=str(tmp_path / 'cache'))
    assert torch.equal(cached.batch(torch.arange(4))['images'], images)


def test_a_file_with_other_channels_is_left_out_or_refused(tmp_path, caplog):
    root = make_folder(tmp_path / 'images')
    np.save(root / 'train/a/2.npy', values(3, 24, 20))
    named = f'{str(root / "train/a/2.npy")!r} (3 channels in an array of 3 x 24 x 20; expected [4, H, W] or [H, W, 4])'
    message = error_of(load, root, channels=4)
    assert message.startswith(f'config.dataset.root={str(root)!r}: cannot read the image {named}; repair or remove it')
    with caplog.at_level('WARNING', logger='absl'):
        assert load(root, channels=4, max_bad_fraction=0.2).num_examples == 4
    assert f'Skipped bad file 1 of at most 1: cannot read the image {named}' in caplog.text


def test_other_formats_beside_them_are_counted(tmp_path, caplog):
    root = make_folder(tmp_path / 'images')
    for name in 'ab':
        Image.new('RGB', (8, 8)).save(root / 'train' / name / 'preview.png')
    with caplog.at_level('WARNING', logger='absl'):
        assert load(root, channels=4).num_examples == 4
    because = 'because of config.dataset.channels=4; found 2 of .png'
    assert f'ignored files with other endings than .tif, .tiff or .npy, {because}' in caplog.text
    for path in [*root.rglob('*.tif'), *root.rglob('*.npy')]:
        path.unlink()
    assert 'expected files with the ending .tif, .tiff or .npy' in error_of(load, root, channels=4)
    assert load(root).num_examples == 2


def test_arrays_are_no_images_unless_channels_are_given(tmp_path):
    root = make_folder(tmp_path / 'images')
    assert load(root).num_examples == 2
    assert load(make_folder(tmp_path / 'three', 3), channels=3).num_examples == 4


def test_dark_and_clipped_values_are_reported(tmp_path, caplog):
    root = make_folder(tmp_path / 'images')
    with caplog.at_level('WARNING', logger='absl'):
        load(root, channels=4)
        assert 'values of at most 1000 of 65535' in caplog.text or 'values of at most 999 of 65535' in caplog.text
        caplog.clear()
        load(root, channels=4, value_range=((0, 2000), (0, 2000), (0, 100), (0, 2000)))
    (line,) = caplog.messages
    assert 'in channel 2 of 0 to 3; all above config.dataset.value_range=((0, 2000), (0, 2000), (0, 100)' in line


def test_settings_that_contradict_each_other():
    source = dict(
        name='folder', root='x', source_size=0, max_gib=1.0, max_bad_fraction=0.0, num_workers=0, cache_dir=''
    )
    for options, message in (
        (dict(grayscale=True, channels=4), 'config.dataset.channels=4: expected 0 or 1 beside'),
        (dict(grayscale=False, channels=4, name='digits'), 'expected 0 unless config.dataset.name is folder or shards'),
        (dict(grayscale=False, channels=4, value_range=((0, 1), (0, 1))), '2 pairs; expected one for each of'),
        (dict(grayscale=False, value_range=((0, 1),)), '1 pair; expected one for each of config.dataset.channels=0'),
        (dict(grayscale=False, channels=2, value_range=((0, 1), (1, 0))), 'expected the smallest and the largest'),
        (dict(grayscale=False, channels=2, value_range=((0, 1), 3)), 'expected the smallest and the largest'),
    ):
        assert message in error_of(dataset.load, 'train', **source | options)
