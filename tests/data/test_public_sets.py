"""STL-10, Tiny ImageNet and Imagenette in their layouts on disk, in miniature: unpacked, in archives, and missing."""

import functools
import hashlib
import itertools
import json
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import byol_func
import cli
from byol_func.data import named, stl10, tiny_imagenet
from byol_func.errors import UserError
from byol_func.modes import embed
from byol_func.utils import dataset
from byol_func.workdir.run import Run
from runs import error_of

SOURCE = dict(source_size=0, grayscale=False, max_gib=1.0, max_bad_fraction=0.0, num_workers=0, cache_dir='')


def load(name, root, split='train', **kwargs):
    return dataset.load(split, name=name, root=str(root), **SOURCE | kwargs)


@pytest.fixture
def no_network(monkeypatch):
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    for name in ('no_proxy', 'NO_PROXY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr('urllib.request._opener', None)  # It would remember other proxies.


def pack(top, archive):
    """Packs a folder into an archive, and removes it."""
    if archive.suffix == '.zip':
        with zipfile.ZipFile(archive, 'w') as file:
            for path in sorted(top.rglob('*')):
                file.write(path, path.relative_to(top.parent))
    else:
        with tarfile.open(archive, 'w:gz') as file:
            file.add(top, top.name)
    shutil.rmtree(top)


def trust(archive, monkeypatch, module, name):
    """Makes the checksum of an archive that of the data set."""
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(module, name, getattr(module, name)._replace(md5=md5))


# --- STL-10


def write_stl10(folder):
    """Images `[N, 96, 96, 3]` and labels from 0, by set; a file stores a channel after the other, by columns."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sets = {}
    for name, count in (('train', 20), ('test', 10), ('unlabeled', 12)):
        images = rng.integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)
        (folder / f'{name}_X.bin').write_bytes(b''.join(image.transpose(2, 1, 0).tobytes() for image in images))
        labels = rng.permutation(np.arange(count) % 10)
        if name != 'unlabeled':
            (folder / f'{name}_y.bin').write_bytes(bytes((labels + 1).tolist()))
        sets[name] = images, labels
    return sets


def test_stl10(tmp_path):
    sets = write_stl10(tmp_path / 'stl10_binary')
    for split in ('train', 'test'):
        data = load('stl10_labeled', tmp_path, split)
        images, labels = sets[split]
        np.testing.assert_array_equal(data.images.permute(0, 2, 3, 1), images)
        assert data.labels.tolist() == labels.tolist() and data.images.is_contiguous()
        assert data.class_names[:3] == ('airplane', 'bird', 'car') and data.num_classes == 10
    pool = load('stl10', tmp_path)
    both = np.concatenate([sets['unlabeled'][0], sets['train'][0]])
    np.testing.assert_array_equal(pool.images.permute(0, 2, 3, 1), both)
    assert dataset.describe(pool) == '32 images without labels' and load('stl10', tmp_path, 'test') is None
    assert torch.equal(load('stl10', tmp_path / 'stl10_binary').images, pool.images)
    assert 'max_gib=0.0001: expected at least 0.001 for 32 images' in error_of(load, 'stl10', tmp_path, max_gib=1e-4)
    assert error_of(load, 'stl10', tmp_path, source_size=32).endswith('expected 0 or 96')


@pytest.mark.parametrize(
    'name, content, message',
    [
        ('train_X.bin', b'x' * 27649, 'has 27649 bytes; expected 27648 for each image'),
        ('train_X.bin', b'', 'has 0 bytes; expected 27648'),
        ('train_y.bin', b'\x01' * 19, 'has 19 labels; expected 20, as many as images'),
        ('train_y.bin', b'\x00' * 20, '20 labels such as 0: expected 1 to 10'),
        ('train_y.bin', b'\x01' * 20, "no images of the class 'bird'"),
    ],
)
def test_damaged_files_of_stl10(tmp_path, name, content, message):
    write_stl10(tmp_path / 'stl10_binary')
    (tmp_path / 'stl10_binary' / name).write_bytes(content)
    found = error_of(load, 'stl10_labeled', tmp_path)
    assert found.startswith(f"config.dataset.root='{tmp_path}': ") and message in found


def test_an_archive_of_stl10_is_unpacked_and_completes_a_folder(tmp_path, monkeypatch, no_network):
    sets = write_stl10(tmp_path / 'stl10_binary')
    pack(tmp_path / 'stl10_binary', tmp_path / 'stl10_binary.tar.gz')
    trust(tmp_path / 'stl10_binary.tar.gz', monkeypatch, stl10, '_ARCHIVE')
    assert load('stl10', tmp_path).num_examples == 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ['stl10_binary', 'stl10_binary.tar.gz']
    (tmp_path / 'stl10_binary/unlabeled_X.bin').unlink()
    assert load('stl10_labeled', tmp_path).num_examples == len(sets['train'][0])
    assert load('stl10', tmp_path).num_examples == 32


TINY = {
    name.replace('__', '.'): value
    for name, value in dict(
        cli.TINY_RUN, batch_size=8, num_epochs=1, image_size=16, final_linear_eval=True, pictures=True
    ).items()
} | {'linear_eval.batch_size': 8, 'linear_eval.compare_untrained': False, 'preview.num_images': 1}


@pytest.fixture(scope='module')
def stl10_run(tmp_path_factory):
    root = tmp_path_factory.mktemp('stl10')
    write_stl10(root / 'stl10_binary')
    config = byol_func.get_config('stl10', TINY | {'dataset.root': str(root)})
    return root, config, byol_func.pretrain(config, root / 'run', device='cpu')


def test_a_run_learns_from_all_images_and_is_measured_on_those_with_labels(stl10_run):
    root, _, result = stl10_run
    summary = result.summary
    assert summary['steps'] == 4 and summary['num_classes'] == 0  # 32 images in batches of 8.
    assert {name for name in summary if name.endswith('top1')} == {'test/linear_top1', 'test/online_knn_top1'}
    records = [json.loads(line) for line in (root / 'run/metrics.jsonl').read_text().splitlines()]
    assert not any('classif_loss' in record for record in records)
    for name in ('augmentations.png', 'confusion_matrix.linear.test.png', 'neighbours.png', 'report.html'):
        assert (root / 'run' / name).exists(), name


def test_modes_on_top_take_the_images_with_labels(stl10_run):
    root, config, _ = stl10_run
    assert 'test/knn_top1' in byol_func.evaluate(root / 'run', 'knn', device='cpu').summary
    assert 'test/linear_top1' in byol_func.evaluate(root / 'run', 'eval', device='cpu').summary
    embed.embed(Run(config, str(root / 'run'), torch.device('cpu'), None, 60.0))
    for split, count in (('train', 20), ('test', 10)):
        with np.load(root / f'run/embeddings.{split}.npz') as file:
            assert len(file['labels']) == len(file['features']) == count


def test_held_out_images_would_be_trained_on(stl10_run):
    root, config, _ = stl10_run
    config = byol_func.get_config('stl10', TINY | {'dataset.root': str(root), 'dataset.eval_split': 'val'})
    message = error_of(byol_func.pretrain, config, root / 'val', device='cpu')
    assert message.startswith("config.dataset.eval_split='val': no labels to evaluate with; expected 'test'")


# --- Tiny ImageNet


def write_tiny_imagenet(top):
    """Two classes of two and three images each; returns the path of every image below the folder, by set and class."""
    paths = {}
    rng = np.random.default_rng(0)

    def save(path, mode='RGB'):
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((64, 64), Image.Resampling.BICUBIC).convert(mode).save(path, format='JPEG')
        return path.relative_to(top).as_posix()

    for wnid in ('n02', 'n01'):
        paths['train', wnid] = [save(top / f'train/{wnid}/images/{wnid}_{i}.JPEG') for i in range(3)]
        (top / f'train/{wnid}/{wnid}_boxes.txt').write_text(f'{wnid}_0.JPEG\t0\t0\t63\t63\n')
    lines = []
    for i, wnid in enumerate(('n01', 'n02', 'n02', 'n01')):
        path = save(top / f'val/images/val_{i}.JPEG', 'L' if i == 2 else 'RGB')
        paths.setdefault(('test', wnid), []).append(path)
        lines.append(f'val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n')
    (top / 'val/val_annotations.txt').write_text(''.join(lines))
    save(top / 'test/images/test_0.JPEG')
    (top / 'wnids.txt').write_text('n02\nn01\n')
    (top / 'words.txt').write_text('n01\tgoldfish, Carassius auratus\nn02\ttailed frog\n')
    return paths


@pytest.mark.parametrize('below', [True, False])
def test_tiny_imagenet(tmp_path, below):
    top = tmp_path / 'tiny-imagenet-200'
    paths = write_tiny_imagenet(top)
    for split in ('train', 'test'):
        data = load('tiny_imagenet', tmp_path if below else top, split)
        assert data.class_names == ('n01', 'n02') and data.image_shape == (3, 64, 64)
        found = [data.class_names[label] for label in data.labels]
        expected = [(path, wnid) for wnid in ('n01', 'n02') for path in paths[split, wnid]]
        assert list(zip(data.paths, found, strict=True)) == expected
        for image, path in zip(data.images, data.paths, strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0), np.asarray(Image.open(top / path).convert('RGB')))


def test_an_archive_of_tiny_imagenet_is_unpacked(tmp_path, monkeypatch, no_network):
    top = tmp_path / 'tiny-imagenet-200'
    write_tiny_imagenet(top)
    pack(top, tmp_path / 'tiny-imagenet-200.zip')
    trust(tmp_path / 'tiny-imagenet-200.zip', monkeypatch, tiny_imagenet, '_ARCHIVE')
    train, test = dataset.load_train_and_test(
        name='tiny_imagenet', root=str(tmp_path), fraction=1.0, eval_split='test', val_fraction=0.1, **SOURCE
    )
    assert (train.num_examples, test.num_examples) == (6, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['tiny-imagenet-200', 'tiny-imagenet-200.zip']


def test_other_contents_of_tiny_imagenet_are_named(tmp_path):
    top = tmp_path / 'tiny-imagenet-200'
    write_tiny_imagenet(top)
    refusal = functools.partial(error_of, load, 'tiny_imagenet', tmp_path)
    list_of_val = (top / 'val/val_annotations.txt').read_text()
    (top / 'val/val_annotations.txt').write_text(list_of_val + '\nval_9.JPEG\tn03\t0\t0\t1\t1\n')
    assert "val_annotations.txt, line 6: 'val_9.JPEG\\tn03" in refusal('test')
    (top / 'val/val_annotations.txt').write_text(list_of_val + 'val_9.JPEG\tn02\t0\t0\t1\t1\n')
    assert f"cannot read the image '{top}/val/images/val_9.JPEG' (No such file or directory)" in refusal('test')
    (top / 'val/val_annotations.txt').write_text('val_0.JPEG\tn01\n')
    assert "no images of the class 'n02' for test" in refusal('test')
    shutil.rmtree(top / 'train/n01/images')
    expected = f"cannot read '{top}/train/n01/images' (No such file or directory); expected the layout of http://cs231n"
    assert expected in refusal('train')
    shutil.rmtree(top / 'train/n01')
    assert '1 class for train' in refusal('train')


# --- Imagenette


def test_imagenette(tmp_path, monkeypatch, no_network):
    top = tmp_path / 'imagenette2-160'
    for split, wnid, i in itertools.product(('train', 'val'), ('n01', 'n02'), range(2)):
        path = top / split / wnid / f'{i}.JPEG'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((90, 80), 60).save(path)
    pack(top, tmp_path / 'imagenette2-160.tgz')
    trust(tmp_path / 'imagenette2-160.tgz', monkeypatch, named, '_IMAGENETTE')
    config = byol_func.get_config('imagenette', {'dataset.root': str(tmp_path), 'dataset.source_size': 20})
    for root in (tmp_path, top):
        train, test = dataset.load_train_and_test(**dict(config.dataset, root=str(root)))
        assert train.num_examples == test.num_examples == 4 and train.image_shape == (3, 20, 20)


# --- Without a network


@pytest.mark.parametrize(
    'name, title, url, what',
    [
        ('stl10', 'STL-10', 'http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz', 'unlabeled_X.bin and train_X'),
        (
            'tiny_imagenet',
            'Tiny ImageNet',
            'http://cs231n.stanford.edu/tiny-imagenet-200.zip',
            'train and val/val_anno',
        ),
        ('imagenette', 'Imagenette', 'https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz', 'train and val'),
    ],
)
def test_missing_files_are_named_with_their_address(tmp_path, no_network, name, title, url, what):
    root = tmp_path / 'new' / 'below'
    message = error_of(load, name, root)
    assert message.startswith(f"config.dataset.root='{root}': cannot download {title} (")
    assert f'expected {what}' in message and f" from {url}, or that archive in '{root}'" in message
    assert not (tmp_path / 'new').exists()
    folder, _, ending = url.rpartition('/')[2].partition('.')
    (tmp_path / folder).mkdir()
    pack(tmp_path / folder, tmp_path / f'{folder}.{ending}')  # Of another checksum.
    with pytest.raises(UserError, match=f'cannot download {title}'):
        load(name, tmp_path)
