"""The network whose parameters a golden file names, so that no test repeats a constructor."""

import re
from collections.abc import Mapping

import torch

from byol_func.utils import networks

# Haiku names a module after its class in snake case.
CLASSES = {
    'tiny_res_net': 'TinyResNet',
    **{f'res_net{depth}': f'ResNet{depth}' for depth in (18, 34, 50, 101, 152, 200)},
}
EPS = 1e-5  # of every recorded network
DECAY_RATE = 0.9  # where a file does not say

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


def build(shapes: Shapes, decay_rate: float = DECAY_RATE) -> networks.Network:
    """The network with parameters of these Haiku keys and shapes: a ResNet or an MLP."""
    bn_config = dict(decay_rate=decay_rate, eps=EPS)
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
