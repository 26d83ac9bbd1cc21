"""Which device a run takes and what it needs there, decided on a machine that has none of them."""

import os

from ml_collections import config_dict
import ml_collections
import pytest
import torch

from byol_func import config_checks
from byol_func.runtime import collectives
from byol_func.utils.helpers import UserError


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, as far as the choice of one goes; the list holds what was made the current one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    return chosen


@pytest.fixture
def replica(monkeypatch):
    """The second process of a `torchrun`; the list holds the groups that it joined."""
    joined = []
    for name, value in dict(WORLD_SIZE='2', RANK='1', LOCAL_RANK='1').items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(collectives.dist, 'init_process_group', joined.append)
    monkeypatch.setattr(collectives, '_host_group', lambda: joined.append('gloo'))
    return joined


@pytest.mark.parametrize('name, index', [('cuda:1', 1), ('cuda:0', 0), ('cuda', 0), ('auto', 0)])
def test_the_gpu_of_a_run_is_the_current_one(name, index, gpus):
    """Events, captures and pinned copies go by the current GPU, not by where the tensors are."""
    device = config_checks.pick_device(name)
    assert device.type == 'cuda'
    collectives.initialize(device)
    assert gpus == [index]


def test_a_cpu_makes_no_gpu_the_current_one(gpus):
    collectives.initialize(config_checks.pick_device('cpu'))
    assert gpus == []


def test_a_gpu_for_every_process(gpus, replica):
    collectives.initialize(config_checks.pick_device('auto'))
    assert gpus == [1] and replica == ['nccl', 'gloo']


def test_all_processes_on_one_gpu_are_refused(gpus, replica):
    with pytest.raises(UserError, match='--device=cuda:1: every process of torchrun .* expected auto, cpu or cuda'):
        config_checks.pick_device('cuda:1')


@pytest.mark.parametrize('name', ['auto', 'cuda'])
def test_more_processes_than_gpus_are_refused(name, gpus, replica, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(UserError, match=f'--device={name}: 2 GPUs found; expected --nproc-per-node=2'):
        config_checks.pick_device(name)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes a machine of what its arguments name, and returns whether a run compiles there."""

    def make(device: str, *programs: str, triton=True, capability=(8, 0), compile=True, **variables) -> bool | None:
        for program in programs:
            (tmp_path / program).write_text('#!/bin/sh\n')
            (tmp_path / program).chmod(0o755)
        for name in ('CC', 'CXX'):
            monkeypatch.delenv(name, raising=False)
        for name, value in {'PATH': str(tmp_path), **variables}.items():
            monkeypatch.setenv(name, value)
        find_spec = lambda name: object() if triton and name == 'triton' else None
        monkeypatch.setattr(config_checks.importlib.util, 'find_spec', find_spec)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        config = ml_collections.ConfigDict({'compile': config_dict.placeholder(bool)})
        config.compile = compile
        config_checks.check_compiler(config, torch.device(device))
        return config.compile

    return make


@pytest.mark.parametrize('device, programs, settings', [
    ('cpu', ['g++'], {}), ('cpu', ['clang++'], {}), ('cpu', ['mine'], dict(CXX='mine')),
    ('cuda', ['gcc'], {}), ('cuda', ['clang'], {}), ('cuda', ['mine'], dict(CC='mine')),
    ('cuda', ['gcc'], dict(capability=(7, 0))),
])
def test_a_machine_that_can_compile(device, programs, settings, machine):
    for wanted in (True, None, False):
        assert machine(device, *programs, compile=wanted, **settings) is wanted


@pytest.mark.parametrize('device, programs, settings, missing', [
    ('cpu', ['gcc'], {}, r'a C\+\+ compiler'),
    ('cuda', [], {}, 'a C compiler'),
    ('cuda', ['g++'], {}, 'a C compiler'),
    ('cuda', ['gcc'], dict(CC='mine'), 'what CC names'),  # Triton would call it and nothing else.
    ('cuda', ['gcc'], dict(triton=False), r'Triton \(pip install triton\)'),
    ('cuda', ['gcc'], dict(capability=(6, 1)), 'compute capability 7.0 or more, this one has 6.1'),
])
def test_a_machine_that_cannot_compile(device, programs, settings, missing, machine, caplog):
    """Found out before the first step; only who insists on compiling is refused."""
    with pytest.raises(UserError, match=f'^config.compile=True: expected .*{missing}.* add --config.compile=False$'):
        machine(device, *programs, compile=True, **settings)
    assert machine(device, *programs, compile=False, **settings) is False and not caplog.text
    assert machine(device, *programs, compile=None, **settings) is False
    assert 'not compiled' in caplog.text


def test_tests_see_no_gpu():
    assert os.environ['CUDA_VISIBLE_DEVICES'] == '' and not torch.cuda.is_available()
