"""Shards made from a folder: the same bytes whatever the order on disk, and an interrupted packing that goes on."""

import os
import shutil
import tarfile

import pytest

from byol_func.data import listing, packing
from image_folders import load, make_folder
from runs import error_of
from shard_files import pack


@pytest.fixture
def root(tmp_path):
    return make_folder(tmp_path / 'images', lambda rng: (24, 24))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_depend_on_names_and_contents_only(root, tmp_path):
    expected = contents(pack(root, tmp_path / 'shards'))
    assert list(expected) == ['test-000000.tar', 'test-000001.tar', *(f'train-00000{i}.tar' for i in range(3))]
    copy = tmp_path / 'copy'
    for path in sorted(root.glob('*/*/*'), reverse=True):  # Another order on disk, other times and rights.
        (copy / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy / path.relative_to(root))
        os.utime(copy / path.relative_to(root), (1, 1))
        (copy / path.relative_to(root)).chmod(0o600)
    assert contents(pack(copy, tmp_path / 'again')) == expected
    with tarfile.open(tmp_path / 'shards/train-000000.tar') as tar:
        members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, '', '', 0o644)}
        assert {m.name[0] for m in members} == {'a', 'b'}  # A sample of all classes.
        first = members[0]
        assert tar.extractfile(first).read() == (root / 'train' / first.name).read_bytes()


def test_an_interrupted_packing_goes_on(root, tmp_path):
    shards = tmp_path / 'shards'
    expected = contents(pack(root, shards))
    last = sorted(root.glob('train/*/*'))[-1]
    picture = last.read_bytes()
    shutil.rmtree(shards)
    last.unlink()
    last.symlink_to('nowhere')
    message = error_of(pack, root, shards)
    assert message == f'{last}: cannot be read (No such file or directory); repair or remove it'
    complete = {path: path.stat().st_ino for path in shards.iterdir()}
    assert all(path.suffix == '.tar' and path.read_bytes() == expected[path.name] for path in complete)
    last.unlink()
    last.write_bytes(picture)
    assert contents(pack(root, shards)) == expected
    assert {path: path.stat().st_ino for path in complete} == complete  # They were kept.


def test_shards_of_other_images_are_not_mixed(root, tmp_path):
    shards = pack(root, tmp_path / 'shards')
    before = contents(shards)
    for size in (4, 100):
        assert "holds 'train-000000.tar' of other images" in error_of(pack, root, shards, images_per_shard=size)
    (root / 'train/a/new.jpg').write_bytes(b'')
    assert 'of other images; expected an empty folder' in error_of(pack, root, shards)
    assert contents(shards) == before
    assert 'cannot write it' in error_of(pack, root, shards / 'train-000000.tar')


def test_keys_that_other_readers_would_take_for_one(root, tmp_path, caplog):
    pack(root, tmp_path / 'fine')
    assert not caplog.records
    shutil.copy(root / 'train/a/0.jpg', root / 'train/a/0.small.jpg')
    shards = pack(root, tmp_path / 'shards')
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "'a/0.small.jpg' is not the only image with the key 'a/0'" in warning
    assert load(shards, name='shards').num_examples == load(root).num_examples


def test_shards_of_shards(root, tmp_path):
    """Packing needs no folder: what is read in whatever place is written."""
    from byol_func.data import shards

    first = pack(root, tmp_path / 'shards')
    packing.pack(shards.list_shards('train', str(first)), 'train', str(tmp_path / 'again'), 5)
    expected = contents(first)
    assert all(expected[name] == content for name, content in contents(tmp_path / 'again').items())
    assert listing.list_files('train', str(root)).paths.in_split(0) == 'a/0.jpg'
