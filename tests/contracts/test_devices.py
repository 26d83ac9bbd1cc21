"""Which device a run takes and what it needs there, decided on a machine that has none of them."""

import os

import pytest
import torch

from byol_func.errors import UserError
from byol_func.modes import config_checks
from byol_func.runtime import collectives, compilation, compilers, rendezvous


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
    for name, value in dict(WORLD_SIZE='2', RANK='1', LOCAL_RANK='1', MASTER_ADDR='127.0.0.1').items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(collectives.dist, 'init_process_group', lambda backend, **how: joined.append(backend))
    for name in ('store', 'wait_for_all'):
        monkeypatch.setattr(rendezvous, name, lambda world: None)
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
    with pytest.raises(UserError, match='--device=cuda:1: every torchrun process .* expected auto, cpu or cuda'):
        config_checks.pick_device('cuda:1')


@pytest.mark.parametrize('name', ['auto', 'cuda'])
def test_more_processes_than_gpus_are_refused(name, gpus, replica, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(UserError, match=f'--device={name}: 2 GPUs found; expected torchrun --nproc-per-node=2'):
        config_checks.pick_device(name)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes a machine of what its arguments name, and returns its device."""

    def make(device: str, *programs: str, triton=True, capability=(8, 0), **variables) -> torch.device:
        for program in programs:
            (tmp_path / program).write_text('#!/bin/sh\n')
            (tmp_path / program).chmod(0o755)
        for name in ('CC', 'CXX'):
            monkeypatch.delenv(name, raising=False)
        for name, value in {'PATH': str(tmp_path), **variables}.items():
            monkeypatch.setenv(name, value)
        find_spec = lambda name: object() if triton and name == 'triton' else None
        monkeypatch.setattr(compilers.importlib.util, 'find_spec', find_spec)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        return torch.device(device)

    return make


@pytest.mark.parametrize(
    'device, programs, settings',
    [
        ('cpu', ['g++'], {}),
        ('cpu', ['clang++'], {}),
        ('cpu', ['mine'], dict(CXX='mine')),
        ('cuda', ['gcc'], {}),
        ('cuda', ['clang'], {}),
        ('cuda', ['mine'], dict(CC='mine')),
        ('cuda', ['gcc'], dict(capability=(7, 0))),
    ],
)
def test_a_machine_that_can_compile(device, programs, settings, machine):
    device = machine(device, *programs, **settings)
    assert compilers.missing(device) is None
    for wanted in (True, None, False):
        config_checks.check_compiler(wanted, device)


@pytest.mark.parametrize(
    'device, programs, settings, missing',
    [
        ('cpu', ['gcc'], {}, r'a C\+\+ compiler'),
        ('cuda', [], {}, 'a C compiler'),
        ('cuda', ['g++'], {}, 'a C compiler'),
        ('cuda', ['gcc'], dict(CC='mine'), 'the one that CC names'),  # Triton would call it and nothing else.
        ('cuda', ['gcc'], dict(triton=False), r'Triton \(pip install triton\)'),
        ('cuda', ['gcc'], dict(capability=(6, 1)), 'compute capability 7.0 or more, this one has 6.1'),
    ],
)
def test_a_machine_that_cannot_compile(device, programs, settings, missing, machine):
    """Found out before the first step; only who insists on compiling is refused."""
    device = machine(device, *programs, **settings)
    with pytest.raises(UserError, match=f'^config.compile=True: expected .*{missing}.* set --config.compile=False$'):
        config_checks.check_compiler(True, device)
    for wanted in (None, False):
        config_checks.check_compiler(wanted, device)


def test_a_step_worth_compiling_runs_without_a_compiler(machine):
    """Traced, and whoever wonders at the time it takes is told."""
    machine('cpu')
    calls, told = [], []

    def step(state, x):
        calls.append(1)
        return {'w': x @ state['w']}, {}

    update = compilation.compile_update(step, compiled=None, num_steps=10**12, warn=told.append)
    state = {'w': torch.eye(8)}
    for _ in range(4):
        state, _ = update(state, 2 * torch.eye(8))
    assert torch.equal(state['w'], 16 * torch.eye(8))
    assert told == ['Steps are not compiled and are therefore slower: compiling needs a C++ compiler (g++ or clang++)']
    assert len(calls) == 2  # To count its operations and to trace it.


def test_tests_see_no_gpu():
    assert os.environ['CUDA_VISIBLE_DEVICES'] == '' and not torch.cuda.is_available()
