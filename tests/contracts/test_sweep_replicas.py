"""Sweeps on two real processes, in memory and streamed: the choice is one, whoever makes it."""

import pathlib

import numpy as np
import pytest
import torch
from PIL import Image

from byol_func.errors import UserError
from byol_func.modes import inputs, on_top, sweeps
from byol_func.runtime import collectives
from byol_func.training import loop_config
from byol_func.workdir.run import Run
from cli import TINY_NETWORK
from configs import folder
from golden_processes import run_in_processes

pytestmark = pytest.mark.slow

RATES = (1e-4, 0.5, 1.0)


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> pathlib.Path:
    """Two noisy colours, 24 training images of 8 x 8 pixels each."""
    path = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, count in (('train', 24), ('test', 2)):
        for label, name in enumerate('ab'):
            for i in range(count):
                pixels = rng.integers(0, 200, (8, 8, 3), np.uint8)
                pixels[..., label] += 25
                (path / split / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path / split / name / f'{i:02}.png')
    return path


def _run(root: pathlib.Path, workdir: pathlib.Path, max_gib: float, **overrides) -> Run:
    config = folder.get_config()
    for field, value in {
        **TINY_NETWORK,
        'dataset__root': str(root),
        'dataset__source_size': 8,
        'dataset__max_gib': max_gib,
        'dataset__num_workers': 0,
        'dataset__val_fraction': 0.25,
        'image_size': 8,
        'batch_size': 16,
        'compile': False,
        **overrides,
    }.items():
        config.update_from_flattened_dict({field.replace('__', '.'): value})
    config.precision = 'float32'
    return Run(config, str(workdir), torch.device('cpu'), None, 10.0)


def _protocol(mode: str, **fields) -> dict:
    protocol = (
        dict(batch_size=12, num_epochs=3, cache_features=False, compare_untrained=False, sweep__learning_rates=RATES)
        | fields
    )
    return {f'{mode}__{field}': value for field, value in protocol.items()}


def _choose(rank: int, mode: str, root, workdir, max_gib: float, overrides: dict):
    """What a sweep finds on this replica."""
    run = _run(root, workdir, max_gib, **overrides)
    train, _ = inputs.load_labelled_data(run)
    encoder = on_top.untrained_encoder(run, train)
    return sweeps.choose(run.config, mode, train, *encoder, loop_config.of_run(run, mode, compiled=False)).found


def _on_two(tmp_path, *args) -> dict:
    (tmp_path / 'group').mkdir(parents=True)
    first, second = run_in_processes(_choose, 2, tmp_path / 'group', *args)
    assert first == second
    return first


def _close(found: dict, expected: dict) -> None:
    """The same choice from the same scores, but for an image or so where rounding decides."""
    assert found['learning_rate'] == expected['learning_rate']
    for one, other in zip(found['sweep'], expected['sweep'], strict=True):
        assert one['held_out_top1'] == pytest.approx(other['held_out_top1'], abs=0.1)


def test_linear_evaluation_in_memory_streamed_and_on_two_replicas(root, tmp_path):
    overrides = _protocol('linear_eval')
    in_memory, streamed = (
        _choose(0, 'linear_eval', root, tmp_path / name, max_gib, overrides)
        for name, max_gib in (('memory', 1.0), ('stream', 0.0))
    )
    assert streamed == in_memory and len(in_memory['sweep']) == len(RATES)
    for max_gib in (1.0, 0.0):
        at = tmp_path / f'two_{max_gib}'
        _close(_on_two(at, 'linear_eval', root, at / 'run', max_gib, overrides), in_memory)


def test_fine_tuning_on_two_replicas_chooses_once(root, tmp_path):
    """Each normalises with its own half of the batch, and a rate diverges: still there is one choice."""
    overrides = _protocol('fine_tune', batch_size=4, sweep__learning_rates=(1e36, 0.01, 0.1))
    found = _on_two(tmp_path, 'fine_tune', root, tmp_path / 'run', 1.0, overrides)
    assert found['sweep'][0]['held_out_top1'] is None and found['learning_rate'] in (0.01, 0.1)


def _first_and_own(rank: int):
    tree = {'x': torch.full((2, 3), float(rank)), 'n': torch.tensor(rank, dtype=torch.int32)}
    return collectives.of_first_replica(tree), tree


def test_what_the_first_replica_has(tmp_path):
    for rank, (found, own) in enumerate(run_in_processes(_first_and_own, 2, tmp_path)):
        assert not found['x'].any() and found['n'] == 0 and found['n'].dtype == torch.int32
        assert own['x'].eq(rank).all()


@pytest.mark.parametrize(
    'fields, blamed',
    [
        (dict(label_fraction=0.02), 'config.linear_eval.label_fraction=0.02: '),
        (dict(label_files='LIST'), "config.linear_eval.label_files='"),
    ],
)
def test_what_leaves_one_image_of_a_class_is_named(root, tmp_path, fields, blamed):
    listed = tmp_path / 'list.txt'
    listed.write_text('a/00.png\nb/00.png\nb/01.png\n')
    fields = {name: str(listed) if value == 'LIST' else value for name, value in fields.items()}
    run = _run(root, tmp_path, 1.0, **_protocol('linear_eval', batch_size=1, **fields))
    train, _ = inputs.load_labelled_data(run)
    with pytest.raises(UserError) as caught:
        on_top.check_protocol(run.config, 'linear_eval', train)
    assert str(caught.value).startswith(blamed) and "the class 'a' has 1 training image" in str(caught.value)


def test_a_protocol_that_the_replicas_do_not_divide_is_found_before_the_training(root, tmp_path, monkeypatch):
    run = _run(root, tmp_path, 1.0, **_protocol('linear_eval', batch_size=9))
    train, _ = inputs.load_labelled_data(run)
    on_top.check_protocol(run.config, 'linear_eval', train)
    monkeypatch.setattr(collectives, 'num_replicas', lambda: 2)
    with pytest.raises(UserError, match='config.linear_eval.batch_size=9: expected a multiple of 2'):
        on_top.check_protocol(run.config, 'linear_eval', train)
