"""Tracking where something fails: the run, the server, what a user asks for; and without mlflow."""

import json
import pathlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import ml_collections
import pytest
import torch

from byol_func.tracking import finder
from byol_func.tracking import mlflow_tracker as tracker_module
from byol_func.tracking.mlflow_tracker import Tracker
from byol_func.workdir.run import Run, Tracking
from cli import ROOT, run_launch, start_launch, succeed, tiny_digits
from mlflow_server import LIMIT, check_history, client_of, free_port, run_id_of, serve, wait_for
from runs import records

pytestmark = pytest.mark.slow


def test_a_server_that_dies_stops_nothing(tmp_path):
    """It is killed while the run trains; started again, it gets what it missed."""
    port = free_port()
    server = serve(tmp_path, port)
    argv = [*tiny_digits(num_epochs=6), f'--workdir={tmp_path}/run', f'--mlflow_tracking_uri={server.uri}']
    running = start_launch(*argv, cwd=tmp_path)
    wait_for((tmp_path / 'run/mlflow.json').exists)
    server.kill()
    outcome = running.wait()
    assert outcome.code == 0, outcome.stderr
    assert len(records(tmp_path / 'run', 'pretrain')) > 60
    assert outcome.stderr.count('accepts no data') == 1
    assert outcome.stderr.count('has not received everything') == 1
    server = serve(tmp_path, port)
    try:
        succeed(*argv, cwd=tmp_path)
        check_history(server.uri, tmp_path / 'run')
    finally:
        server.kill()


def test_a_server_that_is_down_from_the_start(tmp_path):
    argv = [*tiny_digits(num_seeds=2), f'--mlflow_tracking_uri=http://127.0.0.1:{free_port()}']
    outcome = succeed(*argv, f'--workdir={tmp_path}/run', '--mlflow_run_id=abc', cwd=tmp_path)
    assert (tmp_path / 'run/summary.json').exists() and not (tmp_path / 'run/mlflow.json').exists()
    assert outcome.stderr.count('accepts no data') == 1


def test_a_server_that_never_answers(tmp_path, monkeypatch):
    """It takes the connection and says nothing."""
    monkeypatch.setenv('MLFLOW_HTTP_REQUEST_TIMEOUT', '1')
    with socket.create_server(('127.0.0.1', 0)) as silent:
        argv = [*tiny_digits(), f'--mlflow_tracking_uri=http://127.0.0.1:{silent.getsockname()[1]}']
        outcome = succeed(*argv, f'--workdir={tmp_path}/run', cwd=tmp_path)
    assert (tmp_path / 'run/summary.json').exists()
    assert outcome.stderr.count('accepts no data') == 1


def test_a_folder_and_a_failed_run(tmp_path, monkeypatch):
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    argv = [*tiny_digits(lr_schedule__base_learning_rate=1e30), f'--workdir={tmp_path}/run']
    outcome = run_launch(*argv, f'--mlflow_tracking_uri={tmp_path}/tracked', cwd=tmp_path)
    assert outcome.code == 1 and 'expected finite numbers' in outcome.stderr
    run = client_of(f'{tmp_path}/tracked').get_run(run_id_of(tmp_path / 'run'))
    assert run.info.status == 'FAILED' and 'pretrain/loss' in run.data.metrics


def test_a_failed_run_has_no_results_of_an_earlier_one(tmp_path):
    """In a workdir where the same mode came to its end before, untracked."""
    succeed(*tiny_digits(), f'--workdir={tmp_path}/run', cwd=tmp_path)
    summary = json.loads((tmp_path / 'run/summary.pretrain.json').read_text())
    for path in tmp_path.glob('run/checkpoints/*'):
        path.unlink()
    time.sleep(1.1)  # Times of files are compared in seconds.
    uri = f'sqlite:///{tmp_path}/m.db'
    argv = [*tiny_digits(lr_schedule__base_learning_rate=1e30), f'--workdir={tmp_path}/run']
    assert run_launch(*argv, f'--mlflow_tracking_uri={uri}', cwd=tmp_path).code == 1
    client, run_id = client_of(uri), run_id_of(tmp_path / 'run')
    run = client.get_run(run_id)
    assert run.info.status == 'FAILED' and not set(summary) & set(run.data.metrics)
    files = {file.path for file in client.list_artifacts(run_id)}
    assert 'config.pretrain.json' in files and 'summary.pretrain.json' not in files


class _SlowClient:
    """A server that takes a second for every answer and has the histories of 50 metrics."""

    names = [f'pretrain/{i}' for i in range(50)]

    def __init__(self):
        from mlflow.entities import Metric, Run, RunData, RunInfo

        info = RunInfo('id', '0', 'me', 'KILLED', 0, None, 'active')
        self.run = Run(info, RunData([Metric(name, 0.0, 0, 0) for name in self.names]))
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Callable:
        def answer(*args, **kwargs):
            time.sleep(1.0)
            self.asked.append(threading.current_thread().name)
            return self.run if name == 'get_run' else []

        return answer


def test_a_slow_server_does_not_delay_a_resumed_run(tmp_path, monkeypatch):
    config = ml_collections.ConfigDict(dict(final_linear_eval=False))
    where = Tracking('http://slow', 'e', None, False)
    run = Run(config, str(tmp_path), torch.device('cpu'), None, 1.0, tracking=where)
    client = _SlowClient()
    monkeypatch.setattr(finder, 'make_client', lambda uri: client)
    monkeypatch.setattr(tracker_module, 'make_client', lambda uri: client, raising=False)
    monkeypatch.setattr(finder.Finder, '_digest', lambda self: 'same')
    (tmp_path / 'mlflow.json').write_text(
        json.dumps({'pretrain': {'uri': 'http://slow', 'run_id': 'id', 'config': 'same'}})
    )
    start = time.monotonic()
    tracker = Tracker(run, 'pretrain', None)
    assert time.monotonic() - start < 3.0 and client.asked == ['MainThread']
    wait_for(lambda: len(client.asked) > 3)
    assert set(client.asked[1:]) == {'mlflow pretrain'}
    monkeypatch.setattr(tracker, '_patience', 0.0)
    tracker.close('KILLED')


# Bad input.


def _refused(*argv: str, cwd: pathlib.Path) -> str:
    outcome = run_launch(*tiny_digits(), f'--workdir={cwd}/refused', *argv, cwd=cwd)
    lines = [line for line in outcome.stderr.splitlines() if line.startswith('Error:')]
    assert outcome.code == 1 and len(lines) == 1 and 'Traceback' not in outcome.stderr, outcome.stderr
    assert not [path for path in (cwd / 'refused').glob('*') if path.name != '.lock']  # Before the work, not after it.
    return lines[0]


@pytest.mark.parametrize('run_id', ['0' * 32, 'deleted', 'a b'])
def test_a_run_that_does_not_exist(server, run_id, tmp_path):
    if run_id == 'deleted':
        client = client_of(server.uri)
        run_id = client.create_run('0').info.run_id
        client.delete_run(run_id)
    argv = [f'--mlflow_tracking_uri={server.uri}', f'--mlflow_run_id={run_id}']
    error = _refused(*argv, cwd=tmp_path)
    assert f'--mlflow_run_id={run_id}: no such run in {server.uri}' in error


def test_a_deleted_experiment(server, tmp_path):
    client = client_of(server.uri)
    client.delete_experiment(client.create_experiment('gone'))
    argv = [f'--mlflow_tracking_uri={server.uri}', '--mlflow_experiment_name=gone']
    assert '--mlflow_experiment_name=gone: deleted' in _refused(*argv, cwd=tmp_path)


@pytest.mark.parametrize(
    'argv, expected',
    [
        (['--mlflow_run_id=abc'], '--mlflow_run_id=abc: needs --mlflow_tracking_uri'),
        (['--mlflow_tracking_uri=sqlite:////dev/null/m.db'], '--mlflow_tracking_uri=sqlite:////dev/null/m.db: '),
        (['--mlflow_tracking_uri=nonsense://me:secret@x'], '--mlflow_tracking_uri=nonsense://x: '),
        (['--mlflow_tracking_uri=http://me:se/secret@x', '--mode=preview'], 'write @, / and space as %40, %2F and %20'),
        (['--mlflow_tracking_uri=http://me:secret@x', '--mode=preview'], '--mlflow_tracking_uri=http://x: only with'),
    ],
)
def test_a_place_that_cannot_be_used(argv, expected, tmp_path):
    error = _refused(*argv, cwd=tmp_path)
    assert expected in error and 'secret' not in error


# Without mlflow.

_WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'mlflow':
            attempts.append(name)
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

attempts = []
sys.meta_path.insert(0, Blocker())
import torch, launch
torch.set_num_threads(1)
try:
    launch.run()
finally:
    print('attempts:', attempts)
"""


def _without_mlflow(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, '-c', _WITHOUT, *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)


def test_nothing_needs_mlflow(tmp_path):
    done = _without_mlflow(*tiny_digits(batch_size=512), f'--workdir={tmp_path}/run')
    assert done.returncode == 0, done.stderr
    assert 'attempts: []' in done.stdout  # Nothing as much as tried to import it.
    assert (tmp_path / 'run/summary.json').exists()


def test_the_flag_needs_mlflow(tmp_path):
    argv = [*tiny_digits(), f'--workdir={tmp_path}/run', f'--mlflow_tracking_uri=sqlite:///{tmp_path}/m.db']
    done = _without_mlflow(*argv)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'mlflow cannot be imported' in done.stderr and 'pip install mlflow' in done.stderr
    assert not (tmp_path / 'run/config.json').exists()
