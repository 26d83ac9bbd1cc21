"""Whole BYOL updates against the official experiment: every step from its own initialisation.

The two-device file is replayed twice: by one process on the global batch, and by one process per
device on its share. Both must give the same numbers.
"""

import functools

import pytest
import torch

from byol_func import byol_experiment
from byol_func.runtime import collectives
from byol_func.utils import optimizers, schedules
from golden_io import (
    BYOL_GRADIENTS,
    BYOL_LOGS,
    BYOL_STATES,
    DTYPES,
    OUTPUTS,
    assert_close,
    assert_norms_close,
    assert_trees_close,
    below,
    children,
    flatten,
    images,
    limit,
    load,
    scalar,
    tensor,
    tree,
)
from golden_networks import encoder_class, is_resnet_v2
from golden_processes import run_in_processes

FILES = ('byol_update.npz', 'byol_update_2dev.npz')
SEVERAL_DEVICES = [name for name in FILES if scalar(load(name)['config/devices']) > 1]
TREES = ('online_params', 'target_params', 'online_state', 'target_state')


class _Official:
    """The experiment of one file, bound to its config."""

    def __init__(self, name):
        self.data = data = load(name)
        config = {key: scalar(v) for key, v in below(data, 'config').items() if v.ndim == 0}
        self.config = config
        keys = [str(key) for key in below(data, 'init/online_params')]
        self.network = byol_experiment.make_network(
            encoder_class=encoder_class(keys),
            encoder_config=dict(resnet_v2=config['resnet_v2']),
            bn_config=dict(decay_rate=config['bn_decay'], eps=config['eps']),
            projector_hidden_size=config['hidden'],
            projector_output_size=config['out'],
            predictor_hidden_size=config['pred'],
            num_classes=config['classes'],
        )
        assert is_resnet_v2(keys) == config['resnet_v2']
        self.loss_fn = functools.partial(
            byol_experiment.loss_fn,
            forward=self.network,
            target_forward=self.network,
            repr_loss_fn=byol_experiment.repr_loss_fn,
            postprocess=lambda inputs, draws: inputs,  # The views are given.
            num_classes=config['classes'],
        )
        self.update_fn = functools.partial(
            byol_experiment.update_fn,
            loss_fn=self.loss_fn,
            grad=torch.func.grad,
            optimizer=self.optimizer,
            learning_schedule=functools.partial(
                schedules.learning_schedule,
                batch_size=config['batch'],
                base_learning_rate=config['base_lr'],
                total_steps=config['max_steps'],
                warmup_steps=config['warmup'],
            ),
            target_ema=functools.partial(schedules.target_ema, base_ema=config['ema'], max_steps=config['max_steps']),
        )

    def optimizer(self, learning_rate):
        return optimizers.lars(
            learning_rate,
            weight_decay=self.config['wd'],
            momentum=self.config['momentum'],
            eta=self.config['eta'],
            weight_decay_filter=optimizers.exclude_bias_and_norm,
            lars_adaptation_filter=optimizers.exclude_bias_and_norm,
        )

    def initial_state(self, dtype):
        trees = {name: tree(self.data, f'init/{name}', dtype) for name in TREES}
        momentum = optimizers.ScaleByLarsState(mu=tree(self.data, 'init/momentum', dtype))
        is_lars = lambda s: isinstance(s, optimizers.ScaleByLarsState)
        fresh = self.optimizer(0.0).init(trees['online_params'])
        opt_state = tuple(momentum if is_lars(s) else s for s in fresh)
        return byol_experiment.ByolState(**trees, opt_state=opt_state)

    def batch(self, step, dtype, examples):
        """The batch of the step-th update, from 1."""
        views = {view: images(self.data[f'inputs/{view}'][step - 1], dtype)[examples] for view in ('view1', 'view2')}
        return {**views, 'labels': tensor(self.data['inputs/labels'][step - 1]).long()[examples]}


def _trees(state):
    (momentum,) = (s.mu for s in state.opt_state if isinstance(s, optimizers.ScaleByLarsState))
    return {**{name: getattr(state, name) for name in TREES}, 'momentum': momentum}


def _replay(name, dtype, examples=slice(None)):
    """All updates on these examples of every batch; what came out, per update.

    The first also has the gradients and the outputs of both networks before it.
    """
    official = _Official(name)
    state = official.initial_state(dtype)
    batch = official.batch(1, dtype, examples)
    params_and_states = state[:4]
    grads, _ = torch.func.grad(official.loss_fn, has_aux=True)(*params_and_states, None, batch)
    first = {
        'grads': collectives.pmean(grads),
        'online': official.network.apply(state.online_params, state.online_state, batch, True)[0],
        'target': official.network.apply(state.target_params, state.target_state, batch, True)[0],
    }
    updates = []
    for step in range(1, official.config['steps'] + 1):
        global_step = torch.tensor(official.config['first_step'] + step - 1)
        batch = official.batch(step, dtype, examples)
        state, logs = official.update_fn(state, global_step, None, batch)
        updates.append({'trees': _trees(state), 'logs': logs})
    return first, updates


def _replay_share(rank, name, dtypes):
    """What one device did: its examples in every batch."""
    examples = tensor(load(name)['inputs/device_of_example']) == rank
    return [_replay(name, dtype, examples) for dtype in dtypes]


def _assert_as_official(name, dtype, first, updates):
    data = load(name)
    expected = tree(data, 'step1/grads', dtype)
    assert_trees_close(first['grads'], expected, limit(BYOL_GRADIENTS, dtype), 'step1/grads')
    for network in ('online', 'target'):
        stored = below(data, f'step1/outputs/{network}')
        assert set(stored) <= set(first[network])  # Beside these our network returns the embedding.
        for key, value in stored.items():
            where = f'step1/outputs/{network}/{key}'
            assert_close(first[network][key], tensor(value), limit(OUTPUTS, dtype), where)

    for step, update in enumerate(updates, start=1):
        rtol = limit(BYOL_STATES, dtype, step)
        assert data[f'step{step}/global_step'] == data['config/first_step'] + step - 1
        logs = below(data, f'step{step}/logs')
        assert sorted(logs) == sorted(update['logs'])
        for key, value in logs.items():
            where = f'step{step}/logs/{key}'
            assert_close(update['logs'][key], tensor(value), limit(BYOL_LOGS, dtype, step), where)
        norms = data[f'step{step}/norms']
        assert_norms_close(update['trees'], data['norm_keys'], norms, rtol, f'step{step}')
        for group in set(update['trees']) & set(children(data, f'step{step}')):
            stored = tree(data, f'step{step}/{group}', dtype)
            assert_trees_close(update['trees'][group], stored, rtol, f'step{step}/{group}')


def _assert_evaluates_as_official(name, dtype, trees):
    official = _Official(name)
    stored = below(official.data, 'eval')
    batch = {'images': images(stored['images'], dtype), 'labels': tensor(stored['labels']).long()}
    scalars = byol_experiment.eval_batch(
        trees['online_params'],
        trees['online_state'],
        batch,
        forward=official.network,
        num_classes=official.config['classes'],
    )
    assert sorted([*scalars, *batch]) == sorted(stored)
    rtol = limit(BYOL_STATES, dtype, official.config['steps'])
    for key, value in scalars.items():
        assert_close(value, tensor(stored[key]), rtol, f'eval/{key}')


@pytest.mark.parametrize('name', FILES)
def test_initial_trees_have_the_official_names_and_shapes(name):
    official = _Official(name)
    params, state = official.network.init(torch.Generator().manual_seed(0))
    shapes = lambda leaves: {path: value.shape for path, value in flatten(leaves).items()}
    for network in ('online', 'target'):
        assert shapes(params) == shapes(tree(official.data, f'init/{network}_params'))
        assert shapes(state) == shapes(tree(official.data, f'init/{network}_state'))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('name', FILES)
def test_updates_in_one_process(name, dtype):
    first, updates = _replay(name, dtype)
    _assert_as_official(name, dtype, first, updates)
    _assert_evaluates_as_official(name, dtype, updates[-1]['trees'])


@pytest.mark.parametrize('name', SEVERAL_DEVICES)
def test_updates_in_one_process_per_device(name, tmp_path):
    devices = scalar(load(name)['config/devices'])
    results = run_in_processes(_replay_share, devices, tmp_path, name, DTYPES)
    # From [device][dtype] to [dtype][device].
    for dtype, replays in zip(DTYPES, zip(*results, strict=True), strict=True):
        firsts, updates = zip(*replays, strict=True)
        for other in updates[1:]:
            _assert_same(other, updates[0])
        first = dict(firsts[0])
        for network in ('online', 'target'):
            outputs = [of_device[network] for of_device in firsts]
            first[network] = {k: _global_batch(name, [o[k] for o in outputs]) for k in outputs[0]}
        _assert_as_official(name, dtype, first, updates[0])
        _assert_evaluates_as_official(name, dtype, updates[0][-1]['trees'])


def _global_batch(name, shares):
    """Per-device outputs in the order of the examples."""
    device_of_example = tensor(load(name)['inputs/device_of_example'])
    order = torch.cat([(device_of_example == i).nonzero() for i in range(len(shares))]).flatten()
    return torch.cat(shares)[order.argsort()]


def _assert_same(updates, others):
    """Replicas stay identical, bit for bit."""
    for step, (update, other) in enumerate(zip(updates, others, strict=True), start=1):
        actual, expected = flatten(update), flatten(other)
        assert actual.keys() == expected.keys()
        for path, value in expected.items():
            assert torch.equal(actual[path], value), f'step{step}: replicas differ in {path}'
