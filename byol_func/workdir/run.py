"""A run and the files it leaves in its workdir.

`config.json`, `metrics.jsonl`, `checkpoints/` and at the end `summary.json`; where several modes
share a workdir, the plain names belong to the latest and `config.MODE.json`, `summary.MODE.json` to
each.
"""

import json
import os
from typing import Any, NamedTuple

import ml_collections
import torch


class Tracking(NamedTuple):
    """Where mlflow keeps a run; the flags of the same names explain the fields."""

    uri: str
    experiment_name: str
    run_id: str | None
    checkpoints: bool


class Run(NamedTuple):
    """Everything a mode needs to know."""

    config: ml_collections.ConfigDict
    workdir: str
    device: torch.device
    checkpoint: str | None
    log_every_seconds: float
    follow: bool = False  # Evaluate what another process trains, as it trains.
    resume: str = 'auto'  # One of `resuming.RESUME`.
    output: str | None = None  # What --mode=export writes, and how.
    format: str | None = None  # None: official.
    split: str | None = None  # What --mode=eval and --mode=embed look at.
    command: str = ''  # As it was typed, without passwords.
    tracking: Tracking | None = None
    is_first_seed: bool = True
    dry_run: bool = False  # Tell what a pre-training would be, and write nothing.
    missing: list[str] | None = None  # Where the files are noted that could not be written, for the end of the run.

    def plain_config(self) -> dict[str, Any]:
        """The resolved config as plain values, as JSON has them."""
        return json.loads(self.config.to_json_best_effort())

    def of_seed(self, i: int) -> 'Run':
        """Run i of `config.num_seeds`, in a folder of its own."""
        config = ml_collections.ConfigDict(self.config)
        config.num_seeds = 1
        config.random_seed = self.config.random_seed + i
        return self._replace(config=config, workdir=os.path.join(self.workdir, f'seed_{i}'), is_first_seed=i == 0)
