"""Runs a mode once or for every seed, and writes its summary."""

import importlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from byol_func import console
from byol_func.errors import UserError, one_of
from byol_func.modes import MEASURING, TOOLS, TRAINING_MODES, drawing, follow, init_from
from byol_func.runtime import collectives
from byol_func.tracking.tracker import Tracker, track
from byol_func.training import loop_config, resuming
from byol_func.workdir import faults, files, lock
from byol_func.workdir.run import Run
from byol_func.workdir.summaries import closing_words, merge_seeds, note_command, write_config, write_summary


def run_mode(mode: str, run: Run) -> dict[str, Any]:
    """Runs a mode, once or for every seed, and writes its summary.

    With `config.num_seeds` > 1 seed i runs with `random_seed + i` in the folder `seed_i` of the
    workdir, and the summary holds means, standard deviations and values of the metrics.

    Returns:
      The summary; empty for a tool, --dry_run and --follow.

    Raises:
      UserError: any mistake that the user can correct.
    """
    if run.follow:
        follow.check(run)
    console.set_pace(run.log_every_seconds)
    if mode in TOOLS:
        # `embed` runs for every seed, unless --workdir is the folder of one seed; the other tools run once.
        own = run.checkpoint or os.path.isdir(os.path.join(run.workdir, 'checkpoints'))
        for each in _seed_runs(run) if mode == 'embed' and not own else [run]:
            _function(TOOLS[mode])(each)
        return {}
    one_of('--mode', mode, MEASURING)
    if run.config.num_seeds > 1 and run.checkpoint:
        raise UserError(
            f'--checkpoint={run.checkpoint}: one file for config.num_seeds={run.config.num_seeds}; '
            'give --workdir, or --config.num_seeds=1'
        )
    if mode == 'pretrain':
        init_from.resolve(run)
    if run.dry_run:
        _function('dry_run.dry_run')(run)
        return {}
    seed_runs = _seed_runs(run)
    if run.follow:  # Takes no lock: the pre-training holds it.
        follow.follow(run, seed_runs)
        return {}
    with lock.locked(run.workdir), faults.traced(run.workdir):
        return _run_seeds(mode, run, seed_runs)


def _function(name: str) -> Callable[[Run], Any]:
    """Returns the function of a mode, importing only the module that defines it."""
    module, function = name.split('.')
    return getattr(importlib.import_module(f'byol_func.modes.{module}'), function)


def _seed_runs(run: Run) -> list[Run]:
    num_seeds = run.config.num_seeds
    return [run.of_seed(i) for i in range(num_seeds)] if num_seeds > 1 else [run]


def _run_seeds(mode: str, run: Run, seed_runs: list[Run]) -> dict[str, Any]:
    num_seeds = run.config.num_seeds
    loops = [loop_config.of_run(seed_run, mode, compiled=False) for seed_run in seed_runs]
    if mode in TRAINING_MODES:
        for loop in loops:  # A mismatch is reported before anything is written.
            resuming.check_continues(loop)
        resuming.check_policy(loops, mode)
    function = _function(MEASURING[mode])
    _tell_settings(mode, run)
    note_command(run)
    if num_seeds == 1:
        summary = _run_once(function, mode, run)
    else:
        with track(run, mode) as trackers:
            write_config(run, mode)
            summaries = []
            for i, seed_run in enumerate(seed_runs):
                logging.info('Seed %d of %d', i + 1, num_seeds)
                summaries.append(_run_once(function, mode, seed_run, trackers))
            summary = merge_seeds(summaries)
            write_summary(run, mode, summary)
            drawing.draw_run(run, mode)
    lock.check_still_there(run.workdir)
    if collectives.replica_index() == 0:
        print(closing_words(summary, run.workdir))
    if run.missing:
        raise UserError(
            f'--workdir={run.workdir}: results and checkpoints are complete, but these could not be written: '
            f'{", ".join(run.missing)}'
        )
    return summary


# Fields in which an evaluation may differ from the pre-training without a word.
_QUIET = (
    *(field for field in resuming.FREE_FIELDS if field not in ('dataset.root', 'evaluation')),
    *('evaluation.batch_size', 'fine_tune', 'linear_eval', 'precision'),
)


def _tell_settings(mode: str, run: Run) -> None:
    """Says how the settings of an evaluation differ from the pre-training's and from those of the result it replaces.

    An evaluation starts with the settings of its last run in the workdir, so some may come from there.
    """
    if mode in TRAINING_MODES or collectives.replica_index() > 0:
        return
    now, folder = run.plain_config(), pathlib.Path(run.workdir)
    own = resuming.differences(files.read_json(folder / 'config.pretrain.json') or now, now, _QUIET)
    if own:
        logging.info(
            '%s: differs from the pre-training: %s', mode, _in_words({name: new for name, (_, new) in own.items()})
        )
    if (folder / f'summary.{mode}.json').exists():
        before = resuming.differences(files.read_json(folder / f'config.{mode}.json') or now, now, _QUIET)
        if before:
            found = {name: old for name, (old, _) in before.items()}
            what = 'summary.%s.json, a result with %s, is replaced; another --workdir with --checkpoint=FILE keeps both'
            logging.warning(what, mode, _in_words(found))


def _in_words(fields: Mapping[str, Any]) -> str:
    return ', '.join(f'config.{name}={value!r}' for name, value in fields.items())


def _run_once(function, mode: str, run: Run, parents: Mapping[str, Tracker] | None = None) -> dict[str, Any]:
    with track(run, mode, parents):
        write_config(run, mode)
        summary = function(run)
        write_summary(run, mode, summary)
        drawing.draw_run(run, mode)
    return summary
