"""`--format=hub`: the folder is loaded by the library that it is for, and its model card is true."""

import hashlib
import json
import re
import sys

import pytest
import timm
import torch
from PIL import Image
from test_export import _largest, _save_pretraining

import byol_func
from byol_func.errors import UserError
from byol_func.modes import export
from byol_func.utils.dataset import normalize_images
from byol_func.workdir.run import Run
from configs import byol


def _export(path, **fields):
    run = Run(byol.get_config(), '', torch.device('cpu'), str(path), 60.0, output='hub', format='hub')
    export.export(run._replace(**fields))


def _run_example(card, mode=None):
    """Runs the code of a model card and returns its features."""
    if mode:
        Image.effect_noise((80, 70), 60).convert(mode).save('image.png')
    (block,) = re.findall(r'```python\n(.*?)```', card, re.S)
    names = {}
    exec(block, names)
    return names['features']


@pytest.mark.parametrize('is_v2', [False, True])
def test_timm_loads_the_folder(is_v2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, embed, _ = _save_pretraining(
        tmp_path / 'run/checkpoints', 'ResNet50', 64, width_multiplier=0.25, resnet_v2=is_v2
    )
    measured = {'mode': 'linear_eval', 'eval_split': 'test', 'variant': 'BYOL', 'checkpoint': str(path)}
    (tmp_path / 'run/summary.linear_eval.json').write_text(json.dumps(measured | {'test/linear_top1': 0.875}))
    (tmp_path / 'run/summary.knn.json').write_text(json.dumps({'checkpoint': 'other', 'test/knn_top1': 0.5}))
    _export(path)
    assert "timm.create_model('local-dir:hub', pretrained=True) loads it" in capsys.readouterr().out
    model = timm.create_model('local-dir:hub', pretrained=True).eval()
    for size in (65, 97):  # Where symmetric padding is SAME.
        images = torch.rand(2, 3, size, size)
        with torch.no_grad():
            found, expected = model(normalize_images(images)), embed(images)
        assert _largest(found, expected) <= 1e-5 * expected.abs().max()
    wanted = timm.data.resolve_model_data_config(model)
    assert wanted['input_size'] == (3, 65, 65) and wanted['interpolation'] == 'bicubic'
    assert wanted['crop_pct'] == 0.875 and wanted['mean'] == pytest.approx((0.485, 0.456, 0.406))

    card = (tmp_path / 'hub/README.md').read_text()
    assert card.startswith('---\nlicense: apache-2.0\nlibrary_name: timm\n')
    assert '| linear classifier on the BYOL encoder | 87.5 |' in card and '50.0' not in card
    assert hashlib.sha256((tmp_path / 'hub/model.safetensors').read_bytes()).hexdigest() in card
    assert str(tmp_path) not in card + (tmp_path / 'hub/config.json').read_text()
    assert _run_example(card, 'RGB').shape == (1, 512)


def test_other_networks_are_loaded_by_us(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, embed, _ = _save_pretraining(
        tmp_path / 'run/checkpoints', 'ResNet10', 16, stem='cifar', width_multiplier=0.25
    )
    _export(path)
    assert "byol_func.load_encoder('hub') loads it" in capsys.readouterr().out
    images = torch.rand(2, 3, 16, 16)
    assert _largest(byol_func.load_encoder('hub')(images), embed(images)) <= 1e-6
    card = (tmp_path / 'hub/README.md').read_text()
    assert 'library_name: byol_func' in card and 'top-1' not in card
    assert _run_example(card, 'RGB').shape == (1, 128)
    with pytest.raises(UserError, match='--output=hub: already exists'):
        _export(path)
    with pytest.raises(UserError, match="--push: --format='module': expected one of hub"):
        _export(path, output='x', push='user/name', format='module')
    for name in ('noslash', 'a/b/c', 'me/x y', 'me/a--b', 'me/x.git', '/x', 'me/'):
        with pytest.raises(UserError, match=f'--push={name}: expected USER/NAME'):
            _export(path, output='x', push=name)
    with pytest.raises(UserError, match="--register=x: --format='hub': expected one of mlflow"):
        _export(path, output='x', register='x')
    for name in ('a/b', 'a:b', ' '):
        with pytest.raises(UserError, match=f'--register={name}: expected a name without / and :'):
            _export(path, output='x', register=name, format='mlflow')
    (tmp_path / 'file').write_text('')
    for output, form in (('file/x', 'hub'), ('file/x/y', 'module'), ('file/z', 'mlflow')):
        with pytest.raises(UserError, match=f'--output={output}.*: {tmp_path}/file is a file; expected a folder'):
            _export(path, output=output, format=form)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(UserError, match="--push=user/name: .*; pip install huggingface_hub, or 'byol_func\\[hub\\]'"):
        _export(path, output='x', push='user/name')
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('encoder_class, library', [('ResNet50', 'timm'), ('ResNet10', 'byol_func')])
def test_the_card_of_an_encoder_for_five_channels(encoder_class, library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, embed, _ = _save_pretraining(tmp_path / 'run', encoder_class, 64, in_channels=5, width_multiplier=0.125)
    _export(path)
    card = (tmp_path / 'hub/README.md').read_text()
    assert f'library_name: {library}' in card and 'It turns an image with 5 channels of 6' in card
    side = 65 if library == 'timm' else 64
    assert ('trained at 64 x 64 pixels; at 65, timm pads' in card) == (library == 'timm')
    expected = embed(torch.zeros(1, 5, side, side))
    assert _largest(_run_example(card), expected) <= 1e-5 * max(1.0, expected.abs().max())
