"""Networks used in BYOL. Namesake of the official `byol/utils/networks.py`.

A network is a pair of pure functions over nested dicts of tensors. Modules and leaves have Haiku's names, with
one dict level per module: Haiku's `res_net18/~/block_group_0/~/block_0/~/conv_0/w` is
`['block_group_0']['block_0']['conv_0']['w']` here.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from byol_func.errors import UserError, one_of
from byol_func.runtime.layers import NetState, Params, conv2d, conv2d_init, linear, linear_init, max_pool
from byol_func.runtime.norms import Norm, make_norm
from byol_func.runtime.precision import at_least_float32


class Network(NamedTuple):
    """A pair of pure functions, and the size of the outputs.

    `init(generator) -> (params, state)`.
    `apply(params, state, inputs, is_training, num_views=1) -> (outputs, new_state)`; with
    `num_views=2` the batch is `[2 B, ...]`, view 1 first, and each view is normalised separately.
    """

    init: Callable[[torch.Generator], tuple[Params, NetState]]
    apply: Callable[..., tuple[Any, NetState]]
    output_size: int


def MLP(  # noqa: N802 (the official name)
    in_size: int,
    hidden_size: int,
    output_size: int,
    depth: int = 2,
    bn_config: Mapping[str, Any] | None = None,
    norm: str = 'batch_norm',
) -> Network:
    """Builds an MLP: Linear - norm - ReLU per hidden layer, then Linear without bias; BYOL uses one hidden layer.

    Port of `networks.MLP`; differences: the input size is given, not inferred; `depth` and `norm`.

    Args:
      in_size: D of the inputs `[B, D]`.
      hidden_size: width of the hidden layers.
      output_size: D of the outputs `[B, D]`.
      depth: number of linear layers; 0 returns the inputs.
      bn_config: keyword arguments of `batch_norm`, and the `decay_rate` of its moving averages.
      norm: a key of `norms.NORMS`.
    """
    if not depth:
        return make_identity(in_size)
    norm_layer, weights = make_norm('head_norm', norm, bn_config)
    sizes = [in_size, *[hidden_size] * (depth - 1), output_size]
    suffixes = ['', *(f'_{i}' for i in range(1, depth))]  # Haiku's suffixes for repeated layers.

    def init(generator):
        params, state = {}, {}
        for i, suffix in enumerate(suffixes):
            is_last = i == depth - 1
            params[f'linear{suffix}'] = linear_init(generator, sizes[i], sizes[i + 1], with_bias=not is_last)
            if not is_last:
                params[f'batch_norm{suffix}'], state[f'batch_norm{suffix}'] = norm_layer.init(hidden_size)
        return params, state

    def apply(params, state, inputs, is_training, num_views=1):
        out, statistics = inputs, {}
        for suffix in suffixes[: depth - 1]:
            out, name = linear(weights(params[f'linear{suffix}']), out), f'batch_norm{suffix}'
            out, statistics[name] = norm_layer.apply(params[name], state[name], out, is_training, num_views=num_views)
            out = F.relu(out)
        out = linear(params[f'linear{suffixes[depth - 1]}'], out)
        return out, norm_layer.new_state(state, statistics, is_training)

    return Network(init, apply, output_size)


class _Block(NamedTuple):
    """The static shape of one residual block; `convs` holds (in, out, kernel size, stride)."""

    convs: tuple[tuple[int, int, int, int], ...]
    shortcut: tuple[int, int, int, int] | None


def _block(in_channels, channels, stride, bottleneck, use_projection) -> _Block:
    convs: tuple[tuple[int, int, int, int], ...]
    if bottleneck:  # The 3x3 convolution has the stride, not the first 1x1.
        inner = channels // 4
        convs = (
            (in_channels, inner, 1, 1),
            (inner, inner, 3, stride),
            (inner, channels, 1, 1),
        )
    else:
        convs = ((in_channels, channels, 3, stride), (channels, channels, 3, 1))
    return _Block(convs, (in_channels, channels, 1, stride) if use_projection else None)


def _block_init(block: _Block, generator, resnet_v2: bool, norm: Norm) -> tuple[Params, NetState]:
    params, state = {}, {}
    if block.shortcut:
        cin, cout, kernel_size, _ = block.shortcut
        params['shortcut_conv'] = conv2d_init(generator, cin, cout, kernel_size)
        if not resnet_v2:
            params['shortcut_batchnorm'], state['shortcut_batchnorm'] = norm.init(cout)
    for i, (cin, cout, kernel_size, _) in enumerate(block.convs):
        # Only the last norm of a v1 bottleneck starts at zero.
        zero_init = not resnet_v2 and i == 2
        params[f'conv_{i}'] = conv2d_init(generator, cin, cout, kernel_size)
        params[f'batchnorm_{i}'], state[f'batchnorm_{i}'] = norm.init(
            cin if resnet_v2 else cout, scale=0.0 if zero_init else 1.0
        )
    return params, state


def _block_v1(block: _Block, params, norm, conv, x):
    """Applies conv - norm - ReLU, with the last ReLU after adding the shortcut."""
    out = shortcut = x
    if block.shortcut:
        shortcut = conv(params['shortcut_conv'], x, block.shortcut[-1])
        shortcut = norm('shortcut_batchnorm', shortcut)
    for i, (*_, stride) in enumerate(block.convs):
        out = norm(f'batchnorm_{i}', conv(params[f'conv_{i}'], out, stride))
        out = F.relu(out) if i < len(block.convs) - 1 else out
    return F.relu(out + shortcut)


def _block_v2(block: _Block, params, norm, conv, x):
    """Applies norm - ReLU - conv; the projection takes the input after the first norm and ReLU."""
    out = shortcut = x
    for i, (*_, stride) in enumerate(block.convs):
        out = F.relu(norm(f'batchnorm_{i}', out))
        if i == 0 and block.shortcut:
            shortcut = conv(params['shortcut_conv'], out, block.shortcut[-1])
        out = conv(params[f'conv_{i}'], out, stride)
    return out + shortcut


def _make_blocks(
    blocks_per_group: Sequence[int],
    in_channels: int,
    bottleneck: bool,
    channels_per_group: Sequence[int],
    use_projection: Sequence[bool],
    width_multiplier: float,
) -> tuple[dict[tuple[str, str], _Block], int]:
    """Returns the blocks by group and name, in order, and the number of channels of the last one."""
    for name, value in (
        ('blocks_per_group', blocks_per_group),
        ('channels_per_group', channels_per_group),
        ('use_projection', use_projection),
    ):
        if len(value) != 4:
            raise ValueError(f'{name}={value}: expected 4 values')
    blocks, channels = {}, in_channels
    for g in range(4):
        out_channels = _widen(channels_per_group[g], width_multiplier, 4 if bottleneck else 1)
        for b in range(blocks_per_group[g]):
            stride = 2 if g > 0 and b == 0 else 1
            project = b == 0 and use_projection[g]
            blocks[f'block_group_{g}', f'block_{b}'] = _block(channels, out_channels, stride, bottleneck, project)
            channels = out_channels
    return blocks, channels


# Kernel size and stride of the first convolution, and whether a max-pool follows.
_STEMS = {'imagenet': (7, 2, True), 'cifar': (3, 1, False)}


def ResNetTorso(  # noqa: N802 (the official name)
    blocks_per_group: Sequence[int],
    in_channels: int = 3,
    bn_config: Mapping[str, Any] | None = None,
    resnet_v2: bool = False,
    bottleneck: bool = True,
    channels_per_group: Sequence[int] = (256, 512, 1024, 2048),
    use_projection: Sequence[bool] = (True, True, True, True),
    width_multiplier: float = 1,
    stem: str = 'imagenet',
    norm: str = 'batch_norm',
) -> Network:
    """Builds a residual network without its classifier, which maps images to spatially averaged features.

    Port of `networks.ResNetTorso`; differences: the CIFAR stem, input channels, other norms, and fractional
    width multipliers. As in the official code, group 0 has a projection shortcut even in ResNet-18 and 34.

    Args:
      blocks_per_group: the number of blocks in each of the four groups.
      in_channels: C of the images `[B, C, H, W]`.
      bn_config: keyword arguments of `batch_norm`, and the `decay_rate` of its moving averages.
      resnet_v2: whether to normalise before the convolutions instead of after them.
      bottleneck: whether to use 1x1 - 3x3 - 1x1 blocks instead of 3x3 - 3x3.
      channels_per_group: the number of channels in each of the four groups.
      use_projection: whether the first shortcut of each of the four groups is a convolution.
      width_multiplier: multiplies every number of channels, including the 64 of the stem.
      stem: 'imagenet' (7x7 with stride 2, and a max-pool) or 'cifar' (3x3 with stride 1 and no max-pool; from
        the paper's appendix on CIFAR-10, after SimCLR).
      norm: a key of `norms.NORMS`; the layers have the names of batch normalisation with every norm.

    Returns:
      A network from `[B, C, H, W]` to `[B, D]`, where D is the number of channels of the last group. It computes
      in the dtype of the images; its outputs are at least float32.

    Raises:
      UserError: the stem is unknown, or the width gives a fractional number of channels.
      ValueError: a sequence does not have length 4.
    """
    norm_layer, weights = make_norm('norm', norm, bn_config)
    stem_kernel, stem_stride, has_max_pool = one_of('config.network.encoder_config.stem', stem, _STEMS)
    stem_channels = _widen(64, width_multiplier, 1)
    blocks, channels = _make_blocks(
        blocks_per_group, stem_channels, bottleneck, channels_per_group, use_projection, width_multiplier
    )
    outer_norm, outer_channels = ('final_batchnorm', channels) if resnet_v2 else ('initial_batchnorm', stem_channels)

    def init(generator):
        params = {'initial_conv': conv2d_init(generator, in_channels, stem_channels, stem_kernel)}
        state = {}
        params[outer_norm], state[outer_norm] = norm_layer.init(outer_channels)
        for (group, name), block in blocks.items():
            block_params, block_state = _block_init(block, generator, resnet_v2, norm_layer)
            params.setdefault(group, {})[name] = block_params
            state.setdefault(group, {})[name] = block_state
        return params, state

    def apply(params, state, inputs, is_training, num_views=1):
        apply_block = _block_v2 if resnet_v2 else _block_v1
        statistics = {}

        def conv(params, x, stride):
            return conv2d(weights(params), x, stride)

        def norm_in(params, state, statistics):
            def norm(name, x):
                x, statistics[name] = norm_layer.apply(params[name], state[name], x, is_training, num_views=num_views)
                return x

            return norm

        outer = norm_in(params, state, statistics)
        x = inputs.contiguous(memory_format=torch.channels_last)
        x = conv(params['initial_conv'], x, stem_stride)
        if not resnet_v2:
            x = F.relu(outer('initial_batchnorm', x))
        if has_max_pool:
            x = max_pool(x)
        for (group, name), block in blocks.items():
            in_block = statistics.setdefault(group, {}).setdefault(name, {})
            norm = norm_in(params[group][name], state[group][name], in_block)
            x = apply_block(block, params[group][name], norm, conv, x)
        if resnet_v2:
            x = F.relu(outer('final_batchnorm', x))
        return at_least_float32(x).mean(dim=(2, 3)), norm_layer.new_state(state, statistics, is_training)

    return Network(init, apply, channels)


def _widen(channels: int, width_multiplier: float, divisor: int) -> int:
    wide = channels * width_multiplier
    if wide < divisor or wide % divisor:
        raise UserError(
            f'config.network.encoder_config.width_multiplier={width_multiplier}: {channels} channels '
            f'become {wide:g}, expected a multiple of {divisor}'
        )
    return int(wide)


class Shape(NamedTuple):
    """The arguments of `ResNetTorso` that distinguish the encoder classes."""

    blocks_per_group: tuple[int, int, int, int]
    bottleneck: bool = True
    channels_per_group: tuple[int, int, int, int] = (256, 512, 1024, 2048)


_basic = functools.partial(Shape, bottleneck=False, channels_per_group=(64, 128, 256, 512))

ENCODERS = {
    'TinyResNet': Shape((1, 1, 1, 1), bottleneck=False, channels_per_group=(8, 8, 8, 8)),
    'ResNet10': _basic((1, 1, 1, 1)),  # Not in the official code: half the blocks of ResNet-18, for small images.
    'ResNet18': _basic((2, 2, 2, 2)),
    'ResNet34': _basic((3, 4, 6, 3)),
    'ResNet50': Shape((3, 4, 6, 3)),
    'ResNet101': Shape((3, 4, 23, 3)),
    'ResNet152': Shape((3, 8, 36, 3)),
    'ResNet200': Shape((3, 24, 36, 3)),
}

# The official classes under their names, and ResNet10.
TinyResNet, ResNet10, ResNet18, ResNet34, ResNet50, ResNet101, ResNet152, ResNet200 = (
    functools.partial(ResNetTorso, **shape._asdict()) for shape in ENCODERS.values()
)


def make_encoder(
    encoder_class: str,
    encoder_config: Mapping[str, Any],
    bn_config: Mapping[str, Any],
    in_channels: int = 3,
    norm: str = 'batch_norm',
) -> Network:
    """Builds the encoder of a class in `ENCODERS`; the other arguments are those of `ResNetTorso`.

    `encoder_config` holds `resnet_v2`, `width_multiplier` and `stem`.

    Raises:
      UserError: the class, the stem or the norm is unknown, or the width gives a fractional number of channels.
    """
    shape = one_of('config.network.encoder_class', encoder_class, ENCODERS)
    return ResNetTorso(**shape._asdict(), in_channels=in_channels, bn_config=bn_config, norm=norm, **encoder_config)


def make_identity(size: int) -> Network:
    """Builds a network that returns its inputs, embeddings `[B, size]`; it has no parameters and ignores any given."""
    return Network(
        init=lambda generator: ({}, {}),
        apply=lambda params, state, inputs, is_training, num_views=1: (inputs, state),
        output_size=size,
    )
