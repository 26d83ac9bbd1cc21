"""Which device a run takes and what it needs there, decided on a machine that has none of them."""

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
    assert gpus == [1] and replica == ['nccl']


def test_all_processes_on_one_gpu_are_refused(gpus, replica):
    with pytest.raises(UserError, match='--device=cuda:1: every process of torchrun .* expected auto, cpu or cuda'):
        config_checks.pick_device('cuda:1')


@pytest.mark.parametrize('name', ['auto', 'cuda'])
def test_more_processes_than_gpus_are_refused(name, gpus, replica, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(UserError, match=f'--device={name}: 2 GPUs found; expected --nproc-per-node=2'):
        config_checks.pick_device(name)
