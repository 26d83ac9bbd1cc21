"""Small ResNets and MLPs against the official code: outputs, states and gradients, all stored."""

import pytest
import torch

from golden_io import (
    DTYPES,
    GRADIENTS,
    OUTPUTS,
    alone,
    assert_close,
    assert_norms_close,
    assert_trees_close,
    below,
    children,
    images,
    limit,
    load,
    recipe_average,
    recipe_param,
    scalar,
    tensor,
    tree,
)
from golden_networks import bn_config, build, gradients

GOLDEN = load('networks.npz')
NETS = [net for net in children(GOLDEN) if f'{net}/counter' in GOLDEN]


class _Case:
    """One net on one batch: images of some size, or the vectors of an MLP."""

    def __init__(self, where, dtype):
        self.where, self.dtype = where, dtype
        self.net = where.split('/')[0]
        self.name = 'images' if f'{where}/images' in GOLDEN else 'inputs'
        self.layout = images if self.name == 'images' else tensor
        shapes = {k: v.shape for k, v in below(GOLDEN, f'{self.net}/params').items()}
        self.network = build(shapes, bn_config(GOLDEN, self.net))
        self.params = tree(GOLDEN, f'{self.net}/params', dtype, alone)
        self.state = tree(GOLDEN, f'{self.net}/state', dtype, alone)
        self.inputs = self.layout(GOLDEN[f'{where}/{self.name}'], dtype)

    def assert_stored(self, actual, key):
        expected = tensor(GOLDEN[f'{self.where}/{key}'])
        assert_close(actual, expected, limit(OUTPUTS, self.dtype), f'{self.where}/{key}')


CASES = [f'{net}/{size}' for net in NETS for size in children(GOLDEN, net, r'\d+x\d+')]
CASES += [net for net in NETS if f'{net}/inputs' in GOLDEN]


@pytest.fixture(params=[(c, d) for c in CASES for d in DTYPES], ids=lambda p: f'{p[0]}-{p[1]}')
def case(request):
    return _Case(*request.param)


@pytest.mark.parametrize('net', NETS)
def test_recipe(net):
    # The larger networks rest on it.
    seed = scalar(GOLDEN['recipe/seed'])
    for key, value in below(GOLDEN, f'{net}/params').items():
        actual = tensor(recipe_param(key, value.shape, seed))
        assert_close(actual, tensor(value), 1e-7, f'{net}/params/{key}')
    stored = below(GOLDEN, f'{net}/state')
    for module in (k.removesuffix('/average') for k in stored if k.endswith('/average')):
        shape, counter = stored[f'{module}/average'].shape, int(GOLDEN[f'{net}/counter'])
        recipe = recipe_average(module, shape, seed, bn_config(GOLDEN, net)['decay_rate'], counter)
        for key, value in recipe.items():
            # The decay rate itself is a float32.
            assert_close(tensor(value), tensor(stored[key]), 3e-7, f'{net}/state/{key}')


def test_training(case):
    out, new_state = case.network.apply(case.params, case.state, case.inputs, True)
    case.assert_stored(out, 'out_train')
    expected = tree(GOLDEN, f'{case.where}/new_state', case.dtype, alone)
    rtol = limit(OUTPUTS, case.dtype)
    assert_trees_close(new_state, expected, rtol, f'{case.where}/new_state')
    assert out.shape[1] == case.network.output_size


@pytest.mark.parametrize('key', ['out_eval', 'out_eval_new_state'])
def test_evaluation(case, key):
    new_state = tree(GOLDEN, f'{case.where}/new_state', case.dtype, alone)
    state = case.state if key == 'out_eval' else new_state
    out, state_after = case.network.apply(case.params, state, case.inputs, False)
    case.assert_stored(out, key)
    assert_trees_close(state_after, state, 0, f'{case.where}: evaluation changed the state')


def test_gradients(case):
    cotangent = tensor(GOLDEN[f'{case.where}/cotangent'], case.dtype)
    grads, grad_inputs = gradients(case.network, case.params, case.state, case.inputs, cotangent)
    rtol = limit(GRADIENTS, case.dtype)
    if f'{case.where}/grad_norms' in GOLDEN:
        keys = [f'grads/{key}' for key in GOLDEN[f'{case.net}/grad_norm_keys']]
        norms = GOLDEN[f'{case.where}/grad_norms']
        assert_norms_close({'grads': grads}, keys, norms, rtol, case.where, alone)
    key = f'{case.where}/grad_{case.name}'
    if key in GOLDEN:
        assert_close(grad_inputs, case.layout(GOLDEN[key]), rtol, key)
    expected = tree(GOLDEN, f'{case.where}/grad_params', case.dtype, alone)
    if not expected:
        assert f'{case.where}/grad_norms' in GOLDEN, f'{case.where}: neither gradients nor their norms'
        return
    if case.name == 'inputs':
        # The bias in front of a BatchNorm has a gradient of zero but for rounding.
        zero, stored_zero = (t['linear'].pop('b') for t in (grads, expected))
        assert_close(zero, stored_zero, 0, f'{case.where}/grad linear/b', atol=1e-6)
    assert_trees_close(grads, expected, rtol, f'{case.where}/grad_params')


def test_two_views_are_two_batches(case):
    # Both views in one pass, as training does it.
    view1, view2 = case.inputs, 0.3 + 0.7 * case.inputs.flip(0)
    out1, state = case.network.apply(case.params, case.state, view1, True)
    out2, state = case.network.apply(case.params, state, view2, True)
    both = torch.cat([view1, view2])
    out, new_state = case.network.apply(case.params, case.state, both, True, num_views=2)
    rtol = limit(OUTPUTS, case.dtype)
    assert_close(out, torch.cat([out1, out2]), rtol, f'{case.where}: two views')
    assert_trees_close(new_state, state, rtol, f'{case.where}: two views')
