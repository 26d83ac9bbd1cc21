"""Steps that run elsewhere than on the CPU: nothing of them may be left there.

On a GPU a tensor of the host is an error, or a copy that waits and that no CUDA graph can hold. Tensors
without data on the device `meta` tell the two apart on any machine.
"""

import functools

import optree
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from byol_func import byol_experiment, eval_experiment
from byol_func.evaluation import health
from byol_func.evaluation.heads import grid, stack
from byol_func.utils import optimizers
from configs import byol, digits


def _elsewhere(tree):
    def move(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device='meta')

    with FakeTensorMode():
        return optree.tree_map(move, tree)


def _nodes_on_the_host(fn, *args) -> list[str]:
    """Of fn(*args), run on tensors that are all elsewhere, the operations whose results are not."""
    leaves, spec = optree.tree_flatten(_elsewhere(args))
    flat = lambda *leaves: optree.tree_leaves(fn(*optree.tree_unflatten(spec, leaves)))
    graph = make_fx(flat, tracing_mode='fake')(*leaves).graph
    graph.eliminate_dead_code()
    tensors = [
        (node, leaf)
        for node in graph.nodes
        for leaf in optree.tree_leaves(node.meta.get('val'))
        if isinstance(leaf, torch.Tensor)
    ]
    assert len(tensors) > len(leaves)
    constants = [str(node) for node in graph.nodes if node.op == 'get_attr']
    return constants + [f'{node.target} -> {node}' for node, leaf in tensors if leaf.device.type != 'meta']


def _config(**overrides):
    config = byol.get_config('40')
    config.update_from_flattened_dict(
        {
            'batch_size': 8,
            'image_size': 16,
            'network.encoder_class': 'TinyResNet',
            'network.projector_hidden_size': 8,
            'network.projector_output_size': 4,
            'network.predictor_hidden_size': 8,
            'linear_eval.batch_size': 8,
            'fine_tune.batch_size': 8,
            **overrides,
        }
    )
    return config


FACTS = dict(num_examples=64, num_classes=4, image_shape=(3, 24, 20))
IMAGES = {'images': torch.zeros(8, 3, 24, 20, dtype=torch.uint8), 'labels': torch.zeros(8, dtype=torch.int64)}
STEP = torch.tensor(0)


@pytest.mark.parametrize(
    'overrides',
    [
        {},
        {'precision': 'bfloat16'},
        {'optimizer': 'adam'},
        {'augmentations.view1.color_transform.semantics': 'torchvision'},
        {'network.encoder_config.resnet_v2': True},
    ],
    ids=['official', 'bfloat16', 'adam', 'torchvision', 'v2'],
)
def test_pretraining(overrides):
    experiment = byol_experiment.make(_config(**overrides), **FACTS)
    state = experiment.init()
    assert _nodes_on_the_host(experiment.update, state, STEP, experiment.sample(0), IMAGES) == []
    assert _nodes_on_the_host(experiment.evaluate, state, IMAGES) == []


def test_blocks_with_a_bottleneck():
    """ResNet-50 is the smallest network that has them: its step has seven times as many operations."""
    network = {'network.encoder_class': 'ResNet50', 'network.encoder_config.resnet_v2': True}
    experiment = byol_experiment.make(_config(**network), **FACTS)
    state, forward = experiment.init(), experiment.parts.forward

    def loss(params, state, images):
        outputs, _ = forward.apply(params, state, {'view1': images, 'view2': images}, is_training=True)
        return outputs['projection_view1'].sum()

    images = torch.zeros(8, 3, 16, 16)
    assert _nodes_on_the_host(torch.func.grad(loss), state.online_params, state.online_state, images) == []


def test_the_health_panel():
    experiment = byol_experiment.make(_config(), **FACTS)
    panel = functools.partial(health.panel, experiment)
    state, draws = experiment.init(), experiment.sample(0)
    assert _nodes_on_the_host(panel, state, STEP, draws, IMAGES) == []


@pytest.mark.parametrize('mode', ['linear_eval', 'fine_tune'])
def test_evaluation_protocols(mode):
    config = _config()
    encoder = byol_experiment.make(config, **FACTS).init()
    parts = ({'encoder': tree['encoder']} for tree in (encoder.online_params, encoder.online_state))
    experiment = eval_experiment.make(config, mode, *parts, **FACTS)
    state = experiment.init()
    assert _nodes_on_the_host(experiment.update, state, STEP, experiment.sample(0), IMAGES) == []
    for function in (experiment.evaluate, experiment.predict):
        assert _nodes_on_the_host(function, state, IMAGES) == []


def test_a_sweep():
    config = digits.get_config()
    config.linear_eval.batch_size = 8
    one = eval_experiment.make(config, 'linear_eval', {}, {}, num_examples=64, num_classes=4, image_shape=(12,))
    settings = config.linear_eval.optimizer_config.sgd
    heads = stack(
        one,
        grid((0.1, 1.0), (0.0, 0.1)),
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        decays=optimizers.FILTERS[settings.weight_decay_filter],
    )
    features = {'images': torch.zeros(8, 12), 'labels': torch.zeros(8, dtype=torch.int64)}
    assert _nodes_on_the_host(heads.update, heads.init(), STEP, None, features) == []


def test_a_constant_of_the_host_is_found():
    assert _nodes_on_the_host(lambda x: x.sum() * torch.ones(()), torch.zeros(3)) != []
