"""Errors that a user can mend: each is one line that says what is wrong and what is accepted."""

from collections.abc import Collection
from typing import Any


class UserError(Exception):
    """A user's mistake: one line that names the field, its value and what is accepted."""


def one_of(field: str, value: Any, accepted: Collection) -> Any:
    """Returns `accepted[value]` of a mapping, or `value` if it is in the collection.

    Raises:
      UserError: `value` is not in `accepted`; the message lists what is.
    """
    if value not in accepted:
        names = ', '.join(str(name) for name in accepted)
        raise UserError(f'{field}={value!r}: expected one of {names}')
    return accepted[value] if isinstance(accepted, dict) else value


# A run that stopped on request and can go on; EX_TEMPFAIL of sysexits.h, "try again".
EXIT_STATUS = 75


class Stopped(Exception):
    """A loop has stopped on request; the message says where, in one line."""
