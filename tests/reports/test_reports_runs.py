"""Other people's reports about machines, trackers, checkpoints and command lines, tried here; see README.md."""

import errno
import io
import os
import pickle
import sys
import time
import types
import warnings

import filelock
import ml_collections
import numpy as np
import pytest
import torch

from byol_func import cli
from byol_func.cli import run_app
from byol_func.errors import UserError
from byol_func.experiment import TrainResult
from byol_func.modes import drawing
from byol_func.report import plots
from byol_func.runtime import collectives
from byol_func.tracking.finder import Finder, Place
from byol_func.tracking.mlflow_tracker import Tracker
from byol_func.tracking.tail import file_time, own_files, results
from byol_func.training import resuming, saving, signals
from byol_func.utils import checkpointing, dataset
from byol_func.workdir import environment, files, lock, summaries
from byol_func.workdir.run import Run, Tracking
from byol_func.workdir.summaries import Length
from cli import run_launch, tiny_digits
from runs import loop_settings, records

# --- containers and clusters


@pytest.mark.parametrize(
    'error',
    [
        NotImplementedError('FileSystem does not appear to support flock'),
        OSError(errno.ENOLCK, 'No locks available'),
        OSError(errno.ENOSYS, 'Function not implemented'),
    ],
    ids=['35 older filelock', '36 no locks', '36 no flock'],
)
def test_35_36_a_file_system_without_locks(tmp_path, error, monkeypatch):
    def fail(self, **kwargs):
        raise error

    monkeypatch.setattr(filelock.FileLock, 'acquire', fail)
    with pytest.raises(UserError, match='cannot write there') as caught, lock.locked(str(tmp_path / 'run')):
        pass
    assert str(error.args[-1]) in str(caught.value)


def test_37_a_workdir_whose_name_is_too_long(tmp_path):
    too_long = str(tmp_path / ('x' * 300))
    with pytest.raises(UserError, match='cannot write there .File name too long'), lock.locked(too_long):
        pass


def test_38_39_home_in_a_path_behind_an_equals_sign(tmp_path, monkeypatch):
    from byol_func import program

    monkeypatch.setenv('HOME', str(tmp_path))
    assert program._in_home('~/run') == f'{tmp_path}/run'
    assert program._in_home('a~/~b') == 'a~/~b' and program._in_home(None) is None


def test_40_41_a_process_without_error_stream(monkeypatch):
    kept = os.dup(2)
    monkeypatch.setattr(sys, 'stderr', None)
    try:
        os.close(2)
        cli._open_closed_streams()
        assert os.fstat(2).st_rdev == os.stat(os.devnull).st_rdev  # No checkpoint will be opened as 2.
        assert sys.stderr.isatty() is False
        print('lost', file=sys.stderr, flush=True)
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1'])
def test_42_43_names_that_the_output_cannot_encode(encoding, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, 'stdout', output)
    monkeypatch.setattr(cli.app, 'run', lambda main, flags_parser: main([]))
    run_app(lambda argv: print('class 猫'))
    output.flush()
    assert output.buffer.getvalue() == b'class \\u732b\n'


def test_44_a_user_without_a_name(monkeypatch):
    pwd = pytest.importorskip('pwd')
    from torch._inductor.runtime import cache_dir_utils

    def unknown(number):
        raise KeyError(f'getpwuid(): uid not found: {number}')

    for name in ('USER', 'LOGNAME', 'LNAME', 'USERNAME', 'TORCHINDUCTOR_CACHE_DIR'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, 'getpwuid', unknown)
    assert cache_dir_utils.default_cache_dir()


def test_45_a_picture_that_cannot_be_made_costs_a_warning(caplog):
    def draw():
        raise OSError(errno.EROFS, 'Read-only file system')

    run = Run(ml_collections.ConfigDict(), '', torch.device('cpu'), None, 1.0)
    drawing.attempt(run, 'curves.png', draw)
    assert 'curves.png could not be made' in caplog.text


def test_46_a_file_server_whose_clock_is_late(tmp_path, monkeypatch):
    late = time.time() + 3600  # This machine's clock, an hour before that of the files.
    monkeypatch.setattr(time, 'time', lambda: late)
    started = file_time(str(tmp_path))
    (tmp_path / 'summary.pretrain.json').write_text('{"steps": 3, "test/x": 0.5}')
    assert results(tmp_path, 'pretrain', started) == (3, {'test/x': 0.5}, {})
    assert own_files(tmp_path, 'pretrain', started) == [tmp_path / 'summary.pretrain.json']
    assert list(tmp_path.iterdir()) == [tmp_path / 'summary.pretrain.json']
    assert file_time(str(tmp_path / 'nowhere')) == late


def test_47_two_tasks_of_a_job_array_in_one_workdir(tmp_path):
    refused = pytest.raises(UserError, match=f'another run is using it .process {os.getpid()} on ')
    with lock.locked(str(tmp_path)), refused, lock.locked(str(tmp_path)):
        pass


def test_48_the_command_that_goes_on_names_the_folder():
    command = signals.how_to_go_on(['launch.py', '--config=configs/digits.py', '--resume=never'], 'runs/digits-x y')
    assert command == "python launch.py --config=configs/digits.py '--workdir=runs/digits-x y'"


def test_49_the_images_of_a_step_do_not_depend_on_interruptions():
    kwargs = dict(seed=3, num_examples=10, batch_size=4)
    steps = [dataset.batch_indices(step, **kwargs) for step in range(5)]
    assert torch.equal(dataset.batch_indices(3, **kwargs), steps[3])
    assert torch.cat(steps).bincount().tolist() == [2] * 10


# --- trackers


class _Client:
    """mlflow's client, as far as it is needed, of a server that takes values up to some length."""

    def __init__(self, longest):
        self.longest, self.params, self.tags = longest, {}, {}

    def log_batch(self, run_id, params):
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

        if any(len(param.value) > self.longest for param in params):
            raise MlflowException('too long', error_code=INVALID_PARAMETER_VALUE)
        self.params |= {param.key: param.value for param in params}

    def create_run(self, experiment_id, tags, run_name):
        self.tags = tags
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id='1'))


_TRACKING = Tracking(uri='x', experiment_name='x', run_id=None, checkpoints=False)


def _tracker(client, tmp_path, config, command=''):
    tracker = Tracker.__new__(Tracker)
    tracker._client, tracker._config, tracker._sent, tracker._mode = client, config, {}, 'eval'
    tracker._found = types.SimpleNamespace(
        info=types.SimpleNamespace(run_id='1', status='RUNNING'), data=types.SimpleNamespace(params={}, metrics={})
    )
    fields = dict(dataset=dict(name='folder'), network=dict(encoder_class='TinyResNet'), random_seed=0, num_seeds=1)
    tracker._run = Run(
        config=ml_collections.ConfigDict(fields),
        workdir=str(tmp_path),
        device=torch.device('cpu'),
        checkpoint=None,
        log_every_seconds=1.0,
        command=command,
    )
    return tracker


@pytest.mark.parametrize('longest, expected', [(6000, 6000), (500, 250)], ids=['50 51 today', '52 older server'])
def test_50_51_52_long_settings(longest, expected, tmp_path):
    pytest.importorskip('mlflow')
    client = _Client(longest)
    tracker = _tracker(client, tmp_path, {'long': 'x' * 10_000, 'short': 1})
    tracker._catch_up()
    assert {name: len(value) for name, value in client.params.items()} == {'long': expected, 'short': 1}
    assert tracker._caught_up


def test_53_a_long_command_line_is_cut(tmp_path):
    client = _Client(6000)
    tracker = _tracker(client, tmp_path, {}, command='python launch.py ' + 'x' * 10_000)
    Finder(tracker._run._replace(tracking=_TRACKING), 'eval', client, None).new_run(Place(None, None, '0'))
    assert len(client.tags['command']) == 5000 and client.tags['dataset'] == 'folder'


# --- checkpoints and files of a run


def _save(tmp_path, step):
    return checkpointing.save(
        tmp_path / 'checkpoints', {'w': torch.full((2,), float(step))}, mode='pretrain', step=step, config={}
    )


def test_54_55_56_names_of_tensors_do_not_tell_how_many_devices_there_were(tmp_path, monkeypatch):
    state = {'online_params': {'encoder': {'w': torch.ones(2)}}}
    monkeypatch.setattr(collectives, 'num_replicas', lambda: 8)
    path = checkpointing.save(tmp_path, state, mode='pretrain', step=0, config={})
    monkeypatch.undo()
    checkpoint = checkpointing.load(path)
    assert list(checkpoint.tensors) == ['online_params/encoder/w']
    assert torch.equal(checkpointing.restore(checkpoint, state)['online_params']['encoder']['w'], torch.ones(2))


def test_57_no_pickle_is_read(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError('unpickled')

    path = _save(tmp_path, 0)
    for module, name in ((pickle, 'load'), (pickle, 'loads'), (pickle, 'Unpickler'), (torch, 'load')):
        monkeypatch.setattr(module, name, fail)
    assert checkpointing.load(path).step == 0


@pytest.mark.parametrize('content', [b'', b'\0' * 500], ids=['empty', 'zeros'])
def test_58_a_newest_checkpoint_that_a_crash_left_incomplete(tmp_path, content):
    good, bad = _save(tmp_path, 1), _save(tmp_path, 2)
    bad.write_bytes(content)
    state, step = resuming.restore_latest(loop_settings(tmp_path), {'w': torch.zeros(2)})
    assert step == 2 and state['w'].tolist() == [1.0, 1.0]
    assert sorted(path.name for path in good.parent.iterdir()) == [good.name, f'{bad.name}.unusable']


def test_59_a_crash_while_saving_leaves_nothing_that_counts(tmp_path):
    good = _save(tmp_path, 1)
    half = good.with_name('pretrain_00000002.tmp')
    half.write_bytes(good.read_bytes()[:50])
    assert resuming.newest_good(good.parent, 'pretrain', 'must')[0].step == 1
    saving.Saver(
        loop_settings(tmp_path), batch_size=1, num_examples=1, max_steps=9, first_step=2, is_writer=True
    ).close()
    assert list(good.parent.iterdir()) == [good]


@pytest.mark.parametrize('content', [b'', b'{"mode": "pret', b'[]', b'\xff\xfe\0\0'])
def test_60_a_summary_that_a_power_cut_has_emptied(tmp_path, content, monkeypatch):
    (tmp_path / 'summary.pretrain.json').write_bytes(content)
    monkeypatch.setattr(environment, 'describe', dict)
    config = dict(dataset=dict(name='folder', eval_split='test'), network=dict(encoder_class='x'), random_seed=0)
    config |= dict(init_from='')
    run = Run(
        config=ml_collections.ConfigDict(config),
        workdir=str(tmp_path),
        device=torch.device('cpu'),
        checkpoint=None,
        log_every_seconds=1.0,
    )
    result = TrainResult(state=None, steps=0, seconds=0.0, images_per_second=0.0, logs={})
    data = types.SimpleNamespace(num_classes=2)
    summary = summaries.summarize(run, 'pretrain', data, Length(3, 1.0, 4), result, {'test/x': 0.5})
    assert summary['test/x'] == 0.5 and summary['steps'] == 3


def test_60_bytes_that_are_no_text_in_the_metrics(tmp_path):
    good = [b'{"mode": "pretrain", "step": 0, "loss": 1.0}', b'{"mode": "pretrain", "step": 1}']
    lines = [good[0], b'\xff\xfe\0\0', good[1], b'{"mo']
    (tmp_path / 'metrics.jsonl').write_bytes(b'\n'.join(lines))
    assert [record['step'] for record in files.read_records(tmp_path / 'metrics.jsonl')] == [0, 1]
    metrics = files.MetricsFile(tmp_path, 'pretrain', first_step=1)
    metrics.write(1, {'loss': 0.5})
    metrics.close()
    lines = records(tmp_path)
    assert [(line['step'], line['loss']) for line in lines] == [(0, 1.0), (1, 0.5)]


# --- names and the command line


@pytest.mark.parametrize(
    'names',
    [
        pytest.param(['5$ \\x$ $', '$'], id='61 dollars'),
        pytest.param(['翘头剪', '猫'], id='62 63 Chinese'),
        pytest.param(['_hidden', '<b>&' + 'x' * 200], id='marks'),
    ],
)
def test_61_62_63_names_of_classes_in_pictures(tmp_path, names):
    points = np.random.default_rng(0).normal(size=(8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        plots.confusion_matrix(tmp_path / 'a.png', np.eye(2, dtype=np.int64), names, 'title')
        plots.embedding_map(tmp_path / 'b.png', points, np.arange(8) % 2, names, 'title')
    assert all((tmp_path / name).stat().st_size > 1000 for name in ('a.png', 'b.png'))


@pytest.mark.parametrize(
    'argv, words',
    [
        pytest.param(['\u2014-config=x'], "'\u2014-config=x': unexpected argument; flags look like", id='64'),
        pytest.param(['--workdir', '--mode=preview'], '--workdir=--mode=preview: expected a path', id='65'),
        pytest.param(['--checkpoint', '--mode=eval'], '--checkpoint=--mode=eval: expected a path', id='65 checkpoint'),
        pytest.param(['--workdir=jennifer', 'aniston'], "'aniston': unexpected argument", id='66'),
    ],
)
def test_64_65_66_mistakes_on_the_command_line(argv, words, tmp_path):
    outcome = run_launch(*tiny_digits(), *argv, cwd=tmp_path)
    assert outcome.code == 1 and f'Error: {words}' in outcome.stderr
    assert not list(tmp_path.iterdir())


def test_66_spaces_and_equals_signs_in_paths(tmp_path):
    workdir = tmp_path / "jennifer aniston's=x,y"
    outcome = run_launch(*tiny_digits(), '--mode=preview', f'--workdir={workdir}', cwd=tmp_path)
    assert outcome.code == 0 and (workdir / 'augmentations.png').exists()
