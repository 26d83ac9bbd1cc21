"""A user's mistakes on the command line and in config files, each told in one line."""

import difflib
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from absl import app, flags
from ml_collections import ConfigDict

from byol_func import stopping
from byol_func.runtime import collectives, compilers
from byol_func.runtime.precision import DTYPES
from byol_func.utils.helpers import UserError, one_of


def check_fields(config: Any, reference: ConfigDict, prefix: str = 'config') -> None:
    """Checks that a config has the fields of a reference, of the same types, and no others.

    Raises:
      UserError: a field is unknown, missing or of another type.
    """
    for key in config:
        if key not in reference:
            raise _unknown_field(prefix, key, reference)
    for key, expected in reference.items():
        if key not in config:
            raise UserError(f'{prefix}.{key}: missing')
        value = config[key]
        if not _same_type(value, expected):
            raise UserError(f'{prefix}.{key}={value!r}: expected {_article(type(expected).__name__)}')
        if isinstance(expected, ConfigDict):
            check_fields(value, expected, f'{prefix}.{key}')


def _unknown_field(prefix: str, key: str, fields: ConfigDict) -> UserError:
    close = difflib.get_close_matches(str(key), fields.keys(), n=1)
    hint = f'did you mean {close[0]}?' if close else f'expected one of {", ".join(fields)}'
    return UserError(f'{prefix}.{key}: unknown field; {hint}')


def _same_type(value: Any, expected: Any) -> bool:
    if isinstance(expected, ConfigDict) or isinstance(value, ConfigDict):
        return isinstance(value, ConfigDict) and isinstance(expected, ConfigDict)
    if expected is None or value is None:  # A placeholder: None stands for a rule.
        return True
    return type(value) is type(expected) or (type(expected) is float and type(value) is int)


def _article(name: str) -> str:
    return f'{"an" if name[0] in "aeiou" else "a"} {name}'


def check_values(config: ConfigDict) -> None:
    """Checks numbers that no other function looks at, and names that would be looked at late.

    Raises:
      UserError: a number is out of its range, or a name is unknown.
    """
    for field, low, high in _RANGES:
        value = config
        for key in field.split('.'):
            value = value[key]
        if value is not None and not (low <= value and (high is None or value <= high)):
            accepted = f'at least {low}' if high is None else f'{low} to {high}'
            raise UserError(f'config.{field}={value!r}: expected {accepted}')
    one_of('config.checkpointing.best_is', config.checkpointing.best_is, ('auto', 'highest', 'lowest'))
    one_of('config.precision', config.precision, tuple(DTYPES))
    for section in ('', 'linear_eval.', 'fine_tune.'):
        fields = config[section[:-1]] if section else config
        one_of(f'config.{section}optimizer', fields['optimizer'], tuple(fields['optimizer_config']))
        schedule = fields['lr_schedule']['name']
        one_of(f'config.{section}lr_schedule.name', schedule, ('cosine', 'constant'))
        if section and fields['cache_features'] and not fields['freeze_backbone']:
            field = f'config.{section}cache_features'
            raise UserError(f'{field}=True: expected False unless freeze_backbone=True')
        if section and fields['label_files'] and fields['label_fraction'] < 1.0:
            raise UserError(
                f'config.{section}label_files={fields["label_files"]!r}: expected no list of files beside '
                f'config.{section}label_fraction={fields["label_fraction"]}'
            )
        if section:
            _check_sweep(config, section[:-1])


def _check_sweep(config: ConfigDict, mode: str) -> None:
    for name, values in config[mode].sweep.items():
        numbers = all(isinstance(v, (int, float)) and math.isfinite(v) and v >= 0 for v in values)
        if not numbers or len(set(values)) < len(values):
            raise UserError(
                f'config.{mode}.sweep.{name}={tuple(values)!r}: expected different numbers of at least 0, '
                'such as (0.1,0.3,1.0), or ()'
            )


# Of moving averages: 1 would never take anything up, and what float32 rounds to 1 neither.
_MAX_DECAY = 0.999999
_RANGES = (
    ('random_seed', 0, None),
    ('num_seeds', 1, None),
    ('num_epochs', 0, None),
    ('batch_size', 2, None),
    ('image_size', 1, None),
    ('eval_crop_fraction', 0.01, 1.0),
    ('base_target_ema', 0.0, 1.0),
    ('lr_schedule.base_learning_rate', 0.0, None),
    ('network.projector_hidden_size', 1, None),
    ('network.projector_output_size', 1, None),
    ('network.predictor_hidden_size', 1, None),
    ('network.bn_config.decay_rate', 0.0, _MAX_DECAY),
    ('network.bn_config.eps', 0.0, None),
    ('log_every_steps', 1, None),
    ('dataset.max_bad_fraction', 0.0, 1.0),
    ('dataset.max_gib', 0.0, None),
    ('preview.num_images', 0, 64),
    ('preview.num_draws', 1, 16),
    ('dataset.num_workers', 0, None),
    ('evaluation.batch_size', 1, None),
    ('eval_every_epochs', 0.0, None),
    ('monitoring.health_every_steps', 1, None),
    ('monitoring.health_images', 2, None),
    ('monitoring.knn_bank_size', 1, None),
    ('checkpointing.save_every_seconds', 0.0, None),
    ('checkpointing.save_every_steps', 0, None),
    ('checkpointing.keep', 1, None),
    ('checkpointing.keep_every_epochs', 0.0, None),
    *(
        (f'{mode}.{field}', low, high)
        for mode in ('linear_eval', 'fine_tune')
        for field, low, high in (
            ('num_epochs', 0, None),
            ('batch_size', 1, None),
            ('label_fraction', 1e-6, 1.0),
            ('lr_schedule.base_learning_rate', 0.0, None),
            ('bn_config.decay_rate', 0.0, _MAX_DECAY),
        )
    ),
)


def pick_device(name: str) -> torch.device:
    """The device of that name; 'auto' takes a GPU if there is one, under torchrun that of the local rank.

    Raises:
      UserError: no such device here.
    """
    if name == 'auto':
        device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    else:
        try:
            device = torch.device(name)
        except RuntimeError:
            device = None
    if device is None or device.type not in ('cpu', 'cuda'):
        raise UserError(f'--device={name}: expected auto, cpu, cuda or cuda:N')
    if device.type == 'cuda':
        _check_gpu(name, device.index)
    return device


def _check_gpu(name: str, index: int | None) -> None:
    replicated = 'WORLD_SIZE' in os.environ
    if replicated and index is not None:
        raise UserError(f'--device={name}: every process of torchrun would take that GPU; expected auto, cpu or cuda')
    found = torch.cuda.device_count()
    if (index or 0) >= found:
        raise UserError(f'--device={name}: {found} GPUs found; expected auto, cpu or a GPU below that')
    if replicated and int(os.environ['LOCAL_RANK']) >= found:
        raise UserError(f'--device={name}: {found} GPUs found; expected --nproc-per-node={found} of torchrun or less')


def check_compiler(compiled: bool | None, device: torch.device) -> None:
    """Checks that steps can be compiled on this machine, where `config.compile=True` insists on it.

    Raises:
      UserError: a program is missing, or the GPU is too old.
    """
    missing = compilers.missing(device) if compiled else None
    if missing:
        raise UserError(f'config.compile=True: expected {missing}; without it add --config.compile=False')


def run_app(main: Callable[[list[str]], None]) -> None:
    """`absl.app.run` with a user's mistakes told in one line and exit status 1, without a traceback.

    A run that stopped on request ends with `stopping.EXIT_STATUS`.
    """

    def parse_flags(argv):
        try:
            _check_config_file(argv)  # Parsing would leave a missing file to be found out later.
            arguments = flags.FLAGS(argv)
            _check_config_type(argv)
            return arguments
        except UserError as error:
            _fail(error)
        except Exception as error:  # Whatever a user's config file may raise.
            text = _explain(error, argv)
            if text is None:
                raise
            _fail(text)

    def checked_main(argv):
        try:
            main(argv)
        except UserError as error:
            _fail(error)
        except stopping.Stopped as stopped:
            if collectives.replica_index() == 0:
                print(stopped, file=sys.stderr)
            sys.exit(stopping.EXIT_STATUS)
        except KeyboardInterrupt:
            _fail('interrupted before anything was begun')

    app.run(checked_main, flags_parser=parse_flags)


def _fail(error: UserError | str) -> None:
    print('Error:', ' '.join(str(error).split()), file=sys.stderr)
    sys.exit(1)


def _config_argument(argv: list[str]) -> str | None:
    """The value of --config, with its preset."""
    for i, argument in enumerate(argv):
        if match := re.fullmatch(r'--?config(?:=(.*))?', argument):
            return match[1] if match[1] is not None else argv[i + 1] if i + 1 < len(argv) else None
    return None


def _check_config_file(argv: list[str]) -> None:
    argument = _config_argument(argv)
    if argument is not None and not os.path.isfile(argument.split(':')[0]):
        raise UserError(f'--config={argument}: no such file, expected one like configs/digits.py')


def _check_config_type(argv: list[str]) -> None:
    argument, config = _config_argument(argv), flags.FLAGS['config'].value
    if argument is not None and not isinstance(config, ConfigDict):
        found = type(config).__name__
        raise UserError(f'--config={argument}: get_config() returned {_article(found)}, expected a ConfigDict')


def _explain(error: Exception, argv: list[str]) -> str | None:
    """One line about an error of parsing the flags; None if it is no mistake of the user."""
    if isinstance(error, flags.UnrecognizedFlagError):
        if error.flagname.startswith('config.') and _config_argument(argv) is None:
            return f'--{error.flagname}: needs --config=FILE, for example --config=configs/digits.py'
        close = difflib.get_close_matches(error.flagname, list(flags.FLAGS), n=1)
        hint = f'did you mean --{close[0]}?' if close else '--help lists what is accepted'
        return f'--{error.flagname}: unknown flag; {hint}'
    return (
        _explain_config_file(error, argv)
        or _explain_override(argv)
        or _explain_value(error)
        or (str(error) if isinstance(error, flags.Error) else None)
    )


def _explain_config_file(error: Exception, argv: list[str]) -> str | None:
    """Finds the line of the config file in the errors that absl and ml_collections made of one."""
    argument = _config_argument(argv)
    path = argument.split(':')[0] if argument else ''
    chain = [error]
    while before := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(before)
    for one in chain:
        if isinstance(one, SyntaxError):
            return f'--config={argument}: {one.filename}, line {one.lineno}: {one.msg}'
        for frame in reversed(traceback.extract_tb(one.__traceback__)):
            if os.path.abspath(frame.filename) == os.path.abspath(path):
                return f'--config={argument}: line {frame.lineno}: {type(one).__name__}: {one}'
    if 'get_config' in str(chain[-1]):  # There is none, or it takes no preset.
        return f'--config={argument}: {chain[-1]}'
    return None


def _explain_override(argv: list[str]) -> str | None:
    """Finds the --config.FIELD=VALUE whose field the config does not have."""
    argument = _config_argument(argv)
    overrides = [match[1] for arg in argv if (match := re.match(r'--?config\.([\w.]+)', arg))]
    config = flags.FLAGS['config'].parser.parse(argument) if argument and overrides else None
    for override in overrides:
        fields, prefix = config, 'config'
        for key in override.split('.'):
            if not isinstance(fields, ConfigDict):
                return f'--config.{override}: {prefix} is {_article(type(fields).__name__)} without fields'
            if key not in fields:
                return f'--{_unknown_field(prefix, key, fields)}'
            fields, prefix = fields[key], f'{prefix}.{key}'
    return None


def _explain_value(error: Exception) -> str | None:
    """Absl's 'flag --name=value: reason', with the type in place of a reason."""
    match = re.match(r'flag --([\w.]+)=(.*?): ', str(error), re.DOTALL)
    if not isinstance(error, flags.IllegalFlagValueError) or not match:
        return None
    return f'--{match[1]}={match[2]}: expected {_article(flags.FLAGS[match[1]].flag_type())}'
