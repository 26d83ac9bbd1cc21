"""`--mode=replay`: repeats the step at which a run stopped because of non-finite numbers."""

import os
import pathlib

import tabulate
import torch
from absl import logging

from byol_func.errors import UserError
from byol_func.modes import checkpoints, sweeps
from byol_func.modes.inputs import embed, labelled_part, load_data, make_byol, make_protocol
from byol_func.runtime import transfer
from byol_func.training import loop_config, nonfinite, resuming
from byol_func.training import replay as replaying
from byol_func.utils import checkpointing, dataset
from byol_func.workdir.run import Run

_SHOWN = 4  # Largest number of names that a list shows.


def replay(run: Run) -> None:
    """Replays a saved step and prints its loss, its gradient norms and the first numbers that are not finite.

    Raises:
      UserError: there is no file of such a step, or it does not fit the run.
    """
    checkpoint = checkpointing.load(run.checkpoint or _newest(run))
    if not checkpoint.mode.startswith(nonfinite.PREFIX):
        raise UserError(
            f'--checkpoint={checkpoint.path}: written by --mode={checkpoint.mode}, expected the file of a '
            'step whose numbers were not finite, from WORKDIR/diverged'
        )
    mode = checkpoint.mode.removeprefix(nonfinite.PREFIX)
    train, _ = load_data(run, to_pretrain=mode == 'pretrain')
    experiment, train = _experiment(run, mode, train, checkpoint)
    template = {
        'state': experiment.init(),
        'draws': experiment.sample(checkpoint.step),
        'indices': torch.zeros(experiment.batch_size, dtype=torch.int64),
    }
    kept = transfer.place(checkpointing.restore(checkpoint, template), run.device)
    step, how = checkpoint.step, dict(seed=run.config.random_seed, batch_size=experiment.batch_size)
    indices = dataset.batch_indices(step, num_examples=train.num_examples, **how)
    if not torch.equal(indices, kept['indices'].cpu()):
        raise UserError(
            f'--checkpoint={checkpoint.path}: its step used other images; expected the config.dataset and '
            'config.random_seed of its run'
        )
    loop = loop_config.of_run(run, mode, compiled=False)
    for field, (old, new) in resuming.differences(checkpoint.config, loop.config, resuming.FREE_FIELDS).items():
        if field not in resuming.FOUND:
            logging.warning('the run had config.%s=%r, now it is %r', field, old, new)
    (inputs,) = dataset.train_batches(
        train, range(step, step + 1), relative_crops=experiment.relative_crops, image_size=experiment.image_size, **how
    )
    global_step = torch.full((), step, device=run.device)
    found = replaying.replay(experiment, kept['state'], global_step, kept['draws'], inputs)
    print(_tell(checkpoint, mode, indices.tolist(), found))


def _newest(run: Run) -> pathlib.Path:
    files = _files(run.workdir)
    if not files:
        raise UserError(
            f'--workdir={run.workdir}: no file in {nonfinite.directory(run.workdir)}; '
            + (checkpoints.seed_folders(run, _files) or 'a run writes one when its numbers are not finite')
        )
    return max(files, key=lambda path: path.stat().st_mtime)


def _files(workdir: str | os.PathLike) -> list[pathlib.Path]:
    return sorted(pathlib.Path(nonfinite.directory(os.fspath(workdir))).glob(f'{nonfinite.PREFIX}*.safetensors'))


def _experiment(run: Run, mode: str, train, checkpoint: checkpointing.Checkpoint):
    """Returns the experiment that a saved step belongs to, and the set that it was trained on."""
    if mode == 'pretrain':
        return make_byol(run.config, train), train
    protocol = mode.removesuffix('_untrained')
    if protocol not in ('linear_eval', 'fine_tune'):
        raise UserError(
            f'--checkpoint={checkpoint.path}: holds a step of {mode}, '
            'expected one of pretrain, linear_eval or fine_tune'
        )
    chosen = checkpoint.config.get('chosen')
    config = sweeps.with_pair(run.config, protocol, *chosen) if chosen else run.config
    train = labelled_part(run.config, protocol, train)
    params, state = checkpoints.restore_encoder(run, train, checkpoint)
    if config[protocol].cache_features:
        train = embed(run.config, train, params, state)
    return make_protocol(config, protocol, params, state, train), train


def _tell(checkpoint: checkpointing.Checkpoint, mode: str, indices: list[int], found: replaying.Replay) -> str:
    lines = [
        f'Step {checkpoint.step} of {mode}, replayed from {checkpoint.path}',
        f'images: {_list([str(i) for i in indices])}',
        'logs: ' + ', '.join(f'{name} {value:.6g}' for name, value in found.logs.items()),
        '',
        tabulate.tabulate(found.gradient_norms.items(), ['module', 'gradient norm'], floatfmt='.4g'),
        '',
        *(f'not finite in {place}: {_list(names) or "nothing"}' for place, names in found.not_finite.items()),
        'the first operation that turned finite numbers into infinity or NaN: ' + (found.first_operation or 'none'),
    ]
    return '\n'.join(lines)


def _list(names: list[str]) -> str:
    more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
    return ', '.join(names[:_SHOWN]) + more
