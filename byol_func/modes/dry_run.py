"""`--dry_run`: reports the size and cost of a pre-training from its shapes and a few timed steps; writes nothing."""

import os
import resource
import sys
import time

import torch

from byol_func.errors import counted
from byol_func.experiment import Experiment, step_inputs
from byol_func.modes import inputs, sizes
from byol_func.runtime import collectives, compilation, costs, transfer
from byol_func.utils import dataset
from byol_func.workdir.run import Run

_STEPS = 3  # Number of timed steps; one untimed step comes first.


def dry_run(run: Run) -> None:
    """Prints the shapes, parameters, memory, steps, hours and files of a pre-training.

    Raises:
      UserError: the run would stop with this error in its first steps.
    """
    config = run.config.copy_and_resolve_references()
    config.dataset.cache_dir = ''  # Loading the data would write to it.
    run = run._replace(config=config)
    train, test = inputs.load_data(run, to_pretrain=True)
    _, test = inputs.load_beside(run, train, test)
    sizes.check_image_size(run, train)
    experiment = inputs.make_byol(run.config, train)
    sizes.check_memory(run, experiment, train)
    seconds = _time_steps(run, experiment, train)
    if collectives.replica_index() == 0:
        print(sizes.outline(run, experiment, train, test))
        print(_costs(run, experiment, seconds))
        print(f'Nothing was written. Without --dry_run: {_files(run)}')


def _time_steps(run: Run, experiment: Experiment, train: dataset.Examples) -> float:
    """Returns the seconds per uncompiled step on this replica, including the time to read its batch."""
    update = compilation.compile_update(experiment.update, compiled=False)
    state = transfer.place(experiment.init(), run.device)
    start = 0.0
    for arguments in step_inputs(experiment, train, range(_STEPS + 1), seed=run.config.random_seed, device=run.device):
        state, logs = update(state, *arguments)
        float(logs['loss'])  # Waits for the device.
        start = start or time.perf_counter()
    return (time.perf_counter() - start) / _STEPS


def _costs(run: Run, experiment: Experiment, seconds: float) -> str:
    hours = seconds * experiment.max_steps * run.config.num_seeds / 3600
    if run.device.type == 'cuda':
        taken = torch.cuda.max_memory_allocated(run.device)
    else:  # Kilobytes on Linux, bytes on macOS.
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    free = costs.available_bytes(run.device)
    return (
        f'Memory:  {taken / 2**30:.2f} GiB used, {free / 2**30:.1f} GiB free\n'
        f'Time:    {experiment.batch_size / seconds:,.0f} images/s, {counted(hours, "hour", ".2g")} for all steps, '
        'without compilation and evaluations'
    )


def _files(run: Run) -> str:
    config = run.config
    files = ['config.json', 'metrics.jsonl', f'checkpoints/ (the newest {config.checkpointing.keep})', 'summary.json']
    files += ['augmentations.png'] if config.preview.num_images else []
    files += ['pictures and report.html'] if config.pictures else []
    where = os.path.join(run.workdir, 'seed_*') if config.num_seeds > 1 else run.workdir
    return f'{", ".join(files)} in {where}.'
