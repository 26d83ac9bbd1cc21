"""Gradients in buckets: the same numbers bit for bit, sent while others are still computed, in real processes."""

import optree
import pytest
import torch

from byol_func import byol_experiment
from byol_func.experiment import step_arguments
from byol_func.runtime import buckets, collectives, compilation, torch_internals
from configs import byol
from golden_processes import run_in_processes


def _tiny_byol():
    config = byol.get_config().copy_and_resolve_references()
    config.batch_size, config.image_size, config.precision = 8, 16, 'float32'
    config.network.encoder_class = 'TinyResNet'
    config.network.projector_hidden_size = config.network.predictor_hidden_size = 256
    shape = (3, 16, 16)
    experiment = byol_experiment.make(config, num_examples=100, num_classes=10, image_shape=shape)
    state, step, draws, inputs = optree.tree_map(torch.clone, step_arguments(experiment, shape))
    pixels = torch.Generator().manual_seed(collectives.replica_index())
    images = torch.randint(256, inputs['images'].shape, dtype=torch.uint8, generator=pixels)
    return experiment.update, state, (step, draws, {**inputs, 'images': images})


def _layers():
    """Layers of two dtypes, transposed weights, an empty tensor and one that is a whole bucket."""
    rng = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=rng) / shape[0] ** 0.5
    params = dict(a=new(8, 300), b=new(40, 300).T.contiguous(), c=new(40, 8).double(), d=torch.zeros(0))
    x = torch.randn(6, 8, generator=rng) + collectives.replica_index()

    def loss(params, x):
        hidden = (x @ params['a']).relu() @ params['b'].T.t()
        return (hidden.double().tanh() @ params['c']).square().sum() + params['d'].sum(), hidden.mean()

    def update(state, x):
        grads, mean = collectives.pmean(torch.func.grad(loss, has_aux=True)(state['params'], x))
        return {'params': optree.tree_map(lambda p, g: p - 0.1 * g, state['params'], grads)}, {'mean': mean}

    return update, {'params': params}, (x,)


def _trained(rank, make, bucket_mb, backend):
    """The state and logs after two steps, and the bytes of the messages of a step in their order."""
    update, state, arguments = make()
    step = compilation._Compiled(update, backend, bucket_mb)
    for _ in range(2):
        state, logs = step(state, *arguments)
    step.graph.graph.lint()
    sent = [node.args[0].args[0] for node in step.graph.graph.nodes if node.target is torch_internals.all_reduce_op]
    return optree.tree_leaves((state, logs)), [sum(map(buckets._bytes, tensors)) for tensors in sent]


@pytest.mark.parametrize(
    'make, bucket_mb, more, backend',
    [
        (_tiny_byol, 0.3, 2, None),
        (_layers, 0.02, 1, None),
        pytest.param(_layers, 0.02, 1, 'inductor', marks=pytest.mark.slow),
    ],
)
def test_buckets_are_sent_early_and_change_no_bit(make, bucket_mb, more, backend, tmp_path):
    found = []
    for size in (0, bucket_mb):
        folder = tmp_path / str(size)
        folder.mkdir()
        found.append(run_in_processes(_trained, 2, folder, make, size, backend))
    for (block, whole), (split, parts) in zip(*found, strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(block, split, strict=True))
        assert len(parts) == len(whole) + more and sum(parts) == sum(whole)
        large = [i for i, size in enumerate(parts) if size >= 1e6 * bucket_mb]
        assert len(large) >= more
        if make is _tiny_byol:  # Batch statistics of the backward pass are sent after the first gradients.
            assert whole.index(max(whole)) == len(whole) - 1 and large[0] < len(parts) - 1 - more
