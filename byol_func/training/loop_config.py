"""Settings shared by every training loop."""

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from byol_func.workdir.run import Run


class LoopConfig(NamedTuple):
    """The settings of a training loop, independent of the experiment that it trains."""

    mode: str
    workdir: str
    device: torch.device
    compiled: bool | None  # None: compile if it is worth it.
    seed: int
    config: Mapping[str, Any]  # The resolved config as plain values, saved with every checkpoint.
    save_every_seconds: float
    save_every_steps: int  # 0: save by time only.
    keep: int
    log_every_steps: int
    log_every_seconds: float
    keep_every_epochs: float = 0.0  # 0: no checkpoint is kept for its epoch.
    best_metric: str = ''  # '': no checkpoint is kept for its value.
    best_is: str = 'auto'
    resume: str = 'auto'
    bucket_mb: float = 0.0  # See `compilation.compile_update`.
    # Whether the caller continues after this loop diverges. If so, no failing step is saved, and all replicas
    # end at the same step.
    is_trial: bool = False

    @property
    def seed_index(self) -> int | None:
        """The i of the folder `seed_i` if the run is one of several seeds; None if it has its own workdir."""
        found = re.fullmatch(r'seed_(\d+)', os.path.basename(os.path.normpath(self.workdir)))
        return int(found[1]) if found else None

    @property
    def checkpoint_dir(self) -> str:
        """The folder that holds the loop's checkpoints."""
        return f'{self.workdir}/checkpoints'


def of_run(run: Run, mode: str, compiled: bool | None) -> LoopConfig:
    """Returns the settings of one training loop of a run; `mode` names it in checkpoints and `metrics.jsonl`."""
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
        bucket_mb=run.config.gradient_bucket_mb,
        **run.config.checkpointing,
    )
