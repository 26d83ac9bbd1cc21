"""Folders with files that cannot be read: in memory, streamed and from the command line."""

import json
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from byol_func.errors import UserError
from byol_func.utils import dataset
from cli import run_launch, succeed
from image_folders import flags, load, make_folder, smooth
from runs import error_of


@pytest.fixture
def damaged(tmp_path):
    """Of 12 training images of three classes' worth two of class 'a' cannot be read."""
    root = make_folder(tmp_path / 'images', lambda rng: (24, 24))
    first, second = root / 'train/a/1.jpg', root / 'train/a/2.jpg'
    first.write_bytes(first.read_bytes()[:-60])
    second.write_text('no image')
    return root


@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.bmp', '.webp', '.tif'])
def test_truncated_image(tmp_path, suffix):
    root = make_folder(tmp_path / 'images', lambda rng: (24, 24))
    path = root / 'train' / 'b' / f'1{suffix}'
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    message = error_of(load, root)
    assert message.startswith(f"config.dataset.root='{root}': cannot read the image '{path}' (")


@pytest.mark.parametrize('content', [b'', b'<html>\nnot found\n</html>'])
def test_not_an_image(tmp_path, content):
    root = make_folder(tmp_path / 'images', lambda rng: (24, 24))
    path = root / 'train' / 'b' / '1.jpg'
    path.write_bytes(content)
    assert f"cannot read the image '{path}' (" in error_of(load, root)


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('source_size', [0, 20])
def test_the_next_good_file_of_the_class_takes_the_place_of_a_bad_one(damaged, num_workers, source_size):
    stream = load(damaged, source_size=source_size, max_gib=0.0, max_bad_fraction=0.2, num_workers=num_workers)
    stream = stream._replace(center_crop=(20, 1.0))
    (batch,) = dataset.train_batches(stream, range(1), seed=1, batch_size=12)
    order = dataset.batch_indices(0, seed=1, num_examples=12, batch_size=12).tolist()
    images = batch.get('images', batch.get('view'))[torch.tensor(order).argsort()]
    assert torch.equal(images[1], images[3]) and torch.equal(images[2], images[3])
    assert not torch.equal(images[3], images[4]) and batch['labels'].tolist() == [i // 6 for i in order]


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('batch_size', [1, 2, 12])
def test_evaluation_leaves_bad_files_out_as_in_memory(damaged, num_workers, batch_size):
    stream, in_memory = (load(damaged, max_gib=gib, max_bad_fraction=0.2, num_workers=num_workers) for gib in (0, 1.0))
    batches = list(dataset.eval_batches(stream, batch_size))
    rows, labels, images = (torch.cat([b[name] for b in batches]) for name in ('rows', 'labels', 'images'))
    assert rows.tolist() == [0, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert torch.equal(labels, in_memory.labels) and torch.equal(images, in_memory.images)
    read = dataset.part_read(stream, rows)
    assert torch.equal(read.positions, in_memory.positions) and torch.equal(read.positions, rows)
    assert read.paths == in_memory.paths and read.paths[:2] == ('train/a/0.jpg', 'train/a/3.jpg')


def test_a_part_may_have_the_bad_files_of_the_whole(damaged):
    """Of 12 files two may be bad, be they all in a part of four or of two."""
    stream = load(damaged, max_gib=0.0, max_bad_fraction=0.2)
    part = stream.take(torch.tensor([7, 2, 1, 0]))
    batches = list(dataset.eval_batches(part, 3))
    assert [batch['rows'].tolist() for batch in batches] == [[0], [3]]
    again = part.take(torch.tensor([3, 1]))
    assert again.positions.tolist() == [0, 2] and again.labels.tolist() == [0, 0]
    assert again.paths == ('train/a/0.jpg', 'train/a/2.jpg')
    assert [batch['rows'].tolist() for batch in dataset.eval_batches(again, 3)] == [[0]]
    with pytest.raises(UserError, match='train/a/1.jpg.*nor any other image of train'):
        list(dataset.eval_batches(stream.take(torch.tensor([2, 1])), 3))


@pytest.mark.parametrize('num_workers', [0, 2])
def test_too_many_bad_files_end_with_the_path_of_one(damaged, num_workers):
    stream = load(damaged, max_gib=0.0, max_bad_fraction=0.1, num_workers=num_workers)
    with pytest.raises(UserError) as caught:
        list(dataset.eval_batches(stream, 3))
    assert str(caught.value) == (
        f"config.dataset.root='{damaged}': cannot read the image '{damaged}/train/a/2.jpg' (not in a format that "
        'Pillow reads) after 1 other; repair or remove it, or allow more than config.dataset.max_bad_fraction=0.1'
    )


def test_in_memory_bad_files_are_left_out_up_to_the_allowed_share(damaged):
    with pytest.raises(UserError, match='train/a/1.jpg'):
        load(damaged)
    data = load(damaged, max_bad_fraction=0.2)
    assert dataset.class_counts(data) == [4, 6]
    whole = load(damaged, 'test')
    assert dataset.class_counts(whole) == [3, 3]


def test_an_error_leaves_no_threads_behind(tmp_path):
    """The garbage collector would wait for them, maybe while it holds up the start of a thread: forever."""
    before = set(threading.enumerate())  # Another test of this process may have left some.
    root = make_folder(tmp_path / 'images', lambda rng: (24, 24))
    (root / 'train/a/1.jpg').write_text('no image')
    smooth(np.random.default_rng(0), 20, 30).save(root / 'train/b/5.jpg')  # Of another size.
    for fields in ({}, dict(cache_dir=f'{tmp_path}/cache'), dict(source_size=0, max_bad_fraction=0.2)):
        with pytest.raises(UserError) as caught:
            load(root, **fields)
        left = set(threading.enumerate()) - before
        assert caught.tb and not [each.name for each in left if 'ThreadPool' in each.name]


def test_a_class_of_bad_files(damaged):
    for path in damaged.glob('train/a/*'):
        path.write_text('no image')
    with pytest.raises(UserError, match="no images of the class 'a', expected at least one of each class"):
        load(damaged, max_bad_fraction=0.9)
    stream = load(damaged, max_gib=0.0, max_bad_fraction=0.9)
    with pytest.raises(UserError, match="no images of the class 'a', expected at least one of each class"):
        list(dataset.eval_batches(stream, 12))
    with pytest.raises(UserError, match='train/a/.*nor any other image of its class'):
        list(dataset.train_batches(stream, range(12), seed=1, batch_size=4))


def test_a_bad_file_ends_a_run_in_one_line(damaged, tmp_path):
    outcome = run_launch(*flags(damaged), '--workdir=run', cwd=tmp_path)
    assert outcome.code == 1 and 'Traceback' not in outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith(f"Error: config.dataset.root='{damaged}': cannot read the image")
    outcome = succeed(*flags(damaged, dataset__max_bad_fraction=0.2), '--workdir=run2', cwd=tmp_path)
    assert 'Skipped bad file 1 of at most 2: cannot read the image' in outcome.stderr


@pytest.mark.parametrize('source_size', [0, 20])
def test_results_with_a_broken_test_file_are_those_in_memory(tmp_path, source_size):
    """Predictions, embeddings and accuracies, with their files; the broken one shifts no index."""
    root = make_folder(tmp_path / 'images', lambda rng: (24, 24))
    (root / 'test/a/1.jpg').write_text('no image')
    both = dict(
        dataset__source_size=source_size,
        dataset__max_bad_fraction=0.2,
        linear_eval__cache_features=True,
        evaluation__batch_size=2,
        num_epochs=1,
    )
    found = {}
    for name, gib in (('memory', 1.0), ('stream', 0.0)):
        argv = [*flags(root, **both, dataset__max_gib=gib), f'--workdir={name}']
        if name == 'memory':
            succeed(*argv, cwd=tmp_path)
        else:  # The same encoder.
            shutil.copytree(tmp_path / 'memory/checkpoints', tmp_path / 'stream/checkpoints')
        accuracies = {}
        for mode in ('linear_eval', 'knn', 'eval', 'embed'):
            succeed(*argv, f'--mode={mode}', cwd=tmp_path)
            if mode != 'embed':
                summary = json.loads((tmp_path / name / f'summary.{mode}.json').read_text())
                accuracies |= {metric: value for metric, value in summary.items() if metric.startswith('test/')}
        files = {file: dict(np.load(tmp_path / name / f'{file}.test.npz')) for file in ('predictions', 'embeddings')}
        found[name] = accuracies, files
    (expected, arrays), (ours, of_stream) = found['memory'], found['stream']
    near = 1e-5 if source_size else 0.2  # Views of own sizes are rounded to whole levels.
    assert ours.keys() == expected.keys()
    assert all(abs(ours[k] - expected[k]) <= (1e-9 if '_top' in k else near) for k in ours), (ours, expected)
    paths = [f'test/{i}.jpg' for i in ('a/0', 'a/2', 'b/0', 'b/1', 'b/2')]
    for file, content in arrays.items():
        assert content['index'].tolist() == [0, 2, 3, 4, 5] and content['path'].tolist() == paths
        assert content.keys() == of_stream[file].keys()
        for name, values in content.items():
            if values.dtype == np.float32:
                np.testing.assert_allclose(of_stream[file][name], values, rtol=1e-5, atol=near)
            else:
                np.testing.assert_array_equal(of_stream[file][name], values)


def test_nothing_but_bad_files_without_labels(tmp_path):
    (tmp_path / 'train').mkdir()
    for i in range(3):
        (tmp_path / 'train' / f'{i}.jpg').write_text('no image')
    with pytest.raises(UserError, match='train/2.jpg.*nor any other image of train'):
        load(tmp_path, max_bad_fraction=1.0)
    with pytest.raises(UserError, match='train/2.jpg.*nor any other image of train'):
        load(tmp_path, max_bad_fraction=1.0, cache_dir=f'{tmp_path}/cache')
