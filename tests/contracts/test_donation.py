"""The contract of donation, on a state of two leaves: what a step may do with the memory of the old state."""

from typing import NamedTuple

import optree
import pytest
import torch

from byol_func.runtime.compilation import compile_update

WAYS = [dict(compiled=False), dict(compiled=None, num_steps=1000), dict(backend='eager')]


def addresses(tree) -> list[int]:
    return [leaf.data_ptr() for leaf in optree.tree_leaves(tree)]


class _State(NamedTuple):
    params: dict
    count: torch.Tensor


def _state() -> _State:
    return _State({'a': torch.arange(4.0), 'b': torch.ones(4)}, torch.zeros((), dtype=torch.int32))


def _next(state: _State, **params) -> _State:
    params = {name: params.get(name, value + 1) for name, value in state.params.items()}
    return _State(params, state.count + 1)


def _mutates(state, x):
    state.params['a'].add_(1)
    return _next(state), {}


def _mutates_an_argument(state, x):
    x.mul_(2)
    return _next(state), {}


def _swaps(state, x):
    return _next(state, a=state.params['b'], b=state.params['a']), {}


def _returns_a_view(state, x):
    return _next(state, a=state.params['a'].flip(0)[:], b=state.params['a'][:]), {}


def _changes_shape(state, x):
    return _next(state, b=torch.ones(5)), {}


def _changes_dtype(state, x):
    return _next(state)._replace(count=state.count + 0.5), {}


def _changes_structure(state, x):
    return _next(state)._replace(params={'a': state.params['a'] + 1}), {}


def _returns_a_tuple(state, x):
    return tuple(_next(state)), {}


@pytest.mark.parametrize('how', WAYS, ids=['plain', 'traced', 'compiled'])
@pytest.mark.parametrize(
    'update, message',
    [
        (_mutates, "'a'.* in place"),
        (_mutates_an_argument, 'in place'),
        (_swaps, "memory of the old state.*'[ab]'"),
        (_returns_a_view, "memory of the old state.*'b'"),
        (_changes_shape, r"'b'.*\[4\].*\[5\]"),
        (_changes_dtype, 'int32.*float32'),
        (_changes_structure, 'structure'),
        (_returns_a_tuple, 'structure'),
    ],
)
def test_broken_contract_is_an_error(update, message, how):
    donating = compile_update(update, **how)
    with pytest.raises(ValueError, match=message):
        donating(_state(), torch.ones(()))


@pytest.mark.parametrize('how', WAYS, ids=['plain', 'traced', 'compiled'])
def test_untouched_leaf_may_stay(how):
    """What a step does not change, such as a frozen encoder, is returned as it is."""

    def update(state, x):
        new_state = _next(state, a=state.params['a'])
        return new_state, {'sum': x + new_state.params['b'].sum()}

    donating = compile_update(update, **how)
    state = _state()
    before = addresses(state)
    for step in range(1, 3):
        state, logs = donating(state, torch.tensor(0.5))
        assert torch.equal(state.params['a'], torch.arange(4.0))
        assert torch.equal(state.params['b'], torch.full((4,), 1.0 + step))
        assert int(state.count) == step and float(logs['sum']) == 4 * (1 + step) + 0.5
    assert addresses(state) == before


def test_new_values_are_computed_before_old_ones_are_overwritten():
    """A rotation: any leaf written too early would be read by the next."""

    def update(state, x):
        a, b = state.params['a'], state.params['b']
        return _next(state, a=b * 1, b=a * 1), {}

    for how in WAYS:
        state, _ = compile_update(update, **how)(_state(), torch.ones(()))
        assert torch.equal(state.params['a'], torch.ones(4))
        assert torch.equal(state.params['b'], torch.arange(4.0))


def test_a_branch_on_a_value_runs_as_python_only():
    def update(state, x):
        return (_next(state) if x.sum() > 0 else state), {}

    compile_update(update, **WAYS[0])(_state(), torch.ones(2))
    for how in (*WAYS[1:], dict(compiled=None, num_steps=1000)):
        with pytest.raises(ValueError, match='looks at the value of a tensor.*config.compile=False'):
            compile_update(update, **how)(_state(), torch.ones(2))


@pytest.mark.parametrize('how', WAYS[1:], ids=['traced', 'compiled'])
def test_a_traced_step_takes_no_other_inputs(how):
    """What was traced for a shape and a layout would compute something else of another one, or crash."""
    update = compile_update(lambda state, x: (_next(state), {'sum': x.sum()}), **how)
    state, _ = update(_state(), torch.ones(2, 3))
    others = torch.ones(3, 3), torch.ones(2, 3).double(), torch.ones(3, 2).T
    for other, what in zip(others, ('shapes', 'shapes', 'strides'), strict=True):
        with pytest.raises(ValueError, match=f'other {what} than the first time'):
            update(state, other)
    state, logs = update(state, torch.full((2, 3), 2.0))
    assert logs['sum'] == 12 and int(state.count) == 2
