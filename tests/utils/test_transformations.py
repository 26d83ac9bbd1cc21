"""Optimisers beside the official one, and what update rules are built of: groups, micro-batches, norms, gathers."""

import optree
import pytest
import torch

from byol_func.errors import UserError
from byol_func.runtime import collectives, norms
from byol_func.utils import networks, optimizers, transformations
from golden_processes import run_in_processes


def _tree(seed: int) -> dict:
    draw = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    return {'encoder': {'conv': {'w': new(6, 3, 3, 3)}}, 'predictor': {'linear': {'w': new(5, 4), 'b': new(4)}}}


def test_lion_follows_its_equations():
    params, lion = _tree(0), optimizers.lion(0.1, b1=0.8, b2=0.7, weight_decay=0.01)
    state, mu = lion.init(params), torch.zeros(5, 4, dtype=torch.float64)
    for step in range(3):
        grads = _tree(step + 1)
        updates, state = lion.update(grads, state, params)
        g, w = grads['predictor']['linear']['w'], params['predictor']['linear']['w']
        expected = -0.1 * ((0.8 * mu + 0.2 * g).sign() + 0.01 * w)
        mu = 0.7 * mu + 0.3 * g
        torch.testing.assert_close(updates['predictor']['linear']['w'], expected)
        params = optimizers.apply_updates(params, updates)


def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adamw():
    params, grads = _tree(0), _tree(1)
    updates, _ = (muon := optimizers.muon(1.0)).update(grads, muon.init(params), params)
    for path, rows, columns in ((('encoder', 'conv', 'w'), 6, 27), (('predictor', 'linear', 'w'), 5, 4)):
        update = updates[path[0]][path[1]][path[2]].reshape(rows, columns)
        values = torch.linalg.svdvals(update) / (0.2 * max(rows, columns) ** 0.5)
        assert values.min() > 0.6 and values.max() < 1.3
        gradient = grads[path[0]][path[1]][path[2]].reshape(rows, columns)
        assert (update * gradient).sum() < 0  # Downhill.
    adamw = optimizers.adamw(1.0, weight_decay=0.0)
    bias = {'b': params['predictor']['linear']['b']}
    expected, _ = adamw.update({'b': grads['predictor']['linear']['b']}, adamw.init(bias), bias)
    torch.testing.assert_close(updates['predictor']['linear']['b'], expected['b'])


def test_muon_is_that_of_pytorch_but_for_its_bfloat16():
    weight = torch.nn.Parameter(torch.randn(8, 12, generator=torch.Generator().manual_seed(0)))
    params, ours = {'w': weight.detach().clone()}, optimizers.muon(0.1, weight_decay=0.1)
    theirs = torch.optim.Muon([weight], lr=0.1, weight_decay=0.1, adjust_lr_fn='match_rms_adamw')
    state = ours.init(params)
    for step in range(3):
        weight.grad = torch.randn(8, 12, generator=torch.Generator().manual_seed(step + 1))
        updates, state = ours.update({'w': weight.grad.clone()}, state, params)
        params = optimizers.apply_updates(params, updates)
        theirs.step()
    assert (params['w'] - weight).norm() < 0.1 * (0.1 * 0.2 * 12**0.5 * 8**0.5) * 3


def test_groups_are_trained_as_if_alone():
    params, grads = _tree(0), _tree(1)
    groups = {'predictor': optimizers.sgd(1.0, momentum=0.9), 'rest': optimizers.sgd(0.1, momentum=0.9)}
    both = optimizers.partition(groups, lambda path, p: 'predictor' if path[0] == 'predictor' else 'rest')
    state = both.init(params)
    for _ in range(2):
        updates, state = both.update(grads, state, params)
    assert optree.tree_structure(updates) == optree.tree_structure(params)
    for part, name in (('predictor', 'predictor'), ('encoder', 'rest')):
        own, single = {part: params[part]}, groups[name]
        expected, alone = None, single.init(own)
        for _ in range(2):
            expected, alone = single.update({part: grads[part]}, alone, own)
        optree.tree_map(torch.testing.assert_close, updates[part], expected[part])
    with pytest.raises(KeyError):
        optimizers.partition(groups, lambda path, p: 'other').init(params)


def _square_loss(params, target_params, online_state, target_state, draws, inputs):
    loss = ((inputs['x'] @ params['w'] - draws) ** 2).mean()
    return loss, (dict(online_state=online_state + 1, target_state=target_state), dict(loss=loss))


def test_micro_batches_have_the_gradient_of_the_batch():
    draw = torch.Generator().manual_seed(0)
    x, y, w = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((12, 5), (12,), (5,)))
    arguments = ({'w': w}, {}, torch.tensor(0), torch.tensor(0), y, {'x': x})
    whole, (_, logs) = torch.func.grad(_square_loss, has_aux=True)(*arguments)
    parts, (states, part_logs) = transformations.multi_steps(4)(_square_loss)(*arguments)
    torch.testing.assert_close(parts['w'], whole['w'])
    torch.testing.assert_close(part_logs['loss'], logs['loss'])
    assert states['online_state'] == 4  # Moving averages take as many steps.
    with pytest.raises(UserError, match='num_micro_batches=5: expected a divisor of 12'):
        transformations.multi_steps(5)(_square_loss)(*arguments)


def _coupled(x: torch.Tensor) -> torch.Tensor:
    """A loss in which every example meets every other."""
    return (x @ x.T).tanh().square().mean()


def _gathered(rank: int, world_size: int) -> tuple:
    x = torch.randn(4 * world_size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = x.chunk(world_size)[rank]
    grad, loss = torch.func.grad_and_value(lambda own: _coupled(collectives.all_gather(own)))(share)
    _, gathered = torch.func.grad_and_value(lambda own: collectives.all_gather(own).sum())(share)
    return grad, loss, gathered, x.sum()


def test_the_gradient_of_a_gathered_loss_is_that_of_one_process(tmp_path):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grad, loss = torch.func.grad_and_value(_coupled)(x)
    results = run_in_processes(_gathered, 2, tmp_path, 2)
    for rank, (own_grad, own_loss, gathered, total) in enumerate(results):
        torch.testing.assert_close(own_loss, loss)
        torch.testing.assert_close(own_grad / 2, grad.chunk(2)[rank])  # The sum over both losses; pmean halves it.
        torch.testing.assert_close(gathered, total)


def test_all_gather_alone_is_the_identity():
    x = torch.ones(3)
    assert collectives.all_gather(x) is x


@pytest.mark.parametrize('shape', [(4, 32), (4, 32, 5, 3), (4, 10, 2, 2)])
def test_group_norm_is_that_of_pytorch(shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    params = {'scale': torch.linspace(0.5, 2, shape[1]), 'offset': torch.linspace(-1, 1, shape[1])}
    groups = 2 if shape[1] == 32 else 1
    expected = torch.nn.functional.group_norm(x, groups, params['scale'], params['offset'])
    torch.testing.assert_close(norms.group_norm(params, x), expected, rtol=1e-4, atol=1e-5)


def test_standardised_weights():
    for shape, axes in (((6, 3, 3, 3), (1, 2, 3)), ((12, 5), (0,))):
        w = 3 + torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        out = norms.standardized({'w': w, 'b': 1})['w']
        assert out.mean(axes).abs().max() < 1e-9
        fan_in = w.numel() // shape[0] if len(shape) == 4 else shape[0]
        torch.testing.assert_close(
            out.var(axes, correction=0) * fan_in, torch.ones(shape[0] if len(shape) == 4 else 5).double()
        )


@pytest.mark.parametrize('depth', [0, 1, 2, 3])
@pytest.mark.parametrize('norm', list(norms.NORMS))
def test_heads_of_every_depth_and_norm(depth, norm):
    head = networks.MLP(6, 16, 4, depth, norm=norm)
    params, state = head.init(torch.Generator().manual_seed(0))
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    out, new_state = head.apply(params, state, x, True)
    assert out.shape == ((8, 6) if depth == 0 else (8, 4))
    assert optree.tree_structure(new_state) == optree.tree_structure(state)
    assert sum(name.startswith('linear') for name in params) == depth


def test_an_unknown_norm():
    with pytest.raises(UserError, match="config.network.head_norm='batchnorm': expected one of batch_norm, group_norm"):
        networks.MLP(2, 2, 2, norm='batchnorm')
