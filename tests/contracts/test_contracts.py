"""What compiling and donation promise: the same numbers, the same memory, one compilation."""

from collections.abc import Callable
from typing import NamedTuple

import optree
import pytest
import torch

from byol_func import byol_experiment, main_loop
from byol_func.errors import UserError
from byol_func.experiment import Experiment
from byol_func.runtime.compilation import compile_update
from byol_func.utils import dataset, networks
from byol_func.utils.checkpointing import leaf_names
from configs import digits
from runs import loop_settings, records

STEPS = 3
# Compiled code orders its sums in its own way. The gradient of a bias in front of a batch norm is 0
# but for rounding, hence the absolute tolerance.
TOLERANCE = dict(rtol=5e-4, atol=5e-5)


class Run(NamedTuple):
    """States and logs of the first steps, the initial state first, and every state's addresses."""

    states: list
    logs: list
    addresses: list[list[int]]


def _smallest_encoder(encoder_class, encoder_config, bn_config, in_channels, norm):
    """A stem without blocks: a network that is compiled in seconds."""
    return networks.ResNetTorso((0, 0, 0, 0), in_channels, bn_config, width_multiplier=1 / 16, stem='cifar')


@pytest.fixture(scope='module')
def experiment() -> byol_experiment.Experiment:
    """BYOL with everything a step can have: all augmentations, batch norm, LARS, warm-up."""
    config = digits.get_config()
    config.batch_size = 6
    config.base_target_ema = 0.97
    config.optimizer = 'lars'  # Adam would make whole steps of the rounding in gradients of 0.
    config.lr_schedule.base_learning_rate = 2.0
    config.lr_schedule.warmup_epochs = 1.0
    config.augmentations.view2.solarize.apply_prob = 0.5
    config.network.projector_hidden_size = 5
    config.network.projector_output_size = 4
    config.network.predictor_hidden_size = 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, 'make_encoder', _smallest_encoder)
        return byol_experiment.make(config, num_examples=24, num_classes=10, image_shape=(1, 8, 8))


@pytest.fixture(scope='module')
def data() -> dataset.Dataset:
    """24 images of noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (24, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return dataset.Dataset(images, torch.arange(24) % 10, tuple('0123456789'))


def _arguments(experiment, data, step: int):
    batch = dataset.train_batch(data, step, seed=0, batch_size=experiment.batch_size)
    return torch.tensor(step), experiment.sample(step), batch


def _copy(tree):
    return optree.tree_map(torch.clone, tree)


def _run(experiment, data, update: Callable) -> Run:
    state = _copy(experiment.init())
    states, logs, addresses = [_copy(state)], [], [_addresses(state)]
    for step in range(STEPS):
        state, step_logs = update(state, *_arguments(experiment, data, step))
        states.append(_copy(state))
        logs.append({name: float(value) for name, value in step_logs.items()})
        addresses.append(_addresses(state))
    return Run(states, logs, addresses)


def _addresses(tree) -> list[int]:
    return [leaf.data_ptr() for leaf in optree.tree_leaves(tree)]


@pytest.fixture(scope='module')
def eager(experiment, data) -> Run:
    """The update as it is written."""
    return _run(experiment, data, compile_update(experiment.update, compiled=False, donate=False))


@pytest.fixture(scope='module')
def donated(experiment, data) -> Run:
    """The update with its result in the old memory."""
    return _run(experiment, data, compile_update(experiment.update, compiled=False))


@pytest.fixture(scope='module')
def traced(experiment, data) -> Run:
    """The operations of the update one by one, donated."""
    return _run(experiment, data, compile_update(experiment.update, compiled=None, num_steps=200))


@pytest.fixture(scope='module', params=['aot_eager', 'inductor'])
def compiled(experiment, data, request) -> Run:
    """The update in one graph, donated; any compilation after the first is an error."""
    update = compile_update(experiment.update, backend=request.param)
    with torch._dynamo.config.patch(error_on_recompile=True):
        return _run(experiment, data, update)


def _assert_equal(actual, expected, exactly: bool) -> None:
    assert optree.tree_structure(actual) == optree.tree_structure(expected)
    for name, x, y in zip(leaf_names(expected), optree.tree_leaves(actual), optree.tree_leaves(expected), strict=False):
        assert x.dtype == y.dtype, name
        if exactly:
            assert torch.equal(x, y), name
        else:
            torch.testing.assert_close(x, y, **TOLERANCE, msg=lambda text, name=name: f'{name}: {text}')


def test_update_leaves_its_inputs_alone(experiment, data):
    state = experiment.init()
    arguments = _arguments(experiment, data, 1)
    before = _copy((state, arguments))
    new_state, _ = experiment.update(state, *arguments)
    _assert_equal((state, arguments), before, exactly=True)
    old = set(_addresses(state))
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves(new_state))
    assert not old & {leaf.data_ptr() for leaf in optree.tree_leaves(new_state)}


def test_update_is_a_function_of_its_arguments(experiment, data, eager):
    """The same state and step give the same numbers, in any order of the steps."""
    for step in (2, 0, 1):
        state, _ = experiment.update(eager.states[step], *_arguments(experiment, data, step))
        _assert_equal(state, eager.states[step + 1], exactly=True)


def test_randomness_is_a_function_of_seed_step_and_view(experiment):
    """Draws of another step or view are other draws, those of the same step the same."""

    def crops(step, view):  # Drawn from the same presets in both views.
        return experiment.sample(step)[view].crop

    draws = [crops(step, view) for step in (0, 1, 7) for view in ('view1', 'view2')]
    for i, first in enumerate(draws):
        assert not any(torch.equal(first, second) for second in draws[:i])
    assert torch.equal(crops(1, 'view2'), draws[3])


def test_online_and_target_start_apart(experiment):
    state = experiment.init()
    weights = [params['encoder']['initial_conv']['w'] for params in (state.online_params, state.target_params)]
    assert not torch.equal(*weights)
    _assert_equal(experiment.init(), state, exactly=True)


def test_donated_is_eager(eager, donated):
    _assert_equal(donated.states, eager.states, exactly=True)
    assert donated.logs == eager.logs


def test_traced_is_eager_to_the_last_bit(eager, traced):
    _assert_equal(traced.states, eager.states, exactly=True)
    assert traced.logs == eager.logs


def test_compiled_is_eager(eager, compiled):
    for actual, expected in zip(compiled.states, eager.states, strict=True):
        _assert_equal(actual, expected, exactly=False)
    for actual, expected in zip(compiled.logs, eager.logs, strict=True):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_donation_keeps_every_address(eager, donated, traced, compiled):
    for run in (donated, traced, compiled):
        assert all(addresses == run.addresses[0] for addresses in run.addresses)
        assert len(set(run.addresses[0])) == len(run.addresses[0])
    assert eager.addresses[0] != eager.addresses[1]


def test_every_step_has_its_own_rate_and_tau(compiled):
    """What was compiled at step 0 has not frozen the schedules: warm-up over 4 steps, cosine of tau."""
    rates = [logs['learning_rate'] for logs in compiled.logs]
    assert rates == pytest.approx([i / 4 * 2.0 * 6 / 256 for i in range(STEPS)])
    taus = [logs['tau'] for logs in compiled.logs]
    assert taus[0] == pytest.approx(0.97) and taus == sorted(set(taus))


def test_every_step_changes_the_state(eager):
    for before, after in zip(eager.states[1:], eager.states[2:], strict=False):
        for name, x, y in zip(leaf_names(before), optree.tree_leaves(before), optree.tree_leaves(after), strict=False):
            assert not torch.equal(x, y), name


def test_a_probe_sees_the_state_of_its_step_and_leaves_a_line(tmp_path):
    """Every second step and after the last; its scalars stand in metrics.jsonl and touch nothing else."""
    config = digits.get_config()
    config.num_epochs, config.batch_size, config.lr_schedule.warmup_epochs = 1, 256, 0.0
    config.network.encoder_class = 'TinyResNet'
    data, _ = dataset.load_train_and_test(**config.dataset)
    experiment = byol_experiment.make(
        config, num_examples=data.num_examples, num_classes=10, image_shape=data.images.shape[1:]
    )
    seen = []

    def measure(state, step, draws, inputs):
        seen.append(step)
        return {'test/weight': float(state.online_params['classifier']['w'].sum())}

    def run(name, probes):
        result = main_loop.train_loop(experiment, data, loop_settings(tmp_path / name), probes)
        return result, records(tmp_path / name)

    with_probe, lines = run('with', [main_loop.Probe(2, measure)])
    without, plain_lines = run('without', [])
    assert seen == [*range(1, experiment.max_steps - 1, 2), experiment.max_steps - 1]
    found = [line for line in lines if 'test/weight' in line]
    assert [line['step'] for line in found] == seen and found[-1]['epoch'] == 5 * 256 / data.num_examples
    assert found[-1]['test/weight'] == float(with_probe.state.online_params['classifier']['w'].sum())
    timed = ('images_per_second',)
    rest = [{k: v for k, v in line.items() if k not in timed} for line in lines if line not in found]
    assert rest == [{k: v for k, v in line.items() if k not in timed} for line in plain_lines]
    assert with_probe.logs == without.logs


def test_a_probe_sees_no_step_whose_loss_is_not_finite(data, tmp_path):
    """Before it runs all losses are looked at, also between two logged steps."""

    def update(state, step, draws, inputs):
        loss = torch.where(step == 3, torch.nan, step.double())
        return {'w': state['w'] + 1}, {'loss': loss}

    experiment = Experiment(
        init=lambda: {'w': torch.zeros(2)},
        sample=lambda step: {},
        update=update,
        evaluate=None,
        predict=None,
        batch_size=4,
        max_steps=8,
    )
    seen = []

    def measure(state, step, draws, inputs):
        seen.append(step)
        return {}

    with pytest.raises(UserError, match='step 3: loss=nan'):
        main_loop.train_loop(
            experiment, data, loop_settings(tmp_path, log_every_steps=1000), [main_loop.Probe(2, measure)]
        )
    assert seen == [1]
