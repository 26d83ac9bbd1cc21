"""The cache of decoded images: the same pixels, noticed changes, bad places and two processes at once."""

import os
import resource
import threading

import numpy as np
import pytest
import torch

from byol_func.errors import UserError
from byol_func.utils import dataset
from cli import start_launch, succeed
from image_folders import flags, lines_of, make_folder


@pytest.fixture
def root(tmp_path):
    return make_folder(tmp_path / 'images', lambda rng: rng.integers(14, 40, 2))


def load(root, cache_dir='', **kwargs):
    defaults = dict(name='folder', source_size=12, grayscale=False, max_gib=1.0, max_bad_fraction=0.0, num_workers=0)
    return dataset.load('train', root=str(root), cache_dir=str(cache_dir), **defaults | kwargs)


def images(data):
    return torch.cat([batch['images'].clone() for batch in dataset.eval_batches(data, 5)])


@pytest.mark.parametrize('kwargs', [{}, dict(grayscale=True), dict(max_gib=0.0), dict(max_gib=0.0, num_workers=2)])
def test_the_second_run_reads_the_same_pixels_and_no_file(root, tmp_path, kwargs):
    expected = images(load(root, **kwargs))
    assert torch.equal(images(load(root, tmp_path / 'cache', **kwargs)), expected)
    for path in root.glob('train/*/*'):  # Size and time stay, so that nothing seems changed.
        stat = path.stat()
        path.write_bytes(b'?' * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    cached = load(root, tmp_path / 'cache', **kwargs)
    assert torch.equal(images(cached), expected)
    assert cached.labels.tolist() == [0] * 6 + [1] * 6 and cached.class_names == ('a', 'b')


def test_changes_are_noticed(root, tmp_path):
    cache_dir = tmp_path / 'cache'
    before = load(root, cache_dir)
    count = lambda: len(list(cache_dir.glob('*.npy')))
    assert count() == 1
    load(root, cache_dir, source_size=10), load(root, cache_dir, grayscale=True)
    assert count() == 3
    first, second = sorted(root.glob('train/a/*'))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    changed = load(root, cache_dir)
    assert count() == 4 and torch.equal(changed.images[0], changed.images[1])
    first.write_bytes(content)
    os.utime(first, ns=(1, 1))  # The old size, the old pixels, another time.
    assert torch.equal(load(root, cache_dir).images, before.images) and count() == 5
    second.unlink()
    assert load(root, cache_dir).num_examples == before.num_examples - 1 and count() == 6


def test_bad_files_are_remembered(root, tmp_path):
    bad = root / 'train/a/2.jpg'
    bad.write_text('no image')
    with pytest.raises(UserError, match='train/a/2.jpg'):
        load(root, tmp_path / 'cache')
    assert not list((tmp_path / 'cache').iterdir())
    expected = {gib: load(root, max_bad_fraction=0.1, max_gib=gib) for gib in (1.0, 0.0)}
    for _ in range(2):
        for gib, without in expected.items():
            cached = load(root, tmp_path / 'cache', max_bad_fraction=0.1, max_gib=gib)
            assert torch.equal(images(cached), images(without))
    part, _ = dataset.split_train(cached, 0.5)
    plain, _ = dataset.split_train(expected[0.0], 0.5)
    assert torch.equal(images(part), images(plain))
    with pytest.raises(UserError, match='train/a/2.jpg'):  # The cache exists, the tolerance does not.
        load(root, tmp_path / 'cache')


@pytest.mark.parametrize('place', ['file', 'file/below', '/proc/nowhere'])
def test_a_place_that_cannot_be_written(root, tmp_path, place):
    (tmp_path / 'file').write_text('mine')
    cache_dir = place if place[0] == '/' else tmp_path / place
    with pytest.raises(UserError) as caught:
        load(root, cache_dir)
    message = str(caught.value)
    assert message.startswith(f"config.dataset.cache_dir='{cache_dir}': cannot write or read it (")
    assert '\n' not in message and (tmp_path / 'file').read_text() == 'mine'


def test_no_room_left(root, tmp_path):
    """The limit of a process's file size stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(UserError, match='cache_dir=.*: cannot write or read it \\('):
            load(root, tmp_path / 'cache')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / 'cache').iterdir())


@pytest.mark.parametrize('damage', [lambda b: b[:100], lambda b: b'', lambda b: b'?' * len(b)])
def test_a_damaged_cache(root, tmp_path, damage):
    load(root, tmp_path / 'cache')
    (path,) = (tmp_path / 'cache').glob('*.npy')
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match='is damaged; remove it'):
        load(root, tmp_path / 'cache')


@pytest.mark.parametrize('kwargs', [dict(name='digits', source_size=0), dict(source_size=0)])
def test_what_cannot_be_cached(root, tmp_path, kwargs):
    with pytest.raises(UserError, match="cache_dir=.*: expected '' unless config.dataset.name is folder or sh"):
        load(root, tmp_path / 'cache', **kwargs)


def test_two_at_once(root, tmp_path):
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: load(root, tmp_path / 'cache')})) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = load(root).images
    assert len(results) == 4 and all(torch.equal(data.images, expected) for data in results.values())
    names = sorted(path.suffix for path in (tmp_path / 'cache').iterdir())
    assert names == ['.json', '.npy']


def test_two_runs_at_once_and_a_third_from_their_cache(root, tmp_path):
    argv = flags(
        root, dataset__source_size=12, image_size=12, dataset__cache_dir='cache', num_epochs=1, final_linear_eval=False
    )
    running = [start_launch(*argv, f'--workdir=run{i}', cwd=tmp_path) for i in range(2)]
    assert [run.wait().code for run in running] == [0, 0]
    outcome = succeed(*argv, '--workdir=run2', cwd=tmp_path)
    assert outcome.stderr.count('Reading the decoded images of') == 2
    assert lines_of(tmp_path / 'run0') == lines_of(tmp_path / 'run1') == lines_of(tmp_path / 'run2')


def test_the_file_is_a_plain_array(root, tmp_path):
    data = load(root, tmp_path / 'cache')
    (path,) = (tmp_path / 'cache').glob('train-12px-*.npy')
    np.testing.assert_array_equal(np.load(path), data.images)


@pytest.mark.skipif(not os.path.exists('/proc/self/maps'), reason='only Linux lists the mapped files of a process')
@pytest.mark.parametrize('name', ['folder', 'shards'])
def test_processes_share_the_pages(root, tmp_path, name):
    if name == 'shards':
        made = tmp_path / 'shards'
        argv = ('--config=folder', '--mode=shards', f'--config.dataset.root={root}', f'--output={made}')
        succeed(*argv, '--images_per_shard=7', cwd=tmp_path)
        root = made
    data = load(root, tmp_path / 'cache', name=name)
    (path,) = (tmp_path / 'cache').glob('train*.npy')
    with open('/proc/self/maps') as maps:
        assert str(path) in maps.read()
    before = path.read_bytes()
    data.images.zero_()  # A private copy of the pages that are written to.
    assert path.read_bytes() == before
