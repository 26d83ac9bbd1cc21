"""Detects the launcher of this process (torchrun, Kubeflow or srun), its rank and the number of processes."""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from byol_func.errors import UserError

_PORT = 29500  # The default of torchrun.


class World(NamedTuple):
    """The processes that share a run."""

    launcher: str
    rank: int  # The rank of this process.
    size: int
    local_rank: int  # The rank among the processes of its machine.
    address: str  # The host of the first process.
    port: int
    has_agent: bool = False  # Whether torchrun's agent hosts the store through which they find each other.

    @property
    def hosts_store(self) -> bool:
        """Whether this process hosts the store."""
        return self.rank == 0 and not self.has_agent


def find(environ: Mapping[str, str] = os.environ) -> World | None:
    """Returns the `World` that the environment variables describe; None for a single process.

    torchrun sets all variables. Kubeflow sets WORLD_SIZE, RANK and MASTER_ADDR, with one process per machine. srun
    sets SLURM_* in every job step of several tasks. A stray WORLD_SIZE=1 without the others is ignored.

    Raises:
      UserError: the variables ask for several processes but RANK or MASTER_ADDR is missing, or a value is not a
        number.
    """
    if environ.get('WORLD_SIZE', '1') != '1' or 'RANK' in environ and 'MASTER_ADDR' in environ:
        missing = [name for name in ('RANK', 'MASTER_ADDR') if not environ.get(name)]
        if missing:
            raise UserError(
                f'WORLD_SIZE={environ["WORLD_SIZE"]}: expected {" and ".join(missing)} too, as torchrun sets them; '
                'for a single process: unset WORLD_SIZE'
            )
        by_torchrun = 'TORCHELASTIC_RUN_ID' in environ
        return World(
            launcher='torchrun' if by_torchrun else 'WORLD_SIZE and RANK',
            rank=_number(environ, 'RANK'),
            size=_number(environ, 'WORLD_SIZE', 1),
            local_rank=_number(environ, 'LOCAL_RANK', 0),
            address=environ['MASTER_ADDR'],
            port=_number(environ, 'MASTER_PORT', _PORT),
            has_agent=environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True',
        )
    if _number(environ, 'SLURM_STEP_NUM_TASKS', 1) > 1 and 'SLURM_PROCID' in environ:
        nodes = environ.get('SLURM_STEP_NODELIST') or environ.get('SLURM_JOB_NODELIST', '')
        return World(
            launcher='srun',
            rank=_number(environ, 'SLURM_PROCID'),
            size=_number(environ, 'SLURM_STEP_NUM_TASKS'),
            local_rank=_number(environ, 'SLURM_LOCALID', 0),
            address=environ.get('MASTER_ADDR') or _first_node(nodes) or '127.0.0.1',
            # Jobs that share a machine need different ports.
            port=_number(environ, 'MASTER_PORT', 20000 + _number(environ, 'SLURM_JOB_ID', 0) % 20000),
        )
    return None


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name) or ('' if default is None else str(default))
    if not text.isdigit():
        raise UserError(f'{name}={text}: expected a whole number, as launchers of several processes set it')
    return int(text)


def _first_node(nodes: str) -> str:
    """Returns the first host of a Slurm node list: 'gpu[03-05,9],big1' -> 'gpu03'."""
    match = re.match(r'([^,\[]+)(?:\[(\w+))?', nodes)
    return f'{match[1]}{match[2] or ""}' if match else ''
