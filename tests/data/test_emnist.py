"""EMNIST: six splits in torchvision's layout, upright, labels from 0, and broken files in one line."""

import functools
import json
import struct

import numpy as np
import pytest
import torch
from torchvision.datasets import EMNIST

import runs
from byol_func.errors import UserError
from byol_func.utils import dataset
from cli import TINY_NETWORK, config, run_launch, succeed

NUM_CLASSES = dict(byclass=62, bymerge=47, balanced=47, letters=26, digits=10, mnist=10)


def write_idx(path, array):
    header = struct.pack('>HBB', 0, 8, array.ndim) + struct.pack(f'>{array.ndim}I', *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_emnist(root, split, per_class=2):
    """An EMNIST of noise; each class has as many images. Returns images and labels as in the files."""
    raw = root / 'EMNIST' / 'raw'
    raw.mkdir(parents=True, exist_ok=True)
    low = 1 if split == 'letters' else 0
    labels = np.arange(low, low + NUM_CLASSES[split]).repeat(per_class)
    rng = np.random.default_rng(0)
    rng.shuffle(labels)
    images = rng.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
    for part in ('train', 'test'):
        write_idx(raw / f'emnist-{split}-{part}-images-idx3-ubyte', images)
        write_idx(raw / f'emnist-{split}-{part}-labels-idx1-ubyte', labels)
    return images, labels


def load(root, split='letters', part='train', **kwargs):
    defaults = dict(source_size=0, grayscale=False, max_gib=1.0, max_bad_fraction=0.0, num_workers=0, cache_dir='')
    return dataset.load(part, name=f'emnist_{split}', root=str(root), **defaults | kwargs)


error_of = functools.partial(runs.error_of, load)


@pytest.mark.parametrize('split', NUM_CLASSES)
@pytest.mark.parametrize('part', ['train', 'test'])
def test_images_labels_and_class_names(tmp_path, split, part):
    images, labels = write_emnist(tmp_path, split)
    data = load(tmp_path, split, part)
    assert data.images.dtype == torch.uint8 and data.images.is_contiguous()
    np.testing.assert_array_equal(data.images[:, 0], images.transpose(0, 2, 1))
    assert dataset.class_counts(data) == [2] * NUM_CLASSES[split]
    theirs = EMNIST(str(tmp_path), split, train=part == 'train')
    names = [theirs.classes[label] for label in theirs.targets]
    assert [data.class_names[label] for label in data.labels] == names
    assert 'N/A' not in data.class_names


def test_letters_stand_upright(tmp_path):
    """An L of a true letter: its long stroke is on the left, its short one at the foot."""
    upright = np.zeros((28, 28), np.uint8)
    upright[4:24, 6:9] = 255
    upright[21:24, 6:20] = 255
    write_emnist(tmp_path, 'letters')
    in_file = np.repeat(upright.T[None], 52, axis=0)
    write_idx(tmp_path / 'EMNIST/raw/emnist-letters-train-images-idx3-ubyte', in_file)
    image = load(tmp_path).images[0, 0]
    assert image[:, :14].sum() > image[:, 14:].sum() and image[14:].sum() > image[:14].sum()


def test_unknown_split():
    with pytest.raises(UserError, match='emnist_byclass, emnist_bymerge, emnist_balanced, emnist_letters'):
        load('root', 'capitals')


@pytest.mark.parametrize('kind', ['images-idx3', 'labels-idx1'])
@pytest.mark.parametrize('damage', ['empty', 'short', 'text', 'longer'])
def test_broken_files(tmp_path, kind, damage):
    write_emnist(tmp_path, 'letters')
    path = tmp_path / 'EMNIST' / 'raw' / f'emnist-letters-train-{kind}-ubyte'
    whole = path.read_bytes()
    path.write_bytes(dict(empty=b'', short=whole[:-5], text=b'<html>not found</html>', longer=whole + b'xyz')[damage])
    message = error_of(tmp_path)
    assert message.startswith(f"config.dataset.root='{tmp_path}': cannot read {path.parent}/emnist-letters-train-*")
    assert message.endswith('remove them to unpack them again')


def test_images_and_labels_of_different_numbers(tmp_path):
    _, labels = write_emnist(tmp_path, 'letters')
    write_idx(tmp_path / 'EMNIST/raw/emnist-letters-train-labels-idx1-ubyte', labels[:-1])
    assert 'images (52, 28, 28), labels (51,)' in error_of(tmp_path)


@pytest.mark.parametrize(
    'split, label, expected', [('letters', 0, '1 to 26'), ('letters', 27, '1 to 26'), ('mnist', 10, '0 to 9')]
)
def test_labels_out_of_range(tmp_path, split, label, expected):
    _, labels = write_emnist(tmp_path, split)
    labels[3] = label
    write_idx(tmp_path / f'EMNIST/raw/emnist-{split}-train-labels-idx1-ubyte', labels)
    assert error_of(tmp_path, split) == (
        f"config.dataset.root='{tmp_path}': 1 label such as {label}: expected {expected}"
    )


def test_class_without_images(tmp_path):
    _, labels = write_emnist(tmp_path, 'letters')
    labels[labels == 5] = 6
    write_idx(tmp_path / 'EMNIST/raw/emnist-letters-train-labels-idx1-ubyte', labels)
    assert "no images of the class 'e'" in error_of(tmp_path)


def test_download_without_network_says_where_to_put_the_archive(tmp_path, monkeypatch, capfd):
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    for name in ('no_proxy', 'NO_PROXY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr('urllib.request._opener', None)  # it would remember other proxies
    raw = tmp_path / 'EMNIST' / 'raw'
    raw.mkdir(parents=True)
    (raw / 'gzip.zip').write_bytes(b'of another checksum')
    message = error_of(tmp_path)
    assert message.startswith(f"config.dataset.root='{tmp_path}': cannot download EMNIST (")
    assert f"put gzip.zip from the EMNIST page, or its emnist-letters-train-* files unpacked, into '{raw}'" in message
    error_of(tmp_path / 'new' / 'below')
    assert not (tmp_path / 'new').exists()


def test_memory_and_size(tmp_path):
    write_emnist(tmp_path, 'letters')
    assert error_of(tmp_path, max_gib=1e-6).startswith('config.dataset.max_gib=1e-06: expected at least 0.001 for 52')
    assert error_of(tmp_path, source_size=32) == 'config.dataset.source_size=32: expected 0 or 28'
    assert error_of(tmp_path, grayscale=True).startswith('config.dataset.grayscale=True: expected False')


def test_a_run_from_the_command_line(tmp_path):
    write_emnist(tmp_path, 'letters', per_class=4)
    tiny = dict(
        **TINY_NETWORK,
        num_epochs=1,
        batch_size=52,
        compile=False,
        pictures=False,
        linear_eval__compare_untrained=False,
        linear_eval__num_epochs=1,
        linear_eval__batch_size=52,
        lr_schedule__warmup_epochs=0.0,
        dataset__root='.',
    )
    succeed(*config('emnist.py:letters', **tiny), '--workdir=run', cwd=tmp_path)
    summary = json.loads((tmp_path / 'run/summary.json').read_text())
    assert (summary['dataset'], summary['num_classes']) == ('emnist_letters', 26)
    outcome = run_launch(*config('emnist.py:capitals'), cwd=tmp_path)
    assert outcome.code == 1 and "PRESET='capitals': expected one of letters, balanced" in outcome.stderr
