"""Every export is loaded by `load_encoder` and `config.init_from`, or they say which format it is and what loads it."""

import re

import pytest
import torch
from test_export import _largest, _save_pretraining
from test_init_from import _start

import byol_func
from byol_func.bridge import plain_module
from byol_func.modes import EXPORT_FORMATS, export
from byol_func.workdir.run import Run
from cli import ROOT, assert_refused, run_launch
from configs import byol
from runs import error_of

_FILES = {'official': 'official.pkl', 'module': 'module.pt2', 'onnx': 'encoder.onnx', 'hub': 'hub', 'mlflow': 'mlflow'}
_FILES = {form: _FILES.get(form, f'{form}.safetensors') for form in EXPORT_FORMATS}
_READ = ('encoder', 'hub')  # By load_encoder.
_GRAPHS = ('module', 'onnx', 'mlflow')  # Of the smaller network, whose graphs are traced sooner.
_CONTINUED = (*_READ, 'official', 'timm', 'torchvision', 'safetensors')  # By config.init_from.


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A folder with the exports of one ResNet-50, a second one with those of a ResNet-10, and their encoders."""
    encoders = {}
    for name, fields in (('ResNet50', {}), ('ResNet10', dict(stem='cifar', width_multiplier=0.125))):
        folder = tmp_path_factory.mktemp(name)
        path, embed, _ = _save_pretraining(folder / 'run/checkpoints', name, 40, **fields)
        for form, file in _FILES.items():
            if form not in (_GRAPHS if name == 'ResNet50' else ('official', 'timm', 'torchvision')):
                run = Run(byol.get_config(), '', torch.device('cpu'), str(path), 60.0)
                export.export(run._replace(output=str(folder / file), format=form))
        encoders[name] = folder, embed
    return encoders


@pytest.mark.parametrize('name', ['ResNet50', 'ResNet10'])
def test_what_load_encoder_reads(name, exported):
    folder, embed = exported[name]
    images = torch.rand(2, 3, 65, 65)
    for path in (*(_FILES[form] for form in _READ), 'hub/model.safetensors', 'run'):
        encoder = byol_func.load_encoder(folder / path)
        assert _largest(encoder(images), embed(images)) <= 1e-4, path
        assert encoder.step == 3 and encoder.embed([folder / 'x'][:0]).shape[1] == encoder.output_size
        assert byol_func.get_config(encoder_file(folder / path)).network.encoder_class == name
    message = error_of(byol_func.load_classifier, folder / 'hub')
    assert 'the encoder alone' in message and 'model.safetensors: holds no classifier' in message


def encoder_file(path):
    """The file whose header holds the config."""
    if path.name == 'run':
        return next((path / 'checkpoints').iterdir())
    return path / 'model.safetensors' if path.is_dir() else path


@pytest.mark.parametrize('form', sorted({*EXPORT_FORMATS} - {*_READ}))
def test_what_load_encoder_says_of_other_formats(form, exported, tmp_path):
    folder, _ = exported['ResNet10' if form in _GRAPHS else 'ResNet50']
    path = folder / _FILES[form]
    message = error_of(byol_func.load_encoder, path)
    assert message.startswith(f'path={path}: ') and 'checkpoint=' not in message
    hint = '--mode=import' if form == 'official' else '--format=encoder and --format=hub write what is read here'
    assert hint in message and (form == 'official' or f'it is an export with --format={form}, for ' in message)
    # The flag of the other modes tells the same.
    flags = [f'--config={ROOT}/configs/digits.py', '--mode=knn', '--workdir=run', f'--checkpoint={path}']
    assert_refused(run_launch(*flags, cwd=tmp_path), f'--checkpoint={path}: ', hint)


@pytest.mark.parametrize('form', _CONTINUED)
def test_what_init_from_continues(form, exported):
    for name, fields in (
        ('ResNet50', {}),
        ('ResNet10', {'network.encoder_config.stem': 'cifar', 'network.encoder_config.width_multiplier': 0.125}),
    ):
        folder, embed = exported[name]
        path = folder / _FILES[form]
        for each in [path, path / 'model.safetensors'] if path.is_dir() else [path] if path.exists() else []:
            state, config = _start(each, **{'network.encoder_class': name, **fields})
            trees = state.online_params['encoder'], state.online_state['encoder']
            module = plain_module.make_module(*trees, config.network.to_dict())
            images = torch.rand(2, 3, 65, 65)
            assert _largest(module(images).detach(), embed(images)) <= 1e-4, each


@pytest.mark.parametrize('form', sorted({*EXPORT_FORMATS} - {*_CONTINUED}))
def test_what_init_from_says_of_other_formats(form, exported):
    path = exported['ResNet10'][0] / _FILES[form]
    message = error_of(_start, path)
    assert message.startswith(f'config.init_from={str(path)!r}: it is an export with --format={form}, for ')
    assert '--checkpoint' not in message


_NO_CHECKPOINTS = {
    'text': (b'hello there, this is no checkpoint\n', 'it is a text file'),
    'short': ('Größe'.encode(), 'it is a text file'),
    'json': (b'[1, 2, 3]', 'it is a text file'),
    'png': (b'\x89PNG\r\n\x1a\n' + bytes(9), 'it is a picture'),
    'jpeg': (b'\xff\xd8\xff\xe0' + bytes(40), 'it is a picture'),
    'noise': (bytes(range(200, 256)) * 9, 'it is neither a safetensors file nor a pickle'),
    'null': (b')\x85\x85.' + bytes(30), 'it is neither a safetensors file nor a pickle'),
    'pickle': (b'\x80\x04' + b'h\x07' + bytes(60), 'damaged (no pickle goes on like this)'),
}


@pytest.mark.parametrize('content, what', _NO_CHECKPOINTS.values(), ids=_NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint(content, what, tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(content)
    for called, call in (('path=', byol_func.load_encoder), ('config.init_from=', _start)):
        message = error_of(call, path)
        assert message.startswith(called) and not re.search(r'\w+Error|--checkpoint', message)
        assert what in message or (content.startswith(b'\x80') and '--mode=import' in message)


def test_a_folder_without_checkpoints(tmp_path):
    path = str(tmp_path)
    for called, call in ((f'path={path}', byol_func.load_encoder), (f'config.init_from={path!r}', _start)):
        assert error_of(call, path).startswith(f'{called}: no checkpoint of pretrain or ')
