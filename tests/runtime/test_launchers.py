"""Which of how many processes this is: all ways in which launchers say so."""

import pytest

from byol_func.errors import UserError
from byol_func.runtime.launchers import find

_TORCHRUN = dict(
    RANK='3',
    WORLD_SIZE='4',
    LOCAL_RANK='1',
    MASTER_ADDR='node0',
    MASTER_PORT='1234',
    TORCHELASTIC_RUN_ID='x',
    TORCHELASTIC_USE_AGENT_STORE='True',
)
_SRUN = dict(
    SLURM_PROCID='5',
    SLURM_STEP_NUM_TASKS='8',
    SLURM_LOCALID='1',
    SLURM_STEP_NODELIST='gpu[03-05,9],b',
    SLURM_JOB_ID='7',
)


def test_torchrun():
    assert find(_TORCHRUN) == ('torchrun', 3, 4, 1, 'node0', 1234, True)
    assert find(_TORCHRUN | _SRUN).launcher == 'torchrun', 'a torchrun that srun has started'


def test_kubeflow():
    world = find(dict(WORLD_SIZE='2', RANK='1', MASTER_ADDR='job-0'))
    assert (world.rank, world.size, world.local_rank, world.address) == (1, 2, 0, 'job-0')


def test_srun():
    world = find(_SRUN)
    assert world[:6] == ('srun', 5, 8, 1, 'gpu03', 20007)
    assert find(_SRUN | dict(SLURM_STEP_NODELIST='a1,a2')).address == 'a1'


@pytest.mark.parametrize(
    'left_over', [{}, dict(WORLD_SIZE='1'), dict(RANK='0'), dict(SLURM_PROCID='0', SLURM_NTASKS='4')], ids=str
)
def test_a_process_of_its_own(left_over):
    """The script of a batch job has SLURM_PROCID and SLURM_NTASKS too: nobody has started several tasks."""
    assert find(left_over) is None


@pytest.mark.parametrize(
    'environ, message',
    [
        (dict(WORLD_SIZE='2'), 'WORLD_SIZE=2: expected RANK and MASTER_ADDR too'),
        (dict(WORLD_SIZE='2', RANK='1'), 'WORLD_SIZE=2: expected MASTER_ADDR too'),
        (dict(WORLD_SIZE='two', RANK='1', MASTER_ADDR='x'), 'WORLD_SIZE=two: expected a whole number'),
    ],
)
def test_half_a_launcher(environ, message):
    with pytest.raises(UserError, match=message):
        find(environ)
