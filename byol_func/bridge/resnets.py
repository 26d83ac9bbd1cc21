"""Converts the encoder to state dicts for the residual networks of torchvision and timm, and theirs to ours.

The weights fit bottleneck networks. torchvision pads its strided layers symmetrically, while the official
code pads them SAME, with the larger part at the end. The inputs of every strided layer are therefore shifted by
a pixel in torchvision, and the outputs differ. timm's `ResNetV2` can pad SAME and gives the same outputs.

ResNet-18 and 34 do not fit: in the official code the first block of *every* group has a convolution in its
shortcut, while torchvision and timm have the identity in the first group and no place for its weights.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from byol_func.bridge.plain_module import Encoder
from byol_func.errors import UserError, counted
from byol_func.utils.networks import ENCODERS

StateDict = dict[str, torch.Tensor]


def to_torchvision(module: Encoder, classifier: Mapping[str, torch.Tensor], network: Mapping[str, Any]) -> StateDict:
    """Returns weights for `torchvision.models.resnet50(num_classes=K)` or `timm.create_model('resnet50', ...)`.

    Both expect images normalised by ImageNet's mean and standard deviation. Their outputs are those of the
    online classifier, except for the effect of the padding.

    Args:
      module: the result of `make_module`.
      classifier: `w` `[D, K]` and `b` `[K]`, the online classifier of the pre-training.
      network: `config.network` as plain values.

    Raises:
      UserError: torchvision has no such network.
    """
    options = network['encoder_config']
    check_bottleneck(network, 'torchvision')
    _check(options['resnet_v2'], 'resnet_v2', network, 'torchvision', 'False')
    _check(options['width_multiplier'] != 1, 'width_multiplier', network, 'torchvision', '1.0')
    channels = module.conv1.in_channels
    if channels != 3:
        raise UserError(
            f'--format=torchvision: the encoder takes {counted(channels, "channel")}, and torchvision builds networks '
            'for 3; expected timm, or module, which accepts any'
        )
    head = {'fc.weight': classifier['w'].T.contiguous(), 'fc.bias': classifier['b']}
    return {**module.state_dict(), **head}


def to_timm(module: Encoder, classifier: Mapping[str, torch.Tensor] | None, network: Mapping[str, Any]) -> StateDict:
    """Returns weights for `timm.models.resnetv2.ResNetV2` with SAME padding, which gives the same outputs.

    `timm_arguments` returns the code that builds this network. The arguments are those of `to_torchvision`; without
    a classifier, the weights are those of a network with `num_classes=0`.

    Raises:
      UserError: timm has no such network.
    """
    check_bottleneck(network, 'timm')
    names = (
        (r'^conv1\.', 'stem.conv.'),
        (r'^bn1\.', 'norm.' if network['encoder_config']['resnet_v2'] else 'stem.norm.'),
        (r'^layer(\d)\.(\d+)\.', lambda match: f'stages.{int(match[1]) - 1}.blocks.{match[2]}.'),
        (r'\.downsample\.0\.', '.downsample.conv.'),
        (r'\.downsample\.1\.', '.downsample.norm.'),
        (r'\.bn(\d)\.', r'.norm\1.'),
    )
    renamed = {}
    for name, tensor in module.state_dict().items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    if classifier is None:
        return renamed
    head = {'head.fc.weight': classifier['w'].T[:, :, None, None].contiguous(), 'head.fc.bias': classifier['b']}
    return {**renamed, **head}


_OUR_NAMES = (
    # timm's ResNetV2, to torchvision's names.
    (r'^stem\.conv\.', 'conv1.'),
    (r'^(stem\.)?norm\.', 'bn1.'),
    (r'^stages\.(\d)\.blocks\.(\d+)\.', lambda match: f'layer{int(match[1]) + 1}.{match[2]}.'),
    (r'\.downsample\.conv\.', '.downsample.0.'),
    (r'\.downsample\.norm\.', '.downsample.1.'),
    (r'\.norm(\d)\.', r'.bn\1.'),
    # torchvision's names, to ours.
    (r'^conv1\.weight$', 'initial_conv/w'),
    (r'^layer(\d)\.(\d+)\.', lambda match: f'block_group_{int(match[1]) - 1}/block_{match[2]}/'),
    (r'/conv(\d)\.weight$', lambda match: f'/conv_{int(match[1]) - 1}/w'),
    (r'/bn(\d)\.', lambda match: f'/batchnorm_{int(match[1]) - 1}/'),
    (r'/downsample\.0\.weight$', '/shortcut_conv/w'),
    (r'/downsample\.1\.', '/shortcut_batchnorm/'),
)
_OUR_LEAVES = {'weight': 'scale', 'bias': 'offset', 'running_mean': 'mean_ema', 'running_var': 'var_ema'}
_SETTLED = 2**30  # A number of updates after which a moving average has no bias.


def from_state_dict(tensors: Mapping[str, torch.Tensor]) -> tuple[StateDict, list[str]]:
    """Returns the leaves of our params and state, by our names, and the names of the tensors that are no part of them.

    Args:
      tensors: the state dict of a ResNet of torchvision, of timm's `ResNet` or `ResNetV2`, or of our `Encoder`.
    """
    ours, others = {}, []
    # The outermost norm follows the stem in version 1 and the last block in version 2.
    stem = next((tensors[name] for name in ('conv1.weight', 'stem.conv.weight') if name in tensors), None)
    for original, tensor in tensors.items():
        name = original
        for pattern, replacement in _OUR_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.startswith('bn1.'):
            is_initial = stem is not None and len(tensor) == len(stem) if tensor.ndim else True
            name = f'{"initial" if is_initial else "final"}_batchnorm/{name[4:]}'
        path, _, leaf = name.rpartition('/')
        if re.fullmatch(r'(block_group_\d/block_\d+/)?(initial_conv|conv_\d|shortcut_conv)/w', name):
            ours[f'encoder/{name}'] = tensor
        elif path.endswith(('batchnorm', 'batchnorm_0', 'batchnorm_1', 'batchnorm_2')) and leaf in _OUR_LEAVES:
            ours |= _norm_leaves(f'encoder/{path}/{_OUR_LEAVES[leaf]}', tensor)
        elif not original.endswith('num_batches_tracked'):
            others.append(original)
    return ours, others


def _norm_leaves(name: str, tensor: torch.Tensor) -> StateDict:
    if not name.endswith('_ema'):
        return {name: tensor}
    counter = torch.tensor(_SETTLED, dtype=torch.int32)
    return {f'{name}/average': tensor, f'{name}/hidden': tensor, f'{name}/counter': counter}


def timm_name(network: Mapping[str, Any]) -> str:
    """Returns timm's name of the network, whose strided layers pad on both sides; '' if timm has none."""
    depth = network['encoder_class'].removeprefix('ResNet')
    fits = depth in ('50', '101', '152') and network['encoder_config']['stem'] == 'imagenet'
    return f'resnetv2_{depth}' if fits and network.get('norm', 'batch_norm') == 'batch_norm' else ''


def timm_arguments(network: Mapping[str, Any], channels: int = 3) -> str:
    """Returns Python code that builds the network for `to_timm`; it needs `functools` and `timm`."""
    options, layers = network['encoder_config'], ENCODERS[network['encoder_class']].blocks_per_group
    inputs = '' if channels == 3 else f'in_chans={channels}, '
    return (
        f'timm.models.resnetv2.ResNetV2({layers}, {inputs}num_classes=K, preact={options["resnet_v2"]}, '
        f"width_factor={options['width_multiplier']:g}, stem_type='same', "
        "conv_layer=functools.partial(timm.layers.create_conv2d, padding='same'), "
        'norm_layer=timm.layers.BatchNormAct2d)'
    )


def check_bottleneck(network: Mapping[str, Any], library: str) -> None:
    """Raises a UserError if timm and torchvision have no network like that of `config.network`."""
    _check_norm(network, library)
    bottleneck = [name for name, encoder in ENCODERS.items() if encoder.bottleneck]
    if network['encoder_class'] not in bottleneck:
        raise UserError(
            f'config.network.encoder_class={network["encoder_class"]!r}: {library} has no such network (the shortcut '
            f'of the first group is a convolution here, the identity there), expected one of {", ".join(bottleneck)}; '
            '--format=module accepts any'
        )
    _check(network['encoder_config']['stem'] != 'imagenet', 'stem', network, library, 'imagenet')


def _check_norm(network: Mapping[str, Any], library: str) -> None:
    norm = network.get('norm', 'batch_norm')
    if norm != 'batch_norm':
        raise UserError(
            f'config.network.norm={norm!r}: {library} has no such network, expected batch_norm; --format=module '
            'accepts any'
        )


def _check(wrong: bool, option: str, network: Mapping[str, Any], library: str, accepted: str) -> None:
    if wrong:
        value = network['encoder_config'][option]
        raise UserError(
            f'config.network.encoder_config.{option}={value!r}: {library} has no such network, expected {accepted}; '
            '--format=module accepts any'
        )
