"""Normalisations under one interface: batch, group and layer normalisation, and none."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from byol_func.errors import one_of
from byol_func.runtime.layers import NetState, Params, batch_norm, batch_norm_init, moving_averages
from byol_func.runtime.precision import at_least_float32

GROUP_SIZE = 16  # Channels: groups of few channels say little about images of few pixels.


def num_groups(channels: int, group_size: int = GROUP_SIZE) -> int:
    """How many groups of that size so many channels make; 1 where they do not divide."""
    return channels // group_size if channels % group_size == 0 else 1


def group_norm(params: Params, x: torch.Tensor, *, group_size: int = GROUP_SIZE, eps: float = 1e-5) -> torch.Tensor:
    """Group normalisation (arXiv 1803.08494): each example by mean and variance over groups of its channels.

    Args:
      params: `scale` and `offset`, `[C]`.
      x: `[B, C]` or `[B, C, H, W]`.
      group_size: channels of a group; one group where C is smaller or not a multiple. C is layer normalisation.
      eps: added to the variance.

    Returns:
      The output, shape and dtype of `x`.
    """
    dtype = at_least_float32(x).dtype
    groups = at_least_float32(x).reshape(x.shape[0], num_groups(x.shape[1], group_size), -1)
    var, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
    normalized = ((groups - mean) * torch.rsqrt(var + eps)).view(x.shape)
    of_channels = (-1, *[1] * (x.ndim - 2))
    out = normalized * params['scale'].to(dtype).view(of_channels) + params['offset'].to(dtype).view(of_channels)
    return out.to(x.dtype)


def standardized(params: Params, eps: float = 1e-10) -> Params:
    """Weight standardisation (arXiv 1903.10520): every output's weights get mean 0 and variance 1 / fan-in.

    Args:
      params: `{'w': [out, in, k, k]}` of a convolution or `{'w': [in, out]}` of a linear layer; `b` stays.
      eps: added to the variance.
    """
    w = params['w']
    axes = (0,) if w.ndim == 2 else (1, 2, 3)
    fan_in = w.numel() // w.shape[1 if w.ndim == 2 else 0]
    var, mean = torch.var_mean(w, dim=axes, correction=0, keepdim=True)
    return {**params, 'w': (w - mean) * torch.rsqrt(var * fan_in + eps)}


class Norm(NamedTuple):
    """A normalisation: `init(channels, scale) -> (params, state)`, `apply` as `batch_norm`, and the next state.

    `new_state(state, statistics, is_training)` takes the states and the statistics of all layers of a network.
    """

    init: Callable[..., tuple[Params, NetState]]
    apply: Callable[..., tuple[torch.Tensor, NetState]]
    new_state: Callable[[NetState, NetState, bool], NetState]


def _batch_norm(decay_rate: float = 0.9, **bn_config: Any) -> Norm:
    def new_state(state, statistics, is_training):
        return moving_averages(state, statistics, decay_rate) if is_training and statistics else state

    return Norm(batch_norm_init, functools.partial(batch_norm, **bn_config), new_state)


def _without_statistics(function: Callable, has_params: bool = True) -> Norm:
    """`function(params, x)` normalises each example by itself; the state is empty."""

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


# With `group_norm` the kernels and weights in front of a norm are standardised (arXiv 1903.10520), as in
# "BYOL works even without batch statistics" (arXiv 2010.10241).
NORMS = {'batch_norm': _batch_norm, 'group_norm': _group_norm, 'layer_norm': _layer_norm, 'none': _no_norm}


def make_norm(field: str, name: str, bn_config: Mapping[str, Any] | None) -> tuple[Norm, Callable]:
    """The norm of that name, and a function that the parameters of the layer in front of it go through.

    Args:
      field: where the name stands in `config.network`, for messages.
      name: one of `NORMS`.
      bn_config: keyword arguments of `batch_norm` and the `decay_rate` of its averages; the others use `eps`.

    Raises:
      UserError: an unknown name.
    """
    norm = one_of(f'config.network.{field}', name, NORMS)(**bn_config or {})
    return norm, standardized if name == 'group_norm' else lambda params: params
