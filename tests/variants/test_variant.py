"""What every update rule must do: `python -m pytest tests/variants --variant=FILE` tests a file of your own.

A file of `configs/variants`, or another with `variant` and `get_config(base)`, is trained for seconds on images of
8 x 8 pixels.
"""

import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import optree
import pytest
import torch

from byol_func.errors import UserError
from byol_func.evaluation import health
from byol_func.modes import config_checks, inputs, running
from byol_func.runtime.compilation import compile_update
from byol_func.training import loop_config, replay, resuming
from byol_func.utils import checkpointing, dataset, variants
from byol_func.utils.checkpointing import leaf_names
from byol_func.workdir.run import Run
from byol_func.workdir.summaries import write_config
from configs import byol as byol_config
from golden_processes import run_in_processes
from variant_runs import arguments, data, load_config, make, share_in_float64

STEPS = 30  # Of the run.


class Subject(NamedTuple):
    """A variant, its experiment, and its first steps as they are written."""

    path: str
    config: Any
    experiment: Any
    states: list[Any]  # The initial one first.
    logs: list[dict[str, torch.Tensor]]


def _copy(tree):
    return optree.tree_map(torch.clone, tree)


def _steps(experiment, update, num_steps, state=None, first=0):
    state = _copy(experiment.init()) if state is None else state
    states, logs = [_copy(state)], []
    for step in range(first, first + num_steps):
        state, step_logs = update(state, *arguments(experiment, step))
        states.append(_copy(state))
        logs.append({name: value.clone() for name, value in step_logs.items()})
    return states, logs


@pytest.fixture(scope='module')
def subject(variant_file) -> Subject:
    config = load_config(variant_file)
    experiment = make(config)
    states, logs = _steps(experiment, experiment.update, 4)
    return Subject(str(variant_file), config, experiment, states, logs)


def _assert_same(actual, expected, **tolerance) -> None:
    assert optree.tree_structure(actual) == optree.tree_structure(expected)
    for name, x, y in zip(leaf_names(expected), optree.tree_leaves(actual), optree.tree_leaves(expected), strict=True):
        if tolerance:
            torch.testing.assert_close(x, y, **tolerance, msg=lambda text, name=name: f'{name}: {text}')
        else:
            assert torch.equal(x, y), name


def test_donated_and_traced_steps_are_the_step_as_it_is_written(subject):
    """To the last bit; on its first call a donating step checks the contract."""
    for how in (dict(compiled=False), dict(compiled=None, num_steps=200)):
        states, logs = _steps(subject.experiment, compile_update(subject.experiment.update, **how), 2)
        _assert_same(states, subject.states[:3])
        _assert_same(logs, subject.logs[:2])


@pytest.mark.slow
def test_a_compiled_step_is_the_step_as_it_is_written(subject):
    (_, state), _ = _steps(subject.experiment, compile_update(subject.experiment.update), 1)
    ours, theirs = _copy(state.online_params), _copy(subject.states[1].online_params)
    for params in (ours, theirs):
        for head in ('projector', 'predictor'):  # Adam makes whole steps of the rounding in gradients of 0.
            params.get(head, {}).get('linear', {}).pop('b', None)
    _assert_same(ours, theirs, rtol=1e-2, atol=1e-3)


def test_stopped_and_resumed_is_undisturbed(subject, tmp_path):
    path = checkpointing.save(tmp_path, subject.states[2], mode='pretrain', step=1, config={})
    state = checkpointing.restore(checkpointing.load(path), subject.experiment.init())
    states, _ = _steps(subject.experiment, subject.experiment.update, 2, state, first=2)
    _assert_same(states[-1], subject.states[4])


@pytest.fixture(scope='session')
def two_replicas(variant_files, tmp_path_factory):
    """What two processes find, for all variants at once: starting them is what takes time."""
    return run_in_processes(share_in_float64, 2, tmp_path_factory.mktemp('replicas'), [str(f) for f in variant_files])


def test_two_replicas_are_one(subject, two_replicas):
    leaves, logs = share_in_float64(-1, [subject.path])[subject.path]
    for replica in two_replicas:
        their_leaves, their_logs = replica[subject.path]
        assert their_leaves.keys() == leaves.keys()
        for name, x in their_leaves.items():
            torch.testing.assert_close(
                x, leaves[name], rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f'{name}: {text}'
            )
        assert their_logs['loss'] == pytest.approx(logs['loss'], rel=1e-9)


def test_two_seeds_at_once_are_one_after_the_other(subject):
    states = [subject.states[0], subject.states[2]]
    steps = [arguments(subject.experiment, step)[1:] for step in (1, 2)]
    stack = lambda trees: optree.tree_map(lambda *leaves: torch.stack(leaves), *trees)
    update, step = subject.experiment.update, torch.tensor(1)
    _, logs = torch.func.vmap(update, in_dims=(0, None, 0, 0))(stack(states), step, *stack(steps))
    for i, (state, given) in enumerate(zip(states, steps, strict=True)):
        _, alone = update(_copy(state), step, *given)
        _assert_same({name: value[i] for name, value in logs.items()}, alone, rtol=1e-4, atol=1e-5)


def test_labels_change_no_weight_of_the_encoder(subject):
    global_step, draws, batch = arguments(subject.experiment, 0)
    other = {**batch, 'labels': batch['labels'].flip(0)}
    state, _ = subject.experiment.update(_copy(subject.states[0]), global_step, draws, other)
    _assert_same(state.online_params['encoder'], subject.states[1].online_params['encoder'])
    assert not torch.equal(state.online_params['classifier']['w'], subject.states[1].online_params['classifier']['w'])


def test_panel_and_replay(subject):
    state = subject.states[3]
    step = arguments(subject.experiment, 3)
    panel = health.panel(subject.experiment, state, *step)
    assert {'projection_spread', 'effective_rank', 'param_norm/all', 'update_norm/all'} <= panel.keys()
    assert all(math.isfinite(value) for value in panel.values())
    found = replay.replay(subject.experiment, state, *step)
    assert found.first_operation is None and found.logs['loss'] == pytest.approx(float(subject.logs[3]['loss']))


@pytest.fixture(scope='module')
def trained(subject, tmp_path_factory):
    """A workdir after a pre-training of 30 steps by `--mode=pretrain`, and its run."""
    workdir = str(tmp_path_factory.mktemp('run') / 'run')
    config = subject.config.copy_and_resolve_references()
    config_checks.check_variant(config, byol_config.get_config())
    run = Run(config, workdir, torch.device('cpu'), None, 1000.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, 'load_train_and_test', lambda **kwargs: data())
        running.run_mode('pretrain', run)
        yield run


def test_many_steps_stay_finite(trained):
    """A loop whose numbers are not finite ends with an error."""
    summary = json.loads(pathlib.Path(trained.workdir, 'summary.json').read_text())
    assert summary['steps'] == STEPS and math.isfinite(summary['train/loss'])
    assert summary['variant'] == pathlib.Path(trained.config.variant).stem
    assert pathlib.Path(trained.workdir, 'variant.py').read_text() == variants.find(trained.config.variant).read_text()


def test_evaluations_and_export_need_the_encoder_alone(trained, tmp_path):
    for mode in ('eval', 'knn', 'linear_eval'):
        summary = running.run_mode(mode, trained)
        assert 0 <= summary['test/' + {'eval': 'online', 'knn': 'knn', 'linear_eval': 'linear'}[mode] + '_top1'] <= 1
    output = str(tmp_path / 'encoder.safetensors')
    running.run_mode('export', trained._replace(output=output, format='safetensors'))
    assert pathlib.Path(output).stat().st_size > 0


def test_a_workdir_of_another_rule_is_refused(trained):
    config = trained.config.copy_and_resolve_references()
    config.variant, config.variant_digest = '', ''
    with pytest.raises(UserError, match=r'config\.variant='):
        resuming.check_continues(loop_config.of_run(trained._replace(config=config), 'pretrain', False))
    config = trained.config.copy_and_resolve_references()
    config.variant_digest = re.sub(r':\w+', ':00000000', config.variant_digest, count=1)
    copy = pathlib.Path(trained.workdir, 'variant.py')
    undo = f'copy {copy} back over {trained.config.variant}, or choose another --workdir'
    with pytest.raises(UserError, match=f'from before an edit of .*{re.escape(undo)}'):
        resuming.check_continues(loop_config.of_run(trained._replace(config=config), 'pretrain', False))
    resuming.check_continues(loop_config.of_run(trained, 'pretrain', False))


def test_a_resumed_run_keeps_its_copy_of_the_rule(trained):
    copy = pathlib.Path(trained.workdir, 'variant.py')
    as_it_was = copy.read_text()
    copy.write_text(f'{as_it_was}# A comment of that day.\n')
    write_config(trained, 'pretrain')
    assert copy.read_text() != as_it_was
    copy.unlink()
    write_config(trained, 'pretrain')
    assert copy.read_text() == as_it_was


def test_every_option_is_a_checked_field(subject):
    def check(**options):
        config, reference = subject.config.copy_and_resolve_references(), byol_config.get_config()
        with config.variant_config.unlocked(), config.variant_config.ignore_type():
            config.variant_config.update(options)
        config_checks.check_variant(config, reference)
        config_checks.check_fields(config, reference)
        return config

    check()
    for name, default in subject.config.variant_config.items():
        wrong = object() if isinstance(default, str) else 'a word'
        with pytest.raises(UserError, match=rf'config\.variant_config\.{name}='):
            check(**{name: None if isinstance(default, str) else wrong})
        with pytest.raises(UserError, match=rf'did you mean config\.variant_config\.{name}\?'):
            check(**{f'{name}s': default})


def test_the_encoder_is_where_evaluations_look(subject):
    experiment, run = subject.experiment, Run(subject.config, '', torch.device('cpu'), None, 0.0)
    params, _ = inputs.make_backbone(run.config, data()[0]).init(torch.Generator())
    own = inputs.encoder_part(experiment.init().online_params)
    assert optree.tree_structure(own) == optree.tree_structure(params)
