"""Tracking with mlflow, against a real server on localhost, without a server, and without mlflow."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_collections
import pytest
import torch
from cli import ROOT, run_launch, start_launch, succeed, tiny_digits

from byol_func import pictures, runs, tracking, tracking_files
from byol_func.tracking import redact

LIMIT = 120.0  # seconds
os.environ |= {'MLFLOW_DISABLE_TELEMETRY': 'true', 'MLFLOW_SERVER_ENABLE_JOB_EXECUTION': 'false'}  # For the servers.


class Server(NamedTuple):
    """A tracking server with its data in `folder`."""

    process: subprocess.Popen
    uri: str

    def kill(self) -> None:
        """Kills it and its workers, as a power failure would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _wait_for(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.1)
    raise TimeoutError


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def _serve(folder: pathlib.Path, port: int) -> Server:
    command = [sys.executable, '-m', 'mlflow', 'server', '--workers=1', '--host=127.0.0.1', f'--port={port}']
    command += [f'--backend-store-uri=sqlite:///{folder}/m.db', f'--artifacts-destination={folder}/artifacts']
    with open(folder / 'server.log', 'a') as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)

    def answers() -> bool:
        assert process.poll() is None, (folder / 'server.log').read_text()
        with socket.socket() as connection:
            return connection.connect_ex(('127.0.0.1', port)) == 0

    _wait_for(answers)
    return Server(process, f'http://127.0.0.1:{port}')


@pytest.fixture(scope='module')
def server(tmp_path_factory) -> Iterator[Server]:
    """A server for all tests that leave it alive."""
    server = _serve(tmp_path_factory.mktemp('server'), _free_port())
    yield server
    server.kill()


def _client(uri: str):
    import mlflow

    return mlflow.MlflowClient(uri)


def _run_id(workdir: pathlib.Path, mode: str = 'pretrain') -> str:
    return json.loads((workdir / 'mlflow.json').read_text())[mode]['run_id']


def _lines(workdir: pathlib.Path, mode: str) -> list[dict]:
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return [record for record in map(json.loads, lines) if record['mode'] == mode]


def _check_history(uri: str, workdir: pathlib.Path, mode: str = 'pretrain') -> None:
    """The server has every number of `metrics.jsonl` once, and the run is finished.

    Where a killed run repeats a step, its rate is another; the server keeps the first.
    """
    client, run_id, lines = _client(uri), _run_id(workdir, mode), _lines(workdir, mode)
    assert lines
    for name in ({name for line in lines for name in line} - {'mode', 'step'}):
        # Several lines of a step have its epoch in common.
        expected = list(dict.fromkeys((line['step'], line[name]) for line in lines if name in line))
        history = client.get_metric_history(run_id, f'{mode}/{name}')
        found = sorted((metric.step, metric.value) for metric in history)
        if name == 'images_per_second':
            found, expected = ([step for step, _ in points] for points in (found, expected))
        assert found == expected, name
    assert client.get_run(run_id).info.status == 'FINISHED'


@pytest.fixture(scope='module')
def tracked(server, tmp_path_factory):
    """The workdir and the flags of a tracked pre-training."""
    workdir = tmp_path_factory.mktemp('tracked') / 'run'
    argv = [*tiny_digits(), f'--mlflow_tracking_uri={server.uri}']
    succeed(*argv, '--mlflow_checkpoints', f'--workdir={workdir}', cwd=workdir.parent)
    return workdir, argv


def test_a_run_is_tracked(server, tracked):
    workdir, client = tracked[0], _client(server.uri)
    _check_history(server.uri, workdir)
    run = client.get_run(_run_id(workdir))
    config = json.loads((workdir / 'config.json').read_text())
    assert run.data.params == {k: str(v) for k, v in tracking_files.flatten(config).items()}
    assert run.data.params['network.encoder_class'] == 'TinyResNet'
    summary = json.loads((workdir / 'summary.json').read_text())
    assert run.data.metrics['test/online_top1'] == summary['test/online_top1']
    assert client.get_experiment(run.info.experiment_id).name == 'byol_experiment'
    assert run.info.run_name == 'run'
    assert run.data.tags['command'].startswith('python launch.py --config=')
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {'config.pretrain.json', 'summary.pretrain.json', 'metrics.jsonl', 'checkpoints'} <= files
    (checkpoint,) = client.list_artifacts(run.info.run_id, 'checkpoints')
    assert checkpoint.file_size == next(workdir.glob('checkpoints/*')).stat().st_size


def test_what_follows_is_nested_under_the_pretraining(server, tracked, tmp_path):
    """By itself in the same workdir and from its checkpoint, elsewhere by --mlflow_run_id."""
    (workdir, argv), client = tracked, _client(server.uri)
    checkpoint = next(workdir.glob('checkpoints/pretrain_*'))
    parent = _run_id(workdir)
    elsewhere = [f'--workdir={tmp_path}', f'--checkpoint={checkpoint}']
    succeed(*argv, '--mode=linear_eval', f'--workdir={workdir}', cwd=tmp_path)
    succeed(*argv, '--mode=eval', *elsewhere, cwd=tmp_path)
    other = client.create_run(client.create_experiment('other')).info.run_id
    succeed(*argv, '--mode=fine_tune', *elsewhere, f'--mlflow_run_id={other}', cwd=tmp_path)
    for folder, mode, expected in (
        (workdir, 'linear_eval', parent), (tmp_path, 'eval', parent), (tmp_path, 'fine_tune', other),
    ):
        run = client.get_run(_run_id(folder, mode))
        assert run.data.tags['mlflow.parentRunId'] == expected
        assert run.info.experiment_id == client.get_run(expected).info.experiment_id
    _check_history(server.uri, workdir, 'linear_eval')
    _check_history(server.uri, tmp_path, 'fine_tune')
    assert not any(n.startswith('linear') for n in client.get_run(parent).data.metrics)


def test_a_killed_run_goes_on_with_its_own(server, tmp_path):
    argv = [*tiny_digits(num_epochs=15, checkpointing__save_every_steps=50), f'--workdir={tmp_path}/run']
    argv += [f'--mlflow_tracking_uri={server.uri}', '--mlflow_experiment_name=killed']
    running, client = start_launch(*argv, cwd=tmp_path), _client(server.uri)
    _wait_for((tmp_path / 'run/mlflow.json').exists)
    run_id = _run_id(tmp_path / 'run')
    _wait_for(lambda: len(client.get_metric_history(run_id, 'pretrain/loss')) > 10)
    running.process.kill()
    assert running.wait().code == -signal.SIGKILL
    assert client.get_run(run_id).info.status == 'RUNNING'
    succeed(*argv, cwd=tmp_path)
    assert _run_id(tmp_path / 'run') == run_id
    assert len(_lines(tmp_path / 'run', 'pretrain')) > 150
    _check_history(server.uri, tmp_path / 'run')
    succeed(*argv, cwd=tmp_path)  # Nothing left to do, and nothing is sent twice.
    _check_history(server.uri, tmp_path / 'run')
    assert len(client.get_metric_history(run_id, 'test/online_top1')) == 1
    (experiment,) = client.search_experiments(filter_string="name = 'killed'")
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_a_server_that_dies_stops_nothing(tmp_path):
    """It is killed while the run trains; started again, it gets what it missed."""
    port = _free_port()
    server = _serve(tmp_path, port)
    argv = [*tiny_digits(num_epochs=15), f'--workdir={tmp_path}/run', f'--mlflow_tracking_uri={server.uri}']
    running = start_launch(*argv, cwd=tmp_path)
    _wait_for((tmp_path / 'run/mlflow.json').exists)
    server.kill()
    outcome = running.wait()
    assert outcome.code == 0, outcome.stderr
    assert len(_lines(tmp_path / 'run', 'pretrain')) > 150
    assert outcome.stderr.count('does not take what is sent') == 1
    assert outcome.stderr.count('has not got everything') == 1
    server = _serve(tmp_path, port)
    try:
        succeed(*argv, cwd=tmp_path)
        _check_history(server.uri, tmp_path / 'run')
    finally:
        server.kill()


def test_a_server_that_is_down_from_the_start(tmp_path):
    argv = [*tiny_digits(num_seeds=2), f'--mlflow_tracking_uri=http://127.0.0.1:{_free_port()}']
    outcome = succeed(*argv, f'--workdir={tmp_path}/run', '--mlflow_run_id=abc', cwd=tmp_path)
    assert (tmp_path / 'run/summary.json').exists() and not (tmp_path / 'run/mlflow.json').exists()
    assert outcome.stderr.count('does not take what is sent') == 1


def test_a_server_that_never_answers(tmp_path, monkeypatch):
    """It takes the connection and says nothing."""
    monkeypatch.setenv('MLFLOW_HTTP_REQUEST_TIMEOUT', '1')
    with socket.create_server(('127.0.0.1', 0)) as silent:
        argv = [*tiny_digits(), f'--mlflow_tracking_uri=http://127.0.0.1:{silent.getsockname()[1]}']
        outcome = succeed(*argv, f'--workdir={tmp_path}/run', cwd=tmp_path)
    assert (tmp_path / 'run/summary.json').exists()
    assert outcome.stderr.count('does not take what is sent') == 1


def test_seeds_are_children_of_one_run(tmp_path):
    """In a database file, without any server."""
    uri = f'sqlite:///{tmp_path}/m.db'
    argv = [*tiny_digits(num_seeds=2), f'--workdir={tmp_path}/run', f'--mlflow_tracking_uri={uri}']
    succeed(*argv, cwd=tmp_path)
    client, parent = _client(uri), _run_id(tmp_path / 'run')
    summary = json.loads((tmp_path / 'run/summary.json').read_text())
    assert client.get_run(parent).data.metrics['test/online_top1'] == summary['test/online_top1']
    for i in range(2):
        workdir = tmp_path / f'run/seed_{i}'
        assert client.get_run(_run_id(workdir)).data.tags['mlflow.parentRunId'] == parent
        _check_history(uri, workdir)


def test_a_folder_and_a_failed_run(tmp_path, monkeypatch):
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    argv = [*tiny_digits(lr_schedule__base_learning_rate=1e30), f'--workdir={tmp_path}/run']
    outcome = run_launch(*argv, f'--mlflow_tracking_uri={tmp_path}/tracked', cwd=tmp_path)
    assert outcome.code == 1 and 'expected finite numbers' in outcome.stderr
    run = _client(f'{tmp_path}/tracked').get_run(_run_id(tmp_path / 'run'))
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
    client, run_id = _client(uri), _run_id(tmp_path / 'run')
    run = client.get_run(run_id)
    assert run.info.status == 'FAILED' and not set(summary) & set(run.data.metrics)
    files = {file.path for file in client.list_artifacts(run_id)}
    assert 'config.pretrain.json' in files and 'summary.pretrain.json' not in files


def test_an_evaluation_sends_its_results(tmp_path):
    """Also of the validation set: numbers, the report by class, predictions; what was chosen as tags."""
    uri, workdir = f'sqlite:///{tmp_path}/m.db', tmp_path / 'run'
    argv = [*tiny_digits(dataset__eval_split='val'), f'--mlflow_tracking_uri={uri}', f'--workdir={workdir}']
    client = _client(uri)
    for mode in ('pretrain', 'eval', 'knn'):
        succeed(*argv, f'--mode={mode}', cwd=tmp_path)
    runs_of = {mode: client.get_run(_run_id(workdir, mode)) for mode in ('pretrain', 'eval', 'knn')}
    report = json.loads((workdir / 'eval.val.json').read_text())
    for mode in ('pretrain', 'eval'):
        assert runs_of[mode].data.metrics['val/online_top1'] == report['top1']
    assert runs_of['eval'].data.metrics['val/calibration_error'] == report['calibration_error']
    files = {file.path for file in client.list_artifacts(runs_of['eval'].info.run_id)}
    assert {'eval.val.json', 'predictions.val.npz', 'summary.eval.json'} <= files
    chosen, tags = json.loads((workdir / 'summary.knn.json').read_text())['chosen'], runs_of['knn'].data.tags
    assert tags['chosen.k'] == str(chosen['k']) and float(tags['chosen.temperature']) == chosen['temperature']


def test_a_follower_is_a_run_of_its_own(server, tmp_path):
    """Started before the training, nested under it, one point per checkpoint; started again it goes on."""
    argv = tiny_digits(num_epochs=4, checkpointing__save_every_steps=4, checkpointing__keep=100,
                       monitoring__knn_bank_size=200, pictures=True)
    argv += [f'--mlflow_tracking_uri={server.uri}', f'--workdir={tmp_path}/run']
    follow, client, path = [*argv, '--mode=eval', '--follow'], _client(server.uri), tmp_path / 'run/eval.jsonl'

    def check(status: str) -> str:
        run_id = json.loads((tmp_path / 'run/mlflow.follow.json').read_text())['follow']['run_id']
        expected = sorted((r['step'], r['test/online_top1']) for r in map(json.loads, path.read_text().splitlines()))
        history = client.get_metric_history(run_id, 'eval/test/online_top1')
        assert sorted((metric.step, metric.value) for metric in history) == expected
        run = client.get_run(run_id)
        assert run.info.status == status and run.data.tags['mlflow.parentRunId'] == _run_id(tmp_path / 'run')
        assert [file.path for file in client.list_artifacts(run_id)] == ['eval.jsonl']
        return run_id

    follower = start_launch(*follow, cwd=tmp_path)
    training = start_launch(*argv, cwd=tmp_path)
    _wait_for(path.exists)
    follower.process.terminate()
    assert follower.wait().code == 0
    run_id = check('KILLED')
    assert training.wait().code == 0
    succeed(*follow, cwd=tmp_path)
    assert check('FINISHED') == run_id
    series = pictures.read_metrics(tmp_path / 'run')['pretrain']['follower/test/online_top1']
    assert series.steps == [*range(3, 44, 4), 44] and series.epochs[-1] == pytest.approx(4, abs=0.1)
    drawn = (tmp_path / 'run/curves.png').stat().st_mtime_ns
    assert drawn > path.stat().st_mtime_ns  # With the last point, which came after the training's end.


def test_a_run_that_is_stopped_is_killed_and_goes_on(tmp_path):
    uri = f'sqlite:///{tmp_path}/m.db'
    argv = [*tiny_digits(num_epochs=15), f'--workdir={tmp_path}/run', f'--mlflow_tracking_uri={uri}']
    running = start_launch(*argv, cwd=tmp_path)
    _wait_for((tmp_path / 'run/metrics.jsonl').exists)
    running.process.terminate()
    assert running.wait().code == 75
    client, run_id = _client(uri), _run_id(tmp_path / 'run')
    assert client.get_run(run_id).info.status == 'KILLED'
    succeed(*argv, cwd=tmp_path)
    assert _run_id(tmp_path / 'run') == run_id
    _check_history(uri, tmp_path / 'run')


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
    where = runs.Tracking('http://slow', 'e', None, False)
    run = runs.Run(config, str(tmp_path), torch.device('cpu'), None, 1.0, tracking=where)
    client = _SlowClient()
    monkeypatch.setattr(tracking, 'make_client', lambda uri: client)
    monkeypatch.setattr(tracking.Tracker, '_digest', lambda self: 'same')
    (tmp_path / 'mlflow.json').write_text(json.dumps(
        {'pretrain': {'uri': 'http://slow', 'run_id': 'id', 'config': 'same'}}))
    start = time.monotonic()
    tracker = tracking.Tracker(run, 'pretrain', None)
    assert time.monotonic() - start < 3.0 and client.asked == ['MainThread']
    _wait_for(lambda: len(client.asked) > 3)
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
        client = _client(server.uri)
        run_id = client.create_run('0').info.run_id
        client.delete_run(run_id)
    argv = [f'--mlflow_tracking_uri={server.uri}', f'--mlflow_run_id={run_id}']
    error = _refused(*argv, cwd=tmp_path)
    assert f'--mlflow_run_id={run_id}: no such run in {server.uri}' in error


def test_a_deleted_experiment(server, tmp_path):
    client = _client(server.uri)
    client.delete_experiment(client.create_experiment('gone'))
    argv = [f'--mlflow_tracking_uri={server.uri}', '--mlflow_experiment_name=gone']
    assert '--mlflow_experiment_name=gone: deleted' in _refused(*argv, cwd=tmp_path)


@pytest.mark.parametrize('argv, expected', [
    (['--mlflow_run_id=abc'], '--mlflow_run_id=abc: needs --mlflow_tracking_uri'),
    (['--mlflow_tracking_uri=sqlite:////dev/null/m.db'], '--mlflow_tracking_uri=sqlite:////dev/null/m.db: '),
    (['--mlflow_tracking_uri=nonsense://me:secret@x'], '--mlflow_tracking_uri=nonsense://x: '),
])
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
    launch.config_checks.run_app(launch.main)
finally:
    print('attempts:', attempts)
"""


def _without_mlflow(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, '-c', _WITHOUT, *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)


def test_nothing_needs_mlflow(tmp_path):
    done = _without_mlflow(*tiny_digits(), f'--workdir={tmp_path}/run')
    assert done.returncode == 0, done.stderr
    assert 'attempts: []' in done.stdout  # Nothing as much as tried to import it.
    assert (tmp_path / 'run/summary.json').exists()


def test_the_flag_needs_mlflow(tmp_path):
    argv = [*tiny_digits(), f'--workdir={tmp_path}/run', f'--mlflow_tracking_uri=sqlite:///{tmp_path}/m.db']
    done = _without_mlflow(*argv)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'mlflow cannot be imported' in done.stderr and 'pip install mlflow' in done.stderr
    assert not (tmp_path / 'run/config.json').exists()


# The files.


def test_tail_reads_whole_lines_once(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    tail = tracking_files.MetricsTail(path, ('pretrain',))
    assert tail.read() == []
    path.write_text('{"mode": "pretrain", "step": 0, "loss": 2.0, "note": "x"}\n{"mode": "eval", "step": 0}\n{"mo')
    assert tail.read() == [(0, {'pretrain/loss': 2.0})]
    assert tail.read() == []
    with open(path, 'a') as file:
        file.write('de": "pretrain_x", "step": 1, "a/b(c)": 1}\nno json\n')
    assert tail.read() == [(1, {'pretrain_x/a/b_c_': 1.0})]
    other = tmp_path / 'other'
    other.write_text('{"mode": "pretrain", "step": 7, "loss": 3.0}\n')
    other.replace(path)
    assert tail.read() == [(7, {'pretrain/loss': 3.0})]


def test_tail_of_a_long_file(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text(''.join(f'{{"mode": "pretrain", "step": {i}, "loss": 0}}\n' for i in range(5000)))
    tail, steps = tracking_files.MetricsTail(path, ('pretrain',)), []
    while records := tail.read():
        steps += [record.step for record in records]
    assert steps == list(range(5000))


def test_passwords_are_not_written_down():
    assert redact('--uri=https://me:secret@host:5000/x') == '--uri=https://host:5000/x'
    assert redact('sqlite:////tmp/a@b.db') == 'sqlite:////tmp/a@b.db'
