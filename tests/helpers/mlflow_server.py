"""A real mlflow server on localhost for the tests, and what it has of a run."""

import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from runs import records

LIMIT = 400.0  # seconds
# A password is checked in half a second, and then known until it changes.
_AUTH = """[mlflow]
default_permission = READ
database_uri = sqlite:///basic_auth.db
admin_username = admin
auth_cache_ttl_seconds = 3600
"""


class Server(NamedTuple):
    """A tracking server with its data in `folder`."""

    process: subprocess.Popen
    uri: str

    def kill(self) -> None:
        """Kills it and its workers, as a power failure would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def wait_for(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.1)
    raise TimeoutError


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def serve(folder: pathlib.Path, port: int, password: str | None = None) -> Server:
    """Starts a server; with a password it answers only the user `admin` and those that admin adds."""
    command = [sys.executable, '-m', 'mlflow', 'server', '--workers=1', '--host=127.0.0.1', f'--port={port}']
    command += [f'--backend-store-uri=sqlite:///{folder}/m.db', f'--artifacts-destination={folder}/artifacts']
    environ = dict(os.environ)
    if password:
        command.append('--app-name=basic-auth')
        (folder / 'auth.ini').write_text(_AUTH)
        environ |= {'MLFLOW_AUTH_ADMIN_PASSWORD': password, 'MLFLOW_FLASK_SERVER_SECRET_KEY': 'key'}
        environ |= {'MLFLOW_AUTH_CONFIG_PATH': f'{folder}/auth.ini'}
    with open(folder / 'server.log', 'a') as log:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log, start_new_session=True)

    def answers() -> bool:
        assert process.poll() is None, (folder / 'server.log').read_text()
        with socket.socket() as connection:
            return connection.connect_ex(('127.0.0.1', port)) == 0

    wait_for(answers)
    return Server(process, f'http://127.0.0.1:{port}')


def client_of(uri: str):
    import mlflow

    return mlflow.MlflowClient(uri)


@functools.cache
def _tables() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        client_of(f'sqlite:///{folder}/m.db').search_experiments()
        return pathlib.Path(folder, 'm.db').read_bytes()


def database(path: pathlib.Path) -> str:
    """The URI of a new database in a file; its tables, which mlflow makes in seconds, are copied."""
    path.write_bytes(_tables())
    return f'sqlite:///{path}'


def run_id_of(workdir: pathlib.Path, mode: str = 'pretrain') -> str:
    return json.loads((workdir / 'mlflow.json').read_text())[mode]['run_id']


def check_history(uri: str, workdir: pathlib.Path, mode: str = 'pretrain') -> None:
    """The server has every number of `metrics.jsonl` once, and the run is finished.

    Where a killed run repeats a step, its rate is another; the server keeps the first.
    """
    client, run_id, lines = client_of(uri), run_id_of(workdir, mode), records(workdir, mode)
    assert lines
    for name in {name for line in lines for name in line} - {'mode', 'step'}:
        # Several lines of a step have its epoch in common.
        expected = list(dict.fromkeys((line['step'], line[name]) for line in lines if name in line))
        history = client.get_metric_history(run_id, f'{mode}/{name}')
        found = sorted((metric.step, metric.value) for metric in history)
        if name == 'images_per_second':
            found, expected = ([step for step, _ in points] for points in (found, expected))
        assert found == expected, name
    assert client.get_run(run_id).info.status == 'FINISHED'
