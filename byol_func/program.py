"""The command-line program behind `python launch.py` and the installed command `byol-func`.

Flags are read only in this module; `--config.FIELD=VALUE` overrides any field of the config.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import os
import pathlib
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import flags, logging
from ml_collections import config_flags

# Modules that load torch are imported where they are needed, so that a mistake in a flag is reported within a second.
from byol_func import config_files, modes
from byol_func.cli import run_app
from byol_func.errors import Stopped, UserError, one_of, redact
from byol_func.modes import usage
from byol_func.tracking import client
from byol_func.workdir import overview
from byol_func.workdir.saved import find_config

if TYPE_CHECKING:
    import torch

    from byol_func.workdir.run import Run, Tracking

# When another replica is killed, PyTorch's C++ code prints a page of stack frames for every message that it could not
# deliver. `endings.shared` says which replica it was in one line. PyTorch reads this when it is loaded.
if os.environ.keys() & {'WORLD_SIZE', 'SLURM_STEP_NUM_TASKS'}:  # One process of several, see `launchers`.
    os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')

_CONFIG = config_flags.DEFINE_config_file(
    'config',
    None,
    'The experiment: a file of configs/, or a config*.json of an earlier run; by default that of --workdir.',
)
_MODE = flags.DEFINE_string('mode', 'pretrain', f'What to do: {", ".join(modes.MODES)}.')
_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'The folder to write to; by default a new one in runs/. A run that finds its own checkpoints there resumes from '
    'the newest.',
)
_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'The checkpoint to start from, or the workdir of a run; by default the newest of --workdir.'
)
_OUTPUT = flags.DEFINE_string(
    'output',
    None,
    'The file that --mode=export, predict or similar writes, or the folder of --format=hub, mlflow and --mode=shards.',
)
_IMAGES_PER_SHARD = flags.DEFINE_integer(
    'images_per_shard', 10_000, 'The number of images in a shard of --mode=shards.'
)
_FORMAT = flags.DEFINE_string(
    'format',
    None,
    f'The format of --output: {", ".join(modes.EXPORT_FORMATS)}; by default official. With --mode=embed: npz (the '
    'default) or parquet.',
)
_PUSH = flags.DEFINE_string(
    'push', None, 'With --format=hub: the repository on the Hugging Face hub, USER/NAME, to upload the folder to.'
)
_REGISTER = flags.DEFINE_string(
    'register',
    None,
    "With --format=mlflow and --mlflow_tracking_uri: the name in mlflow's registry of which the encoder becomes the "
    'newest version.',
)
_RESUME = flags.DEFINE_string(
    'resume',
    'auto',
    'How to start in a workdir that holds checkpoints of this run. auto: from the newest that can be read; a damaged '
    'one is reported and renamed to *.unusable. must: from the newest, or stop if it is damaged or there is none. '
    'never: from the beginning, or stop if there is one, because a new run would overwrite it. anyway: like auto, '
    'even if the images have changed.',
)
_SPLIT = flags.DEFINE_string(
    'split', None, 'The split for --mode=eval, embed or similar: train, val (held out from the training set) or test.'
)
_IMAGES = flags.DEFINE_string(
    'images', None, 'The image or the folder of images that --mode=predict classifies, or --mode=similar compares.'
)
_DEVICE = flags.DEFINE_string('device', 'auto', 'cpu, cuda, cuda:1, ...; auto uses a GPU if there is one.')
_FOLLOW = flags.DEFINE_bool(
    'follow', False, 'With --mode=eval: evaluate the checkpoints of a running pre-training as they appear.'
)
_DRY_RUN = flags.DEFINE_bool(
    'dry_run',
    False,
    'With --mode=pretrain: print shapes, parameters, memory, steps and hours from a few timed steps; write nothing.',
)
_LOG_EVERY_SECONDS = flags.DEFINE_float(
    'log_every_seconds', 10.0, 'Seconds between two progress lines if the output is not a terminal.'
)
_MLFLOW_TRACKING_URI = flags.DEFINE_string(
    'mlflow_tracking_uri',
    None,
    'Where mlflow tracks the run: sqlite:///FILE, a folder or http://HOST:PORT; by default nowhere.',
)
_MLFLOW_EXPERIMENT_NAME = flags.DEFINE_string(
    'mlflow_experiment_name', 'byol_experiment', 'The mlflow experiment of new runs.'
)
_MLFLOW_RUN_ID = flags.DEFINE_string(
    'mlflow_run_id',
    None,
    'The mlflow run to nest this one under, for example its pre-training; by default the run that wrote the '
    'checkpoint, if it was tracked in the same place.',
)
_MLFLOW_CHECKPOINTS = flags.DEFINE_bool('mlflow_checkpoints', False, 'Whether to upload the last checkpoint to mlflow.')

_TENSORBOARD = flags.DEFINE_bool('tensorboard', False, 'Write event files for TensorBoard to WORKDIR/tensorboard.')


def main(argv: list[str]) -> None:
    """Checks the flags and the config, and runs the mode with them (`running.run_mode`)."""
    for flag in (_WORKDIR, _CHECKPOINT, _OUTPUT):
        if (flag.value or '').startswith('--'):  # For example after an empty shell variable.
            raise UserError(f'--{flag.name}={flag.value}: expected a path, found the next flag')
    client.check_uri(_MLFLOW_TRACKING_URI.value or '')
    modes.check_flags(
        _MODE.value, {name: flags.FLAGS[name].value for name in modes.HEEDED_BY if flags.FLAGS[name].present}
    )
    from byol_func.modes import config_checks, preparing
    from byol_func.runtime import endings
    from byol_func.training import resuming, signals

    if len(argv) > 1:
        raise UserError(f'{argv[1]!r}: unexpected argument; flags look like --mode=pretrain')
    one_of('--resume', _RESUME.value, resuming.RESUME)
    if _CONFIG.value is None:
        raise UserError(_no_config())
    overrides = config_flags.get_override_values(flags.FLAGS['config'])
    preparing.complete(_CONFIG.value, overrides, _MODE.value)
    config_checks.check_labels(_MODE.value, _CONFIG.value, overrides)
    # A signal stops a follower as it stops any other program: it has nothing to resume.
    stopping = contextlib.nullcontext() if _FOLLOW.value else signals.outside_of_loops()
    with stopping, endings.shared('the same command resumes from the newest checkpoint'):
        _run(_make_run(config_checks.pick_device(_DEVICE.value)))


def _make_run(device: 'torch.device') -> 'Run':
    """Joins the other replicas, if there are any, and returns the settings of the run."""
    from byol_func.modes import preparing
    from byol_func.runtime import collectives
    from byol_func.workdir.run import Run

    config = _CONFIG.value
    earlier = find_config(_in_home(_WORKDIR.value), _in_home(_CHECKPOINT.value), _MODE.value)
    replica = preparing.start(config, device, earlier)
    workdir = _in_home(_WORKDIR.value) or ''
    if not workdir and _MODE.value != 'shards':  # The clocks of machines differ, so the first replica chooses the name.
        workdir = collectives.text_of_first_replica(_new_workdir() if collectives.replica_index() == 0 else '')
    versions = importlib.metadata.version('torch')
    where = f'{device}, {replica},' if replica else device
    trains = f' in {config.precision}' if _MODE.value in modes.TRAINING_MODES else ''
    logging.info('%s on %s%s with torch %s', _MODE.value, where, trains, versions)
    return Run(
        config=config,
        workdir=workdir,
        device=device,
        checkpoint=_in_home(_CHECKPOINT.value),
        follow=_FOLLOW.value,
        log_every_seconds=_LOG_EVERY_SECONDS.value,
        resume=_RESUME.value,
        output=_in_home(_OUTPUT.value),
        format=_FORMAT.value,
        push=_PUSH.value,
        register=_REGISTER.value,
        split=_SPLIT.value,
        images=_in_home(_IMAGES.value),
        images_per_shard=_IMAGES_PER_SHARD.value,
        command=redact(shlex.join(['python', *sys.argv])),
        tracking=_tracking(),
        tensorboard=_TENSORBOARD.value,
        missing=[],
        dry_run=_DRY_RUN.value,
    )


def _run(run: 'Run') -> None:
    """Runs the mode; if it fails with a `UserError`, removes the workdir created for it, unless it holds files."""
    from byol_func.modes import running
    from byol_func.runtime import collectives
    from byol_func.training import signals

    try:
        running.run_mode(_MODE.value, run)
        collectives.leave()
    except Stopped as stopped:
        go_on = redact(signals.how_to_go_on(sys.argv, run.workdir))
        raise Stopped(f'{stopped} Resume with: {go_on}') from None
    except UserError:
        if not _WORKDIR.value and collectives.replica_index() == 0:
            with contextlib.suppress(OSError):  # The folder is not empty.
                os.removedirs(run.workdir)
        raise


def _in_home(path: str | None) -> str | None:
    """Expands ~ in a path, because shells do not expand it after `--workdir=`."""
    return path and os.path.expanduser(path)


def _tracking() -> 'Tracking | None':
    """Returns the mlflow settings from the flags; None without --mlflow_tracking_uri."""
    from byol_func.workdir.run import Tracking

    if not _MLFLOW_TRACKING_URI.value:
        for flag in (_MLFLOW_RUN_ID, _MLFLOW_CHECKPOINTS):
            if flag.value:
                raise UserError(f'--{flag.name}={flag.value}: needs --mlflow_tracking_uri')
        return None
    return Tracking(
        uri=_MLFLOW_TRACKING_URI.value,
        experiment_name=_MLFLOW_EXPERIMENT_NAME.value,
        run_id=_MLFLOW_RUN_ID.value,
        checkpoints=_MLFLOW_CHECKPOINTS.value,
    )


def choose_config(given: Callable[[str], str | None]) -> str | None:
    """Returns the file to load the config from: --config, or else the saved config of --workdir or --checkpoint.

    Args:
      given: returns the text of a flag, None if it is not on the command line.

    Returns:
      The text for --config; None if there is no config to load.

    Raises:
      UserError: --mode is unknown.
    """
    mode = one_of('--mode', given('mode') or _MODE.default, modes.MODES)
    argument = given('config')
    if argument is None:
        argument = find_config(given('workdir'), given('checkpoint'), mode)
    if not argument:
        return argument
    found = config_files.find(argument)
    if not os.path.isfile(found.partition(':')[0]):
        raise UserError(f'--config={argument}: {config_files.no_such(argument)}')
    return found


def _no_config() -> str:
    example = '--config=FILE, for example --config=configs/digits.py'
    if _WORKDIR.value:
        return f'--workdir={_WORKDIR.value}: it holds no config of a run; expected {example}'
    return f'--config: expected {example}, or --workdir of an earlier run'


def _new_workdir() -> str:
    """Creates a new folder for a run without --workdir and returns its name; a dry run creates nothing."""
    if _MODE.value not in ('pretrain', 'preview') and not _CHECKPOINT.value:
        raise UserError(f'--mode={_MODE.value}: give --workdir of a pre-training or --checkpoint=FILE')
    path = config_flags.get_config_filename(flags.FLAGS['config']).split(':')[0]
    name = _MODE.value if path == config_files.SAVED and _CHECKPOINT.value else pathlib.Path(path).stem
    folder = stem = os.path.join('runs', f'{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}')
    for i in itertools.count(2):  # Another run may have started in the same second.
        try:
            if not _DRY_RUN.value:
                os.makedirs(folder)
            break
        except FileExistsError:
            folder = f'{stem}-{i}'
        except OSError as error:
            raise UserError(f'--workdir={folder}: cannot write there ({error.strerror})') from error
    return folder


def _usage() -> str:
    known = {name: flags.FLAGS[name] for names in usage.GROUPS.values() for name in names}
    return usage.usage(_name(), {name: (str(flag.default), flag.help) for name, flag in known.items()})


def _name() -> str:
    return 'python launch.py' if sys.argv[0].endswith('.py') else os.path.basename(sys.argv[0])


def run() -> None:
    """Runs the program with the command line of this process."""
    run_app(main, choose_config, _usage)


def command() -> None:
    """Runs the installed command: `byol-func configs`, `byol-func runs [DIR]`, or `run` with its flags."""
    config_files.register()
    name, *arguments = sys.argv[1:] or ['']
    if name not in ('configs', 'runs'):
        run()
        return
    parser = argparse.ArgumentParser(prog=f'byol-func {name}')
    if name == 'configs':
        parser.description = 'Lists the configs that --config takes, with their presets, as in --config=cifar10:small.'
        parser.parse_args(arguments)
        print(overview.configs(config_files.FOLDER))
    else:
        parser.description = 'Lists the workdirs in a folder with their status, epoch and best accuracy.'
        parser.add_argument('folder', nargs='?', type=pathlib.Path, default=pathlib.Path('runs'), metavar='DIR')
        folder = parser.parse_args(arguments).folder
        if arguments and not folder.is_dir():
            parser.error(f'{folder}: no such folder')
        print(overview.runs(folder))
