"""A client of mlflow, which is imported here for the first time; its errors in one line, each told once."""

import os
import re
from typing import Any

from absl import logging

from byol_func.errors import UserError

# Unless the user has set them: fail soon, this module tries again by itself; no word to third
# parties; the folder of an older mlflow still opens.
_ENVIRONMENT = {
    'MLFLOW_HTTP_REQUEST_TIMEOUT': '5',
    'MLFLOW_HTTP_REQUEST_MAX_RETRIES': '0',
    'MLFLOW_DISABLE_TELEMETRY': 'true',
    'MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT': 'true',
    'MLFLOW_ALLOW_FILE_STORE': 'true',
    'GIT_PYTHON_REFRESH': 'quiet',
}


def redact(uri: str) -> str:
    """The text without the name and password of 'scheme://name:password@host'."""
    return re.sub(r'(?<=://)[^/\s@]+@', '', uri)


def one_line(error: Exception) -> str:
    """What an error says, on one line, not too long and without passwords."""
    text = redact(' '.join(str(error).split()))
    return text if len(text) < 200 else f'{text[:200]} ...'


def make_client(uri: str) -> Any:
    """A client of mlflow, which is imported here for the first time.

    Raises:
      UserError: it is not installed, or cannot do anything with `uri`.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow
    except ImportError as error:
        raise UserError(
            f'--mlflow_tracking_uri={redact(uri)}: mlflow cannot be imported ({error}); '
            'pip install mlflow, or leave the flag out'
        ) from error
    try:
        return mlflow.MlflowClient(uri)
    except Exception as error:  # SQLAlchemy's, the operating system's or mlflow's own.
        raise UserError(
            f'--mlflow_tracking_uri={redact(uri)}: cannot be used ({one_line(error)}); expected sqlite:///FILE, '
            'a folder or http://HOST:PORT'
        ) from error


class Voice:
    """Says each warning once, whichever of several seeds comes to it first."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say_once(self, words: str, *values: Any) -> None:
        """Logs a warning; `words` are a format for `values`, and what was said once is told by them alone."""
        if words not in self._said:
            self._said.add(words)
            logging.warning(words, *values)
