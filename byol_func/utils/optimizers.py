"""Optimisers in the style of optax. Namesake of the official `byol/utils/optimizers.py`.

An update is a tree that is *added* to the parameters; states are NamedTuples of trees. A learning rate is a number or a
0-d tensor. The filters select the parameters that decay or are adapted; None selects all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch

from byol_func.errors import one_of
from byol_func.runtime.fused import fused_map
from byol_func.utils.transformations import (
    FilterFn,
    GradientTransformation,
    OptState,
    Params,
    ScaleByAdamState,
    TraceState,
    Updates,
    chain,
    multi_steps,
    partition,
    scale,
    scale_by_adam,
    scale_by_lion,
    scale_by_muon,
    trace,
)

__all__ = [  # Includes names re-exported from `transformations`.
    'FILTERS',
    'AddWeightDecayState',
    'GradientTransformation',
    'OptState',
    'Params',
    'ScaleByAdamState',
    'ScaleByLarsState',
    'TraceState',
    'Updates',
    'adam',
    'adamw',
    'add_weight_decay',
    'apply_updates',
    'chain',
    'exclude_bias_and_norm',
    'lars',
    'lion',
    'make_optimizer',
    'multi_steps',
    'muon',
    'partition',
    'scale',
    'scale_by_adam',
    'scale_by_lars',
    'sgd',
    'trace',
]


def exclude_bias_and_norm(path: tuple[str, ...], value: torch.Tensor) -> bool:
    """Returns False for biases and for all parameters of normalisation layers.

    Port of `optimizers.exclude_bias_and_norm`; differences: Haiku stores the module path in one key, while here
    it is all keys but the last. A bias is a leaf named exactly 'b'; a normalisation layer is a module with
    'norm' anywhere in its path.
    """
    del value
    return path[-1] != 'b' and not any('norm' in str(module) for module in path[:-1])


def _apply_where(fn: Callable, filter_fn: FilterFn | None, updates: Updates, params: Params):
    """Maps fn(updates, params) over the leaves that pass the filter; the others keep their update."""
    if filter_fn is None:
        return fused_map(fn, updates, params)
    paths, leaves, spec = optree.tree_flatten_with_path(params)
    new_leaves = spec.flatten_up_to(updates)
    chosen = [i for i, (path, p) in enumerate(zip(paths, leaves, strict=True)) if filter_fn(path, p)]
    results = fused_map(fn, [new_leaves[i] for i in chosen], [leaves[i] for i in chosen])
    for i, result in zip(chosen, results, strict=True):
        new_leaves[i] = result
    return optree.tree_unflatten(spec, new_leaves)


class AddWeightDecayState(NamedTuple):
    """An empty state."""


def add_weight_decay(weight_decay: float, filter_fn: FilterFn | None = None) -> GradientTransformation:
    """Adds weight_decay * param to the update. Port of `optimizers.add_weight_decay`; differences: none.

    Args:
      weight_decay: the coefficient.
      filter_fn: selects the parameters that decay; None selects all.
    """

    def update(updates, state, params):
        decay = lambda u, p: u + weight_decay * p
        return _apply_where(decay, filter_fn, updates, params), state

    return GradientTransformation(lambda params: AddWeightDecayState(), update)


class ScaleByLarsState(NamedTuple):
    """The momentum `mu`, a tree like the parameters."""

    mu: Any


def scale_by_lars(
    momentum: float = 0.9, eta: float = 0.001, filter_fn: FilterFn | None = None
) -> GradientTransformation:
    """Applies layer-wise adaptation, then momentum: mu <- momentum mu + u * eta |p| / |u|.

    The factor eta |p| / |u| is 1 where either norm is 0. Parameters that fail the filter skip the adaptation but
    keep the momentum. Port of `optimizers.scale_by_lars` (arXiv 1708.03888); differences: none.

    Args:
      momentum: decay of the momentum.
      eta: the trust coefficient.
      filter_fn: selects the parameters that are adapted; None selects all.
    """

    def adapt(updates, params):
        param_norms, update_norms = params.norms(), updates.norms()
        both = (param_norms > 0) & (update_norms > 0)
        return updates.times_each(torch.where(both, eta * param_norms / update_norms, 1.0))

    def init(params):
        return ScaleByLarsState(mu=optree.tree_map(torch.zeros_like, params))

    def update(updates, state, params):
        adapted = _apply_where(adapt, filter_fn, updates, params)
        mu = fused_map(lambda m, u: momentum * m + u, state.mu, adapted)
        return mu, ScaleByLarsState(mu=mu)

    return GradientTransformation(init, update)


def lars(
    learning_rate: float | torch.Tensor,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    eta: float = 0.001,
    weight_decay_filter: FilterFn | None = None,
    lars_adaptation_filter: FilterFn | None = None,
) -> GradientTransformation:
    """LARS: weight decay, then adaptation, then momentum, and finally the learning rate.

    Port of `optimizers.lars` (arXiv 1708.03888); differences: none. Note that the learning rate
    is applied after the momentum, so a change of the rate scales the whole accumulated history at once.

    The arguments are those of `add_weight_decay` and `scale_by_lars`.
    """
    return chain(
        add_weight_decay(weight_decay, weight_decay_filter),
        scale_by_lars(momentum, eta, lars_adaptation_filter),
        scale(-learning_rate),
    )


def sgd(
    learning_rate: float | torch.Tensor,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    weight_decay_filter: FilterFn | None = None,
) -> GradientTransformation:
    """Stochastic gradient descent: `optax.sgd` preceded by weight decay in the gradient.

    The official evaluation uses Nesterov momentum. The state of the momentum is kept even if its decay is 0.
    """
    return chain(
        add_weight_decay(weight_decay, weight_decay_filter),
        trace(momentum, nesterov),
        scale(-learning_rate),
    )


def adam(
    learning_rate: float | torch.Tensor,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_decay_filter: FilterFn | None = None,
) -> GradientTransformation:
    """Adam with weight decay in the gradient (L2), as in `torch.optim.Adam`.

    `b1` and `b2` are the decay rates of the first and second moment; `eps` is added to the root of the second.
    """
    return chain(
        add_weight_decay(weight_decay, weight_decay_filter),
        scale_by_adam(b1, b2, eps),
        scale(-learning_rate),
    )


def adamw(
    learning_rate: float | torch.Tensor,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    weight_decay_filter: FilterFn | None = None,
) -> GradientTransformation:
    """Adam with decoupled weight decay (arXiv 1711.05101); arguments as in `adam`, but decay follows the moments."""
    return chain(
        scale_by_adam(b1, b2, eps),
        add_weight_decay(weight_decay, weight_decay_filter),
        scale(-learning_rate),
    )


def lion(
    learning_rate: float | torch.Tensor,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    weight_decay_filter: FilterFn | None = None,
) -> GradientTransformation:
    """Lion with decoupled weight decay (arXiv 2302.06675), as `optax.lion`.

    Suitable learning rates are 3 to 10 times smaller than Adam's. `b1` is the weight of the momentum in the update,
    `b2` the decay of the momentum.
    """
    return chain(scale_by_lion(b1, b2), add_weight_decay(weight_decay, weight_decay_filter), scale(-learning_rate))


def muon(
    learning_rate: float | torch.Tensor,
    momentum: float = 0.95,
    nesterov: bool = True,
    num_iterations: int = 5,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_decay_filter: FilterFn | None = None,
) -> GradientTransformation:
    """Muon for matrices and kernels, AdamW for everything else, with the same learning rate.

    From Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the scaling
    of arXiv 2502.16982. `momentum`, `nesterov` and `num_iterations` are arguments of `scale_by_muon`, the others of
    `adamw`.
    """
    matrices = chain(
        scale_by_muon(momentum, nesterov, num_iterations),
        add_weight_decay(weight_decay, weight_decay_filter),
        scale(-learning_rate),
    )
    rest = adamw(learning_rate, b1, b2, eps, weight_decay, weight_decay_filter)
    return partition({'muon': matrices, 'adamw': rest}, lambda path, p: 'muon' if p.ndim > 1 else 'adamw')


FILTERS = {'exclude_bias_and_norm': exclude_bias_and_norm, 'none': None}
_OPTIMIZERS = {'lars': lars, 'sgd': sgd, 'adam': adam, 'adamw': adamw, 'lion': lion, 'muon': muon}


def make_optimizer(
    name: str, optimizer_config: dict[str, dict[str, Any]], section: str = 'config'
) -> Callable[[torch.Tensor], GradientTransformation]:
    """Binds all arguments of an optimiser except the learning rate.

    Args:
      name: lars, sgd, adam, adamw, lion or muon.
      optimizer_config: name -> the keyword arguments of that function; filters are given as
        'exclude_bias_and_norm' or 'none'.
      section: the config section that holds both, for error messages: 'config' or 'config.linear_eval'.

    Returns:
      A function from the learning rate to the transformation.

    Raises:
      UserError: the name or a filter is unknown.
    """
    optimizer = one_of(f'{section}.optimizer', name, _OPTIMIZERS)
    kwargs = dict(optimizer_config[name])
    for key in [k for k in kwargs if k.endswith('_filter')]:
        kwargs[key] = one_of(f'{section}.optimizer_config.{name}.{key}', kwargs[key], FILTERS)
    return lambda learning_rate: optimizer(learning_rate, **kwargs)


def apply_updates(params: Params, updates: Updates) -> Params:
    """Adds the updates to the parameters, as `optax.apply_updates`."""
    return fused_map(lambda p, u: p + u, params, updates)
