"""Datasets by name, errors in one line, and batches as functions of (seed, step)."""

import hashlib
import pickle
import tarfile
import urllib.request

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from byol_func.utils import dataset
from runs import error_of

IMAGENET = dict(mean=(0.485, 0.456, 0.406), stddev=(0.229, 0.224, 0.225))


def load(split='train', *, name, root='', source_size=0, max_gib=1.0, **kwargs):
    kwargs = dict(grayscale=False, max_bad_fraction=0.0, num_workers=0, cache_dir='') | kwargs
    return dataset.load(split, name=name, root=str(root), source_size=source_size, max_gib=max_gib, **kwargs)


def counting_dataset(num_examples):
    """Image and label i hold the number i."""
    numbers = torch.arange(num_examples)
    images = numbers.to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
    return dataset.Dataset(images, numbers, tuple(map(str, range(num_examples))))


# --- normalize_images


def test_normalize_images_of_three_channels():
    images = torch.rand(2, 3, 5, 4)
    normalized = dataset.normalize_images(images)
    for c in range(3):
        expected = (images[:, c] - IMAGENET['mean'][c]) / IMAGENET['stddev'][c]
        torch.testing.assert_close(normalized[:, c], expected)


def test_normalize_images_of_one_channel():
    images = torch.rand(2, 1, 5, 4)
    torch.testing.assert_close(dataset.normalize_images(images), (images - 0.449) / 0.226)


@pytest.mark.parametrize('channels', [2, 4])
def test_normalize_images_of_other_numbers_of_channels(channels):
    images = torch.rand(2, channels, 5, 4)
    torch.testing.assert_close(dataset.normalize_images(images), (images - 0.449) / 0.226)


# --- digits


def test_digits_are_the_bundled_ones_split_in_each_class():
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = load('train', name='digits'), load('test', name='digits')
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert train.images.shape[1:] == test.images.shape[1:] == (1, 8, 8)
    assert train.num_examples + test.num_examples == 1797
    assert train.class_names == test.class_names == tuple('0123456789')
    for label in range(10):
        expected = np.round(digits.images[digits.target == label] * 255 / 16)[:, None]
        is_test = np.arange(len(expected)) % 5 == 4
        for split, chosen in ((train, ~is_test), (test, is_test)):
            np.testing.assert_array_equal(split.images[split.labels == label], expected[chosen])
    assert train.images.min() == 0 and train.images.max() == 255
    totals = np.bincount(digits.target)
    assert dataset.class_counts(test) == [total // 5 for total in totals]


def test_digits_do_not_change_from_call_to_call():
    first, second = load(name='digits'), load(name='digits')
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


def test_digits_splits_share_no_image():
    train, test = (
        {image.numpy().tobytes() for image in load(split, name='digits').images} for split in ('train', 'test')
    )
    assert not train & test


def test_digits_cannot_be_resized():
    assert load(name='digits', source_size=8).images.shape[2:] == (8, 8)
    assert error_of(load, name='digits', source_size=32).startswith('config.dataset.source_size=32')


# --- cifar10


def test_cifar10_from_an_archive_in_the_root(tmp_path, monkeypatch):
    """An archive of the official layout with one image per batch; its md5s replace the official."""
    folder = tmp_path / 'packing' / 'cifar-10-batches-py'
    folder.mkdir(parents=True)

    def pack(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    names = [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']
    entries = [
        pack(name, {'data': image.reshape(1, 3072), 'labels': [i]})
        for i, (name, image) in enumerate(zip(names, pixels, strict=False))
    ]
    _, meta_md5 = pack('batches.meta', {'label_names': list('abcdefghij')})
    archive = tmp_path / 'cifar-10-python.tar.gz'
    with tarfile.open(archive, 'w:gz') as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(CIFAR10, 'train_list', entries[:5])
    monkeypatch.setattr(CIFAR10, 'test_list', entries[5:])
    monkeypatch.setattr(CIFAR10, 'meta', {**CIFAR10.meta, 'md5': meta_md5})
    monkeypatch.setattr(CIFAR10, 'tgz_md5', hashlib.md5(archive.read_bytes()).hexdigest())

    for split, chosen in (('train', slice(5)), ('test', slice(5, 6))):
        loaded = load(split, name='cifar10', root=tmp_path)
        np.testing.assert_array_equal(loaded.images, pixels[chosen])
        assert loaded.images.is_contiguous() and loaded.labels.dtype == torch.int64
        assert loaded.labels.tolist() == list(range(6))[chosen]
        assert loaded.class_names == tuple('abcdefghij')


def test_cifar10_without_network_says_where_to_put_the_archive(tmp_path, monkeypatch, capfd):
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    for name in ('no_proxy', 'NO_PROXY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, '_opener', None)  # it would remember other proxies
    (tmp_path / 'cifar-10-python.tar.gz').write_bytes(b'half of an archive')
    message = error_of(load, name='cifar10', root=tmp_path)
    assert message.startswith(f"config.dataset.root='{tmp_path}': cannot download CIFAR-10")
    assert f"put cifar-10-python.tar.gz into '{tmp_path}'" in message
    assert '--config=configs/folder.py --config.dataset.root=DIR' in message
    assert 'Traceback' not in capfd.readouterr().err
    error_of(load, name='cifar10', root=tmp_path / 'new' / 'below')
    assert not (tmp_path / 'new').exists()


def test_cifar10_needs_a_root_its_own_size_and_memory(tmp_path):
    assert error_of(load, name='cifar10').startswith("config.dataset.root='': expected a folder")
    message = error_of(load, name='cifar10', root=tmp_path, source_size=64)
    assert message == 'config.dataset.source_size=64: expected 0 or 32'
    message = error_of(load, name='cifar10', root=tmp_path, max_gib=0.1)
    assert message.startswith('config.dataset.max_gib=0.1: expected at least 0.144 for 50000 images')


def test_unknown_name_split_and_size():
    message = error_of(load, name='cifar')
    assert message.startswith("config.dataset.name='cifar': expected one of folder, digits, cifar10, cifar100, ")
    assert error_of(load, 'valid', name='digits') == "split='valid': expected one of train, test"
    message = error_of(load, name='folder', root='DIR', source_size=-1)
    assert message == 'config.dataset.source_size=-1: expected 0 or a side in pixels'


# --- batches


@pytest.mark.parametrize('num_examples, batch_size', [(12, 4), (10, 4), (7, 7), (3, 8), (5, 1)])
def test_every_epoch_holds_every_example_once(num_examples, batch_size):
    kwargs = dict(seed=3, num_examples=num_examples, batch_size=batch_size)
    steps = 4 * num_examples  # the batches of 4 * batch_size epochs, without a rest
    batches = [dataset.batch_indices(step, **kwargs) for step in range(steps)]
    assert all(batch.shape == (batch_size,) and batch.dtype == torch.int64 for batch in batches)
    epochs = torch.cat(batches).reshape(-1, num_examples)
    assert (epochs.sort(dim=1).values == torch.arange(num_examples)).all()


def test_batches_depend_on_seed_and_step_alone():
    kwargs = dict(num_examples=50, batch_size=8)
    forward = [dataset.batch_indices(step, seed=1, **kwargs) for step in range(30)]
    dataset._permutation.cache_clear()
    backward = [dataset.batch_indices(step, seed=1, **kwargs) for step in reversed(range(30))]
    assert all(map(torch.equal, forward, reversed(backward)))
    assert not torch.equal(forward[0], dataset.batch_indices(0, seed=2, **kwargs))
    epochs = torch.cat(forward)[:200].reshape(4, 50)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4


def test_batches_may_be_overwritten():
    kwargs = dict(seed=1, num_examples=6, batch_size=3)
    expected = dataset.batch_indices(0, **kwargs).clone()
    dataset.batch_indices(0, **kwargs).zero_()
    assert torch.equal(dataset.batch_indices(0, **kwargs), expected)


@pytest.mark.parametrize('num_replicas', [1, 2, 3])
def test_replicas_parts_make_up_the_batch(num_replicas):
    data = counting_dataset(20)
    for step in range(5):
        parts = [
            dataset.train_batch(data, step, seed=5, batch_size=12, rank=rank, num_replicas=num_replicas)
            for rank in range(num_replicas)
        ]
        labels = torch.cat([part['labels'] for part in parts])
        images = torch.cat([part['images'] for part in parts])
        indices = dataset.batch_indices(step, seed=5, num_examples=20, batch_size=12)
        assert torch.equal(labels, indices)
        assert images.dtype == torch.uint8 and images.shape == (12, 3, 2, 2)
        assert torch.equal(images[:, 0, 0, 0].long(), indices)


def test_batch_sizes_that_cannot_be():
    data = counting_dataset(20)
    message = error_of(dataset.train_batch, data, 0, seed=0, batch_size=21)
    assert message.startswith('config.batch_size=21: expected 1 to 20, the number of training images')
    assert 'config.batch_size=0' in error_of(dataset.train_batch, data, 0, seed=0, batch_size=0)
    message = error_of(dataset.train_batch, data, 0, seed=0, batch_size=10, num_replicas=4)
    assert message == 'config.batch_size=10: expected a multiple of 4, the number of replicas'


def test_eval_batches_are_the_dataset_in_order():
    data = counting_dataset(10)
    batches = list(dataset.eval_batches(data, 4))
    assert [len(batch['labels']) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch['images'] for batch in batches]), data.images)
    assert torch.equal(torch.cat([batch['labels'] for batch in batches]), data.labels)


def test_class_counts_name_absent_classes_too():
    data = counting_dataset(3)._replace(labels=torch.tensor([2, 0, 2]))
    assert dataset.class_counts(data) == [1, 0, 2]


def test_to_device():
    moved = counting_dataset(3).to_device('meta')
    assert moved.images.device.type == moved.labels.device.type == 'meta'
    assert moved.class_names == ('0', '1', '2')
