"""Fast paths of the runtime against the plain ones: fused arithmetic, packed transfers, late logs, bfloat16."""

import contextlib
import subprocess
import sys

import optree
import pytest
import torch

from byol_func import byol_experiment
from byol_func.runtime import compilation, costs, fused, precision, transfer
from byol_func.training.device_logs import StepLogs
from byol_func.utils import dataset
from configs import digits


def _tree(seed: int):
    generator = torch.Generator().manual_seed(seed)
    shapes = {'w': (3, 4), 'b': (4,), 'scale': ()}
    return {'layer': {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}}


@pytest.mark.parametrize(
    'fn',
    [
        lambda x, y: x + 0.5 * y,
        lambda x, y: x - torch.tensor(0.25) * (y - x),
        lambda x, y: 3.0 * (x * y) / 2.0,
        lambda x, y: x / ((y * y).sqrt() + 1e-3),
    ],
)
def test_fused_map_is_tree_map(fn):
    x, y = _tree(0), _tree(1)
    actual, expected = fused.fused_map(fn, x, y), optree.tree_map(fn, x, y)
    assert optree.tree_structure(actual) == optree.tree_structure(expected)
    for a, b in zip(optree.tree_leaves(actual), optree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_fused_map_without_leaves():
    assert fused.fused_map(lambda x: 2.0 * x, {}) == {}


def test_norms_and_factors_are_per_leaf():
    leaves = optree.tree_leaves(_tree(0))
    norms = fused.Leaves(leaves).norms()
    assert norms.tolist() == pytest.approx([leaf.norm().item() for leaf in leaves])
    scaled = fused.Leaves(leaves).times_each(norms).leaves
    for actual, leaf, norm in zip(scaled, leaves, norms, strict=True):
        assert torch.equal(actual, leaf * norm)


def test_a_placed_tree_is_a_copy():
    kernel = torch.randn(4, 3, 2, 2, dtype=torch.float64).to(memory_format=torch.channels_last)
    tree = {'w': kernel, 'counter': torch.tensor(3, dtype=torch.int32)}
    placed = transfer.place(tree, torch.device('cpu'))
    for name, leaf in tree.items():
        assert torch.equal(placed[name], leaf) and placed[name].dtype == leaf.dtype
        assert placed[name].is_contiguous() and placed[name].data_ptr() != leaf.data_ptr()


def test_freed_memory_is_kept():
    source = """
import ctypes, resource, torch
from byol_func.runtime import memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
by_default = min(faults() for _ in range(5))
memory.keep_freed_memory()
kept = min(faults() for _ in range(20))  # At first what is free may not fit what is asked for.
print(hasattr(ctypes.CDLL(None), 'mallopt'), by_default, kept)
"""
    process = subprocess.run([sys.executable, '-c', source], stdout=subprocess.PIPE, text=True, check=True)
    has_mallopt, by_default, kept = process.stdout.split()
    if has_mallopt == 'False':
        pytest.skip('the C library has no mallopt')
    assert int(kept) < int(by_default) / 10


def test_a_packed_tree_comes_back_bit_for_bit():
    tree = {
        'flip': torch.tensor([True, False, True]),
        'order': torch.tensor([[3, 0], [1, 2], [2**40, -1]]),
        'hue': torch.tensor([0.1, float('inf'), -0.0]),
        'empty': torch.zeros(0, 2),
        'step': torch.tensor(7),
        'wide': torch.tensor([1 / 3], dtype=torch.float64),
    }
    block = transfer.pack(tree)
    assert block.dtype == torch.uint8 and block.numel() == sum(t.nbytes for t in tree.values())
    for name, actual in transfer.unpack(block, like=tree).items():
        assert actual.dtype == tree[name].dtype and actual.shape == tree[name].shape
        assert torch.equal(actual, tree[name])


def test_logs_come_in_blocks():
    logs = StepLogs()
    for step in range(5):
        logs.add(step, {'loss': torch.tensor(float(step)), 'tau': torch.tensor(0.5 + step)})
        if step in (1, 4):
            logs.close_block()
    first, second = logs.take()
    assert (first.step, first.scalars) == (1, {'loss': 1.0, 'tau': 1.5})
    assert second.losses == [(2, 2.0), (3, 3.0), (4, 4.0)]
    logs.close_block()
    assert logs.take(leave=0) == []


def _step(policy: str):
    """New parameters and logs of one update of a small network on noise."""
    config = digits.get_config()
    config.precision = policy
    config.batch_size = 64
    config.optimizer = 'sgd'  # Adam would make whole steps of the rounding in gradients of 0.
    config.lr_schedule.warmup_epochs = 0.0
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8, generator=generator)
    data = dataset.Dataset(images, torch.arange(64) % 10, tuple('0123456789'))
    experiment = byol_experiment.make(config, num_examples=64, num_classes=10, image_shape=(1, 8, 8))
    state = experiment.init()
    batch = dataset.train_batch(data, 0, seed=0, batch_size=64)
    new_state, logs = experiment.update(state, torch.tensor(0), experiment.sample(0), batch)
    return state, new_state, logs


def test_bfloat16_follows_float32():
    """Everything that is kept stays float32; the loss agrees to a percent, the update in direction."""
    before, expected, expected_logs = _step('float32')
    _, actual, actual_logs = _step('bfloat16')
    for leaf in optree.tree_leaves(actual):
        assert leaf.dtype in (torch.float32, torch.int32)
    assert actual_logs['loss'].dtype == torch.float32
    assert actual_logs['loss'] != expected_logs['loss'], 'bfloat16 has no effect'
    assert actual_logs['loss'].item() == pytest.approx(expected_logs['loss'].item(), rel=1e-2)

    def moves(state):
        new, old = (optree.tree_leaves(s.online_params) for s in (state, before))
        return torch.cat([(n - o).flatten() for n, o in zip(new, old, strict=True)])

    cosine = torch.cosine_similarity(moves(actual), moves(expected), dim=0).item()
    assert cosine > 0.97


def test_bfloat16_is_the_fastest_where_a_cpu_has_matrix_units(monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'amx_bf16': True})
    assert precision.fastest(torch.device('cpu')) == 'bfloat16'
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_bf16': True})
    assert precision.fastest(torch.device('cpu')) == 'float32'


def _counted_step():
    """A step, and a list that grows whenever Python runs it."""
    calls = []

    def step(state, x):
        calls.append(1)
        new = {'w': state['w'] - 0.1 * (x @ state['w'])}
        return new, {'loss': new['w'].sum()}

    return step, calls


@pytest.mark.parametrize('num_steps, how', [(5, 'plain'), (1000, 'traced'), (10**12, 'compiled')])
def test_a_step_is_traced_or_compiled_where_the_run_is_long_enough(num_steps, how, monkeypatch):
    """Then Python runs the step twice (to count and to trace it), however often it is called."""
    compiled, compile = [], torch.compile
    monkeypatch.setattr(torch, 'compile', lambda *args, **kwargs: compiled.append(1) or compile(*args, **kwargs))
    step, calls = _counted_step()
    update = compilation.compile_update(step, compiled=None, num_steps=num_steps, backend='aot_eager')
    generator = torch.Generator().manual_seed(0)
    state = {'w': torch.randn(8, 8, generator=generator)}
    x, expected = torch.eye(8), state['w'] * 0.9**6
    for _ in range(6):
        state, _ = update(state, x)
    torch.testing.assert_close(state['w'], expected)
    assert len(calls) == (1 + 6 if how == 'plain' else 2)
    assert len(compiled) == (how == 'compiled')


def test_operations_are_counted_from_shapes():
    product = lambda a, b: a @ b
    assert costs.count_flops(product, torch.ones(3, 5), torch.ones(5, 7)) == 2 * 3 * 5 * 7


@pytest.mark.parametrize('optimizer', ['lars', 'adam'])
def test_a_step_copies_no_constants_from_the_host(optimizer):
    """They would be tensors of the graph; a CUDA graph cannot be captured around such a copy."""
    config = digits.get_config()
    config.optimizer, config.batch_size, config.network.encoder_class = optimizer, 8, 'TinyResNet'
    experiment = byol_experiment.make(config, num_examples=256, num_classes=10, image_shape=(3, 8, 8))
    batch = {'images': torch.zeros(8, 3, 8, 8, dtype=torch.uint8), 'labels': torch.zeros(8, dtype=torch.int64)}
    update = compilation._Compiled(experiment.update, backend=None)  # Traced, which is what a compiler gets.
    update(experiment.init(), torch.tensor(0), experiment.sample(0), batch)
    assert [node for node in update.graph.graph.nodes if node.op == 'get_attr'] == []


def test_constants_are_the_numbers():
    actual = transfer.constants((0.485, 0.456), like=torch.ones(1, dtype=torch.float64))
    assert torch.equal(actual, torch.tensor([0.485, 0.456], dtype=torch.float64))


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs in Python: a capture writes a step down, a replay runs it. The list tells of both."""
    told = []

    class Graph:
        def replay(self):
            told.append('replay')
            self.kernels()

    @contextlib.contextmanager
    def capture(graph, **settings):
        told.append(settings)
        yield
        graph.kernels = captured.pop()

    captured = []
    monkeypatch.setattr(compilation, '_is_on_gpu', lambda state: True)
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', Graph)
    monkeypatch.setattr(torch.cuda, 'graph', capture)
    return told, captured


def test_a_captured_step_sees_the_same_tensors_from_the_first_call_on(graphs):
    """Guards of what was compiled hold in the capture: strides, alignment and addresses stay as they were."""
    told, captured = graphs
    seen = []

    def step(state, draws, images):
        seen.append([leaf.data_ptr() for leaf in (draws['shift'], draws['flip'], images)])
        run = lambda: state['w'].add_(draws['shift'] * images.sum())
        run() if len(seen) < 3 else captured.append(run)  # The third call is the capture.
        return state, {}

    update = compilation._Captured(step)
    state, expected = {'w': torch.zeros(())}, 0.0
    for i in range(5):
        draws = {'flip': torch.tensor([True, False, True]), 'shift': torch.tensor(float(i))}
        draws = transfer.unpack(transfer.pack(draws), like=draws)  # As they come to a GPU.
        images = torch.full((2, 3), i + 1.0)
        given = [leaf.data_ptr() for leaf in (draws['shift'], draws['flip'], images)]
        state, _ = update(state, draws, images)
        assert not set(given) & set(seen[-1])
        expected += i * 6 * (i + 1)
        assert state['w'] == expected
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]
    assert told == [{'capture_error_mode': 'thread_local'}] + 3 * ['replay']


def test_a_captured_step_takes_no_other_shapes(graphs):
    """A copy would repeat a batch of one."""
    update = compilation._Captured(lambda state, x: (state, {}))
    update({'w': torch.zeros(())}, torch.ones(4))
    for other in (torch.ones(1), torch.ones(4, dtype=torch.float64)):
        with pytest.raises(ValueError, match='other shapes than the first time'):
            update({'w': torch.zeros(())}, other)
