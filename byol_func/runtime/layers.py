"""Haiku's layers as pure functions: convolution, pooling, normalisation, linear, initialisers.

Images are `[B, C, H, W]` in any memory format, convolution kernels `[out, in, kh, kw]`, linear
weights `[in, out]`. Parameters and states are dicts under Haiku's names.
"""

from collections.abc import Mapping
from typing import Any

import optree
import torch
from torch.nn import functional as F

from byol_func.runtime import collectives
from byol_func.runtime.fused import Leaves
from byol_func.runtime.precision import at_least_float32

Params = Mapping[str, Any]
NetState = Mapping[str, Any]


def truncated_normal(generator: torch.Generator, shape: tuple[int, ...], fan_in: int) -> torch.Tensor:
    """Samples Haiku's default initialiser: a normal with sigma = 1/sqrt(fan_in), truncated at 2 sigma.

    Sigma is not corrected for the truncation, so the standard deviation is 0.88 sigma. Another version of PyTorch may
    draw other numbers from the same generator.
    """
    sigma = fan_in**-0.5
    weights = torch.empty(shape)
    return torch.nn.init.trunc_normal_(weights, std=sigma, a=-2 * sigma, b=2 * sigma, generator=generator)


def conv2d_init(generator: torch.Generator, in_channels: int, out_channels: int, kernel_size: int) -> Params:
    """Returns the parameters `{'w': [out, in, k, k]}` of a convolution."""
    shape = (out_channels, in_channels, kernel_size, kernel_size)
    return {'w': truncated_normal(generator, shape, in_channels * kernel_size**2)}


def conv2d(params: Params, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """Convolves without bias, padded SAME: ceil(size / stride) outputs. Port of `hk.Conv2D`.

    A 1x1 kernel sees only every `stride`-th pixel, so those are sliced out first. The numbers are the same, and it
    avoids oneDNN's derivative of the strided form, which crashes on CPUs with AVX-512 (8 channels, 64 pixels or
    more).

    Args:
      params: `{'w': [out, in, k, k]}`; the weights are cast to the dtype of `x`.
      x: `[B, in, H, W]`.
      stride: the stride in both directions.

    Returns:
      `[B, out, ceil(H / stride), ceil(W / stride)]`.
    """
    w = params['w'].to(x.dtype)
    if w.shape[2:] == (1, 1) and stride > 1:
        # Slice the channels-last view: the gradient of a slice takes the memory layout of the sliced view.
        x, stride = x.permute(0, 2, 3, 1)[:, ::stride, ::stride].permute(0, 3, 1, 2), 1
    if x.shape[2:] == (1, 1):
        stride = 1  # With a stride, oneDNN's derivative in bfloat16 contains uninitialised memory (AVX-512).
    top, bottom = same_padding(x.shape[2], w.shape[2], stride)
    left, right = same_padding(x.shape[3], w.shape[3], stride)
    if top == bottom and left == right:
        return F.conv2d(x, w, stride=stride, padding=(top, left))
    return F.conv2d(F.pad(x, (left, right, top, bottom)), w, stride=stride)


def max_pool(x: torch.Tensor) -> torch.Tensor:
    """Takes 3x3 maxima with stride 2, padded SAME with -inf. Port of `hk.max_pool` as the ResNet uses it.

    Args:
      x: `[B, C, H, W]`.

    Returns:
      `[B, C, ceil(H / 2), ceil(W / 2)]`.
    """
    top, bottom = same_padding(x.shape[2], 3, 2)
    left, right = same_padding(x.shape[3], 3, 2)
    return F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-torch.inf), 3, stride=2)


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Returns the padding before and after that gives ceil(size / stride) outputs; after it may be one pixel more.

    Args:
      size: the size of the input along one axis.
      kernel_size: an odd number.
      stride: 1, or 2 for kernels of at least 3.
    """
    half = kernel_size // 2
    return half - (size - 1) % stride, half


def batch_norm_init(channels: int, scale: float = 1.0) -> tuple[Params, NetState]:
    """Returns the parameters `scale` and `offset` and the state of two moving averages, all `[channels]`."""
    params = {'scale': torch.full((channels,), scale), 'offset': torch.zeros(channels)}
    return params, {'mean_ema': _moving_average_init(channels), 'var_ema': _moving_average_init(channels)}


def _moving_average_init(channels: int) -> NetState:
    return {
        'hidden': torch.zeros(channels),
        'average': torch.zeros(channels),
        'counter': torch.zeros((), dtype=torch.int32),
    }


def moving_averages(state: NetState, values: NetState, decay_rate: float) -> NetState:
    """Updates zero-debiased moving averages: h <- d h + (1 - d) v, average = h / (1 - d^counter).

    Port of `hk.ExponentialMovingAverage`; differences: updates all averages of a network at once, with V values of
    each in order, as V successive calls would.

    Args:
      state: a tree of averages, each a dict of `hidden` and `average` `[C]` and `counter` int32 [].
      values: the same tree with values `[V, C]` in the place of each average.
      decay_rate: d.
    """
    spec = optree.tree_structure(values)
    averages = spec.flatten_up_to(state)
    of_all = lambda name: Leaves([average[name] for average in averages])
    views = [Leaves(view) for view in zip(*(v.unbind() for v in optree.tree_leaves(values)), strict=True)]
    # h <- d^V h + (1 - d) (d^(V-1) v_1 + ... + v_V)
    hidden = of_all('hidden') * decay_rate ** len(views)
    for i, view in enumerate(reversed(views)):
        hidden = hidden + view * ((1.0 - decay_rate) * decay_rate**i)
    counter = of_all('counter') + len(views)
    average = hidden / (1.0 - decay_rate ** counter.to(hidden.leaves[0].dtype))
    new = [
        dict(zip(('hidden', 'average', 'counter'), leaves, strict=True))
        for leaves in zip(hidden.leaves, average.leaves, counter.leaves, strict=True)
    ]
    return optree.tree_unflatten(spec, new)


def batch_norm(
    params: Params,
    state: NetState,
    x: torch.Tensor,
    is_training: bool,
    *,
    eps: float = 1e-5,
    cross_replica: bool = True,
    num_views: int = 1,
) -> tuple[torch.Tensor, NetState]:
    """Batch-normalises over all axes but the channels: (x - mean) * scale / sqrt(var + eps) + offset.

    The variance is the biased one, E[x^2] - E[x]^2, both for normalising and for the moving average (the average
    of `torch.nn.BatchNorm2d` is of the unbiased one). Statistics are at least float32 for any dtype of `x`.

    Port of `hk.BatchNorm`; differences: the moving averages are not updated here but by `moving_averages`, for all
    layers together; with `num_views` > 1 the batch holds that many views one after the other, each view is
    normalised by its own statistics, and the numbers are those of one call per view.

    Args:
      params: `scale` and `offset`, `[C]`.
      state: `mean_ema` and `var_ema`.
      x: `[B, C]` or `[B, C, H, W]`.
      is_training: whether to normalise by the statistics of the batch instead of the moving averages.
      eps: added to the variance.
      cross_replica: whether to average the statistics over all replicas.
      num_views: V, the number of views in the batch.

    Returns:
      The output, with the shape and dtype of `x`, and the statistics of the batch, `[V, C]`, under the names of
      their moving averages (an empty dict unless `is_training`).
    """
    channels = x.shape[1]
    # Views are [V, N, C]: this copies nothing for channels-last images and gives all kernels below one layout.
    last = x if x.ndim == 2 else x.permute(0, 2, 3, 1)
    views = last.reshape(num_views if is_training else 1, -1, channels)
    if is_training:
        out, mean, var = _Normalize.apply(views, params['scale'], params['offset'], eps, cross_replica)
        statistics = {'mean_ema': mean.detach(), 'var_ema': var.detach()}
    else:
        inv = params['scale'] * torch.rsqrt(state['var_ema']['average'] + eps)
        out = (at_least_float32(views) - state['mean_ema']['average']) * inv + params['offset']
        statistics = {}
    out = out.to(x.dtype).view(last.shape)
    return out if x.ndim == 2 else out.permute(0, 3, 1, 2), statistics


class _Normalize(torch.autograd.Function):
    """Computes (x - mean) * scale / sqrt(var + eps) + offset per view, with its derivative in closed form.

    `[V, N, C]` -> the output, mean `[V, C]` and biased variance `[V, C]`; the last two have no derivative. With x^
    the normalised input and g the cotangent, dx = scale / sqrt(var + eps) * (g - mean(g) - x^ mean(g x^)). This
    takes one pass for both means and one for dx; differentiating the single operations would take four.
    """

    generate_vmap_rule = True  # Needed by `torch.func.vmap` over the whole update.

    @staticmethod
    def forward(x, scale, offset, eps, cross_replica):
        full = at_least_float32(x)
        moments = full.mean(1), full.square().mean(1)
        mean, mean_of_squares = collectives.pmean(moments) if cross_replica else moments
        # Rounding can push the variance of a constant channel just below zero.
        var = (mean_of_squares - mean.square()).clamp_min(0.0)
        inv = scale * torch.rsqrt(var + eps)
        return ((full - mean[:, None]) * inv[:, None] + offset).to(x.dtype), mean, var

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, _, ctx.eps, ctx.cross_replica = inputs
        _, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(x, scale, mean, var)

    @staticmethod
    def backward(ctx, grad, grad_mean, grad_var):
        del grad_mean, grad_var
        x, scale, mean, var = ctx.saved_tensors
        inv = torch.rsqrt(var + ctx.eps)
        normalized = (at_least_float32(x) - mean[:, None]) * inv[:, None]
        full = at_least_float32(grad)
        sums = full.sum(1), (full * normalized).sum(1)
        means = sums[0] / x.shape[1], sums[1] / x.shape[1]
        if ctx.cross_replica:
            means = collectives.pmean(means)
        # A clamped variance does not depend on x.
        slope = torch.where(var > 0, means[1], 0.0)[:, None]
        dx = (scale * inv)[:, None] * (full - means[0][:, None] - normalized * slope)
        return dx.to(x.dtype), sums[1].sum(0), sums[0].sum(0), None, None


def linear_init(generator: torch.Generator, in_size: int, out_size: int, with_bias: bool = True) -> Params:
    """Returns the parameters `{'w': [in, out]}` of a linear layer; `with_bias` adds `'b': [out]` of zeros."""
    params = {'w': truncated_normal(generator, (in_size, out_size), in_size)}
    return {**params, 'b': torch.zeros(out_size)} if with_bias else params


def linear(params: Params, x: torch.Tensor) -> torch.Tensor:
    """Returns x w + b, computed in the dtype of `x`. Port of `hk.Linear`.

    Args:
      params: `{'w': [in, out]}`, with or without `'b': [out]`.
      x: `[B, in]`.

    Returns:
      `[B, out]`.
    """
    w = params['w'].to(x.dtype)
    return torch.addmm(params['b'].to(x.dtype), x, w) if 'b' in params else x @ w
