"""Mistakes in a config file of the user: one line each, with the line of the file where it helps."""

import pytest

from cli import assert_refused, run_launch

_OWN_CONFIGS = {
    'unknown field': ('config.nope = 1', 'config.nope: unknown field', 'configs/byol.py'),
    'unknown nested field': (
        'config.network.nope = 1',
        'config.network.nope: unknown field',
        'configs/byol.py explains every field',
    ),
    'misspelt field': ('config.optimiser = "sgd"', 'config.optimiser: unknown field; did you mean config.optimizer?'),
    'missing field': ('del config.dataset', 'config.dataset: missing'),
    'missing nested field': ('del config.network.bn_config.eps', 'config.network.bn_config.eps: missing'),
    'another type': ('config.batch_size = "big"', 'line 6', 'batch_size', 'big', 'int'),
    'another type behind its back': (
        'config.update_from_flattened_dict({"x": 1})\n    del config.x\n    del config.batch_size\n'
        '    config.batch_size = "big"',
        "config.batch_size='big': expected an int",
    ),
    'fields for a number': (
        'del config.batch_size\n    config.batch_size = ml_collections.ConfigDict()',
        'config.batch_size=',
        'expected an int',
    ),
    'a number for fields': (
        'del config.network\n    config.network = 3',
        'config.network=3',
        'expected a ConfigDict',
    ),
    'unknown name': ('config.dataset.name = "mnist"', "config.dataset.name='mnist'", 'digits, cifar10'),
    'preset': ('byol.get_config("77")', "PRESET='77'", '40, 100, 300, 1000'),
    'exception': ('config.batch_size //= 0', 'line 6', 'ZeroDivisionError'),
    'syntax': ('config = (', 'own.py', 'line 6', 'never closed'),
    'import': ('import no_such_module', 'line 6', 'ModuleNotFoundError', 'no_such_module'),
    'nothing returned': ('return', 'get_config() returned a NoneType', 'expected a ConfigDict'),
    'a dict returned': ('return {}', 'get_config() returned a dict', 'expected a ConfigDict'),
}


@pytest.mark.parametrize(
    'body, fragments', [pytest.param(body, fragments, id=name) for name, (body, *fragments) in _OWN_CONFIGS.items()]
)
def test_own_config(body, fragments, tmp_path):
    (tmp_path / 'own.py').write_text(
        f'import ml_collections\nfrom configs import byol\n\n\n'
        f'def get_config(config=byol.get_config()):\n    {body}\n    return config\n'
    )
    assert_refused(run_launch('--config=own.py', cwd=tmp_path), *fragments)


def test_config_without_get_config(tmp_path):
    (tmp_path / 'own.py').write_text('batch_size = 3\n')
    assert_refused(run_launch('--config=own.py', cwd=tmp_path), '--config=own.py', 'get_config')
