"""How a loop runs, whatever it runs."""

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


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
        """I of a run in the folder `seed_i` of several; None for one in a workdir of its own."""
        found = re.fullmatch(r'seed_(\d+)', os.path.basename(os.path.normpath(self.workdir)))
        return int(found[1]) if found else None

    @property
    def checkpoint_dir(self) -> str:
        return f'{self.workdir}/checkpoints'
