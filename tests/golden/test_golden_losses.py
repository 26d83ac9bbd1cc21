"""Losses, accuracies and the image normalisation against the official code's values."""

import pytest
import torch

from byol_func.utils import dataset, helpers
from golden_io import DTYPES, LAYERS, assert_close, children, images, limit, load, tensor

GOLDEN = load('losses.npz')
# One or two reductions over a row: some units in the last place.
RTOL = 2e-6


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def test_regression_loss(dtype):
    x, y = (tensor(GOLDEN[f'regression/{name}'], dtype) for name in 'xy')
    loss = helpers.regression_loss(x, y)
    assert_close(loss, tensor(GOLDEN['regression/loss']), RTOL, 'regression/loss')


@pytest.mark.parametrize('wrt', ['x', 'y'])
def test_regression_loss_gradients(wrt, dtype):
    x, y, cotangent = (tensor(GOLDEN[f'regression/{n}'], dtype) for n in ('x', 'y', 'cotangent'))
    weighted = lambda x, y: (helpers.regression_loss(x, y) * cotangent).sum()
    grads = torch.func.grad(weighted, argnums='xy'.index(wrt))(x, y)
    expected = tensor(GOLDEN[f'regression/grad_{wrt}'])
    # Row by row: a vector near zero has a gradient of a million. And relative to the gradient's
    # natural size, 2 |cotangent| / max(|x|, 1e-6): that of (anti)parallel vectors is all rounding.
    norms = {'x': x, 'y': y}[wrt].norm(dim=-1).clamp_min(1e-6)
    sizes = 2 * cotangent.abs() / norms
    for row, size in enumerate(sizes.tolist()):
        where = f'regression/grad_{wrt}[{row}]'
        assert_close(grads[row], expected[row], RTOL, where, atol=RTOL * size)


@pytest.mark.parametrize('name', [name for name in children(GOLDEN, 'l2_normalize') if name != 'x'])
def test_l2_normalize(name, dtype):
    x = tensor(GOLDEN['l2_normalize/x'], dtype)
    axis_name, _, epsilon = name.removeprefix('axis_').partition('_eps_')
    axis = {'last': -1, 'none': None}[axis_name]
    if epsilon:
        actual = helpers.l2_normalize(0.1 * x, axis=axis, epsilon=float(epsilon))
    else:
        actual = helpers.l2_normalize(x, axis=axis)
    assert_close(actual, tensor(GOLDEN[f'l2_normalize/{name}']), RTOL, f'l2_normalize/{name}')


@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
def test_softmax_cross_entropy(reduction, dtype):
    logits = tensor(GOLDEN['xent/logits'], dtype)
    labels = torch.nn.functional.one_hot(tensor(GOLDEN['xent/labels']).long(), logits.shape[1])
    actual = helpers.softmax_cross_entropy(logits, labels.to(dtype), reduction=reduction)
    assert_close(actual, tensor(GOLDEN[f'xent/{reduction}']), RTOL, f'xent/{reduction}')


def test_softmax_cross_entropy_gradient(dtype):
    logits = tensor(GOLDEN['xent/logits'], dtype)
    labels = torch.nn.functional.one_hot(tensor(GOLDEN['xent/labels']).long(), logits.shape[1])
    grads = torch.func.grad(helpers.softmax_cross_entropy)(logits, labels.to(dtype))
    assert_close(grads, tensor(GOLDEN['xent/grad_mean']), RTOL, 'xent/grad_mean')


@pytest.mark.parametrize('key', [k for k in GOLDEN if k.rpartition('/')[2].startswith('top')])
def test_topk_accuracy(key):
    group, name = key.split('/')
    logits = tensor(GOLDEN['ties/logits' if group == 'ties' else 'xent/logits'])
    labels = tensor(GOLDEN['xent/labels']).long()
    actual = helpers.topk_accuracy(logits, labels, topk=int(name.removeprefix('top')))
    assert_close(actual, tensor(GOLDEN[key]), 0, key)


def test_normalize_images(dtype):
    actual = dataset.normalize_images(images(GOLDEN['normalize_images/images'], dtype))
    expected = images(GOLDEN['normalize_images/out'])
    assert_close(actual, expected, limit(LAYERS, dtype), 'normalize_images/out')
