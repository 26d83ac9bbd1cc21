"""ResNet-18, ResNet-50 and a net without projection against the official code, and initialisers.

Parameters and states of these follow from a recipe; only the outcomes are stored.
"""

import math
import re

import pytest
import torch

from byol_func import eval_experiment
from byol_func.utils import networks
from golden_io import (
    DTYPES,
    LARGE_DEEP_TRAINING,
    LARGE_OUTPUTS,
    alone,
    assert_close,
    assert_norms_close,
    assert_trees_close,
    below,
    children,
    flatten,
    images,
    leaf,
    limit,
    load,
    nest,
    recipe_average,
    recipe_param,
    scalar,
    tensor,
    tree,
)
from golden_networks import bn_config, build, gradients

GOLDEN = load('networks_large.npz')
NETS = [net for net in children(GOLDEN) if f'{net}/param_check' in GOLDEN]
CASES = [(net, size) for net in NETS for size in children(GOLDEN, net, r'\d+x\d+')]


# The norm of a tensor of two or three numbers has no neighbours to average its rounding with: in a
# network of width 2 rounding alone moved one by 1.06e-4 of itself in float32.
SMALL_NORMS = 2.5e-5


def _shapes(prefix):
    names, shapes = GOLDEN[f'{prefix}/param_names'], GOLDEN[f'{prefix}/param_shapes']
    return {str(name): tuple(int(n) for n in shape if n) for name, shape in zip(names, shapes, strict=True)}


def _params(net):
    """Haiku's key to the recipe's parameter in Haiku's layout."""
    seed = scalar(GOLDEN['recipe/seed'])
    return {key: recipe_param(key, shape, seed) for key, shape in _shapes(net).items()}


def _ours(arrays, dtype):
    return nest({alone(k): leaf(k.split('/')[-1], v, dtype) for k, v in arrays.items()})


def _state(net, size, dtype):
    """The recipe's state; the names and shapes of its modules are those of the stored new state."""
    seed, decay_rate = scalar(GOLDEN['recipe/seed']), bn_config(GOLDEN, net)['decay_rate']
    counter = scalar(GOLDEN[f'{net}/counter'])
    arrays = {}
    for key, average in below(GOLDEN, f'{net}/{size}/new_state').items():
        module = key.removesuffix('/average')
        arrays |= recipe_average(module, average.shape, seed, decay_rate, counter)
    return _ours(arrays, dtype)


def _case(net, size, dtype):
    network = build(_shapes(net), bn_config(GOLDEN, net))
    inputs = images(GOLDEN[f'{net}/{size}/images'], dtype)
    return network, _ours(_params(net), dtype), _state(net, size, dtype), inputs


def _assert_stored(actual, key, rtol):
    assert_close(actual, tensor(GOLDEN[key]), rtol, key)


@pytest.mark.parametrize('net', NETS)
def test_recipe(net):
    check = GOLDEN[f'{net}/param_check']
    for (key, value), expected in zip(_params(net).items(), check, strict=True):
        value = torch.tensor(value.reshape(-1)).double()
        actual = torch.stack([value.sum(), value.abs().sum(), value[0], value[-1]])
        # The sum may cancel to nothing; it is as exact as the sum of magnitudes.
        assert_close(actual, tensor(expected), 1e-6, f'{net}/param_check of {key}')


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(('net', 'size'), CASES)
def test_outputs(net, size, dtype):
    where = f'{net}/{size}'
    network, params, state, inputs = _case(net, size, dtype)
    rtol = limit(LARGE_OUTPUTS, dtype)
    is_deep = sum(key.endswith('/w') for key in _shapes(net)) > 50
    training_rtol = limit(LARGE_DEEP_TRAINING if is_deep else LARGE_OUTPUTS, dtype)
    out, new_state = network.apply(params, state, inputs, True)
    _assert_stored(out, f'{where}/out_train', training_rtol)
    averages = nest({p: v for p, v in flatten(new_state).items() if p[-1] == 'average'})
    stored = tree(GOLDEN, f'{where}/new_state', rename=alone)
    assert_trees_close(averages, stored, training_rtol, f'{where}/new_state')
    out, _ = network.apply(params, state, inputs, False)
    _assert_stored(out, f'{where}/out_eval', rtol)
    out, _ = network.apply(params, new_state, inputs, False)
    _assert_stored(out, f'{where}/out_eval_new_state', rtol)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(('net', 'size'), [c for c in CASES if f'{c[0]}/{c[1]}/cotangent' in GOLDEN])
def test_gradients(net, size, dtype):
    where = f'{net}/{size}'
    network, params, state, inputs = _case(net, size, dtype)
    cotangent = tensor(GOLDEN[f'{where}/cotangent'], dtype)
    grads, grad_images = gradients(network, params, state, inputs, cotangent)
    rtol = limit(LARGE_OUTPUTS, dtype)
    keys = [f'grads/{key}' for key in GOLDEN[f'{net}/param_names']]
    norm_rtol = max(rtol, limit(SMALL_NORMS, dtype)) if dtype == torch.float32 else rtol
    assert_norms_close({'grads': grads}, keys, GOLDEN[f'{where}/grad_norms'], norm_rtol, where, alone)
    expected = leaf('w', GOLDEN[f'{where}/grad_initial_conv'])
    assert_close(grads['initial_conv']['w'], expected, rtol, f'{where}/grad_initial_conv')
    expected = images(GOLDEN[f'{where}/grad_images_first'])
    assert_close(grad_images[: len(expected)], expected, rtol, f'{where}/grad_images_first')


@pytest.mark.parametrize('name', children(GOLDEN, 'param_count'))
def test_param_count(name):
    encoder, width, version = re.fullmatch(r'(\w+)_width(\d+)_v([12])', name).groups()
    network = getattr(networks, encoder)(width_multiplier=int(width), resnet_v2=version == '2')
    with torch.device('meta'):  # Shapes without the numbers: the largest has 94 million.
        params, _ = network.init(torch.Generator('cpu'))
    count = sum(math.prod(value.shape) for value in flatten(params).values())
    assert count == GOLDEN[f'param_count/{name}']


@pytest.mark.parametrize('net', NETS)
def test_param_count_of_nets(net):
    params, _ = build(_shapes(net)).init(torch.Generator().manual_seed(0))
    assert sum(v.numel() for v in flatten(params).values()) == GOLDEN[f'{net}/param_count']


# Of a normal distribution cut at two sigma: its standard deviation, the relative standard error of
# the standard deviation of n values, and the density at the cut, all for sigma = 1.
STD, STD_ERROR, DENSITY_AT_CUT = 0.87963, 0.584, 0.0566


def _init(net):
    """Our initial parameters of a net in init_stats; `linear_<in>_<out>` is the classifier."""
    generator = torch.Generator().manual_seed(0)
    if net.startswith('linear_'):
        in_size, num_classes = map(int, net.split('_')[1:])
        return eval_experiment.make_classifier(in_size, num_classes).init(generator)[0]
    return build(_shapes(f'init_stats/{net}')).init(generator)[0]


@pytest.mark.parametrize('net', children(GOLDEN, 'init_stats'))
def test_initialisers(net):
    shapes = _shapes(f'init_stats/{net}')
    rename = (lambda key: tuple(key.split('/'))) if net.startswith('linear_') else alone
    params = flatten(_init(net))
    assert sorted(params) == sorted(rename(key) for key in shapes)
    stored = GOLDEN[f'init_stats/{net}/mean_std_min_max']
    for (key, shape), (mean, std, low, high) in zip(shapes.items(), stored.tolist(), strict=True):
        value = params[rename(key)].double()
        n = math.prod(shape)
        assert value.numel() == n, key
        if std == 0:
            assert (value == mean).all() and low == mean == high, f'{net}/{key} is not {mean}'
            continue
        # Both are samples of one distribution, so five standard errors of a difference; the
        # chance to fail by accident is 1e-6, and the seed is fixed.
        fan_in = math.prod(shape[:-1])
        sigma = 1 / math.sqrt(fan_in)
        mean_error = 5 * math.sqrt(2 / n) * STD * sigma
        assert abs(value.mean() - mean) < mean_error, f'{net}/{key}: mean'
        std_error = 5 * math.sqrt(2 / n) * STD_ERROR * std
        assert abs(value.std(correction=0) - std) < std_error, f'{net}/{key}: standard deviation'
        # The extremes are just inside the cut, by a share of 1/n of the density there on average.
        gap = 20 * sigma / (DENSITY_AT_CUT * n)
        cut = 2 * sigma * (1 + 1e-6)
        for extremes in ((-low, high), (-value.min(), value.max())):
            assert all(cut - gap <= x <= cut for x in extremes), f'{net}/{key}: extremes'
