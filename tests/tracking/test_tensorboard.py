"""The event files of `--tensorboard`, read by TensorBoard's own reader and shown on its page."""

import csv
import json
import re
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from browser import show
from byol_func.errors import UserError
from byol_func.tracking import tracker
from byol_func.workdir.run import Run
from cli import assert_refused, run_launch, succeed, tiny_digits
from mlflow_server import wait_for
from runs import records

# The text of the page; the number of cards follows the name of a group without a space.
_SHOWN = 'return document.body.innerText.replace(/([a-z_]+)(\\d+ cards)/g, "$1 $2")'


def _read(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def _check_scalars(workdir, mode):
    """TensorBoard shows the numbers of metrics.jsonl, each step once."""
    events, lines = _read(workdir / 'tensorboard' / mode), records(workdir, mode)
    for name in {name for line in lines for name in line} - {'mode', 'step'}:
        expected = [(line['step'], line[name]) for line in lines if name in line]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in expected], name
        assert np.allclose([value for _, value in found], [value for _, value in expected], rtol=1e-6), name
    return events


def test_a_run_and_its_continuation(tmp_path):
    run, workdir = [*tiny_digits(checkpointing__save_every_steps=3), '--workdir=run'], tmp_path / 'run'
    succeed(*run, cwd=tmp_path)  # Without the flag: the next process writes what is missing.
    for _ in range(2):
        newest = max((workdir / 'checkpoints').glob('pretrain_*'))
        newest.unlink()  # What comes behind the checkpoint before it is done again.
        succeed(*run, '--tensorboard', cwd=tmp_path)
        events = _check_scalars(workdir, 'pretrain')
    assert len(list((workdir / 'tensorboard/pretrain').glob('events*'))) > 2
    assert events.Images('augmentations')
    results = json.loads((workdir / 'summary.json').read_text())
    (accuracy,) = events.Scalars('result/test/online_top1')
    assert accuracy.value == pytest.approx(results['test/online_top1']) and accuracy.step == results['steps']
    content = events.summary_metadata['_hparams_/session_start_info'].plugin_data.content
    parameters = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert parameters['network.encoder_class'].string_value == 'TinyResNet'
    assert parameters['batch_size'].number_value == 128

    succeed('--workdir=run', '--mode=embed', '--split=test', '--tensorboard', cwd=tmp_path)
    (tsv,) = workdir.glob('tensorboard/embeddings.test/*/*/metadata.tsv')
    header, *rows = csv.reader(tsv.open(), delimiter='\t')
    written = np.load(workdir / 'embeddings.test.npz')
    assert header == ['index', 'label', 'class']
    assert [int(row[1]) for row in rows] == written['labels'].tolist()
    tensors = np.loadtxt(tsv.with_name('tensors.tsv'), delimiter='\t')
    assert np.allclose(tensors, written['features'], atol=1e-5)
    assert 'metadata.tsv' in (workdir / 'tensorboard/embeddings.test/projector_config.pbtxt').read_text()


def test_the_page_in_a_browser(tmp_path, browser):
    """TensorBoard's page has a card for every number of a run, with its last value beside the curve, and a picture."""
    succeed(*tiny_digits(), '--workdir=run', '--tensorboard', cwd=tmp_path)
    lines = records(tmp_path / 'run', 'pretrain')
    names = {name.split('/')[0] for line in lines for name in line} - {'mode', 'step'}
    last = [line['classif_loss'] for line in lines if 'classif_loss' in line][-1]
    command = [sys.executable, '-m', 'tensorboard.main', '--logdir=run/tensorboard', '--host=127.0.0.1', '--port=0']
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = next(found[0] for line in server.stderr if (found := re.search(r'http://[\d.]+:\d+/', line)))
            show(browser, f'{address}#timeseries')
            wanted = {*names, 'augmentations', f'{last:.4f}'.rstrip('0')}
            wait_for(lambda: wanted <= set(re.findall(r'[\w.]+', browser.execute_script(_SHOWN))))
        finally:
            server.kill()


def test_what_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorboard', None)
    monkeypatch.delitem(sys.modules, 'torch.utils.tensorboard', raising=False)
    config = ml_collections.ConfigDict(dict(final_linear_eval=False))
    run = Run(config, str(tmp_path), torch.device('cpu'), None, 1.0, tensorboard=True)
    with (
        pytest.raises(UserError, match=r"--tensorboard: .*; pip install tensorboard, or 'byol_func\[tensorboard\]'"),
        tracker.track(run, 'pretrain'),
    ):
        pass
    outcome = run_launch(*tiny_digits(), '--mode=preview', '--workdir=run', '--tensorboard', cwd=tmp_path)
    assert_refused(outcome, '--tensorboard=True: only with --mode=pretrain or')
