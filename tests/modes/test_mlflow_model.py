"""`--format=mlflow`: mlflow loads the folder, and its embeddings are those of the encoder."""

import json
import pathlib
import re
import sys
import zipfile

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from test_export import _save_pretraining

import byol_func
from byol_func.errors import UserError
from byol_func.modes import export
from byol_func.workdir.run import Run, Tracking
from cli import ROOT
from configs import byol
from runs import error_of

NOBODY = 'http://127.0.0.1:9'


def _export(path, **fields):
    run = Run(byol.get_config(), '', torch.device('cpu'), str(path), 60.0, output='out/model', format='mlflow')
    export.export(run._replace(**fields))


@pytest.mark.parametrize('image_size', [16, 8])
def test_mlflow_loads_the_folder(image_size, tmp_path, monkeypatch, capsys, recwarn):
    """By the snippet of docs/export.md; the smaller network takes images of its own size only."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    path, _, _ = _save_pretraining(tmp_path / 'run', 'TinyResNet', image_size, stem='cifar')
    _export(path)
    files = [file for file in (tmp_path / 'out/model').rglob('*') if file.is_file()]  # Before Python's own are added.
    captured = capsys.readouterr()
    assert "mlflow.pyfunc.load_model('out/model').predict(images) takes a NumPy array" in captured.out
    assert 'float32 [B, 3, H, W] in 0..1, not normalised' in captured.out
    assert f'Trained on {image_size} x {image_size} pixels' in captured.out and captured.err == ''
    assert not [warning for warning in recwarn if warning.category is UserWarning]

    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/export.md').read_text(), re.S)
    (block,) = (block for block in blocks if 'mlflow' in block)
    expect = byol_func.load_encoder(path)
    monkeypatch.chdir(tmp_path / 'out')
    for batch, height, width in [(1, image_size, image_size), (3, image_size, image_size), (2, 21, 30)]:
        if image_size == 16 or height == 8:
            names = {'images': torch.rand(batch, 3, height, width)}
            exec(block, names)
            expected = expect(names['images']).numpy()
            assert names['embeddings'].dtype == np.float32 and names['embeddings'].shape == expected.shape
            assert np.abs(names['embeddings'] - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())
    assert names['about']['range'] == [0.0, 1.0] and names['about']['image_size'] == image_size

    model, images = names['model'], np.full((2, 3, image_size, image_size), 0.5, np.float32)
    side = -1 if image_size == 16 else 8
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 3, side, side)
    assert model.metadata.signature.outputs.inputs[0].shape == (-1, expect.output_size)
    with pytest.raises(ValueError, match=r'images in 0.5..1.5: expected floats in 0..1'):
        model.predict(images + np.arange(2, dtype=np.float32)[:, None, None, None])
    for wrong in (images.astype(np.float64), images[:, :1], images[0]):
        with pytest.raises(MlflowException):
            model.predict(wrong)
    assert not [file for file in files if file.suffix in ('.pkl', '.pyc')]
    with zipfile.ZipFile(tmp_path / 'out/model/artifacts/encoder.pt2') as graph:  # torch.save would begin with PK.
        assert not [
            name
            for name in graph.namelist()
            if '/weights/' not in name and graph.read(name).startswith((b'PK', b'\x80'))
        ]
    texts = [file.read_text() for file in files if file.suffix != '.pt2']
    assert not [text for text in texts if str(tmp_path) in text or str(ROOT) in text]
    assert 'byol_func' not in (tmp_path / 'out/model/served_encoder.py').read_text()
    wanted = pathlib.Path(mlflow.pyfunc.get_model_dependencies('model')).read_text().split()
    assert f'torch=={torch.__version__.split("+")[0]}' in wanted and len(wanted) == 3


def test_what_is_refused(tmp_path, monkeypatch):
    """In one line, and before anything is written."""
    monkeypatch.chdir(tmp_path)
    path, _, _ = _save_pretraining(tmp_path / 'run/checkpoints', 'TinyResNet', 8, stem='cifar')
    (tmp_path / 'run/mlflow.json').write_text(json.dumps({'pretrain': {'uri': NOBODY, 'run_id': 'x'}}))
    tracking = Tracking(NOBODY.replace('://', '://me:secret@'), 'e', None, False)
    for fields, message in [
        ({'register': 'x'}, '--register=x: needs --mlflow_tracking_uri'),
        (
            {'tracking': tracking, 'format': 'onnx'},
            f"--mlflow_tracking_uri={NOBODY}: --format='onnx': expected one of",
        ),
        ({'tracking': tracking}, f'--mlflow_tracking_uri={NOBODY}: API request to {NOBODY}'),
    ]:
        assert message in error_of(_export, path, **fields)
    monkeypatch.setitem(sys.modules, 'mlflow', None)
    with pytest.raises(UserError, match='--format=mlflow: mlflow cannot be imported .*; pip install mlflow'):
        _export(path)
    assert not (tmp_path / 'out').exists()
