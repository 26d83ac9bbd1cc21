"""Errors that a user can fix: each message is one line that says what is wrong and what is accepted."""

import re
from collections.abc import Collection
from typing import Any


class UserError(Exception):
    """A user's mistake; the message is one line that names the field, its value and the accepted values."""


def one_of(field: str, value: Any, accepted: Collection) -> Any:
    """Returns `accepted[value]` if `accepted` is a dict, else `value` itself, after checking that it is accepted.

    Raises:
      UserError: `value` is not in `accepted`; the message lists the accepted values.
    """
    if value not in accepted:
        names = ', '.join(str(name) for name in accepted)
        raise UserError(f'{field}={value!r}: expected one of {names}')
    return accepted[value] if isinstance(accepted, dict) else value


def counted(number: float, noun: str, form: str = '') -> str:
    """Returns a number, formatted by `form`, with its noun: '1 image', '2 classes', '0.5 epochs'."""
    text = f'{number:{form}}'
    ending = 'es' if noun.endswith(('s', 'x', 'tch', 'sh')) else 's'
    return f'{text} {noun}' if text == '1' else f'{text} {noun}{ending}'


def as_arguments(text: str) -> str:
    """Returns a message with the names of arguments in Python in place of those flags that are the same there."""
    return re.sub(r'--(?=(?:workdir|checkpoint|resume|device|mode|config)\b)', '', text)


def redact(text: str) -> str:
    """Removes the name and password from every 'scheme://name:password@host' in a text."""
    return re.sub(r'(?<=://)[^/\s]+@', '', text)


# The exit status of a run that stopped on request and can be resumed: EX_TEMPFAIL of sysexits.h, "try again".
EXIT_STATUS = 75


class Stopped(Exception):
    """Raised when a run has stopped on request; the message says in one line where it stopped."""
