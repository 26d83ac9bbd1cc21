"""Linear evaluation and fine-tuning against the official experiment, every step.

With several devices the official fine-tuning averages gradients and nothing else: every device
normalises with its own share of the batch and keeps running statistics of its own.
"""

import functools

import pytest
import torch

from byol_func import eval_experiment
from byol_func.utils import optimizers, schedules
from golden_io import (
    DTYPES,
    EVAL_FIRST,
    EVAL_LATER,
    as_classifier,
    assert_close,
    assert_norms_close,
    assert_trees_close,
    below,
    children,
    flatten,
    images,
    in_experiment,
    limit,
    load,
    numbered,
    scalar,
    tensor,
    tree,
)
from golden_networks import DECAY_RATE, EPS, encoder_class, is_resnet_v2
from golden_processes import run_in_processes

ONE_DEVICE, SEVERAL_DEVICES = 'eval_update.npz', 'eval_update_2dev.npz'
MOMENTUM = 0.9  # Nesterov's, of both modes


def _rename(key):
    """Names in any tree: the classifier's are `linear/w` and `linear/b`."""
    return as_classifier(key) if key.startswith('linear/') else in_experiment(key)


class _Official:
    """The experiment of one mode of one file, bound to its config."""

    def __init__(self, name, mode):
        self.data = below(load(name), mode)
        self.freeze = {'frozen': True, 'finetune': False}[mode]
        self.steps = len(self.data['inputs/labels'])
        config = {key: scalar(value) for key, value in below(self.data, 'config').items()}
        keys = below(self.data, 'init/backbone_params')
        self.modules = dict(
            backbone=eval_experiment.make_backbone(
                encoder_class=encoder_class(keys),
                encoder_config=dict(resnet_v2=is_resnet_v2(keys)),
                bn_config=dict(decay_rate=DECAY_RATE, eps=EPS, cross_replica=False),
            ),
            num_classes=config['num_classes'],
        )
        in_size = self.modules['backbone'].output_size
        self.modules['classifier'] = eval_experiment.make_classifier(in_size, config['num_classes'])
        self.update_fn = functools.partial(
            eval_experiment.update_fn,
            loss_fn=functools.partial(eval_experiment.loss_fn, **self.modules, freeze_backbone=self.freeze),
            postprocess=lambda inputs, draws: inputs,
            optimizer=self.optimizer,
            learning_schedule=functools.partial(
                schedules.learning_schedule,
                batch_size=config['batch_size'],
                base_learning_rate=config['base_learning_rate'],
                total_steps=config['max_steps'],
                warmup_steps=config['warmup_steps'],
            ),
            freeze_backbone=self.freeze,
        )

    @staticmethod
    def optimizer(learning_rate):
        return optimizers.sgd(learning_rate, momentum=MOMENTUM, nesterov=True)

    def tree(self, prefix, dtype):
        return tree(self.data, prefix, dtype, _rename)

    def initial_state(self, dtype):
        stored = lambda name: self.tree(f'init/{name}', dtype)
        is_trace = lambda s: isinstance(s, optimizers.TraceState)

        def opt_state(params, momentum):
            fresh = self.optimizer(0.0).init(params)
            return tuple(optimizers.TraceState(trace=momentum) if is_trace(s) else s for s in fresh)

        backbone, classifier = stored('backbone_params'), stored('classif_params')
        return eval_experiment.EvalState(
            backbone_params=backbone,
            classif_params=classifier,
            backbone_state=stored('backbone_state'),
            backbone_opt_state=(None if self.freeze else opt_state(backbone, stored('backbone_momentum'))),
            classif_opt_state=opt_state(classifier, stored('classif_momentum')),
        )

    def batch(self, prefix, dtype, step=None):
        """The images and labels under a prefix, of the step-th update from 1."""
        index = ... if step is None else step - 1
        pictures = images(self.data[f'{prefix}/images'][index], dtype)
        return {'images': pictures, 'labels': tensor(self.data[f'{prefix}/labels'][index]).long()}


def _trees(state):
    trees = {
        'backbone_params': state.backbone_params,
        'backbone_state': state.backbone_state,
        'classif_params': state.classif_params,
    }
    for part in ('backbone', 'classif'):
        for s in getattr(state, f'{part}_opt_state') or ():
            if isinstance(s, optimizers.TraceState):
                trees[f'{part}_momentum'] = s.trace
    return trees


def _replay(name, mode, dtype, device=0, num_devices=1):
    """All updates on one device's share of every batch; the trees and the loss after each."""
    official = _Official(name, mode)
    state = official.initial_state(dtype)
    updates = []
    for step in range(1, official.steps + 1):
        batch = official.batch('inputs', dtype, step)
        share = {key: value.chunk(num_devices)[device] for key, value in batch.items()}
        global_step = torch.tensor(int(official.data[f'step{step}/global_step']))
        state, logs = official.update_fn(state, global_step, None, share)
        updates.append({'trees': _trees(state), 'loss': logs['train_loss']})
    return updates, state


def _replay_share(rank, name, mode, num_devices, dtypes):
    return [_replay(name, mode, dtype, rank, num_devices) for dtype in dtypes]


def _limit(mode, step, dtype):
    if mode == 'frozen':  # A linear model: nothing amplifies the rounding.
        return limit(EVAL_FIRST, dtype)
    return limit(EVAL_FIRST if step == 1 else EVAL_LATER, dtype, step)


def _assert_as_official(name, mode, dtype, updates, final_state):
    official = _Official(name, mode)
    data = official.data
    initial = _trees(official.initial_state(dtype))
    steps = [int(data[f'step{step}/global_step']) for step in range(1, len(updates) + 1)]
    assert steps == list(range(steps[0], steps[0] + len(updates))), f'{mode}: steps {steps} are not in sequence'
    for step, update in enumerate(updates, start=1):
        where, trees, rtol = f'step{step}', update['trees'], _limit(mode, step, dtype)
        stored = tensor(data[f'{where}/train_loss'])
        assert_close(update['loss'], stored, rtol, f'{mode}/{where}/train_loss')
        if official.freeze:
            for group in ('backbone_params', 'backbone_state'):
                assert_trees_close(trees[group], initial[group], 0, f'{mode}/{where}: {group}')
            assert 'backbone_momentum' not in trees
        else:
            norms, keys = data[f'{where}/norms'], data['norm_keys']
            assert_norms_close(trees, keys, norms, rtol, f'{mode}/{where}', _rename)
        groups = set(trees) & set(children(data, where))
        assert {'classif_params', 'classif_momentum'} <= groups
        for group in groups:
            expected = official.tree(f'{where}/{group}', dtype)
            assert_trees_close(trees[group], expected, rtol, f'{mode}/{where}/{group}')

    scalars = eval_experiment.eval_batch(final_state, official.batch('eval', dtype), **official.modules)
    stored = {k: v for k, v in below(data, 'eval').items() if k not in ('images', 'labels')}
    assert sorted(scalars) == sorted(stored)
    for key, value in scalars.items():
        rtol = _limit(mode, len(updates), dtype)
        assert_close(value, tensor(stored[key]), rtol, f'{mode}/eval/{key}')


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('mode', children(load(ONE_DEVICE)))
def test_updates_on_one_device(mode, dtype):
    updates, state = _replay(ONE_DEVICE, mode, dtype)
    _assert_as_official(ONE_DEVICE, mode, dtype, updates, state)


@pytest.mark.parametrize('mode', children(load(SEVERAL_DEVICES)))
def test_updates_in_one_process_per_device(mode, tmp_path):
    # Nothing but the states of the other devices says how many there were.
    others = numbered(load(SEVERAL_DEVICES), f'{mode}/step1', 'device')
    num_devices = 1 + max(others)
    results = run_in_processes(_replay_share, num_devices, tmp_path, SEVERAL_DEVICES, mode, num_devices, DTYPES)
    official = _Official(SEVERAL_DEVICES, mode)
    # From [device][dtype] to [dtype][device].
    for dtype, replays in zip(DTYPES, zip(*results, strict=True), strict=True):
        updates, states = zip(*replays, strict=True)
        _assert_as_official(SEVERAL_DEVICES, mode, dtype, updates[0], states[0])
        for device in others:
            for step, (update, first) in enumerate(zip(updates[device], updates[0], strict=True), start=1):
                key = f'step{step}/device{device}/backbone_state'
                actual, expected = update['trees'].pop('backbone_state'), official.tree(key, dtype)
                assert_trees_close(actual, expected, _limit(mode, step, dtype), f'{mode}/{key}')
                # All but the running statistics stays identical, bit for bit.
                everything_else = flatten(update)
                for path, value in flatten(first).items():
                    if 'backbone_state' not in path:
                        same = torch.equal(everything_else.pop(path), value)
                        assert same, f'{mode}/step{step}: device {device} differs in {path}'
                assert not everything_else
