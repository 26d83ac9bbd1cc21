"""Pieces of runs in tests: the settings of a loop, the lines of its metrics, the messages of errors."""

import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file

from byol_func.errors import UserError
from byol_func.training.loop_config import LoopConfig


def loop_settings(workdir, **fields) -> LoopConfig:
    """A pre-training on the CPU, not compiled, that saves no checkpoint but the last one."""
    defaults = dict(
        mode='pretrain',
        device=torch.device('cpu'),
        compiled=False,
        seed=0,
        config={},
        save_every_seconds=1e9,
        save_every_steps=0,
        keep=1,
        log_every_steps=1,
        log_every_seconds=1e9,
    )
    return LoopConfig(workdir=str(workdir), **defaults | fields)


def records(workdir: pathlib.Path, mode: str | None = None) -> list[dict]:
    """The lines of `metrics.jsonl`, of one mode or of all."""
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return [line for line in lines if mode in (None, line['mode'])]


def step_records(workdir: pathlib.Path, mode: str | None = None) -> list[dict]:
    """The lines of the steps, without those of probes."""
    return [record for record in records(workdir, mode) if 'images_per_second' in record]


def without_rates(lines: list[dict]) -> list[dict]:
    """The lines without the only number that depends on a clock."""
    return [{name: value for name, value in line.items() if name != 'images_per_second'} for line in lines]


def metrics(workdir: pathlib.Path) -> list[dict]:
    """All lines of `metrics.jsonl`, without their rates."""
    return without_rates(records(workdir))


def assert_same_runs(undisturbed: pathlib.Path, killed: pathlib.Path) -> None:
    """The same lines and, bit for bit, the same tensors."""
    assert metrics(undisturbed) == metrics(killed)
    names = [sorted(p.name for p in w.glob('checkpoints/*')) for w in (undisturbed, killed)]
    assert names[0] == names[1]
    for name in names[0]:
        expected, actual = (load_file(w / 'checkpoints' / name) for w in (undisturbed, killed))
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[leaf], actual[leaf]) for leaf in expected), name


def error_of(function, *args, errors=UserError, **kwargs) -> str:
    """The message of the error that a call raises, which must be one line."""
    with pytest.raises(errors) as caught:
        function(*args, **kwargs)
    assert '\n' not in str(caught.value)
    return str(caught.value)
