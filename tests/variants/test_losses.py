"""Losses of the gallery against the formulas of their papers and of the authors' code, written out plainly."""

import optree
import pytest
import torch
from torch.nn import functional as F

from byol_func import byol_experiment
from cli import ROOT
from configs.variants import accumulation, barlow_twins, contrast, dino, multi_crop, predictor_rate, tau_zero, vicreg
from variant_runs import arguments, load_config, make

VIEWS = ('view1', 'view2')


@pytest.fixture(scope='module')
def parts():
    return make(load_config(ROOT / 'configs/variants/asymmetric.py', variant='')).parts


def _outputs(seed, views=VIEWS):
    rng = torch.Generator().manual_seed(seed)
    names = [f'{kind}_{view}' for kind in ('prediction', 'projection') for view in views]
    return {name: torch.randn(6, 5, generator=rng, dtype=torch.float64).requires_grad_() for name in names}


def _ravel(tree):
    return torch.cat([leaf.flatten() for leaf in optree.tree_leaves(tree)])


def _cosines(x, y):
    return F.normalize(x) @ F.normalize(y).T


@pytest.mark.parametrize('beta', [0.0, 0.5, 1.0])
def test_contrast_is_equation_6_of_byol(parts, beta):
    online, target = _outputs(0), _outputs(1)
    alpha, expected = 0.3, 0.0
    for v, w in (VIEWS, VIEWS[::-1]):
        same, crossed = (_cosines(online[f'prediction_{v}'], target[f'projection_{u}']) for u in (v, w))
        for i in range(6):
            negatives = sum((same[i, j] / alpha).exp() for j in range(6) if j != i) + (crossed[i] / alpha).exp().sum()
            expected = expected + (2 - 2 * crossed[i, i] + 2 * alpha * beta * negatives.log()) / 6
    loss = contrast.variant(parts, beta=beta, temperature=alpha).repr_loss_fn(online, target)
    torch.testing.assert_close(loss, expected)
    if not beta:
        torch.testing.assert_close(loss, byol_experiment.repr_loss_fn(online, target))


@pytest.mark.parametrize('beta', [0.0, 1.0])
@pytest.mark.parametrize('target', [True, False])
def test_contrast_stops_the_gradient_at_a_target_network_only(parts, beta, target):
    online, theirs = _outputs(0), _outputs(1)
    contrast.variant(parts, beta=beta, target=target).repr_loss_fn(online, theirs).backward()
    assert all(x.grad is None for x in theirs.values())
    assert (online['projection_view1'].grad is None) == target


def test_vicreg_is_the_loss_of_the_authors_code(parts):
    z1, z2 = (_outputs(0)[f'projection_{view}'] for view in VIEWS)
    expected = 25 * F.mse_loss(z1, z2)
    for z in (z1, z2):
        expected = expected + 25 * F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean() / 2
        expected = expected + (torch.cov(z.T).square() * (1 - torch.eye(5))).sum() / 5
    loss, terms = vicreg.variant(parts).repr_loss_fn(_outputs(0), {})
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(loss, 25 * terms['invariance'] + 25 * terms['variance'] + terms['covariance'])


def test_barlow_twins_is_the_loss_of_the_authors_code(parts):
    z1, z2 = (F.batch_norm(_outputs(0)[f'projection_{view}'], None, None, training=True) for view in VIEWS)
    of_identity = (z1.T @ z2 / 6 - torch.eye(5)).square()
    expected = (of_identity * torch.eye(5)).sum() + 0.0051 * (of_identity * (1 - torch.eye(5))).sum()
    torch.testing.assert_close(barlow_twins.variant(parts, scale=1.0).repr_loss_fn(_outputs(0), {}), expected)


def test_dino_is_the_loss_of_the_authors_code(parts):
    online, target, center = _outputs(0), _outputs(1), torch.arange(5.0)
    expected = 0.0
    for v, w in (VIEWS, VIEWS[::-1]):
        teacher = F.softmax((target[f'projection_{v}'] - center) / 0.04, dim=1)
        expected = expected + F.cross_entropy(online[f'projection_{w}'] / 0.1, teacher) / 2
    torch.testing.assert_close(dino.variant(parts).repr_loss_fn(online, {**target, 'center': center}), expected)


def test_the_centre_of_dino_follows_the_mean_of_both_views(parts):
    network = dino.variant(parts).target_forward
    params, state = network.init(torch.Generator().manual_seed(0))
    state['center'] += 1
    outputs, new = network.apply(params, state, {view: torch.rand(4, 1, 8, 8) for view in VIEWS}, True)
    mean = torch.stack([outputs[f'projection_{view}'] for view in VIEWS]).mean(dim=(0, 1))
    assert torch.equal(outputs['center'], state['center'])  # The old one, as in the authors' code.
    torch.testing.assert_close(new['center'], 0.9 * state['center'] + 0.1 * mean)


def test_multi_crop_without_local_views_is_byol(parts):
    loss = multi_crop.variant(parts, num_local=0).repr_loss_fn(_outputs(0), _outputs(1))
    torch.testing.assert_close(loss, byol_experiment.repr_loss_fn(_outputs(0), _outputs(1)))


@pytest.mark.parametrize('rule, is_equal', [('group_norm', True), ('constant_tau', False)])
def test_accumulated_gradients_equal_those_of_the_batch_without_batch_statistics(rule, is_equal):
    parts = make(load_config(ROOT / f'configs/variants/{rule}.py', optimizer='sgd')).parts
    parts = parts._replace(learning_schedule=lambda step: torch.ones(()))
    whole, accumulated = (
        byol_experiment.make_experiment(each) for each in (parts, accumulation.variant(parts, num_micro_batches=4))
    )
    start = whole.init()
    steps = [
        _ravel(experiment.update(start, *arguments(experiment, 0))[0].online_params) - _ravel(start.online_params)
        for experiment in (whole, accumulated)
    ]
    assert ((steps[0] - steps[1]).norm() < 1e-4 * steps[0].norm()) == is_equal


@pytest.mark.parametrize('rule', [tau_zero.variant, lambda parts: predictor_rate.variant(parts, target=False)])
def test_the_online_network_as_its_own_target(parts, rule):
    """With tau 0 the target equals the online network from the second step on; then the loss is SimSiam's."""
    experiment = byol_experiment.make_experiment(rule(parts))
    state, _ = experiment.update(experiment.init(), *arguments(experiment, 0))
    _, logs = experiment.update(state, *arguments(experiment, 1))
    draws, batch = arguments(experiment, 1)[1:]
    views = experiment.postprocess(batch, draws)
    outputs, _ = parts.forward.apply(state.online_params, state.online_state, views, is_training=True)
    torch.testing.assert_close(logs['repr_loss'], byol_experiment.repr_loss_fn(outputs, outputs).detach())
