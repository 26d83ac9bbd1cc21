"""Random overrides of random fields: a run, or one line that names what is wrong; never a traceback."""

import functools

import ml_collections
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byol_func import byol_experiment, eval_experiment
from byol_func.errors import UserError
from byol_func.modes import config_checks
from byol_func.modes.inputs import facts, make_backbone, make_byol
from byol_func.runtime import precision
from byol_func.training import loop_config
from byol_func.utils import dataset
from byol_func.workdir.run import Run
from cli import TINY_NETWORK
from configs import byol, digits


def _config() -> ml_collections.ConfigDict:
    config = digits.get_config()
    for field, value in TINY_NETWORK.items():
        config.update_from_flattened_dict({field.replace('__', '.'): value})
    config.batch_size = 32
    config.linear_eval.batch_size = config.fine_tune.batch_size = 32
    return config


@functools.cache
def _digits() -> dataset.Dataset:
    return dataset.load_train_and_test(**digits.get_config().dataset)[0]


def _fields(config, prefix=''):
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _fields(value, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}', (config.get_type(name), value)


# What does not say how the first step goes is checked by running for longer, in other tests.
_FIELDS = {name: value for name, value in _fields(_config()) if not name.startswith('dataset.')}
_NUMBERS = st.sampled_from([-1.0, 0.0, 1e-8, 0.3, 0.5, 1.0, 1.5, 7.0, 1e30, float('inf'), float('nan')])
_OF_TYPE = {
    bool: st.booleans(),
    int: st.sampled_from([-7, -1, 0, 1, 2, 3, 5, 8, 33]),
    float: _NUMBERS,
    str: st.sampled_from(['', 'none', 'cosine', 'sgd', 'ResNet10', 'lars', 'cifar', 'float32', 'x y', 'é']),
}


@st.composite
def _overrides(draw):
    names = draw(st.lists(st.sampled_from(sorted(_FIELDS)), min_size=1, max_size=3, unique=True))
    values = {}
    for name in names:
        kind, value = _FIELDS[name]  # The value of a placeholder is None, whatever its type.
        values[name] = draw(_OF_TYPE.get(kind, st.just(value)))
    return values


@settings(deadline=None, derandomize=True, max_examples=25)
@given(overrides=_overrides())
def test_a_step_or_one_line(overrides):
    config = _config()
    config.update_from_flattened_dict(overrides)
    train = _digits()
    try:
        config_checks.check_fields(config, byol.get_config())
        config_checks.check_values(config)
        device = torch.device('cpu')
        if config.precision == 'auto':
            config.precision = precision.fastest(device)
        run = Run(config=config, workdir='', device=device, checkpoint=None, log_every_seconds=1.0)
        experiment = make_byol(run.config, train)
        inputs = dataset.train_batch(train, 0, seed=config.random_seed, batch_size=experiment.batch_size)
        step = torch.zeros((), dtype=torch.int64)
        state, logs = experiment.update(experiment.init(), step, experiment.sample(0), inputs)
        assert isinstance(state, byol_experiment.ByolState) and 'loss' in logs
        assert isinstance(loop_config.of_run(run, 'pretrain', compiled=False).keep, int)
        encoder = make_backbone(run.config, train).init(torch.Generator())
        for mode in ('linear_eval', 'fine_tune'):
            eval_experiment.make(config, mode, *encoder, **facts(train))
    except UserError as error:
        # A path may contain anything; everything else is one line.
        assert '\n' not in str(error) and len(str(error)) < 600
