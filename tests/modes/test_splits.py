"""Parts of data sets: stratified, deterministic, nested; and what a run is told of them."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from byol_func.errors import UserError
from byol_func.utils import dataset
from cli import run_launch, succeed, tiny_digits


def numbered(counts, names='abcdefgh'):
    """Image i holds the number i; classes of the given sizes, mixed up."""
    labels = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    images = torch.arange(len(labels)).to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    return dataset.Dataset(images, labels, tuple(names[: len(counts)]))


def numbers(data):
    return data.images[:, 0, 0, 0].tolist()


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    fraction=st.floats(0.001, 1.0),
    seed=st.integers(0, 1000),
)
def test_every_class_gives_its_share(counts, fraction, seed):
    data = numbered(counts)
    part, rest = dataset.split_train(data, fraction, seed)
    assert sorted(numbers(part) + numbers(rest)) == numbers(data)
    assert numbers(part) == sorted(numbers(part)) and numbers(rest) == sorted(numbers(rest))
    for split in (part, rest):
        assert split.labels.tolist() == [data.labels[i].item() for i in numbers(split)]
    for count, taken in zip(counts, dataset.class_counts(part), strict=False):
        assert abs(taken - fraction * count) <= 1.0
        assert taken >= 1 and (fraction == 1.0 or count == 1 or taken < count)


def test_a_split_depends_on_the_seed_alone_and_smaller_ones_lie_in_larger():
    data = numbered([40, 30])
    small, large, other = (dataset.split_train(data, f, s)[0] for f, s in ((0.1, 3), (0.5, 3), (0.5, 4)))
    assert numbers(small) == numbers(dataset.split_train(data, 0.1, 3)[0])
    assert set(numbers(small)) < set(numbers(large))
    assert numbers(large) != numbers(other)


def test_a_set_without_labels_is_one_class():
    data = numbered([20, 20])._replace(class_names=(), labels=torch.zeros(40, dtype=torch.int64))
    part, rest = dataset.split_train(data, 0.25)
    assert (part.num_examples, rest.num_examples, part.num_classes) == (10, 30, 0)


@pytest.mark.parametrize('fraction', [0.0, -0.1, 1.1, float('nan')])
def test_impossible_fractions(fraction):
    with pytest.raises(ValueError, match='above 0, at most 1'):
        dataset.split_train(numbered([4]), fraction)


def test_describe():
    assert dataset.describe(numbered([3, 3])) == '6 images, 2 classes of 3'
    assert dataset.describe(numbered([3, 5])) == '8 images, 2 classes of 3 to 5'
    assert dataset.describe(numbered([3])._replace(class_names=())) == '3 images without labels'


DIGITS = dict(
    name='digits',
    root='',
    source_size=0,
    grayscale=False,
    max_gib=1.0,
    max_bad_fraction=0.0,
    num_workers=0,
    cache_dir='',
)


def load_both(**kwargs):
    part = dict(fraction=1.0, eval_split='test', val_fraction=0.1)
    return dataset.load_train_and_test(**DIGITS | part | kwargs)


def test_the_validation_split_is_held_out_of_training():
    everything, test = load_both()
    train, val = load_both(eval_split='val')
    assert train.num_examples + val.num_examples == everything.num_examples == 1442
    assert dataset.describe(val) == '143 images, 10 classes of 14 to 15'
    images = lambda data: {image.numpy().tobytes() for image in data.images}
    assert not images(train) & images(val)
    assert not images(test) & (images(train) | images(val))


def test_fraction_is_taken_of_what_is_left_to_train_on():
    train, val = load_both(eval_split='val')
    part, same_val = load_both(eval_split='val', fraction=0.5)
    assert torch.equal(val.images, same_val.images)
    for left, right in zip(dataset.class_counts(part), dataset.class_counts(train), strict=False):
        assert abs(left - right / 2) <= 0.5


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(fraction=0.0), 'config.dataset.fraction=0.0: expected a number above 0, at most 1'),
        (dict(fraction=1.5), 'config.dataset.fraction=1.5: expected a number above 0, at most 1'),
        (dict(val_fraction=1.0), 'config.dataset.val_fraction=1.0: expected a number above 0, below 1'),
        (dict(eval_split='dev'), "config.dataset.eval_split='dev': expected one of test, val, none"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(UserError) as caught:
        load_both(**kwargs)
    assert str(caught.value) == message


def test_a_run_on_a_part_evaluated_on_held_out_images(tmp_path):
    argv = tiny_digits(
        dataset__fraction=0.5, dataset__eval_split='val', final_linear_eval=True, linear_eval__compare_untrained=False
    )
    outcome = succeed(*argv, f'--workdir={tmp_path}/run', cwd=tmp_path)
    assert outcome.stderr.count('Training set: 6') == 1
    assert outcome.stderr.count('Val set: 143 images, 10 classes of 14 to 15') == 1
    assert 'digits, validation set' in outcome.stdout
    summary = json.loads((tmp_path / 'run/summary.json').read_text())
    assert summary['eval_split'] == 'val' and 0 < summary['val/linear_top1'] <= 1
    outcome = run_launch(*tiny_digits(), f'--workdir={tmp_path}/run', cwd=tmp_path)
    assert outcome.code == 1 and 'config.dataset.eval_split' in outcome.stderr
