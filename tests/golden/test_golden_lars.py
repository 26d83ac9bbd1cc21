"""LARS against the official code's ten steps on a small tree with every special case."""

import pytest

from byol_func.utils import optimizers
from golden_io import (
    DTYPES,
    LARS,
    assert_trees_close,
    children,
    flatten,
    limit,
    load,
    numbered,
    scalar,
    tensor,
    tree,
    unchanged,
)

GOLDEN = load('lars.npz')
VARIANTS = [name for name in children(GOLDEN) if f'{name}/eta' in GOLDEN]


def test_exclude_bias_and_norm():
    params = flatten(tree(GOLDEN, 'init/params', rename=unchanged))
    stored = flatten(tree(GOLDEN, 'filter', rename=unchanged))
    actual = {path: optimizers.exclude_bias_and_norm(path, p) for path, p in params.items()}
    assert actual == {path: bool(value) for path, value in stored.items()}


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('variant', VARIANTS)
def test_lars(variant, dtype):
    stored = lambda prefix: tree(GOLDEN, prefix, dtype, unchanged)
    names = ('weight_decay', 'momentum', 'eta')
    settings = {name: scalar(GOLDEN[f'{variant}/{name}']) for name in names}
    filter_fn = None if variant == 'no_filter' else optimizers.exclude_bias_and_norm
    make = lambda learning_rate: optimizers.lars(
        learning_rate, weight_decay_filter=filter_fn, lars_adaptation_filter=filter_fn, **settings
    )

    params = stored('init/params')
    state = make(0.0).init(params)
    rtol = limit(LARS, dtype)
    to_compare = numbered(GOLDEN, variant, 'step')
    for step, learning_rate in enumerate(tensor(GOLDEN['lr']), start=1):
        updates, state = make(learning_rate).update(stored(f'grads/step{step}'), state, params)
        params = optimizers.apply_updates(params, updates)
        (momentum,) = (s.mu for s in state if isinstance(s, optimizers.ScaleByLarsState))
        if step in to_compare:
            where = f'{variant}/step{step}'
            assert_trees_close(updates, stored(f'{where}/updates'), rtol, f'{where}/updates')
            assert_trees_close(momentum, stored(f'{where}/momentum'), rtol, f'{where}/momentum')
            assert_trees_close(params, stored(f'{where}/params'), rtol, f'{where}/params')
    assert max(to_compare) <= step
