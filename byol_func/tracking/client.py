"""Makes clients of mlflow, which is first imported here, and reports errors on one line and only once."""

import os
import pathlib
import re
import tempfile
from http import HTTPStatus
from typing import Any

from absl import logging

from byol_func.errors import UserError, redact

# Defaults for variables that the user has not set: requests fail soon, because the tracker itself tries
# again; mlflow sends no telemetry; folders written by an older mlflow can still be opened.
_ENVIRONMENT = {
    'MLFLOW_HTTP_REQUEST_TIMEOUT': '5',
    'MLFLOW_HTTP_REQUEST_MAX_RETRIES': '0',
    'MLFLOW_DISABLE_TELEMETRY': 'true',
    'MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT': 'true',
    'MLFLOW_ALLOW_FILE_STORE': 'true',
    'MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR': 'false',
    'GIT_PYTHON_REFRESH': 'quiet',
}


_SQLITE = b'SQLite format 3\0'  # The first bytes of a database.
LOGIN = (
    'asks for a user name and a password, which are missing or wrong; set MLFLOW_TRACKING_USERNAME and '
    'MLFLOW_TRACKING_PASSWORD, or write them to ~/.mlflow/credentials'
)


def check_uri(uri: str) -> None:
    """Checks a tracking URI, without asking a server.

    It must show where its password ends, or else no message could leave it out. mlflow would try for minutes to open
    a database that it cannot create.

    Raises:
      UserError: it has an @ behind a slash or a space, or its database cannot be written.
    """
    _, _, place = uri.partition('://')
    before, _, _ = place.rpartition('@')
    if not place.startswith('/') and re.search(r'[/\s]', before):  # sqlite:////tmp/a@b.db is a path.
        raise UserError(
            '--mlflow_tracking_uri: has an @ behind a / or a space; in a name or password, write @, / and space as '
            '%40, %2F and %20, or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in place of both'
        )
    if (path := _database(uri)) and (reason := _unusable(path)):
        raise UserError(
            f'--mlflow_tracking_uri={uri}: {reason}; expected sqlite:///FILE in a folder that can be written'
        )


def _database(uri: str) -> str:
    """Returns the path of the sqlite database that a tracking URI names; '' if it names another place."""
    found = re.fullmatch(r'sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?', uri)
    return found[1] if found and found[1] != ':memory:' else ''


def _unusable(path: str) -> str:
    folder = os.path.dirname(path) or os.curdir
    if not os.path.isdir(folder):
        return f'there is no folder {folder}'
    if os.path.exists(path) and not os.path.isfile(path):
        return 'it is no file'
    start = b''
    try:
        with tempfile.TemporaryFile(dir=folder):  # The database needs a journal beside it.
            pass
        if os.path.exists(path):
            with open(path, 'rb+') as file:
                start = file.read(len(_SQLITE))
    except OSError as error:
        return f'cannot write there ({error.strerror})'
    if start not in (b'', _SQLITE):
        return 'the file is no sqlite database'
    return ''


def artifact_location(uri: str) -> str | None:
    """Returns where a new experiment keeps its files: beside its sqlite database; None leaves it to mlflow."""
    path = _database(uri)
    return pathlib.Path(os.path.abspath(path)).with_name('mlruns').as_uri() if path else None


def asks_for_login(error: Exception) -> bool:
    """Returns whether an error of mlflow says that a server accepts only users with a password."""
    response = getattr(error, 'response', None)  # Of the upload of a file; other requests have an error of mlflow.
    return getattr(response, 'status_code', None) == HTTPStatus.UNAUTHORIZED or (
        getattr(error, 'error_code', None) == 'UNAUTHENTICATED'
    )


def one_line(error: Exception) -> str:
    """Returns the message of an error on one line, without passwords, cut after 200 characters."""
    text = redact(' '.join(str(error).split()))
    return text if len(text) < 200 else f'{text[:200]} ...'


def import_mlflow(flag: str) -> Any:
    """Returns the module mlflow.

    Raises:
      UserError: it cannot be imported, which `flag` wants.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow
    except ImportError as error:
        raise UserError(
            f'{flag}: mlflow cannot be imported ({error}); pip install mlflow, or leave the flag out'
        ) from error
    return mlflow


def make_client(uri: str) -> Any:
    """Returns a client of mlflow, which is first imported here.

    Raises:
      UserError: mlflow cannot be imported, or it cannot use `uri`.
    """
    check_uri(uri)
    mlflow = import_mlflow(f'--mlflow_tracking_uri={redact(uri)}')
    try:
        return mlflow.MlflowClient(uri)
    except Exception as error:  # An error of SQLAlchemy, the operating system or mlflow.
        raise UserError(
            f'--mlflow_tracking_uri={redact(uri)}: cannot be used ({one_line(error)}); expected sqlite:///FILE, '
            'a folder or http://HOST:PORT'
        ) from error


class Voice:
    """Logs each warning once, even if several seeds give it."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say_once(self, words: str, *values: Any) -> None:
        """Logs a warning, unless one with the same format string `words` was logged before, with any `values`."""
        if words not in self._said:
            self._said.add(words)
            logging.warning(words, *values)
