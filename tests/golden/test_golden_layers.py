"""Convolution, max-pool and BatchNorm against Haiku's values."""

import re

import pytest
import torch

from byol_func.runtime import layers
from byol_func.utils import networks
from golden_io import (
    DTYPES,
    LAYERS,
    alone,
    assert_close,
    assert_trees_close,
    children,
    images,
    leaf,
    limit,
    load,
    numbered,
    scalar,
    tensor,
    tree,
)

GOLDEN = load('layers.npz')
CONVOLUTIONS = [
    (size, conv) for size in children(GOLDEN, pattern=r'\d+x\d+') for conv in children(GOLDEN, size, r'conv\d+s\d+')
]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize(('size', 'conv'), CONVOLUTIONS)
def test_conv2d(size, conv, dtype):
    stride = int(re.fullmatch(r'conv\d+s(\d+)', conv)[1])
    params = {'w': leaf('w', GOLDEN[f'{size}/{conv}/w'], dtype)}
    inputs = images(GOLDEN[f'{size}/input'], dtype)
    actual = networks.conv2d(params, inputs, stride=stride)
    expected = images(GOLDEN[f'{size}/{conv}/out'])
    assert_close(actual, expected, limit(LAYERS, dtype), f'{size}/{conv}/out')


@pytest.mark.parametrize('size', children(GOLDEN, pattern=r'\d+x\d+'))
def test_max_pool(size, dtype):
    actual = networks.max_pool(images(GOLDEN[f'{size}/maxpool/input'], dtype))
    # A maximum does not round.
    assert_close(actual, images(GOLDEN[f'{size}/maxpool/out']), 0, f'{size}/maxpool/out')


class _BatchNorm:
    """One of the recorded BatchNorms: its settings, and its inputs and outputs in our layout."""

    def __init__(self, name, dtype):
        self.name, self.dtype = name, dtype
        self.layout = {'batchnorm_nhwc': images, 'batchnorm_nc': tensor}[name]
        self.decay_rate, self.eps = (scalar(GOLDEN[f'{name}/{key}']) for key in ('decay_rate', 'eps'))
        self.params = self.tree('params')
        self.num_calls = max(numbered(GOLDEN, name, 'call'))

    def tree(self, prefix):
        return tree(GOLDEN, f'{self.name}/{prefix}', self.dtype, alone)

    def stored(self, key):
        return self.layout(GOLDEN[f'{self.name}/{key}'], self.dtype)

    def apply(self, state, inputs, is_training, **kwargs):
        out, statistics = layers.batch_norm(self.params, state, inputs, is_training, eps=self.eps, **kwargs)
        return out, layers.moving_averages(state, statistics, self.decay_rate) if is_training else state


@pytest.fixture(params=children(GOLDEN, pattern='batchnorm_.*'))
def bn(request, dtype):
    return _BatchNorm(request.param, dtype)


def test_batch_norm_training(bn):
    rtol = limit(LAYERS, bn.dtype)
    state = bn.tree('init_state')
    for k in range(1, bn.num_calls + 1):
        out, state = bn.apply(state, bn.stored(f'call{k}/input'), True)
        assert_close(out, bn.stored(f'call{k}/out'), rtol, f'{bn.name}/call{k}/out')
        assert_trees_close(state, bn.tree(f'call{k}/state'), rtol, f'{bn.name}/call{k}/state')


def test_batch_norm_evaluation(bn):
    for k in range(1, bn.num_calls + 1):
        state = bn.tree(f'call{k}/state')
        out, new_state = bn.apply(state, bn.stored('eval_input'), False)
        where = f'{bn.name}/call{k}/eval_out'
        assert_close(out, bn.stored(f'call{k}/eval_out'), limit(LAYERS, bn.dtype), where)
        assert_trees_close(new_state, state, 0, f'{bn.name}: evaluation changed the state')


def test_batch_norm_of_two_views_is_two_calls(bn):
    rtol = limit(LAYERS, bn.dtype)
    for k in range(2, bn.num_calls + 1):
        state = bn.tree(f'call{k - 2}/state' if k > 2 else 'init_state')
        both = torch.cat([bn.stored(f'call{i}/input') for i in (k - 1, k)])
        out, state = bn.apply(state, both, True, num_views=2)
        expected = torch.cat([bn.stored(f'call{i}/out') for i in (k - 1, k)])
        assert_close(out, expected, rtol, f'{bn.name}/call{k - 1} and {k}/out')
        assert_trees_close(state, bn.tree(f'call{k}/state'), rtol, f'{bn.name}/call{k}/state')
