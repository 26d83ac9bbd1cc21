"""Who started this process, and which of how many it is: torchrun, Kubeflow or srun."""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from byol_func.errors import UserError

_PORT = 29500  # As torchrun has it.


class World(NamedTuple):
    """The processes that share a run."""

    launcher: str
    rank: int  # Of this process.
    size: int
    local_rank: int  # On its machine.
    address: str  # Where the first process is.
    port: int
    attempt: int = 0  # How often torchrun has started them anew.
    has_agent: bool = False  # Whether torchrun keeps the store that they meet in.


def find(environ: Mapping[str, str] = os.environ) -> World | None:
    """What the environment says; None for a process of its own.

    torchrun sets everything. Kubeflow sets WORLD_SIZE, RANK and MASTER_ADDR, one process a machine. srun sets
    SLURM_* in every step of several tasks. A lone WORLD_SIZE=1 that somebody left behind means nothing.

    Raises:
      UserError: several processes are meant, but not where they meet, or a value is no number.
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
            attempt=_number(environ, 'TORCHELASTIC_RESTART_COUNT', 0),
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
            # Jobs that share a machine need ports of their own.
            port=_number(environ, 'MASTER_PORT', 20000 + _number(environ, 'SLURM_JOB_ID', 0) % 20000),
        )
    return None


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name) or ('' if default is None else str(default))
    if not text.isdigit():
        raise UserError(f'{name}={text}: expected a whole number, as the launcher of several processes sets it')
    return int(text)


def _first_node(nodes: str) -> str:
    """'gpu[03-05,9],big1' -> 'gpu03'."""
    match = re.match(r'([^,\[]+)(?:\[(\w+))?', nodes)
    return f'{match[1]}{match[2] or ""}' if match else ''
