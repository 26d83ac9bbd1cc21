"""Tracking with mlflow, against a real server on localhost and in a database file."""

import json
import shutil
import signal

import mlflow
import numpy as np
import pytest
import torch

import byol_func
from browser import show
from byol_func.report import curves
from byol_func.workdir.files import flatten
from cli import assert_refused, run_launch, start_launch, succeed, tiny_digits
from mlflow_server import check_history, client_of, database, run_id_of, wait_for
from runs import records

_TEXT = 'return document.body.innerText'
# The heights of the points of every curve that is drawn.
_CURVES = """
const plots = [...document.querySelectorAll('.js-plotly-plot')];
return plots.flatMap(plot => plot.data || []).filter(trace => trace.y).map(trace => [...trace.y]);
"""


@pytest.fixture(scope='module')
def tracked(server, tmp_path_factory):
    """The workdir and the flags of a tracked pre-training."""
    workdir = tmp_path_factory.mktemp('tracked') / 'run'
    argv = [*tiny_digits(batch_size=512), f'--mlflow_tracking_uri={server.uri}']
    succeed(*argv, '--mlflow_checkpoints', f'--workdir={workdir}', cwd=workdir.parent)
    return workdir, argv


def test_a_run_is_tracked(server, tracked):
    workdir, client = tracked[0], client_of(server.uri)
    check_history(server.uri, workdir)
    run = client.get_run(run_id_of(workdir))
    config = json.loads((workdir / 'config.json').read_text())
    assert run.data.params == {k: str(v) for k, v in flatten(config).items()}
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


def test_the_run_in_a_browser(server, tracked, browser):
    """mlflow's page lists the metrics and draws their curves."""
    run = client_of(server.uri).get_run(run_id_of(tracked[0]))
    page = f'{server.uri}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}'
    show(browser, page)
    listed = wait_for(lambda: 'pretrain/loss' in (text := browser.execute_script(_TEXT)) and text).splitlines()
    for name, value in run.data.metrics.items():
        assert float(listed[listed.index(name) + 1]) == pytest.approx(value), name
    show(browser, f'{page}/model-metrics')
    losses = [line['loss'] for line in records(tracked[0], 'pretrain') if 'loss' in line]
    assert len(losses) > 1
    wait_for(lambda: any(curve == pytest.approx(losses) for curve in browser.execute_script(_CURVES)))


def test_the_encoder_of_a_run_is_registered(server, tracked, tmp_path, monkeypatch):
    """It is a model of the pre-training's run, and mlflow loads it under both of its addresses."""
    (workdir, _), client = tracked, client_of(server.uri)
    argv = [f'--workdir={workdir}', '--mode=export', '--format=mlflow', f'--mlflow_tracking_uri={server.uri}']
    *_, told = succeed(*argv, '--output=model', '--register=digits', cwd=tmp_path).stdout.splitlines()
    run = client.get_run(run_id_of(workdir))
    (output,) = run.outputs.model_outputs
    addresses = f'models:/{output.model_id}', 'models:/digits/1'
    assert told == f'In {server.uri} it belongs to run {run.info.run_id} and is called {" and ".join(addresses)}.'
    assert client.get_logged_model(output.model_id).status == 'READY' and output.step == 1
    assert run.info.status == 'FINISHED'
    monkeypatch.setenv('MLFLOW_TRACKING_URI', server.uri)
    images = np.random.default_rng(0).random((2, 1, 8, 8), np.float32)
    expected = byol_func.load_encoder(workdir)(torch.from_numpy(images)).numpy()
    for address in addresses:
        assert np.abs(mlflow.pyfunc.load_model(address).predict(images) - expected).max() < 1e-5

    argv = [f'--checkpoint={next(workdir.glob("checkpoints/*"))}', *argv[1:], '--output=other', '--mlflow_run_id=none']
    assert_refused(run_launch(*argv, cwd=tmp_path), f'--mlflow_run_id=none: no such run in {server.uri}')
    shutil.copytree(workdir / 'checkpoints', tmp_path / 'untracked/checkpoints')
    shutil.copy(workdir / 'config.json', tmp_path / 'untracked')
    outcome = run_launch('--workdir=untracked', *argv[1:-1], cwd=tmp_path)
    assert_refused(outcome, f'--mlflow_tracking_uri={server.uri}: this pre-training was not tracked there; give')
    assert not (tmp_path / 'other').exists()


def test_what_follows_is_nested_under_the_pretraining(server, tracked, tmp_path):
    """By itself in the same workdir and from its checkpoint, elsewhere by --mlflow_run_id."""
    (workdir, argv), client = tracked, client_of(server.uri)
    checkpoint = next(workdir.glob('checkpoints/pretrain_*'))
    parent = run_id_of(workdir)
    elsewhere = [f'--workdir={tmp_path}', f'--checkpoint={checkpoint}']
    succeed(*argv, '--mode=linear_eval', f'--workdir={workdir}', cwd=tmp_path)
    succeed(*argv, '--mode=eval', *elsewhere, cwd=tmp_path)
    other = client.create_run(client.create_experiment('other')).info.run_id
    succeed(*argv, '--mode=fine_tune', *elsewhere, f'--mlflow_run_id={other}', cwd=tmp_path)
    for folder, mode, expected in (
        (workdir, 'linear_eval', parent),
        (tmp_path, 'eval', parent),
        (tmp_path, 'fine_tune', other),
    ):
        run = client.get_run(run_id_of(folder, mode))
        assert run.data.tags['mlflow.parentRunId'] == expected
        assert run.info.experiment_id == client.get_run(expected).info.experiment_id
    check_history(server.uri, workdir, 'linear_eval')
    check_history(server.uri, tmp_path, 'fine_tune')
    assert not any(n.startswith('linear') for n in client.get_run(parent).data.metrics)


def test_a_killed_run_goes_on_with_its_own(server, tmp_path):
    argv = [*tiny_digits(num_epochs=6, checkpointing__save_every_steps=20), f'--workdir={tmp_path}/run']
    argv += [f'--mlflow_tracking_uri={server.uri}', '--mlflow_experiment_name=killed']
    running, client = start_launch(*argv, cwd=tmp_path), client_of(server.uri)
    wait_for((tmp_path / 'run/mlflow.json').exists)
    run_id = run_id_of(tmp_path / 'run')
    wait_for(lambda: len(client.get_metric_history(run_id, 'pretrain/loss')) > 10)
    running.process.kill()
    assert running.wait().code == -signal.SIGKILL
    assert client.get_run(run_id).info.status == 'RUNNING'
    succeed(*argv, cwd=tmp_path)
    assert run_id_of(tmp_path / 'run') == run_id
    assert len(records(tmp_path / 'run', 'pretrain')) > 60
    check_history(server.uri, tmp_path / 'run')
    succeed(*argv, cwd=tmp_path)  # Nothing left to do, and nothing is sent twice.
    check_history(server.uri, tmp_path / 'run')
    assert len(client.get_metric_history(run_id, 'test/online_top1')) == 1
    (experiment,) = client.search_experiments(filter_string="name = 'killed'")
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_seeds_are_children_of_one_run(tmp_path):
    """In a database file, without any server."""
    uri = f'sqlite:///{tmp_path}/m.db'
    argv = [*tiny_digits(num_seeds=2), f'--workdir={tmp_path}/run', f'--mlflow_tracking_uri={uri}']
    (tmp_path / 'elsewhere').mkdir()
    succeed(*argv, cwd=tmp_path / 'elsewhere')
    assert [*tmp_path.glob('mlruns/*/artifacts/*')], 'the files are beside the database'
    assert not [*(tmp_path / 'elsewhere').iterdir()]
    client, parent = client_of(uri), run_id_of(tmp_path / 'run')
    summary = json.loads((tmp_path / 'run/summary.json').read_text())
    assert client.get_run(parent).data.metrics['test/online_top1'] == summary['test/online_top1']
    for i in range(2):
        workdir = tmp_path / f'run/seed_{i}'
        assert client.get_run(run_id_of(workdir)).data.tags['mlflow.parentRunId'] == parent
        check_history(uri, workdir)


def test_an_evaluation_sends_its_results(tmp_path):
    """Also of the validation set: numbers, the report by class, predictions; what was chosen as tags."""
    uri, workdir = database(tmp_path / 'm.db'), tmp_path / 'run'
    argv = [
        *tiny_digits(batch_size=512, dataset__eval_split='val'),
        f'--mlflow_tracking_uri={uri}',
        f'--workdir={workdir}',
    ]
    client = client_of(uri)
    for mode in ('pretrain', 'eval', 'knn'):
        succeed(*argv, f'--mode={mode}', cwd=tmp_path)
    runs_of = {mode: client.get_run(run_id_of(workdir, mode)) for mode in ('pretrain', 'eval', 'knn')}
    report = json.loads((workdir / 'eval.val.json').read_text())
    for mode in ('pretrain', 'eval'):
        assert runs_of[mode].data.metrics['val/online_top1'] == report['top1']
    assert runs_of['eval'].data.metrics['val/calibration_error'] == report['calibration_error']
    files = {file.path for file in client.list_artifacts(runs_of['eval'].info.run_id)}
    assert {'eval.val.json', 'predictions.val.npz', 'summary.eval.json'} <= files
    chosen, tags = json.loads((workdir / 'summary.knn.json').read_text())['chosen'], runs_of['knn'].data.tags
    assert tags['chosen.k'] == str(chosen['k']) and float(tags['chosen.temperature']) == chosen['temperature']


def test_a_follower_is_a_run_of_its_own(server, tmp_path):
    """One point per checkpoint; started again it goes on, and nests itself under a training that is tracked later."""
    argv = tiny_digits(
        num_epochs=4,
        checkpointing__save_every_steps=4,
        checkpointing__keep=100,
        monitoring__knn_bank_size=200,
        pictures=True,
    )
    argv += [f'--workdir={tmp_path}/run']
    tracked = [*argv, f'--mlflow_tracking_uri={server.uri}']
    follow, client, path = [*tracked, '--mode=eval', '--follow'], client_of(server.uri), tmp_path / 'run/eval.jsonl'

    def check(status: str, parent: str | None) -> str:
        run_id = json.loads((tmp_path / 'run/mlflow.follow.json').read_text())['follow']['run_id']
        expected = sorted((r['step'], r['test/online_top1']) for r in map(json.loads, path.read_text().splitlines()))
        history = client.get_metric_history(run_id, 'eval/test/online_top1')
        assert sorted((metric.step, metric.value) for metric in history) == expected
        run = client.get_run(run_id)
        assert run.info.status == status and run.data.tags.get('mlflow.parentRunId') == parent
        assert [file.path for file in client.list_artifacts(run_id)] == ['eval.jsonl']
        return run_id

    follower = start_launch(*follow, cwd=tmp_path)
    training = start_launch(*argv, cwd=tmp_path)
    wait_for(path.exists)
    training.process.kill()
    training.wait()
    follower.process.terminate()
    assert follower.wait().code == 0
    run_id = check('KILLED', None)
    succeed(*tracked, cwd=tmp_path)
    succeed(*follow, cwd=tmp_path)
    assert check('FINISHED', run_id_of(tmp_path / 'run')) == run_id
    series = curves.read_metrics(tmp_path / 'run')['pretrain']['follower/test/online_top1']
    assert series.steps == [*range(3, 44, 4), 44] and series.epochs[-1] == pytest.approx(4, abs=0.1)
    drawn = (tmp_path / 'run/curves.png').stat().st_mtime_ns
    assert drawn > path.stat().st_mtime_ns  # With the last point, which came after the training's end.


def test_a_run_that_is_stopped_is_killed_and_goes_on(tmp_path):
    uri = database(tmp_path / 'm.db')
    argv = [*tiny_digits(num_epochs=4), f'--workdir={tmp_path}/run', f'--mlflow_tracking_uri={uri}']
    running = start_launch(*argv, cwd=tmp_path)
    wait_for((tmp_path / 'run/metrics.jsonl').exists)
    running.process.terminate()
    assert running.wait().code == 75
    client, run_id = client_of(uri), run_id_of(tmp_path / 'run')
    assert client.get_run(run_id).info.status == 'KILLED'
    succeed(*argv, cwd=tmp_path)
    assert run_id_of(tmp_path / 'run') == run_id
    check_history(uri, tmp_path / 'run')


def test_a_run_that_begins_anew_ends_the_one_before(tmp_path):
    """Killed before its first checkpoint, so another config may take its workdir and starts a run of its own."""
    uri = database(tmp_path / 'm.db')
    more = [f'--workdir={tmp_path}/run', f'--mlflow_tracking_uri={uri}']
    running = start_launch(*tiny_digits(num_epochs=50, checkpointing__save_every_seconds=1000), *more, cwd=tmp_path)
    wait_for((tmp_path / 'run/mlflow.json').exists)
    running.process.kill()
    running.wait()
    first = run_id_of(tmp_path / 'run')
    assert client_of(uri).get_run(first).info.status == 'RUNNING' and not list(tmp_path.glob('run/checkpoints/*'))

    succeed(*tiny_digits(lr_schedule__base_learning_rate=1.0), *more, cwd=tmp_path)
    assert run_id_of(tmp_path / 'run') != first
    assert client_of(uri).get_run(first).info.status == 'KILLED'


def test_a_run_that_is_continued_elsewhere_and_comes_back(tmp_path):
    """Killed while one server tracks it, continued with another, and once more with the first."""
    argv = [*tiny_digits(num_epochs=5), f'--workdir={tmp_path}/run']
    places = [database(tmp_path / f'{name}.db') for name in 'ab']
    running = start_launch(*argv, f'--mlflow_tracking_uri={places[0]}', cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob('run/checkpoints/*')) and (tmp_path / 'run/mlflow.json').exists())
    running.process.kill()
    running.wait()
    first = run_id_of(tmp_path / 'run')
    assert client_of(places[0]).get_run(first).info.status == 'RUNNING'

    succeed(*argv, f'--mlflow_tracking_uri={places[1]}', cwd=tmp_path)
    second = run_id_of(tmp_path / 'run')
    check_history(places[1], tmp_path / 'run')
    left = client_of(places[0]).get_run(first)
    assert left.info.status == 'KILLED' and left.data.tags['continued_as'] == f'{second} in {places[1]}'

    succeed(*argv, f'--mlflow_tracking_uri={places[0]}', cwd=tmp_path)
    assert run_id_of(tmp_path / 'run') == first
    assert client_of(places[0]).get_run(first).info.status == 'FINISHED'
    check_history(places[0], tmp_path / 'run')
