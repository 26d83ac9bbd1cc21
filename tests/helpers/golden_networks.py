"""The network whose parameters a golden file names, so that no test repeats a constructor."""

import re
from collections.abc import Mapping

import numpy as np
import torch

from byol_func.utils import networks
from golden_io import scalar

# Haiku names a module after its class in snake case.
CLASSES = {
    'tiny_res_net': 'TinyResNet',
    **{f'res_net{depth}': f'ResNet{depth}' for depth in (18, 34, 50, 101, 152, 200)},
}
EPS, DECAY_RATE = 1e-5, 0.9  # where a file does not say

Shapes = Mapping[str, tuple[int, ...]]


def encoder_class(keys) -> str:
    """The official class of the encoder among these Haiku keys."""
    (name,) = {CLASSES[root] for root in (key.split('/')[0] for key in keys) if root in CLASSES}
    return name


def is_resnet_v2(keys) -> bool:
    """v2 normalises at the end instead of at the beginning."""
    return any('/final_batchnorm/' in key for key in keys)


def torso_arguments(shapes: Shapes) -> dict:
    """All arguments of ResNetTorso, read off the names and shapes of its parameters."""

    def shape_of(pattern):
        return next((shape for key, shape in shapes.items() if re.search(pattern, key)), None)

    blocks = set(re.findall(r'group_(\d)/~/block_(\d+)/', '\n'.join(shapes)))
    bottleneck = shape_of('conv_2/w$') is not None
    last_conv = 'conv_2/w$' if bottleneck else 'conv_1/w$'
    initial = shape_of('initial_conv/w$')
    width_multiplier = initial[-1] // 64
    return dict(
        blocks_per_group=tuple(sum(int(g) == group for g, _ in blocks) for group in range(4)),
        in_channels=initial[-2],
        resnet_v2=is_resnet_v2(shapes),
        bottleneck=bottleneck,
        channels_per_group=tuple(
            shape_of(f'group_{g}/~/block_0/~/{last_conv}')[-1] // width_multiplier for g in range(4)
        ),
        use_projection=tuple(shape_of(f'group_{g}/~/block_0/~/shortcut_conv') is not None for g in range(4)),
        width_multiplier=width_multiplier,
    )


def bn_config(data: Mapping[str, np.ndarray], net: str) -> dict[str, float]:
    """The batch normalisation of one recorded network."""
    stored = {'decay_rate': data.get(f'{net}/decay_rate'), 'eps': data.get(f'{net}/eps')}
    default = {'decay_rate': DECAY_RATE, 'eps': EPS}
    return {name: default[name] if value is None else scalar(value) for name, value in stored.items()}


def build(shapes: Shapes, bn_config: Mapping[str, float] | None = None) -> networks.Network:
    """The network with parameters of these Haiku keys and shapes: a ResNet or an MLP."""
    bn_config = dict(bn_config or {'decay_rate': DECAY_RATE, 'eps': EPS})
    root = next(iter(shapes)).split('/')[0]
    if root in CLASSES:  # The namesake must know all but these.
        arguments = torso_arguments(shapes)
        kwargs = {k: arguments[k] for k in ('in_channels', 'resnet_v2', 'width_multiplier')}
        return getattr(networks, CLASSES[root])(bn_config=bn_config, **kwargs)
    if any('initial_conv' in key for key in shapes):
        return networks.ResNetTorso(bn_config=bn_config, **torso_arguments(shapes))
    in_size, hidden_size = shapes[f'{root}/linear/w']
    output_size = shapes[f'{root}/linear_1/w'][1]
    return networks.MLP(in_size, hidden_size, output_size, bn_config=bn_config)


def gradients(network, params, state, inputs, cotangent) -> tuple[dict, torch.Tensor]:
    """Gradients of sum(training outputs * cotangent) for the parameters and the inputs."""

    def weighted(params, inputs):
        outputs, _ = network.apply(params, state, inputs, True)
        return (outputs * cotangent).sum()

    return torch.func.grad(weighted, argnums=(0, 1))(params, inputs)


def golden_network_fields(network: Mapping) -> dict:
    """`config.network` of a true checkpoint as the keyword arguments of `cli.config`."""
    fields = {f'network__{key}': value for key, value in network.items() if key.endswith('_size')}
    options = {f'network__encoder_config__{key}': value for key, value in network['encoder_config'].items()}
    return {'network__encoder_class': network['encoder_class'], **options, **fields}
