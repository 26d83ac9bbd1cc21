"""Tar shards: the images, labels and order of a folder, in every layout, and an index that is kept."""

import os
import tarfile

import pytest
import torch

from byol_func.data import fingerprint, index_cache, label_files, shard_lists, tar_index
from byol_func.errors import UserError
from byol_func.utils import dataset
from image_folders import load, make_folder
from runs import error_of
from shard_files import jpeg, pack, write_tar


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Two classes, with a folder in one of them, names that sort oddly, and one that needs a PAX header."""
    root = make_folder(tmp_path_factory.mktemp('images'), lambda rng: rng.integers(14, 40, 2))
    (root / 'train/a/deep').mkdir()
    for name in ('deep/0', 'Z', 'a.b', 'é' * 60):
        (root / 'train/a' / f'{name}.jpg').write_bytes(jpeg(len(name)))
    return root


@pytest.fixture(scope='module')
def shards(root, tmp_path_factory):
    return pack(root, tmp_path_factory.mktemp('shards'))


def load_shards(root, split='train', **kwargs):
    return load(root, split, name='shards', **kwargs)


def everything(data):
    batches = list(dataset.eval_batches(data, 4))
    return [torch.cat([batch[name] for batch in batches]) for name in ('images', 'labels', 'rows')]


@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize('max_gib, num_workers', [(1.0, 0), (0.0, 0), (0.0, 2)])
def test_shards_hold_the_images_of_the_folder_in_its_order(root, shards, split, max_gib, num_workers):
    expected = load(root, split)
    found = load_shards(shards, split, max_gib=max_gib, num_workers=num_workers)
    assert found.class_names == expected.class_names and torch.equal(found.labels, expected.labels)
    assert all(map(torch.equal, everything(found), everything(expected)))
    names = [path.split('.tar/') for path in found.paths]
    assert [name for _, name in names] == [path.split('/', 1)[1] for path in expected.paths]
    assert {shard for shard, _ in names} == {f'{split}-{i:06}' for i in range(-(-len(names) // 5))}


@pytest.mark.parametrize('num_workers', [0, 2])
def test_batches_and_crops_are_those_of_the_folder(root, shards, num_workers):
    crops = lambda step: {'view': torch.rand(4, 4, generator=torch.Generator().manual_seed(step)) / 2}
    kwargs = dict(source_size=0, max_gib=0.0, num_workers=num_workers)
    for steps in (range(5), range(3, 5)):  # From the beginning, and resumed.
        both = [
            list(dataset.train_batches(data, steps, seed=1, batch_size=4, relative_crops=crops, image_size=16))
            for data in (load(root, **kwargs), load_shards(shards, **kwargs))
        ]
        assert len(both[0]) == len(steps)
        for expected, found in zip(*both, strict=True):
            assert all(torch.equal(found[name], expected[name]) for name in ('view', 'labels'))


def test_the_cache_of_decoded_images_serves_shards(shards, tmp_path):
    expected = everything(load_shards(shards))
    for _ in range(2):
        assert all(map(torch.equal, everything(load_shards(shards, cache_dir=str(tmp_path))), expected))
    assert len(list(tmp_path.glob('*.npy'))) == 1


def test_how_shards_are_named(root, shards, tmp_path):
    for split in ('train', 'test'):  # In folders, with names that say nothing.
        for i, path in enumerate(sorted(shards.glob(f'{split}-*'))):
            (tmp_path / 'folders' / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / 'folders' / split / f'{i}.tar').hardlink_to(path)
    (tmp_path / 'list.txt').write_text(f'# all\n\n{shards}/test-000000.tar\n{shards}/test-{{000001..000001}}.tar\n')
    with open(tmp_path / 'list.txt', 'a') as file:
        file.write(f'{os.path.relpath(shards, tmp_path)}/train-{{000000..000003}}.tar\n')
    pattern = f'{shards}/{{train-{{000000..000003}},test-00000{{0,1}}}}.tar'
    for split in ('train', 'test'):
        expected = load_shards(shards, split)
        for where in (tmp_path / 'folders', tmp_path / 'list.txt', pattern):
            found = load_shards(where, split)
            assert torch.equal(found.images, expected.images) and torch.equal(found.labels, expected.labels)
            if where != tmp_path / 'folders':  # The place does not matter, the names do.
                assert fingerprint.fingerprint(found) == fingerprint.fingerprint(expected)
    assert fingerprint.fingerprint(load(root, 'test')) != fingerprint.fingerprint(expected)
    only = load_shards(f'{shards}/train-000000.tar')
    assert only.num_examples == 5


@pytest.mark.parametrize(
    'pattern, names',
    [
        ('a.tar', ['a.tar']),
        ('{a,b}{,c}.tar', ['a.tar', 'ac.tar', 'b.tar', 'bc.tar']),
        ('{8..10}', ['8', '9', '10']),
        ('{08..10}', ['08', '09', '10']),
        ('{x{1..2},y}', ['x1', 'x2', 'y']),
    ],
)
def test_braces(pattern, names):
    assert shard_lists.expand(pattern, pattern) == names


@pytest.mark.parametrize('pattern', ['{a', 'a}', '}a{', '{}', '{a}', '{2..1}', '{1..}', '{0..9999999}', '{0..999}' * 3])
def test_braces_that_mean_nothing(pattern):
    assert error_of(shard_lists.expand, pattern, 'ROOT').startswith("config.dataset.root='ROOT': ")


# Class files -> the names of the classes, and the labels of images called 0, 1, ...
@pytest.mark.parametrize(
    'texts, class_names, labels',
    [
        (['1', '0\n', '1'], ('0', '1'), [1, 0, 1]),
        (['10', '9', '007'], ('7', '9', '10'), [2, 1, 0]),  # Numbers in their order.
        (['tabby cat', 'Dog', 'tabby cat\r\n'], ('Dog', 'tabby cat'), [1, 0, 1]),
        (['10', '9', 'other'], ('10', '9', 'other'), [0, 1, 2]),  # Names in the order of names.
    ],
)
def test_class_files(tmp_path, texts, class_names, labels):
    members = [
        member
        for i, text in enumerate(texts)
        for member in ((f'{i}.jpg', jpeg(i)), (f'{i}.cls', text.encode()), (f'{i}.json', b'{}'))
    ]
    write_tar(tmp_path / 'x-train-0.tar', members)
    write_tar(tmp_path / 'x-val-0.tar', [(f'./{name}', content) for name, content in members[:6]])
    found, test = load_shards(tmp_path), load_shards(tmp_path, 'test')
    assert found.class_names == test.class_names == class_names
    of_image = {path.split('/')[1]: label for path, label in zip(found.paths, found.labels.tolist(), strict=True)}
    assert [of_image[f'{i}.jpg'] for i in range(len(texts))] == labels
    assert sorted(test.labels.tolist()) == sorted(labels[:2])
    assert found.labels.tolist() == sorted(labels)


def test_without_labels(root, tmp_path):
    write_tar(tmp_path / '0.tar', [('b.jpg', jpeg(0)), ('a.jpg', jpeg(1)), ('._a.jpg', b'hidden'), ('a.txt', b'a cat')])
    found = load_shards(tmp_path)
    assert found.class_names == () and found.paths == ('0.tar/a.jpg', '0.tar/b.jpg')
    assert load_shards(tmp_path, 'test') is None


def test_splits(root, tmp_path):
    """A part is held out, left out or taken for labelled as in a folder."""
    shards = pack(root, tmp_path, splits=['train'])
    source = dict(
        source_size=20, grayscale=False, max_gib=0.0, max_bad_fraction=0.0, num_workers=0, cache_dir='', fraction=0.5
    )
    listed = tmp_path / 'labels.txt'
    listed.write_text('a/deep/0.jpg\nZ.jpg\n')
    for eval_split in ('val', 'none'):
        both = [
            dataset.load_train_and_test(name=name, root=str(where), eval_split=eval_split, val_fraction=0.3, **source)
            for name, where in (('folder', root), ('shards', shards))
        ]
        for expected, found in zip(*both, strict=True):
            assert (expected is None) == (found is None)
            if found is not None:
                assert torch.equal(found.positions, expected.positions) and torch.equal(found.labels, expected.labels)
                assert all(map(torch.equal, everything(found), everything(expected)))
    rows = [label_files.listed(data, str(listed), 'field') for data in (load(root), load_shards(shards))]
    assert len(rows[0]) == 2 and torch.equal(*rows)
    assert 'no shards of a test set' in error_of(load_shards, shards, 'test')


def scrambled(path):
    """Overwrites a shard in place; its size and time stay."""
    stat = path.stat()
    path.write_bytes(b'?' * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_the_index_is_kept_until_a_shard_changes(root, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv('BYOL_FUNC_CACHE', str(tmp_path / 'cache'))
    shards = pack(root, tmp_path / 'shards')
    read_only = {path: path.stat().st_mtime_ns for path in (shards, *shards.iterdir())}
    expected = load_shards(shards, max_gib=0.0)
    assert {path: path.stat().st_mtime_ns for path in (shards, *shards.iterdir())} == read_only
    kept = sorted((tmp_path / 'cache/shards').iterdir())
    assert len(kept) == 4  # Those of the training set: nobody asked for the others.
    first = shards / 'train-000000.tar'
    content, time = first.read_bytes(), first.stat().st_mtime_ns
    scrambled(first)
    assert load_shards(shards, max_gib=0.0).paths == expected.paths  # From the index.
    os.utime(first, ns=(1, 1))
    assert 'no tar file, or it is damaged' in error_of(load_shards, shards)
    first.write_bytes(content)
    os.utime(first, ns=(time, time))
    for damage in (lambda b: b[:100], lambda b: b'', lambda b: b[:-9] + b'?' * 9):
        for path in kept:
            path.write_bytes(damage(path.read_bytes()))
        assert torch.equal(load_shards(shards).images, everything(expected)[0])
    assert not caplog.records
    (tmp_path / 'file').write_text('mine')
    monkeypatch.setenv('BYOL_FUNC_CACHE', str(tmp_path / 'file/below'))
    index_cache._tell.cache_clear()
    assert load_shards(shards, max_gib=0.0).paths == expected.paths
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f'Cannot keep the index of the images in {tmp_path}/file/below (Not a directory)')


def test_a_shard_that_changes_while_a_run_reads_it(root, tmp_path):
    shards = pack(root, tmp_path, images_per_shard=100)
    stream = load_shards(shards, max_gib=0.0)
    os.utime(shards / 'train-000000.tar', ns=(1, 1))
    with pytest.raises(
        UserError, match=r'train-000000.tar/a/.*\(its shard has changed or was touched .*: start the command again'
    ):
        list(dataset.train_batches(stream, range(1), seed=0, batch_size=4))


# What is in a shard -> the end of the message.
CLASSES = [('0.jpg', jpeg(0)), ('0.cls', b'0'), ('1.jpg', jpeg(1)), ('1.cls', b'1')]
LINK = tarfile.TarInfo('a/2.jpg')
LINK.type, LINK.linkname = tarfile.LNKTYPE, 'a/1.jpg'


@pytest.mark.parametrize(
    'members, words',
    [
        ([], 'no images in '),
        ([('notes.txt', b'soon')], 'found 1 of .txt'),
        ([*CLASSES, ('2.jpg', b'')], "'2.jpg' has no class file '2.cls'"),
        ([*CLASSES, ('2.cls', b'1')], "the class file '2.cls' has no image"),
        ([*CLASSES, ('1.png', b'')], "'1.jpg' and '1.png' have the same key '1'"),
        ([*CLASSES, ('1.jpg', b'')], "two members are called '1.jpg'"),
        ([*CLASSES, ('2.jpg', b''), ('2.cls', b'')], "the class file '2.cls' holds ''; expected a number"),
        ([*CLASSES, ('2.jpg', b''), ('2.cls', b'-1')], "the class file '2.cls' holds '-1'; expected a number"),
        ([*CLASSES, ('2.jpg', b''), ('2.cls', b'0.5')], "the class file '2.cls' holds '0.5'; expected a number"),
        ([*CLASSES, ('2.jpg', b''), ('2.cls', b'\xff\xfe')], "the class file '2.cls' holds"),
        ([*CLASSES, ('2.jpg', b''), ('2.cls', b'a\nb')], "the class file '2.cls' holds 'a\\nb'"),
        ([*CLASSES, ('2.jpg', b''), ('2.cls', b'a' * 999)], "the class file '2.cls' holds 'aaa"),
        ([('a/1.jpg', b''), ('2.jpg', b'')], "/train-0.tar/2.jpg' has no class, but other images have one"),
        ([('a/1.jpg', b''), ('a/2.jpg', b'')], "expected at least two classes, but 'a' is the only one"),
        ([('a/1.jpg', b''), LINK], "'a/2.jpg' is a link; expected a plain file"),
    ],
)
def test_members_that_are_refused(tmp_path, members, words):
    write_tar(tmp_path / 'train-0.tar', members)
    message = error_of(load_shards, tmp_path)
    assert message.startswith(f"config.dataset.root='{tmp_path}': ") and words in message


@pytest.mark.parametrize('layout', ['folders', 'class files'])
def test_a_member_that_is_no_image(tmp_path, layout):
    bad = {'folders': [('b/x.jpg', b'no image'), ('a/y.jpg', jpeg(0))], 'class files': [('0.jpg', b'no'), *CLASSES[1:]]}
    write_tar(tmp_path / '0.tar', bad[layout])
    name = bad[layout][0][0]
    expected = f"cannot read the image '{tmp_path}/0.tar/{name}' (not in a format that Pillow reads)"
    assert expected in error_of(load_shards, tmp_path)
    stream = load_shards(tmp_path, max_gib=0.0)
    with pytest.raises(UserError, match='not in a format'):
        list(dataset.eval_batches(stream, 4))


@pytest.mark.parametrize(
    'damage, words',
    [
        (lambda b: b[:700], "it is truncated: 'a/0.jpg' is not complete"),
        (lambda b: b[:-2000], 'it is truncated'),
        (lambda b: b.rstrip(b'\0') + b'\0' * (-len(b.rstrip(b'\0')) % 512), 'its end mark is missing'),
        (lambda b: b + b, 'more data follows after 2 members and the end mark'),
        (lambda b: b'?' * len(b), 'it is no tar file, or it is damaged'),
        (lambda b: b'', 'it is no tar file, or it is damaged'),
        (
            lambda b: b[: b.rindex(b'ustar') - 200] + b'?' * 200 + b[b.rindex(b'ustar') :],
            'the next header cannot be read',
        ),
    ],
)
def test_a_damaged_tar(tmp_path, damage, words):
    path = write_tar(tmp_path / '0.tar', [('a/0.jpg', jpeg(0)), ('b/0.jpg', jpeg(1))])
    whole = path.read_bytes()
    while whole.endswith(b'\0' * 1536):  # Two blocks of zeros are the end; Python writes some more.
        whole = whole[:-512]
    path.write_bytes(damage(whole))
    message = error_of(load_shards, tmp_path)
    assert message.startswith(f"config.dataset.root='{tmp_path}': the shard '{path}': ") and words in message


def test_roots_that_are_refused(root, shards, tmp_path):
    message = lambda where: error_of(load_shards, where)
    assert 'it holds no *.tar; expected a folder' in message(root)
    assert 'No such file or directory' in message(tmp_path / 'nowhere')
    assert f"no shard '{shards}/train-000004.tar' (6 of 10 are missing)" in message(
        f'{shards}/train-{{000000..000009}}.tar'
    )
    assert 'is named twice' in message(f'{shards}/train-000000{{,}}.tar')
    assert "config.dataset.root='': expected a folder" in message('')
    (tmp_path / 'mixed').mkdir()
    for name in ('train-0.tar', 'more.tar'):
        (tmp_path / 'mixed' / name).hardlink_to(shards / 'train-000000.tar')
    assert "'more.tar' name no split, but others do" in message(tmp_path / 'mixed').replace(f'{tmp_path}/mixed/', '')
    (tmp_path / 'only').mkdir()
    (tmp_path / 'only/test-0.tar').hardlink_to(shards / 'test-000000.tar')
    assert 'no shard of a training set' in message(tmp_path / 'only')
    for name, words in (('0.tar.gz', 'is compressed; images are read at their offsets'), ('0.tar', 'it is compressed')):
        path = tmp_path / 'gz' / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, 'w:gz'):
            pass
        assert words in message(tmp_path / 'gz') and words in message(path)
        path.unlink()


def test_more_members_than_are_read_at_once(tmp_path, monkeypatch):
    """Folders, links and files of other formats among them move no offset."""
    folder, link = tarfile.TarInfo('a'), tarfile.TarInfo('a/link.txt')
    folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, '0.jpg'
    members = [
        folder,
        ('a/0.jpg', jpeg(0)),
        link,
        ('a/x.txt', b'text'),
        ('b/1.jpg', jpeg(1)),
        (f'b/{"é" * 99}.jpg', jpeg(2)),
    ]
    write_tar(tmp_path / '0.tar', members)
    expected = load_shards(tmp_path)
    assert expected.num_examples == 3
    for stretch in (1, 2, 3, 6):
        monkeypatch.setattr(tar_index, '_STRETCH', stretch)
        os.utime(tmp_path / '0.tar', ns=(stretch, stretch))
        assert torch.equal(load_shards(tmp_path).images, expected.images)


@pytest.mark.parametrize(
    'names, missing',
    [
        (['train-000000', 'train-000002', 'train-000003'], ['train-000001']),
        (['train-2', 'train-3', 'train-4'], ['train-1']),
        (['train-0', 'train-1', 'test-5'], []),
        (['train-2019', 'train-2021'], []),
    ],
)
def test_gaps_in_numbers(names, missing):
    assert shard_lists.skipped([f'{name}.tar' for name in sorted(names)]) == [f'{name}.tar' for name in missing]


def test_a_missing_shard_is_told(root, shards, tmp_path, caplog):
    for path in set(shards.iterdir()) - {shards / 'train-000001.tar'}:
        (tmp_path / path.name).hardlink_to(path)
    with caplog.at_level('WARNING'):
        load_shards(tmp_path)
    assert f"no shard '{tmp_path}/train-000001.tar', although there are later ones" in caplog.text
