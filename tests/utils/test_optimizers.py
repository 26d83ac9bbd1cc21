"""SGD, Adam and AdamW against `torch.optim`; LARS has its golden values elsewhere."""

import functools

import optree
import pytest
import torch

from byol_func.errors import UserError
from byol_func.utils import optimizers

STEPS = 10
RATES = torch.linspace(0.1, 0.01, STEPS)  # A rate that changes, as schedules give it.
FILTER = 'exclude_bias_and_norm'


def _params() -> dict:
    generator = torch.Generator().manual_seed(0)
    shapes = {'conv': {'w': (4, 3, 3, 3)}, 'batch_norm': {'scale': (4,), 'offset': (4,)}}
    shapes |= {'linear': {'w': (5, 4), 'b': (4,)}}
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    return {m: {n: draw(shape) for n, shape in leaves.items()} for m, leaves in shapes.items()}


def _gradients(params: dict, step: int) -> dict:
    """Gradients that depend on the parameters and on the step, some of them 0."""
    factors = {'w': 1.0, 'scale': 0.5, 'offset': 0.0, 'b': -2.0}
    return optree.tree_map_with_path(lambda path, p: factors[path[-1]] * (torch.sin(3 * p) + 0.1 * step), params)


def _run(transformation) -> tuple[dict, list[dict]]:
    """The state and the parameters of every step, from a function of the rate."""
    params = _params()
    state, trace = transformation(0.0).init(params), []
    for step in range(STEPS):
        updates, state = transformation(RATES[step]).update(_gradients(params, step), state, params)
        params = optimizers.apply_updates(params, updates)
        trace.append(params)
    return state, trace


def _run_torch(make, decay: float, filtered: bool) -> list[dict]:
    """The same by an optimiser of torch."""
    params = _params()
    paths, leaves, spec = optree.tree_flatten_with_path(params)
    decays = [
        0.0 if filtered and not optimizers.exclude_bias_and_norm(path, leaf) else decay
        for path, leaf in zip(paths, leaves, strict=False)
    ]
    optimizer = make([dict(params=[p], weight_decay=d) for p, d in zip(leaves, decays, strict=False)])
    trace = []
    for step in range(STEPS):
        gradients = optree.tree_leaves(_gradients(optree.tree_unflatten(spec, leaves), step))
        for leaf, gradient in zip(leaves, gradients, strict=False):
            leaf.grad = gradient.clone()
        for group in optimizer.param_groups:
            group['lr'] = RATES[step].item()
        optimizer.step()
        trace.append(optree.tree_unflatten(spec, [leaf.detach().clone() for leaf in leaves]))
    return trace


_SGD, _ADAM, _ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
_BETAS = dict(betas=(0.8, 0.95), eps=1e-3)
_OWN_BETAS = dict(b1=0.8, b2=0.95, eps=1e-3)


@pytest.mark.parametrize('filtered', [False, True], ids=['decay on all', 'decay filtered'])
@pytest.mark.parametrize(
    'name, own, make',
    [
        ('sgd', {}, _SGD),
        ('sgd', dict(momentum=0.9), functools.partial(_SGD, momentum=0.9)),
        ('sgd', dict(momentum=0.9, nesterov=True), functools.partial(_SGD, momentum=0.9, nesterov=True)),
        ('adam', {}, _ADAM),
        ('adam', _OWN_BETAS, functools.partial(_ADAM, **_BETAS)),
        ('adamw', {}, _ADAMW),
        ('adamw', _OWN_BETAS, functools.partial(_ADAMW, **_BETAS)),
    ],
    ids=['sgd', 'momentum', 'nesterov', 'adam', 'adam with betas', 'adamw', 'adamw with betas'],
)
@pytest.mark.parametrize('decay', [0.0, 0.2])
def test_agrees_with_torch(name, own, make, decay, filtered):
    config = dict(**own, weight_decay=decay, weight_decay_filter=FILTER if filtered else 'none')
    _, actual = _run(optimizers.make_optimizer(name, {name: config}))
    expected = _run_torch(make, decay, filtered)
    for step, (x, y) in enumerate(zip(actual, expected, strict=True)):
        paths, leaves, _ = optree.tree_flatten_with_path(y)
        for path, a, b in zip(paths, optree.tree_leaves(x), leaves, strict=True):
            # The rate and the bias correction 1 - b2^t are float32, as in optax.
            torch.testing.assert_close(
                a, b, rtol=1e-5, atol=1e-5, msg=lambda text, where=(step, path): f'step {where}: {text}'
            )


def test_adam_counts_its_steps():
    state, _ = _run(optimizers.make_optimizer('adam', {'adam': {}}))
    counts = [leaf for leaf in optree.tree_leaves(state) if leaf.dtype == torch.int32]
    assert [int(count) for count in counts] == [STEPS]


@pytest.mark.parametrize('name', ['lars', 'sgd', 'adam', 'adamw'])
def test_init_and_update_are_pure(name):
    """Zeros at the start; neither gradients, state nor parameters change in an update."""
    transformation = optimizers.make_optimizer(name, {name: dict(weight_decay=0.1)})(torch.tensor(0.1))
    params = _params()
    state = transformation.init(params)
    assert all(not leaf.any() for leaf in optree.tree_leaves(state))
    inputs = _gradients(params, 0), state, params
    before = optree.tree_map(torch.clone, inputs)
    updates, new_state = transformation.update(*inputs)
    assert all(map(torch.equal, optree.tree_leaves(before), optree.tree_leaves(inputs)))
    assert optree.tree_structure(updates) == optree.tree_structure(params)
    assert optree.tree_structure(new_state) == optree.tree_structure(state)


def test_exclude_bias_and_norm():
    cases = {
        ('encoder', 'initial_conv', 'w'): True,
        ('encoder', 'initial_batchnorm', 'scale'): False,
        ('projector', 'batch_norm', 'offset'): False,
        ('projector', 'linear', 'b'): False,
        ('projector', 'linear', 'w'): True,
        ('b', 'w'): True,  # Only the leaf's own name counts,
        ('linear', 'bias'): True,  # exactly,
        ('linear', 'norm'): True,  # and only the modules' for norms.
    }
    found = {path: optimizers.exclude_bias_and_norm(path, torch.zeros(())) for path in cases}
    assert found == cases


@pytest.mark.parametrize(
    'name, config, fragments',
    [
        ('rmsprop', {}, ["config.optimizer='rmsprop'", 'lars, sgd, adam, adamw']),
        (
            'sgd',
            dict(weight_decay_filter='bias'),
            ["config.optimizer_config.sgd.weight_decay_filter='bias'", 'exclude_bias_and_norm, none'],
        ),
        (
            'lars',
            dict(lars_adaptation_filter=None),
            ['config.optimizer_config.lars.lars_adaptation_filter=None', 'exclude_bias_and_norm, none'],
        ),
    ],
)
def test_unknown_names(name, config, fragments):
    with pytest.raises(UserError) as error:
        optimizers.make_optimizer(name, {name: config})
    assert all(fragment in str(error.value) for fragment in fragments)
