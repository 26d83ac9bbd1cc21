"""Runs a program with absl flags and reports each mistake of a user as one line."""

import difflib
import io
import itertools
import logging as standard_logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from byol_func.errors import EXIT_STATUS, Stopped, UserError, redact
from byol_func.runtime import launchers

_MAX_LISTED = 8  # An error message does not list more names than this.
_NEAR = 0.6  # The least similarity, in 0..1, of a name suggested for an unknown one.
_PER_LEVEL = 0.15  # The penalty for each level of the config tree between two fields.
# What other programs call a field: its name here -> theirs.
_SYNONYMS = {
    'num_epochs': 'epoch epochs max_epochs n_epochs total_epochs train_epochs step steps max_steps num_steps '
    'total_steps train_steps training_steps max_iter max_iters iters iterations',
    'warmup_epochs': 'warmup warmup_steps num_warmup_steps warmup_iters',
    'base_learning_rate': 'lr base_lr blr init_lr initial_lr learning_rate',
    'weight_decay': 'wd l2 weight_decay_rate',
    'base_target_ema': 'ema ema_decay base_ema tau base_tau momentum_target target_momentum moving_average_decay',
    'batch_size': 'bs batch train_batch_size batchsize total_batch_size',
    'accumulate_steps': 'grad_accum grad_accumulation gradient_accumulation_steps accumulation_steps accum_iter',
    'random_seed': 'seed rng_seed manual_seed',
    'encoder_class': 'arch architecture backbone model model_name',
    'image_size': 'img_size input_size resolution crop_size',
    'root': 'data data_dir data_path data_root data_folder train_dir path',
    'num_workers': 'workers n_workers dataloader_workers',
    'precision': 'amp fp16 bf16 mixed_precision dtype',
    'projector_output_size': 'projection_size projection_dim proj_dim out_dim',
    'projector_hidden_size': 'projection_hidden_size hidden_dim mlp_dim',
}
MEANT = {theirs: ours for ours, names in _SYNONYMS.items() for theirs in names.split()}

# Returns the config file. Its argument is a function that returns the text of a flag, or None if it is not given.
ChooseConfig = Callable[[Callable[[str], str | None]], str | None]


def _open_closed_streams() -> None:
    """Opens the null device in place of closed standard streams, so that no other file gets their descriptors."""
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, 'r' if number == 0 else 'w', closefd=False))  # noqa: SIM115


def run_app(
    main: Callable[[list[str]], None],
    choose_config: ChooseConfig = lambda given: given('config'),
    usage: Callable[[], str] | None = None,
) -> None:
    """Runs `absl.app.run` and reports a user's mistake as one line, with exit status 1 and no traceback.

    A run that stopped on request exits with `errors.EXIT_STATUS`.

    Args:
      main: the program; it is called with the arguments that are not flags.
      choose_config: returns the file that --config names, or a default if the flag is not given.
      usage: returns the text of --help; absl's own text by default.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):  # Printing a name that the terminal cannot encode must not end the run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')

    def parse_flags(argv):
        if usage and not {'--help', '-help', '-h', '--helpshort'}.isdisjoint(argv[1:]):
            try:
                print(usage(), flush=True)
            except BrokenPipeError:  # A reader such as `head` has closed the pipe.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        try:
            argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
            argument = choose_config(lambda name: _find(argv, name)[1])
            if argument is not None:  # absl itself would report a mistake late and in few words.
                _check_overrides(_load_config(argument), argv)
                at, _, width = _find(argv, 'config')
                argv = [*argv[:at], f'--config={argument}', *argv[at + width :]]
            return flags.FLAGS(argv)
        except UserError as error:
            _fail(error)
        except flags.Error as error:
            _fail(_explain(error, argv))

    def checked_main(argv):
        try:
            main(argv)
            sys.stdout.flush()
        except BrokenPipeError:  # A reader such as `head` has closed the pipe; discard the rest.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except UserError as error:
            _fail(error)
        except Stopped as stopped:
            world = launchers.find()
            if world is None or world.rank == 0:
                print(stopped, file=sys.stderr)
            sys.exit(EXIT_STATUS)
        except KeyboardInterrupt:
            _fail('interrupted before the run began')

    _shorten_log_lines()
    app.run(checked_main, flags_parser=parse_flags)


def _shorten_log_lines() -> None:
    """Shortens log lines to their message on a terminal; in files they keep level, time and source line."""
    if sys.stderr.isatty():
        logging.get_absl_handler().setFormatter(_Message())


class _Message(standard_logging.Formatter):
    def format(self, record: standard_logging.LogRecord) -> str:
        level = f'{record.levelname.capitalize()}: ' if record.levelno >= standard_logging.WARNING else ''
        return level + record.getMessage()


def _fail(error: UserError | str) -> None:
    print('Error:', redact(' '.join(str(error).split())), file=sys.stderr)
    sys.exit(1)


def _find(argv: list[str], name: str) -> tuple[int, str | None, int]:
    """Returns the index of a flag, its text and the number of arguments it takes; (1, None, 0) if not given."""
    for i, argument in enumerate(argv[1:], start=1):
        if match := re.fullmatch(rf'--?{name}(?:=(.*))?', argument, re.DOTALL):
            if match[1] is None and i + 1 < len(argv):
                return i, argv[i + 1], 2
            return i, match[1] or '', 1
    return 1, None, 0


def _load_config(argument: str) -> ConfigDict:
    """Returns the config that --config names; errors name the faulty line of its file."""
    path = argument.split(':')[0]
    if not os.path.isfile(path):
        raise UserError(f'--config={argument}: no such file, expected one like configs/digits.py')
    try:
        config = flags.FLAGS['config'].parser.parse(argument)
    except Exception as error:  # A user's file may raise anything.
        raise UserError(explain_file(error, argument, path)) from error
    check_is_config(config, argument)
    return config


def check_is_config(config: Any, argument: str) -> None:
    """Raises a UserError if the function get_config of the file of --config returned anything but a config."""
    if not isinstance(config, ConfigDict):
        found = article(type(config).__name__)
        raise UserError(f'--config={argument}: get_config() returned {found}, expected a ConfigDict')


def explain_file(error: BaseException, argument: str, path: str) -> str:
    """Returns the line of a config file that is at fault, and why.

    Args:
      error: what loading it raised.
      argument: the value of --config.
      path: its file.
    """
    chain = [error]
    while before := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(before)
    for one in chain:
        if isinstance(one, UserError):
            return str(one)
        if isinstance(one, SyntaxError):
            return f'--config={argument}: {one.filename}, line {one.lineno}: {one.msg}'
        for frame in reversed(traceback.extract_tb(one.__traceback__)):
            if os.path.abspath(frame.filename) == os.path.abspath(path):
                return f'--config={argument}: line {frame.lineno}: {type(one).__name__}: {one}'
    words = str(chain[-1])  # The file has no get_config, or get_config takes no preset.
    if isinstance(chain[-1], TypeError) and words.startswith('get_config() '):
        words = 'it needs a preset, after a colon' if 'missing' in words else 'it has no presets'
    return f'--config={argument}: {words}'


def _check_overrides(config: ConfigDict, argv: list[str]) -> None:
    """Raises `UserError` for a --config.FIELD=VALUE whose field the config does not have."""
    for override in (match[1] for arg in argv if (match := re.match(r'--?(?:no)?config\.([\w.]+)', arg))):
        fields, prefix = config, 'config'
        for key in override.split('.'):
            if not isinstance(fields, ConfigDict):
                raise UserError(f'--config.{override}: {prefix} is {article(type(fields).__name__)} without fields')
            if key not in fields:
                raise UserError(f'--{unknown_field(f"{prefix}.{key}", config)}')
            fields, prefix = fields[key], f'{prefix}.{key}'


def _explain(error: flags.Error, argv: list[str]) -> str:
    """Returns one line about a flag that absl rejects."""
    if isinstance(error, flags.UnrecognizedFlagError):
        if error.flagname.startswith('config.'):
            return f'--{error.flagname}: needs --config=FILE, for example --config=configs/digits.py'
        close = difflib.get_close_matches(error.flagname, list(flags.FLAGS), n=1)
        hint = f'did you mean --{close[0]}?' if close else '--help lists all flags'
        return f'--{error.flagname}: unknown flag; {hint}'
    # Not every absl parser names the type that it expects, and its error holds the flag and the value only as text.
    # The cases 'no integer' to 'no number' of tests/modes/test_bad_input.py fail when absl rephrases it.
    match = re.match(r'flag --([\w.]+)=(.*?): ', str(error), re.DOTALL)
    if isinstance(error, flags.IllegalFlagValueError) and match and match[1] in flags.FLAGS:
        return f'--{match[1]}={match[2]}: expected {article(flags.FLAGS[match[1]].flag_type())}'
    return str(error)


def unknown_field(field: str, config: ConfigDict) -> UserError:
    """Returns the error for a field that a config does not have; it suggests the nearest name in the whole tree.

    A name that other programs use, such as 'lr', stands for the field that means the same here.

    Args:
      field: the full name of the field, such as 'config.dataset.image_size'.
      config: the whole config.
    """
    *sections, given = field.split('.')[1:]
    name = MEANT.get(given.lower(), given)

    def likeness(candidate: str) -> float:
        *others, other = candidate.split('.')
        if not (others == sections or _is_chosen(others, config)) or name != given and name != other:
            return 0.0
        ratio = 1.0 if name in other else difflib.SequenceMatcher(a=name, b=other).ratio()
        shared = len(os.path.commonprefix([sections, others]))
        return (ratio - _PER_LEVEL * (len(sections) + len(others) - 2 * shared)) if ratio >= _NEAR else 0.0

    best = max(_names(config), key=likeness)
    section = config.get(sections[0]) if len(sections) == 1 else None
    siblings = section if isinstance(section, ConfigDict) else config
    if likeness(best) > 0:
        hint = f'did you mean config.{best}?'
        if name.endswith('_epochs') and ('step' in given or 'iter' in given):
            hint += ' It takes fractions: the steps of an epoch are the images divided by batch_size'
    elif len(siblings) <= _MAX_LISTED:
        hint = f'expected one of {", ".join(siblings) or "none"}'
    else:
        hint = 'configs/byol.py explains every field'
    return UserError(f'{field}: unknown field; {hint}')


def _is_chosen(sections: Sequence[str], config: ConfigDict) -> bool:
    """Returns whether a section takes effect, as the options of an optimiser do that `config.optimizer` names."""
    inside: Any = config
    for section, option in itertools.zip_longest(sections, sections[1:]):
        if section == 'optimizer_config' and option and option != inside.get('optimizer', option):
            return False
        inside = inside[section]
    return True


def _names(config: ConfigDict, prefix: str = '') -> Iterator[str]:
    for name, value in config.items():
        yield f'{prefix}{name}'
        if isinstance(value, ConfigDict):
            yield from _names(value, f'{prefix}{name}.')


def article(name: str) -> str:
    """Returns the name with its indefinite article: 'an int', 'a bool'."""
    return f'{"an" if name[0] in "aeiou" else "a"} {name}'
