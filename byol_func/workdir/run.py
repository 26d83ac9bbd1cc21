"""The settings of a run.

A run writes `config.json`, `metrics.jsonl`, `checkpoints/` and, at its end, `summary.json` to its workdir. If
several modes share a workdir, these names belong to the latest run; each mode also has its own
`config.MODE.json` and `summary.MODE.json`.
"""

import json
import os
from typing import Any, NamedTuple

import ml_collections
import torch


class Tracking(NamedTuple):
    """Where MLflow stores a run; the flags of the same names describe the fields."""

    uri: str
    experiment_name: str
    run_id: str | None
    checkpoints: bool


class Run(NamedTuple):
    """The settings that every mode receives."""

    config: ml_collections.ConfigDict
    workdir: str
    device: torch.device
    checkpoint: str | None
    log_every_seconds: float
    follow: bool = False  # Evaluate the checkpoints of another process while it trains.
    resume: str = 'auto'  # One of `resuming.RESUME`.
    output: str | None = None  # The file that export, predict or similar writes, or the folder of --mode=shards.
    format: str | None = None  # The format of the exported file; None: official.
    push: str | None = None  # The repository on the Hugging Face hub that --mode=export uploads to.
    register: str | None = None  # The name in mlflow's registry under which --mode=export registers the encoder.
    split: str | None = None  # The split that --mode=eval, embed and similar use.
    images: str | None = None  # The images that --mode=predict classifies or similar compares.
    images_per_shard: int = 10_000  # The size of the shards that --mode=shards writes.
    command: str = ''  # The command as typed, without passwords.
    tracking: Tracking | None = None
    tensorboard: bool = False  # Write event files for TensorBoard.
    is_first_seed: bool = True
    dry_run: bool = False  # Describe the pre-training and write nothing.
    missing: list[str] | None = None  # Collects files that could not be written, for a message at the end.

    def plain_config(self) -> dict[str, Any]:
        """Returns the resolved config as plain JSON values."""
        return json.loads(self.config.to_json_best_effort())

    def of_seed(self, i: int) -> 'Run':
        """Returns run i of the `config.num_seeds` runs, with its own folder as its workdir."""
        config = ml_collections.ConfigDict(self.config)
        config.num_seeds = 1
        config.random_seed = self.config.random_seed + i
        return self._replace(config=config, workdir=os.path.join(self.workdir, f'seed_{i}'), is_first_seed=i == 0)
