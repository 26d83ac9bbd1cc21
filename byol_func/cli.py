"""Runs a program with absl flags and reports each mistake on the command line in one line."""

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable

from absl import app, flags
from ml_collections import ConfigDict

from byol_func.errors import EXIT_STATUS, Stopped, UserError
from byol_func.runtime import collectives


def run_app(main: Callable[[list[str]], None]) -> None:
    """`absl.app.run` with a user's mistakes told in one line and exit status 1, without a traceback.

    A run that stopped on request ends with `errors.EXIT_STATUS`.
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
        except Stopped as stopped:
            if collectives.replica_index() == 0:
                print(stopped, file=sys.stderr)
            sys.exit(EXIT_STATUS)
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
        raise UserError(f'--config={argument}: get_config() returned {article(found)}, expected a ConfigDict')


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
                return f'--config.{override}: {prefix} is {article(type(fields).__name__)} without fields'
            if key not in fields:
                return f'--{unknown_field(prefix, key, fields)}'
            fields, prefix = fields[key], f'{prefix}.{key}'
    return None


def _explain_value(error: Exception) -> str | None:
    """Absl's 'flag --name=value: reason', with the type in place of a reason."""
    match = re.match(r'flag --([\w.]+)=(.*?): ', str(error), re.DOTALL)
    if not isinstance(error, flags.IllegalFlagValueError) or not match:
        return None
    return f'--{match[1]}={match[2]}: expected {article(flags.FLAGS[match[1]].flag_type())}'


def unknown_field(prefix: str, key: str, fields: ConfigDict) -> UserError:
    """The error for `prefix.key`, a field that is not among `fields`; it names the nearest one."""
    close = difflib.get_close_matches(str(key), fields.keys(), n=1)
    hint = f'did you mean {close[0]}?' if close else f'expected one of {", ".join(fields)}'
    return UserError(f'{prefix}.{key}: unknown field; {hint}')


def article(name: str) -> str:
    """The name with its indefinite article: 'an int', 'a bool'."""
    return f'{"an" if name[0] in "aeiou" else "a"} {name}'
