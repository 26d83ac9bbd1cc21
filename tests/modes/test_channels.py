"""A folder of images with four channels of 16 bits: training, every mode on top, exports and `load_encoder`."""

import functools
import json

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import tifffile
import timm
import torch
from PIL import Image

import byol_func
import cli
from byol_func.bridge import plain_module, resnets
from byol_func.errors import UserError
from byol_func.modes import embed, export, predict
from byol_func.utils import dataset
from byol_func.workdir.run import Run
from runs import error_of

CHANNELS, RANGES = 4, ((0, 4095), (0, 4095), (100, 900), (0, 4095))
SMALL = {
    name.replace('__', '.'): value
    for name, value in dict(
        cli.TINY_RUN,
        num_epochs=2,
        batch_size=4,
        image_size=12,
        pictures=True,
        dataset__source_size=14,
        dataset__channels=CHANNELS,
        dataset__value_range=RANGES,
        evaluation__batch_size=4,
        linear_eval__batch_size=4,
        fine_tune__batch_size=4,
        preview__num_images=2,
        preview__num_draws=1,
    ).items()
}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """A folder of images, half of them TIFF, and a run on it in `run`."""
    root = tmp_path_factory.mktemp('channels')
    rng = np.random.default_rng(0)
    for split in ('train', 'test'):
        for name in 'ab':
            folder = root / 'images' / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                values = rng.integers(0, 4096, (CHANNELS, 16, 18)).astype(np.uint16)
                values[2] = values[2] % 801 + 100
                if i % 2:
                    np.save(folder / f'{i}.npy', values)
                else:
                    tifffile.imwrite(folder / f'{i}.tif', values, photometric='minisblack')
    byol_func.pretrain(_config(root), root / 'run', device='cpu')
    return root


def _config(root, **fields):
    return byol_func.get_config('folder', {**SMALL, 'dataset.root': str(root / 'images'), **fields})


def _run(root, **fields):
    return Run(_config(root), str(root / 'run'), torch.device('cpu'), None, 60.0, **fields)


def test_the_network_takes_four_channels_and_the_pictures_show_three(root):
    encoder = byol_func.load_encoder(root / 'run')
    assert encoder.params['encoder']['initial_conv']['w'].shape[1] == CHANNELS
    assert str(encoder) == 'Encoder(TinyResNet, 8 features, 4 channels, step 3, cpu)'
    for name in ('augmentations.png', 'embedding_map.png', 'neighbours.png', 'report.html'):
        assert (root / 'run' / name).exists(), name


@pytest.mark.parametrize('semantics', ['official', 'torchvision'])
def test_a_resumed_run_equals_an_undisturbed_one(root, tmp_path, semantics):
    fields = {f'augmentations.view{i}.color_transform.semantics': semantics for i in (1, 2)}
    fields |= {'pictures': False, 'checkpointing.save_every_steps': 1, 'checkpointing.keep': 9}
    whole = byol_func.pretrain(_config(root, **fields), tmp_path / 'run', device='cpu')
    states = sorted((tmp_path / 'run/checkpoints').glob('pretrain_*.safetensors'))
    last = safetensors.torch.load_file(states[-1])
    assert len(states) == 4 and whole.summary['steps'] == 4
    for path in states[2:]:
        path.unlink()
    byol_func.pretrain(_config(root, **fields), tmp_path / 'run', device='cpu')
    again = safetensors.torch.load_file(states[-1])
    assert last.keys() == again.keys() and all(torch.equal(last[name], again[name]) for name in last)


def test_a_run_with_other_channels_does_not_continue(root):
    with pytest.raises(UserError, match='config.dataset.channels=4, not 3'):
        byol_func.pretrain(_config(root, **{'dataset.channels': 3, 'dataset.value_range': ()}), root / 'run')


@pytest.mark.parametrize('mode', ['linear_eval', 'fine_tune', 'knn', 'logistic', 'eval'])
def test_modes_that_measure(root, mode):
    measured = byol_func.evaluate(root / 'run', mode, device='cpu')
    assert measured.summary


def test_files_arrays_and_tensors_embed_as_the_mode_does(root):
    embed.embed(_run(root, split='test'))
    saved = np.load(root / 'run/embeddings.test.npz')
    expected = torch.from_numpy(saved['features'])
    assert len(expected) == 8 and expected.std() > 1e-3
    encoder = byol_func.load_encoder(root / 'run')
    data = dataset.load_train_and_test(**_config(root).dataset)[1]
    for images in ([root / 'images' / path for path in saved['path']], data.images, data.images.numpy()):
        torch.testing.assert_close(encoder.embed(images), expected, rtol=1e-4, atol=1e-5)
    assert 'expected [B, 4, H, W]' in error_of(encoder.embed, np.zeros((2, 3, 12, 12), np.uint8))
    assert 'images of torch.uint16: expected floats' in error_of(encoder.embed, np.zeros((2, 4, 12, 12), np.uint16))


def test_pictures_are_refused_by_such_an_encoder(root, tmp_path):
    encoder = byol_func.load_encoder(root / 'run')
    message = 'a PIL image: expected the path of a TIFF or .npy file with 4 channels, or a tensor'
    assert error_of(encoder.embed, [Image.new('RGB', (16, 16))]).startswith(message)
    np.save(tmp_path / 'x.npy', np.zeros((5, 9, 9), np.uint8))
    assert '(5 channels in an array of 5 x 9 x 9; ' in error_of(encoder.embed, [tmp_path / 'x.npy'])


def test_predictions(root):
    predict.predict(_run(root, images=str(root / 'images/test'), output=str(root / 'predictions.csv')))
    assert len((root / 'predictions.csv').read_text().splitlines()) == 9


def test_exports_take_four_channels(root, tmp_path, capsys):
    encoder = byol_func.load_encoder(root / 'run')
    images = torch.rand(3, CHANNELS, 12, 12, generator=torch.Generator().manual_seed(0))
    expected = encoder(images)
    found = {}
    for name in ('module', 'onnx', 'hub', 'safetensors', 'official'):
        export.export(_run(root, format=name, output=str(tmp_path / name)))
    found['module'] = torch.export.load(tmp_path / 'module.pt2').module()(images)
    session = onnxruntime.InferenceSession(tmp_path / 'onnx')
    (embeddings,) = session.run(None, {'images': images.numpy()})
    found['onnx'] = torch.from_numpy(embeddings)
    found['hub'] = byol_func.load_encoder(tmp_path / 'hub')(images)
    for name, embeddings in found.items():
        torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-5, msg=name)
    assert 'Input: float32 [B, 4, H, W] in 0..1' in capsys.readouterr().out
    card = (tmp_path / 'hub/README.md').read_text()
    assert 'It turns an image with 4 channels of 12 x 12 pixels into 8 features' in card


@functools.cache
def _resnet(channels):
    """A thin ResNet-50 as a module, and `config.network`."""
    network = byol_func.get_config('byol').network.to_dict()
    network['encoder_config']['width_multiplier'] = 0.125
    return plain_module.empty_module(network, channels).eval(), network


def test_an_encoder_of_another_library_must_have_as_many_channels(root, tmp_path):
    module, network = _resnet(3)
    safetensors.torch.save_file(module.state_dict(), tmp_path / 'resnet.safetensors')
    options = {f'network.encoder_config.{name}': value for name, value in network['encoder_config'].items()}
    options |= {'network.encoder_class': 'ResNet50', 'init_from': str(tmp_path / 'resnet.safetensors')}
    message = error_of(byol_func.pretrain, _config(root, **options), tmp_path / 'run', device='cpu')
    assert 'norm batch_norm, channels 3, but the config describes ResNet50' in message and 'channels 4; ' in message


def test_timm_is_told_the_channels_and_torchvision_is_refused():
    module, network = _resnet(4)
    classifier = {'w': torch.zeros(256, 7), 'b': torch.zeros(7)}
    expected = (
        '--format=torchvision: the encoder takes 4 channels, and torchvision builds networks for 3; expected timm'
    )
    full = network | {'encoder_config': network['encoder_config'] | {'width_multiplier': 1.0}}
    assert error_of(resnets.to_torchvision, module, classifier, full).startswith(expected)
    code = resnets.timm_arguments(network, 4)
    model = eval(code, {'timm': timm, 'functools': functools, 'K': 7})
    model.load_state_dict(resnets.to_timm(module, classifier, network))
    assert model(torch.zeros(1, 4, 65, 65)).shape == (1, 7)


def test_the_saved_config_has_the_ranges(root):
    saved = json.loads((root / 'run/config.json').read_text())
    assert saved['dataset']['channels'] == CHANNELS and saved['dataset']['value_range'] == [list(r) for r in RANGES]
