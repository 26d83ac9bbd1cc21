"""Schedules against the official code's values."""

import functools

import pytest
import torch

from byol_func.errors import UserError
from byol_func.utils import schedules
from configs import byol
from golden_io import assert_close, below, children, load, scalar, tensor

GOLDEN = load('schedules.npz')
# Both are a few float32 operations on a cosine: some units in the last place.
RTOL = 1e-6
IMAGENET_TRAIN = 1_281_167  # images
CONFIGS = [c for c in children(GOLDEN) if f'{c}/steps' in GOLDEN]


def _case(config):
    number = lambda name: scalar(GOLDEN[f'{config}/{name}'])
    stored = lambda name: tensor(GOLDEN[f'{config}/{name}'])
    return number, stored, stored('steps').long()


@pytest.mark.parametrize('config', CONFIGS)
def test_learning_schedule(config):
    number, stored, steps = _case(config)
    kwargs = dict(
        batch_size=number('batch_size'),
        base_learning_rate=number('base_learning_rate'),
        total_steps=number('max_steps'),
        warmup_steps=number('warmup_steps'),
    )
    expected = stored('learning_rate')
    actual = schedules.learning_schedule(steps, **kwargs)
    assert_close(actual, expected, RTOL, f'{config}/learning_rate')
    one_by_one = torch.stack([schedules.learning_schedule(step, **kwargs) for step in steps])
    assert torch.equal(one_by_one, actual)
    starts_at_zero = expected[steps == 0] == 0
    assert torch.equal(actual[steps == 0] == 0, starts_at_zero)


@pytest.mark.parametrize('config', CONFIGS)
def test_target_ema(config):
    number, stored, steps = _case(config)
    kwargs = dict(base_ema=number('base_ema'), max_steps=number('max_steps'))
    expected = stored('tau')
    actual = schedules.target_ema(steps, **kwargs)
    # tau is close to 1, and 1 - tau is what acts: hold that to the rounding of tau.
    assert_close(1 - actual, 1 - expected, RTOL, f'1 - {config}/tau', atol=1.2e-7)
    assert torch.equal(actual == 1, expected == 1), f'{config}/tau reaches 1 elsewhere'
    one_by_one = torch.stack([schedules.target_ema(step, **kwargs) for step in steps])
    assert torch.equal(one_by_one, actual)


@pytest.mark.parametrize('name', children(GOLDEN, pattern=r'preset_\d+_\d+'))
def test_published_configurations(name):
    """The recorded numbers are those of `configs/byol.py` and of the steps that it derives."""
    recorded = {key: scalar(value) for key, value in below(GOLDEN, name).items() if value.ndim == 0}
    _, epochs, batch_size = name.split('_')
    config = byol.get_config(epochs)
    num_steps = functools.partial(schedules.num_steps, num_examples=IMAGENET_TRAIN, batch_size=int(batch_size))
    assert recorded == {
        'batch_size': int(batch_size),
        'max_steps': num_steps(config.num_epochs),
        'warmup_steps': num_steps(config.lr_schedule.warmup_epochs),
        'base_learning_rate': config.lr_schedule.base_learning_rate,
        'base_ema': config.base_target_ema,
        'weight_decay': config.optimizer_config.lars.weight_decay,
    }


def test_published_evaluation():
    recorded = {key: scalar(value) for key, value in below(GOLDEN, 'eval_preset').items()}
    num_epochs = byol.get_config().linear_eval.num_epochs
    assert recorded['max_steps'] == schedules.num_steps(num_epochs, IMAGENET_TRAIN, recorded['batch_size'])


def test_a_constant_rate_warms_up_as_well():
    """Not in the official code."""
    make = lambda **kwargs: schedules.make_learning_schedule(
        'constant', 0.4, batch_size=10, num_examples=40, total_steps=40, **kwargs
    )
    steps = torch.arange(12)
    rates = make(warmup_epochs=2.0)(steps)
    torch.testing.assert_close(rates, torch.tensor([0.05 * min(step, 8) for step in range(12)]))
    assert torch.equal(make(warmup_epochs=0.0)(steps), torch.full((12,), 0.4))
    with pytest.raises(UserError, match=r'config\.linear_eval\.lr_schedule\.warmup_epochs=99\.0: 396 steps'):
        make(warmup_epochs=99.0, section='config.linear_eval')
