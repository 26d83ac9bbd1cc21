"""The encoder as a plain `torch.nn.Module`, for users who want the weights without this framework.

The module has only standard layers, with torchvision's names. `bridge.resnets` converts its state dict
for other libraries; `torch.export` turns it into a graph that needs only PyTorch.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from byol_func.runtime.layers import Params, same_padding
from byol_func.runtime.norms import num_groups, standardized
from byol_func.utils.dataset import MEAN_RGB, STDDEV_RGB
from byol_func.utils.networks import ENCODERS


def _pad_same(x: torch.Tensor, kernel_size: int, stride: int, value: float = 0.0) -> torch.Tensor:
    """Pads as `layers.same_padding`, but always by `kernel_size - 1` in total.

    At stride 2 an even size gets one more row at the end, which no window reaches. As the total is the same for all
    sizes, `torch.export` can leave the size of the images open.
    """
    if kernel_size == 1:
        return x
    before = [same_padding(size, kernel_size, stride)[0] for size in (x.shape[3], x.shape[2])]
    return F.pad(x, [pad for first in before for pad in (first, kernel_size - 1 - first)], value=value)


class Conv2dSame(nn.Conv2d):
    """A convolution without bias and with the SAME padding of TensorFlow and JAX, asymmetric at stride 2."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `[B, in, H, W]` to `[B, out, ceil(H / stride), ceil(W / stride)]`."""
        return super().forward(_pad_same(x, self.kernel_size[0], self.stride[0]))


class MaxPoolSame(nn.Module):
    """A 3x3 max pooling with stride 2 and SAME padding with -inf."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `[B, C, H, W]` to `[B, C, ceil(H / 2), ceil(W / 2)]`."""
        return F.max_pool2d(_pad_same(x, 3, 2, -torch.inf), 3, 2)


class Block(nn.Module):
    """A residual block of version 1 (conv - norm - ReLU) or version 2 (norm - ReLU - conv)."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, *, bottleneck: bool, project: bool, v2: bool, norm: Any
    ):
        super().__init__()
        inner = channels // 4 if bottleneck else channels
        sizes = [(in_channels, inner, 1, 1), (inner, inner, 3, stride), (inner, channels, 1, 1)]
        if not bottleneck:
            sizes = [(in_channels, channels, 3, stride), (channels, channels, 3, 1)]
        self.v2, self.depth = v2, len(sizes)
        for i, (cin, cout, kernel_size, conv_stride) in enumerate(sizes, start=1):
            setattr(self, f'conv{i}', Conv2dSame(cin, cout, kernel_size, conv_stride))
            setattr(self, f'bn{i}', norm(cin if v2 else cout))
        self.downsample = None
        if project:
            conv = Conv2dSame(in_channels, channels, 1, stride)
            self.downsample = nn.Sequential(conv) if v2 else nn.Sequential(conv, norm(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `[B, in, H, W]` to `[B, out, ceil(H / stride), ceil(W / stride)]`."""
        out = shortcut = x
        if self.downsample is not None and not self.v2:
            shortcut = self.downsample(x)
        for i in range(1, self.depth + 1):
            conv, norm = getattr(self, f'conv{i}'), getattr(self, f'bn{i}')
            if self.v2:
                out = F.relu(norm(out))
                if i == 1 and self.downsample is not None:
                    shortcut = self.downsample(out)
                out = conv(out)
            else:
                out = norm(conv(out))
                out = F.relu(out) if i < self.depth else out
        return out + shortcut if self.v2 else F.relu(out + shortcut)


def _norm_layer(name: str, channels: int, eps: float) -> nn.Module:
    if name == 'batch_norm':
        return nn.BatchNorm2d(channels, eps=eps)
    if name == 'none':
        return nn.Identity()
    return nn.GroupNorm(num_groups(channels) if name == 'group_norm' else 1, channels, eps=eps)


class Encoder(nn.Module):
    """A residual network from images `[B, C, H, W]` in 0..1 to embeddings `[B, D]`.

    It first normalises the images by ImageNet's mean and standard deviation, as in training; unless C = 3, by
    their averages over the colours. `bn1` is the first norm in version 1 and the last one in version 2.
    """

    mean: torch.Tensor
    std: torch.Tensor
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        blocks: tuple[int, ...],
        channels: tuple[int, ...],
        *,
        bottleneck: bool,
        v2: bool = False,
        width: float = 1.0,
        stem: str = 'imagenet',
        in_channels: int = 3,
        eps: float = 1e-5,
        norm: str = 'batch_norm',
    ):
        super().__init__()
        make_norm = functools.partial(_norm_layer, norm, eps=eps)
        self.v2 = v2
        current = int(64 * width)
        self.conv1 = Conv2dSame(in_channels, current, *((7, 2) if stem == 'imagenet' else (3, 1)))
        self.maxpool = MaxPoolSame() if stem == 'imagenet' else nn.Identity()
        stem_channels = current
        for g in range(4):
            group, out = [], int(channels[g] * width)
            for b in range(blocks[g]):
                stride = 2 if g > 0 and b == 0 else 1
                group.append(Block(current, out, stride, bottleneck=bottleneck, project=b == 0, v2=v2, norm=make_norm))
                current = out
            setattr(self, f'layer{g + 1}', nn.Sequential(*group))
        self.bn1 = make_norm(current if v2 else stem_channels)
        self.total_stride = 32 if stem == 'imagenet' else 8  # From the image to the last feature map.
        for name, values in zip(('mean', 'std'), normalisation(in_channels), strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images `[B, C, H, W]` in 0..1 to embeddings `[B, D]`.

        Raises:
          ValueError: the images have another number of channels or axes, or integer values. Their range is not looked
            at: that would need a copy from the device, and a traced graph cannot do it.
        """
        channels = self.conv1.in_channels
        if images.dim() != 4 or images.shape[1] != channels:  # Normalisation would broadcast a grey image.
            raise ValueError(f'images of shape {tuple(images.shape)}: expected [B, {channels}, H, W]')
        if not images.is_floating_point():
            raise ValueError(f'images of {images.dtype}: expected floats in 0..1')
        x = self.conv1((images - self.mean) / self.std)
        if not self.v2:
            x = F.relu(self.bn1(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.maxpool(x)))))
        if self.v2:
            x = F.relu(self.bn1(x))
        return x.mean(dim=(2, 3))


def normalisation(in_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns ImageNet's mean and standard deviation per channel; unless there are three channels, their averages."""
    if in_channels == 3:
        return MEAN_RGB, STDDEV_RGB
    return (sum(MEAN_RGB) / 3,) * in_channels, (sum(STDDEV_RGB) / 3,) * in_channels


def make_module(params: Mapping[str, Any], state: Mapping[str, Any], network: Mapping[str, Any]) -> Encoder:
    """Returns the trained encoder as a module in evaluation mode, with the same outputs as our `apply`.

    The trees are the encoder's part of those of a run, `network` is `config.network`. With group normalisation, the
    weights are exported in standardised form. The running variance of batch normalisation is biased, as in Haiku;
    PyTorch would make it larger by the factor n / (n - 1).
    """
    module = empty_module(network, params['initial_conv']['w'].shape[1])
    weights = standardized if network.get('norm') == 'group_norm' else lambda conv: conv
    module.load_state_dict(_state_dict(params, state, weights))
    return module.eval()


def empty_module(network: Mapping[str, Any], in_channels: int) -> Encoder:
    """Returns the module of `config.network` with random weights, ready to load a state dict."""
    encoder, options = ENCODERS[network['encoder_class']], network['encoder_config']
    return Encoder(
        encoder.blocks_per_group,
        encoder.channels_per_group,
        bottleneck=encoder.bottleneck,
        v2=options['resnet_v2'],
        width=options['width_multiplier'],
        stem=options['stem'],
        in_channels=in_channels,
        eps=network['bn_config']['eps'],
        norm=network.get('norm', 'batch_norm'),  # Older checkpoints lack this field.
    )


def _state_dict(
    params: Mapping[str, Any], state: Mapping[str, Any], weights: Callable[[Params], Params]
) -> dict[str, torch.Tensor]:
    tensors = {'conv1.weight': weights(params['initial_conv'])['w']}
    outer = 'final_batchnorm' if 'final_batchnorm' in params else 'initial_batchnorm'
    tensors |= _norm('bn1', params[outer], state[outer])
    for g in range(4):
        for name, block in params[f'block_group_{g}'].items():
            averages = state[f'block_group_{g}'][name]
            prefix = f'layer{g + 1}.{name.removeprefix("block_")}'
            for i in range(sum(key.startswith('conv_') for key in block)):
                tensors[f'{prefix}.conv{i + 1}.weight'] = weights(block[f'conv_{i}'])['w']
                norm = f'batchnorm_{i}'
                tensors |= _norm(f'{prefix}.bn{i + 1}', block[norm], averages[norm])
            if 'shortcut_conv' in block:
                tensors[f'{prefix}.downsample.0.weight'] = weights(block['shortcut_conv'])['w']
            if 'shortcut_batchnorm' in block:
                norm = 'shortcut_batchnorm'
                tensors |= _norm(f'{prefix}.downsample.1', block[norm], averages[norm])
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _norm(prefix: str, params: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    if not params:
        return {}
    affine = {f'{prefix}.weight': params['scale'], f'{prefix}.bias': params['offset']}
    if not state:
        return affine
    return {
        **affine,
        f'{prefix}.running_mean': state['mean_ema']['average'],
        f'{prefix}.running_var': state['var_ema']['average'],
        f'{prefix}.num_batches_tracked': state['mean_ema']['counter'].long(),
    }
