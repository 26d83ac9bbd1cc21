"""Settings shared by every training loop."""

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from byol_func.workdir.run import Run


class LoopConfig(NamedTuple):
    """Everything about a loop but what it trains."""

    mode: str
    workdir: str
    device: torch.device
    compiled: bool | None  # None: if it pays.
    seed: int
    config: Mapping[str, Any]  # The resolved config of plain values, saved with every checkpoint.
    save_every_seconds: float
    save_every_steps: int  # 0: by time only.
    keep: int
    log_every_steps: int
    log_every_seconds: float
    keep_every_epochs: float = 0.0  # 0: none for its epoch.
    best_metric: str = ''  # '': none for its value.
    best_is: str = 'auto'
    resume: str = 'auto'
    # Whether the caller goes on where this loop ends by numbers that are not finite: then no step is
    # kept, and all replicas end at the same one.
    is_trial: bool = False

    @property
    def seed_index(self) -> int | None:
        """The i of a run in the folder `seed_i` of several; None for one in a workdir of its own."""
        found = re.fullmatch(r'seed_(\d+)', os.path.basename(os.path.normpath(self.workdir)))
        return int(found[1]) if found else None

    @property
    def checkpoint_dir(self) -> str:
        """The folder of the loop's checkpoints."""
        return f'{self.workdir}/checkpoints'


def of_run(run: Run, mode: str, compiled: bool | None) -> LoopConfig:
    """The settings of one training loop of a run.

    Args:
      run: the run.
      mode: names the loop's checkpoints and its lines in `metrics.jsonl`.
      compiled: as for `compilation.compile_update`.
    """
    return LoopConfig(
        mode=mode,
        workdir=run.workdir,
        device=run.device,
        compiled=compiled,
        seed=run.config.random_seed,
        config=run.plain_config(),
        log_every_steps=run.config.log_every_steps,
        log_every_seconds=run.log_every_seconds,
        resume=run.resume,
        **run.config.checkpointing,
    )
