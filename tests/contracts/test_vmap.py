"""`torch.func.vmap` over the whole update: several seeds, or several learning rates, in one step."""

import optree
import pytest
import torch

from byol_func.experiment import assemble
from byol_func.utils.checkpointing import leaf_names
from cli import ROOT
from variant_runs import arguments, load_config, make

SEEDS, STEPS = 3, 2


def _stack(trees):
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def _assert_close(batched, singles):
    for i, single in enumerate(singles):
        leaves = zip(leaf_names(single), optree.tree_leaves(batched), optree.tree_leaves(single), strict=True)
        for name, x, y in leaves:
            # Where rounding moves an activation across the kink of a ReLU, gradients jump, by 0.3 % on one CPU.
            error, size = (x[i] - y).float().norm().item(), y.float().norm().item()
            assert error <= 3e-2 * max(size, 1e-2), f'{i}, {name}: {error} of {size}'


@pytest.mark.parametrize('optimizer', ['lars', 'sgd'])
def test_seeds(optimizer):
    experiments = [
        make(load_config(ROOT / 'configs/variants/constant_tau.py', random_seed=seed, optimizer=optimizer))
        for seed in range(SEEDS)
    ]
    update = torch.func.vmap(experiments[0].update, in_dims=(0, None, 0, 0))
    singles = [experiment.init() for experiment in experiments]
    states = _stack(singles)
    for step in range(STEPS):
        global_step = torch.tensor(step)
        parts = [arguments(experiment, step)[1:] for experiment in experiments]
        states, logs = update(states, global_step, *_stack(parts))
        results = [
            experiment.update(state, global_step, *part)
            for experiment, state, part in zip(experiments, singles, parts, strict=True)
        ]
        singles = [state for state, _ in results]
        _assert_close(logs, [log for _, log in results])
    _assert_close(states, singles)
    assert not torch.equal(
        states.online_params['predictor']['linear']['w'][0], singles[1].online_params['predictor']['linear']['w']
    )


def test_learning_rates():
    experiment = make(load_config(ROOT / 'configs/variants/constant_tau.py', optimizer='sgd'))
    rates = torch.tensor([0.0, 0.05, 0.2])

    def update(state, rate, *args):
        return assemble(experiment.parts._replace(learning_schedule=lambda step: rate)).update_fn(state, *args)

    args = arguments(experiment, 0)
    states, _ = torch.func.vmap(update, in_dims=(None, 0, None, None, None))(experiment.init(), rates, *args)
    _assert_close(states, [update(experiment.init(), rate, *args)[0] for rate in rates])
