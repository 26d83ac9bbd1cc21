"""The event files of `--tensorboard`, read by TensorBoard's own reader."""

import csv
import json
import sys

import ml_collections
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from byol_func.errors import UserError
from byol_func.tracking import tracker
from byol_func.workdir.run import Run
from cli import assert_refused, run_launch, succeed, tiny_digits
from runs import records


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
