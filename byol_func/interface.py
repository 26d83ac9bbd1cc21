"""The Python interface: `get_config`, `pretrain` and `evaluate` do what `launch.py` does, without flags."""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections

from byol_func import config_files, library
from byol_func.errors import UserError, as_arguments, one_of
from byol_func.modes import MEASURING, config_checks, preparing, running
from byol_func.runtime import endings
from byol_func.training import resuming
from byol_func.workdir.run import Run
from byol_func.workdir.saved import find_config

_ADVICE = 'the same call resumes from the newest checkpoint'
_EVALUATIONS = tuple(mode for mode in MEASURING if mode != 'pretrain')


@contextlib.contextmanager
def _without_flags() -> Iterator[None]:
    """Lets errors name arguments, not the flags of the command line, which the caller has not typed."""
    try:
        yield
    except UserError as error:
        raise UserError(as_arguments(str(error))) from error


class Result(NamedTuple):
    """What a run leaves behind: its folder, and the numbers of its summary.json, accuracies in 0..1."""

    workdir: pathlib.Path
    summary: Mapping[str, Any]

    def encoder(self, device: str = 'cpu') -> library.Encoder:
        """Loads the encoder of the run, of the first seed if there are several."""
        first = self.workdir / 'seed_0'
        return library.load_encoder(first if first.is_dir() else self.workdir, device)


@_without_flags()
def get_config(
    name: str | os.PathLike, overrides: Mapping[str, Any] | None = None, /, **fields: Any
) -> ml_collections.ConfigDict:
    """Returns the config of an experiment.

    Args:
      name: one of `byol-func configs`, such as 'digits' or 'cifar10:small'; or the path of a config file, of a
        config.json or of a checkpoint.
      overrides: the values of fields by their full name, such as `{'dataset.root': DIR}`; or of some fields of a
        section, `{'dataset': {'root': DIR}}`, whose others stay.
      **fields: the values of fields at the top level, such as `num_epochs=10`.

    Raises:
      UserError: there is no such config or field, or a field is of another type.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise UserError(f"get_config({name!r}): expected the name of a config, such as 'digits', or a path")
    if not isinstance(overrides or {}, Mapping):
        raise UserError(f"get_config: {overrides!r}: expected fields and their values, such as {{'dataset.root': DIR}}")
    changes = {**(overrides or {}), **fields}
    config = config_files.load(os.fspath(name), changes)
    preparing.complete(config, config_files.flat(changes, config))
    return config


@_without_flags()
def pretrain(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    *,
    device: str = 'auto',
    resume: str = 'auto',
    tensorboard: bool = False,
) -> Result:
    """Pre-trains an encoder, as `launch.py --config=... --workdir=...` does; the same call resumes it.

    Args:
      config: the experiment; see `get_config`. It is copied.
      workdir: the folder to write to.
      device: 'cpu', 'cuda', 'cuda:1', ...; 'auto' takes a GPU if there is one.
      resume: how to start in a workdir that holds checkpoints, as the flag --resume explains.
      tensorboard: whether to write event files for TensorBoard to the folder `tensorboard` of the workdir.

    Raises:
      UserError: the config does not fit the data or the workdir.
      Stopped: Ctrl-C or another signal stopped the training; its state is saved.
    """
    if not isinstance(config, (Mapping, ml_collections.ConfigDict)):
        raise UserError(f'pretrain({config!r}): expected a config, which get_config returns')
    copy = ml_collections.ConfigDict(config)
    return _run('pretrain', copy, workdir, {}, device=device, resume=resume, tensorboard=tensorboard)


@_without_flags()
def evaluate(
    workdir: str | os.PathLike,
    mode: str = 'linear_eval',
    overrides: Mapping[str, Any] | None = None,
    *,
    checkpoint: str | os.PathLike | None = None,
    device: str = 'auto',
) -> Result:
    """Measures the encoder of a finished or running pre-training, as `launch.py --mode=...` does.

    Args:
      workdir: the folder of the pre-training; or, with `checkpoint`, the folder to write to.
      mode: 'linear_eval', 'fine_tune', 'eval', 'knn' or 'logistic'. It measures on `dataset.eval_split` of the config,
        which `overrides` may set to 'val' or 'test'; there is no argument like --split.
      overrides: the values of fields by their full name, such as `{'linear_eval.num_epochs': 20}`; the others are
        those of the run.
      checkpoint: the file to measure; by default the newest of the workdir.
      device: as for `pretrain`.

    Raises:
      UserError: there is nothing to measure, or the config does not fit it.
    """
    one_of('mode', mode, _EVALUATIONS)
    file = os.fspath(checkpoint) if checkpoint is not None else None
    source = find_config(os.fspath(workdir), file, mode)
    if source is None:
        raise UserError(f'workdir={os.fspath(workdir)}: it holds no config of a run; expected that of a pre-training')
    config = config_files.load(source, overrides or {})
    changes = config_files.flat(overrides or {}, config)
    return _run(mode, config, workdir, changes, device=device, checkpoint=file)


def _run(
    mode: str,
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    overrides: Mapping[str, Any],
    *,
    device: str,
    **how: Any,
) -> Result:
    one_of('resume', how.get('resume', 'auto'), resuming.RESUME)
    config_files.register()
    preparing.complete(config, overrides, mode)
    folder = os.path.expanduser(os.fspath(workdir))
    with endings.shared(_ADVICE):
        config_checks.check_labels(mode, config, overrides)
        chosen = config_checks.pick_device(device)
        preparing.start(config, chosen, find_config(folder, how.get('checkpoint'), mode))
        settings = dict(checkpoint=None, command=f'byol_func {mode}', missing=[]) | how
        run = Run(config=config, workdir=folder, device=chosen, log_every_seconds=10.0, **settings)
        return Result(pathlib.Path(folder), running.run_mode(mode, run))
