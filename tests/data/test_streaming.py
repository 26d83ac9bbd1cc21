"""Streaming: the numbers of the in-memory path, whatever the number of workers and wherever a run resumes."""

import json
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image

from byol_func import byol_experiment
from byol_func.data import cutting
from byol_func.errors import UserError
from byol_func.runtime import prng, resampling
from byol_func.runtime.windows import crop_windows
from byol_func.utils import augmentations, dataset, sampling
from byol_func.utils.sampling import AUGMENT_CONFIG
from cli import ROOT, config, succeed
from image_folders import flags, lines_of, load, make_folder
from variant_runs import BATCH_SIZE, load_config


@pytest.fixture(scope='module')
def one_size(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp('one_size'), lambda rng: (24, 24))


@pytest.fixture(scope='module')
def many_sizes(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp('many_sizes'), lambda rng: rng.integers(14, 40, 2))


def crops(step):
    return {
        f'view{v}': sampling.sample_relative_crops(prng.fold_in(3, step, v), 4, AUGMENT_CONFIG[f'view{v}'])
        for v in (1, 2)
    }


def train_batches(data, steps, **kwargs):
    batches = dataset.train_batches(data, steps, seed=1, batch_size=4, relative_crops=crops, image_size=16, **kwargs)
    return [{name: value.clone() for name, value in batch.items()} for batch in batches]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for left, right in zip(ours, theirs, strict=False):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize('window', [(0, 0, 30, 40), (3, 5, 7, 31), (29, 39, 1, 1), (0, 10, 30, 2)])
@pytest.mark.parametrize('channels', [1, 3])
def test_a_window_is_cut_and_resized_as_on_the_device(window, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, channels), dtype=np.uint8)
    ours = cutting.cut(pixels, window, 17)
    batch = torch.from_numpy(pixels.transpose(2, 0, 1))[None].float()
    theirs = resampling.crop_and_resize(batch, torch.tensor([window], dtype=torch.float32), 17)[0].clamp(0, 255)
    assert ours.shape == (channels, 17, 17) and ours.dtype == np.uint8
    assert np.abs(ours - theirs.numpy()).max() <= 0.5 + 1e-3


def test_crops_of_one_size_are_those_of_the_sampler():
    presets = AUGMENT_CONFIG['view1'] | dict(random_crop=AUGMENT_CONFIG['view1']['random_crop'] | dict(apply_prob=0.5))
    drawn = sampling.sample(prng.fold_in(0), 100, presets, (37, 53)).crop
    relative = sampling.sample_relative_crops(prng.fold_in(0), 100, presets)
    assert torch.equal(drawn, crop_windows(relative, (37, 53)))
    sizes = torch.tensor([[37, 53], [10, 300]]).repeat(50, 1)
    windows = crop_windows(relative, sizes)
    assert torch.equal(windows[::2], drawn[::2])
    top, left, height, width = windows.unbind(1)
    assert (torch.minimum(height, width) >= 1).all() and (torch.minimum(top, left) >= 0).all()
    assert (top + height <= sizes[:, 0]).all() and (left + width <= sizes[:, 1]).all()
    whole = drawn.eq(torch.tensor([0, 0, 37, 53])).all(1)
    assert 0.3 < whole.float().mean() < 0.7


def test_too_large_a_folder_is_streamed(one_size):
    assert isinstance(load(one_size), dataset.Dataset)
    for data in (load(one_size, max_gib=0.0), load(one_size, max_gib=1e-6)):
        assert isinstance(data, dataset.Stream)
        assert (data.num_examples, data.num_classes, data.image_shape) == (12, 2, (3, 20, 20))
        assert dataset.describe(data) == '12 images, 2 classes of 6'


@pytest.mark.parametrize('num_workers', [0, 1, 3])
def test_squares_are_exactly_those_in_memory(one_size, num_workers):
    in_memory, stream = load(one_size), load(one_size, max_gib=0.0, num_workers=num_workers)
    assert_same(train_batches(stream, range(2, 9)), train_batches(in_memory, range(2, 9)))
    ours, theirs = (list(dataset.eval_batches(data, 5)) for data in (stream, in_memory))
    assert_same(ours, theirs)


def test_views_of_own_sizes_agree_with_the_crops_on_the_device(one_size):
    """Images of one size may be read either way: the same windows, pixels within half a level."""
    in_memory, stream = (load(one_size, source_size=0, max_gib=gib) for gib in (1.0, 0.0))
    for step, (whole, cut) in enumerate(
        zip(train_batches(in_memory, range(4)), train_batches(stream, range(4)), strict=False)
    ):
        assert torch.equal(whole['labels'], cut['labels']) and 'images' not in cut
        for view, relative in crops(step).items():
            expected = augmentations.random_crop(whole['images'], crop_windows(relative, (24, 24)), 16)
            assert (cut[view] / 255 - expected).abs().max() <= 0.501 / 255
    stream = stream._replace(center_crop=(16, 0.8))
    for whole, cut in zip(dataset.eval_batches(in_memory, 5), dataset.eval_batches(stream, 5), strict=False):
        ours, theirs = (augmentations.center_view(batch, 16, 0.8) for batch in (cut, whole))
        assert (ours - theirs).abs().max() <= 0.501 / 255


def test_multi_crop(many_sizes):
    """The workers cut local views of their own size, and a step takes them."""
    config = load_config(ROOT / 'configs/variants/multi_crop.py')
    stream = load(many_sizes, source_size=0, max_gib=0.0, num_workers=1)
    shape, size = stream.image_shape, BATCH_SIZE // 2
    config.update_from_flattened_dict({'batch_size': size, 'image_size': 16})
    experiment = byol_experiment.make(config, num_examples=stream.num_examples, num_classes=2, image_shape=shape)
    options = dict(seed=1, batch_size=size, relative_crops=experiment.relative_crops, image_size=experiment.image_size)
    batch = next(dataset.train_batches(stream, range(1), **options))
    sides = {f'view{i}': 16 if i < 3 else 8 for i in range(1, 7)}
    assert {name: tuple(x.shape) for name, x in batch.items() if name in sides} == {
        name: (size, 3, side, side) for name, side in sides.items()
    }
    _, logs = experiment.update(experiment.init(), torch.tensor(0), experiment.sample(0), batch)
    assert 0 < logs['repr_loss'] < 8


def test_order_and_views_do_not_depend_on_workers_replicas_or_the_first_step(many_sizes):
    alone = train_batches(load(many_sizes, source_size=0, max_gib=0.0), range(7))
    for num_workers in (1, 3):
        stream = load(many_sizes, source_size=0, max_gib=0.0, num_workers=num_workers)
        assert_same(train_batches(stream, range(7)), alone)
        assert_same(train_batches(stream, range(4, 7)), alone[4:])
    parts = [train_batches(stream._replace(num_workers=0), range(7), rank=rank, num_replicas=2) for rank in (0, 1)]
    joined = [
        {name: torch.cat([left[name], right[name]]) for name in left} for left, right in zip(*parts, strict=False)
    ]
    assert_same(joined, alone)


def test_parts_of_a_stream(one_size):
    stream, in_memory = load(one_size, max_gib=0.0), load(one_size)
    for ours, theirs in zip(dataset.split_train(stream, 0.5), dataset.split_train(in_memory, 0.5), strict=False):
        assert_same(list(dataset.eval_batches(ours, 4)), list(dataset.eval_batches(theirs, 4)))


def test_one_channel(many_sizes):
    stream = load(many_sizes, source_size=0, grayscale=True, max_gib=0.0)
    assert stream.image_shape == (1, None, None)
    assert train_batches(stream, range(1))[0]['view2'].shape == (4, 1, 16, 16)


# --- from the command line


def test_runs_of_images_of_many_sizes_with_and_without_workers(many_sizes, tmp_path):
    for name, num_workers in (('two', 2), ('none', 0)):
        succeed(*flags(many_sizes, dataset__num_workers=num_workers), f'--workdir={name}', cwd=tmp_path)
    assert lines_of(tmp_path / 'two') == lines_of(tmp_path / 'none')
    summary = json.loads((tmp_path / 'two/summary.json').read_text())
    assert 0 <= summary['test/linear_top1'] <= 1 and 0 <= summary['test/online_top1'] <= 1
    outcome = succeed(
        *flags(many_sizes, fine_tune__num_epochs=1, fine_tune__batch_size=4),
        '--mode=fine_tune',
        '--workdir=two',
        cwd=tmp_path,
    )
    assert 'fine-tuned from the BYOL encoder' in outcome.stdout


def test_the_official_config_streams_whole_images(many_sizes, tmp_path):
    small = [
        flag
        for flag in flags(many_sizes, num_epochs=1)
        if not flag.startswith(('--config=', '--config.dataset.source_size', '--config.dataset.max_gib'))
    ]
    outcome = succeed(*config('byol.py'), *small, '--workdir=run', cwd=tmp_path)
    assert outcome.stderr.count('are more than config.dataset.max_gib=0.0') == 2  # Train and test.
    summary = json.loads((tmp_path / 'run/summary.json').read_text())
    assert summary['steps'] == 3 and 0 <= summary['test/online_top1'] <= 1


def test_a_run_on_streamed_squares_is_the_run_in_memory_and_resumes(one_size, tmp_path):
    common = dict(
        dataset__source_size=20, final_linear_eval=False, checkpointing__save_every_steps=1, checkpointing__keep=10
    )
    succeed(*flags(one_size, **common), '--workdir=stream', cwd=tmp_path)
    succeed(*flags(one_size, **common | dict(dataset__max_gib=1.0)), '--workdir=memory', cwd=tmp_path)
    expected = lines_of(tmp_path / 'memory')
    assert lines_of(tmp_path / 'stream') == expected and len(expected) == 6
    for path in (tmp_path / 'stream/checkpoints').glob('*_0000000[45]*'):
        path.unlink()
    succeed(*flags(one_size, **common | dict(dataset__num_workers=1)), '--workdir=stream', cwd=tmp_path)
    assert lines_of(tmp_path / 'stream')[-2:] == expected[-2:]


def test_a_worker_that_is_ended_from_outside(many_sizes):
    stream = load(many_sizes, source_size=0, max_gib=0.0, num_workers=1)
    before = set(multiprocessing.active_children())
    batches = dataset.train_batches(stream, range(10**6), seed=1, batch_size=4, relative_crops=crops, image_size=16)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    worker.kill()
    with pytest.raises(UserError, match='config.dataset.num_workers=1: a worker process was killed'):
        for _ in batches:
            pass


@pytest.mark.parametrize('source_size', [0, 20])
def test_the_sheet_of_a_stream(many_sizes, tmp_path, source_size):
    succeed(*flags(many_sizes, dataset__source_size=source_size), '--mode=preview', '--workdir=run', cwd=tmp_path)
    with Image.open(tmp_path / 'run/augmentations.png') as sheet:
        assert min(sheet.size) > 100
