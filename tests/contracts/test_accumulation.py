"""`config.accumulate_steps`: micro-batches in place of the whole batch, for every update rule."""

import optree
import pytest
import torch
from safetensors.torch import load_file

from byol_func.errors import UserError
from byol_func.experiment import step_arguments, update_and_gradients
from byol_func.modes import config_checks
from byol_func.runtime import costs
from byol_func.runtime.compilation import compile_update
from byol_func.training import replay, resuming
from byol_func.utils import dataset
from byol_func.utils.checkpointing import leaf_names
from cli import ROOT, assert_refused, run_launch, succeed, tiny_digits
from configs import byol as byol_config
from golden_processes import run_in_processes
from runs import records, without_rates
from variant_runs import arguments, data, load_config, make, share_in_float64

VARIANTS = ROOT / 'configs/variants'
PLAIN = str(VARIANTS / 'group_norm.py')  # Its update rule is BYOL's own, and its norm a field of the config.
BATCH_NORM = {'network.norm': 'batch_norm', 'network.head_norm': 'batch_norm'}


def _assert_close(actual, expected) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f'{name}: {text}'
        )


@pytest.mark.parametrize('norm', ['none', 'group_norm', 'layer_norm'])
def test_without_batch_statistics_the_step_is_that_of_the_whole_batch(norm):
    """Two steps in float64, parameters, momentum and target network."""
    fields = {'network.norm': norm, 'network.head_norm': norm}
    whole, logs = share_in_float64(-1, [PLAIN], fields)[PLAIN]
    parts, part_logs = share_in_float64(-1, [PLAIN], {**fields, 'accumulate_steps': 4})[PLAIN]
    _assert_close(parts, whole)
    assert part_logs == pytest.approx(logs, rel=1e-9)


def test_batch_statistics_are_those_of_a_micro_batch():
    """The gradient is the mean of those of the micro-batches, and the moving averages take a step with each of them."""
    one, two = (make(load_config(PLAIN, **BATCH_NORM, accumulate_steps=k)) for k in (1, 2))
    state, (global_step, draws, batch) = one.init(), arguments(one, 0)
    new_state, _, (gradient,) = update_and_gradients(two, state, global_step, draws, batch)
    gradients, online_state, target_state = [], state.online_state, state.target_state
    for i in range(2):
        part = optree.tree_map(lambda x, i=i: x[i::2], (draws, batch))
        of_part = state._replace(online_state=online_state, target_state=target_state)
        after, _, (found,) = update_and_gradients(one, of_part, global_step, *part)
        gradients.append(found)
        online_state, target_state = after.online_state, after.target_state
    mean = optree.tree_map(lambda *xs: sum(xs) / 2, *gradients)
    optree.tree_map(torch.testing.assert_close, gradient, mean)
    optree.tree_map(torch.testing.assert_close, new_state.online_state, online_state)
    optree.tree_map(torch.testing.assert_close, new_state.target_state, target_state)
    found = replay.replay(two, state, global_step, draws, batch)
    assert found.first_operation is None and not any(found.not_finite.values())


def test_two_replicas_are_one(tmp_path):
    fields = {**BATCH_NORM, 'accumulate_steps': 2}
    one, logs = share_in_float64(-1, [PLAIN], fields)[PLAIN]
    for replica in run_in_processes(share_in_float64, 2, tmp_path, [PLAIN], fields):
        leaves, their_logs = replica[PLAIN]
        for name, value in one.items():
            torch.testing.assert_close(leaves[name], value, rtol=1e-6, atol=1e-8)
        assert their_logs['loss'] == pytest.approx(logs['loss'], rel=1e-9)


def test_a_traced_step_is_the_step_as_it_is_written():
    experiment = make(load_config(PLAIN, **BATCH_NORM, accumulate_steps=2))
    step = arguments(experiment, 0)
    plain, _ = experiment.update(experiment.init(), *step)
    traced, _ = compile_update(experiment.update, compiled=None, num_steps=200)(experiment.init(), *step)
    for name, x, y in zip(leaf_names(plain), optree.tree_leaves(traced), optree.tree_leaves(plain), strict=True):
        assert torch.equal(x, y), name


def test_memory_falls_with_the_number_of_micro_batches():
    config = load_config(PLAIN, **BATCH_NORM, batch_size=32)
    peaks = {}
    for k in (1, 4):
        config.accumulate_steps = k
        experiment = make(config)
        peaks[k] = costs.peak_bytes(experiment.update, *step_arguments(experiment, data()[0].image_shape))
    assert peaks[4] < 0.6 * peaks[1]


def test_one_is_what_was():
    assert make(load_config(PLAIN)).parts.grad is torch.func.grad
    config = byol_config.get_config().to_dict()
    before = {name: value for name, value in config.items() if name != 'accumulate_steps'}
    assert resuming.differences(before, config, []) == {}
    assert resuming.differences(before, config | {'accumulate_steps': 2}, []) == {'accumulate_steps': (1, 2)}


def test_update_rules_accumulate_or_are_refused(tmp_path):
    for path in sorted(VARIANTS.glob('*.py')):
        if path.stem == '__init__':
            continue
        config = load_config(path, accumulate_steps=2)
        if path.stem == 'accumulation':
            with pytest.raises(UserError, match=r'replaces `grad`; expected config\.accumulate_steps=1'):
                make(config)
            continue
        experiment = make(config)
        state, logs = experiment.update(experiment.init(), *arguments(experiment, 0))
        assert optree.tree_structure(state) == optree.tree_structure(experiment.init()), path.stem
        assert logs['loss'].isfinite(), path.stem
    own = tmp_path / 'own.py'
    own.write_text(
        'from configs.variants import group_norm\n'
        'def variant(parts):\n'
        '    return parts._replace(update_fn=lambda state, step, draws, inputs, *, loss_fn: (state, {}))\n'
        'get_config = group_norm.get_config\n'
    )
    config = load_config(own, accumulate_steps=2)
    config.variant = str(own)
    with pytest.raises(UserError, match='update_fn that does not ask for `grad`'):
        make(config)


def test_batches_that_do_not_divide_are_refused(tmp_path):
    dataset.check_batch_size('config.batch_size', 24, 100, 2, 3)
    with pytest.raises(
        UserError, match='^config.batch_size=20: expected a multiple of 8, the number of replicas times config'
    ):
        dataset.check_batch_size('config.batch_size', 20, 100, 2, 4)
    config = byol_config.get_config()
    config.accumulate_steps = 0
    with pytest.raises(UserError, match=r'^config\.accumulate_steps=0: expected at least 1'):
        config_checks.check_values(config)
    outcome = run_launch(*tiny_digits(accumulate_steps=3), cwd=tmp_path)
    assert_refused(outcome, 'config.batch_size=128: expected a multiple of 3, config.accumulate_steps=3')


def test_a_run_is_resumed_and_watched(tmp_path):
    """With a health panel on images that the number of micro-batches does not divide."""
    fields = dict(accumulate_steps=3, batch_size=96, monitoring__health_every_steps=2, monitoring__health_images=50)
    run = [*tiny_digits(**fields, checkpointing__save_every_steps=5), '--workdir=run']
    succeed(*run, cwd=tmp_path)
    lines = without_rates(records(tmp_path / 'run', 'pretrain'))
    assert any('health/grad_norm/all' in line for line in lines)
    *_, middle, last = sorted((tmp_path / 'run/checkpoints').glob('pretrain_*'))
    expected = load_file(last)
    last.unlink()
    succeed(*run, '--resume=must', cwd=tmp_path)
    actual = load_file(last)
    assert middle.exists() and all(torch.equal(actual[name], value) for name, value in expected.items())
    assert without_rates(records(tmp_path / 'run', 'pretrain')) == lines
    outcome = run_launch(*run, '--config.accumulate_steps=1', cwd=tmp_path)
    assert 'holds a run with config.accumulate_steps=3, not 1' in outcome.stderr
