"""Batch, group, layer and no normalisation under one interface."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from byol_func.errors import one_of
from byol_func.runtime.layers import NetState, Params, batch_norm, batch_norm_init, moving_averages
from byol_func.runtime.precision import at_least_float32

GROUP_SIZE = 16  # In channels; the statistics of smaller groups are noisy where images have few pixels.


def num_groups(channels: int, group_size: int = GROUP_SIZE) -> int:
    """Returns the number of groups of `group_size` channels; 1 if `channels` is not a multiple of it."""
    return channels // group_size if channels % group_size == 0 else 1


def group_norm(params: Params, x: torch.Tensor, *, group_size: int = GROUP_SIZE, eps: float = 1e-5) -> torch.Tensor:
    """Normalises each example by the mean and variance of groups of its channels (arXiv 1803.08494).

    Args:
      params: `scale` and `offset`, `[C]`.
      x: `[B, C]` or `[B, C, H, W]`.
      group_size: the channels of a group; there is a single group if C is not a multiple of it. A group of all C
        channels makes it layer normalisation.
      eps: added to the variance.

    Returns:
      The output, with the shape and dtype of `x`.
    """
    dtype = at_least_float32(x).dtype
    groups = at_least_float32(x).reshape(x.shape[0], num_groups(x.shape[1], group_size), -1)
    var, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
    normalized = ((groups - mean) * torch.rsqrt(var + eps)).view(x.shape)
    of_channels = (-1, *[1] * (x.ndim - 2))
    out = normalized * params['scale'].to(dtype).view(of_channels) + params['offset'].to(dtype).view(of_channels)
    return out.to(x.dtype)


def standardized(params: Params, eps: float = 1e-10) -> Params:
    """Standardises the weights of each output to mean 0 and variance 1 / fan-in (arXiv 1903.10520).

    Args:
      params: `{'w': [out, in, k, k]}` of a convolution or `{'w': [in, out]}` of a linear layer; `b` is unchanged.
      eps: added to fan-in times the variance.
    """
    w = params['w']
    axes = (0,) if w.ndim == 2 else (1, 2, 3)
    fan_in = w.numel() // w.shape[1 if w.ndim == 2 else 0]
    var, mean = torch.var_mean(w, dim=axes, correction=0, keepdim=True)
    return {**params, 'w': (w - mean) * torch.rsqrt(var * fan_in + eps)}


class Norm(NamedTuple):
    """A normalisation as three pure functions.

    `init(channels, scale)` returns `(params, state)`, and `apply` has the signature of `batch_norm`.
    `new_state(state, statistics, is_training)` returns the next state; it takes the states and statistics of all
    layers of a network at once.
    """

    init: Callable[..., tuple[Params, NetState]]
    apply: Callable[..., tuple[torch.Tensor, NetState]]
    new_state: Callable[[NetState, NetState, bool], NetState]


def _batch_norm(decay_rate: float = 0.9, **bn_config: Any) -> Norm:
    def new_state(state, statistics, is_training):
        return moving_averages(state, statistics, decay_rate) if is_training and statistics else state

    return Norm(batch_norm_init, functools.partial(batch_norm, **bn_config), new_state)


def _without_statistics(function: Callable, has_params: bool = True) -> Norm:
    """Returns a norm without state from `function(params, x)`, which normalises each example separately."""

    def init(channels, scale=1.0):
        return ({'scale': torch.full((channels,), scale), 'offset': torch.zeros(channels)} if has_params else {}), {}

    def apply(params, state, x, is_training, num_views=1):
        return function(params, x), {}

    return Norm(init, apply, lambda state, statistics, is_training: state)


def _no_norm(**bn_config: Any) -> Norm:
    return _without_statistics(lambda params, x: x, has_params=False)


def _group_norm(eps: float = 1e-5, **bn_config: Any) -> Norm:
    return _without_statistics(lambda params, x: group_norm(params, x, eps=eps))


def _layer_norm(eps: float = 1e-5, **bn_config: Any) -> Norm:
    return _without_statistics(lambda params, x: group_norm(params, x, group_size=x.shape[1], eps=eps))


# With `group_norm` the weights of the layer before each norm are standardised (arXiv 1903.10520), as in "BYOL works
# even without batch statistics" (arXiv 2010.10241).
NORMS = {'batch_norm': _batch_norm, 'group_norm': _group_norm, 'layer_norm': _layer_norm, 'none': _no_norm}


def make_norm(field: str, name: str, bn_config: Mapping[str, Any] | None) -> tuple[Norm, Callable]:
    """Returns the norm called `name`, and a function to apply to the parameters of the layer before it.

    Args:
      field: the field of `config.network` that holds the name, for error messages.
      name: one of `NORMS`.
      bn_config: keyword arguments of `batch_norm` and the `decay_rate` of its moving averages; the other norms use
        only `eps`.

    Raises:
      UserError: the name is unknown.
    """
    norm = one_of(f'config.network.{field}', name, NORMS)(**bn_config or {})
    return norm, standardized if name == 'group_norm' else lambda params: params
