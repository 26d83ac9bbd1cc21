"""Tracking with an mlflow server that asks for a password."""

import pathlib
from collections.abc import Iterator

import pytest
import requests

from byol_func.tracking.client import LOGIN
from cli import run_launch, start_launch, succeed, tiny_digits
from mlflow_server import check_history, client_of, free_port, run_id_of, serve, wait_for

ADMIN, FIRST, SECOND, WRONG = 'admin-secret-1', 'f%irst@secret-2', 'second secret-3', 'wrong@secret-4'
USER = 'MLFLOW_TRACKING_USERNAME'
PASSWORD = 'MLFLOW_TRACKING_PASSWORD'


@pytest.fixture(scope='module')
def guarded(tmp_path_factory) -> Iterator:
    """A server that knows the users `admin` and `me`."""
    server = serve(tmp_path_factory.mktemp('guarded'), free_port(), ADMIN)
    _ask_admin(server, 'post', 'create', 'me', FIRST)
    yield server
    server.kill()


def _ask_admin(server, method: str, what: str, name: str, password: str) -> None:
    address = f'{server.uri}/api/2.0/mlflow/users/{what}'
    user = {'username': name, 'password': password}
    requests.request(method, address, json=user, auth=('admin', ADMIN), timeout=60).raise_for_status()


def _address(server, name: str, password: str) -> str:
    quoted = password.replace('%', '%25').replace(' ', '%20').replace('@', '%40')
    return server.uri.replace('://', f'://{name}:{quoted}@')


def _assert_hidden(folder: pathlib.Path, *texts: str) -> None:
    """No file under the folder and no text has a password in it, in whatever spelling."""
    files = [path for path in folder.rglob('*') if path.is_file()]
    for name, content in (*((path, path.read_bytes()) for path in files), *((text, text.encode()) for text in texts)):
        assert b'secret-' not in content, name


@pytest.mark.parametrize('how', ['missing', 'wrong', 'wrong in the address'])
def test_a_wrong_password_is_refused(guarded, how, tmp_path):
    uri = guarded.uri
    environ = {USER: 'me', PASSWORD: WRONG} if how == 'wrong' else {}
    address = uri.replace('://', f'://me:{WRONG}@') if how == 'wrong in the address' else uri
    argv = [*tiny_digits(), f'--mlflow_tracking_uri={address}', f'--workdir={tmp_path}/run']
    outcome = run_launch(*argv, cwd=tmp_path, **environ)
    assert outcome.code == 1 and outcome.stderr.splitlines()[-1] == f'Error: --mlflow_tracking_uri={uri}: {LOGIN}'
    assert USER in LOGIN and PASSWORD in LOGIN
    assert not (tmp_path / 'run').exists()
    _assert_hidden(tmp_path, outcome.stderr)


def test_a_password_that_changes_while_a_run_trains(guarded, tmp_path):
    """The run goes on; with the new password the same command sends what is missing. Neither is written anywhere."""
    workdir = tmp_path / 'run'
    argv = [
        *tiny_digits(num_epochs=5, monitoring__health_every_steps=1000),
        f'--workdir={workdir}',
        '--mlflow_experiment_name=mine',
    ]
    address = _address(guarded, 'me', FIRST)  # It counts, and not the variables.
    running = start_launch(*argv, f'--mlflow_tracking_uri={address}', cwd=tmp_path, **{USER: 'me', PASSWORD: WRONG})
    wait_for((workdir / 'mlflow.json').exists)
    _ask_admin(guarded, 'patch', 'update-password', 'me', SECOND)
    outcome = running.wait()
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr.count(f'{guarded.uri} {LOGIN}; the run continues') == 1
    assert outcome.stderr.count('has not received everything') == 1
    run_id = run_id_of(workdir)

    again = succeed(*argv, f'--mlflow_tracking_uri={guarded.uri}', cwd=tmp_path, **{USER: 'me', PASSWORD: SECOND})
    assert run_id_of(workdir) == run_id
    address = _address(guarded, 'me', SECOND)
    check_history(address, workdir)
    assert 'metrics.jsonl' in {file.path for file in client_of(address).list_artifacts(run_id)}
    _assert_hidden(tmp_path, outcome.stderr, outcome.stdout, again.stderr, str(client_of(address).get_run(run_id)))


def test_a_user_who_may_not_write(guarded, tmp_path):
    """The experiment belongs to another user, who lets this one only read it; the password is in mlflow's file."""
    client_of(_address(guarded, 'admin', ADMIN)).create_experiment('theirs')
    _ask_admin(guarded, 'post', 'create', 'guest', SECOND)
    argv = [*tiny_digits(batch_size=512), f'--workdir={tmp_path}/run', '--mlflow_experiment_name=theirs']
    argv += [f'--mlflow_tracking_uri={guarded.uri}']
    (tmp_path / '.mlflow').mkdir()
    login = f'mlflow_tracking_username = guest\nmlflow_tracking_password = {SECOND}\n'
    (tmp_path / '.mlflow/credentials').write_text(f'[mlflow]\n{login}')
    outcome = succeed(*argv, cwd=tmp_path, HOME=str(tmp_path))
    assert outcome.stderr.count('accepts no data') == 1 and 'Permission denied' in outcome.stderr
    assert (tmp_path / 'run/summary.json').exists()
