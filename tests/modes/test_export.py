"""The exported encoder in real hands: plain PyTorch, torch.export, torchvision and timm."""

import functools
import json

import optree
import pytest
import safetensors
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image

from byol_func import eval_experiment
from byol_func.bridge import plain_module, resnets
from byol_func.bridge.official import read, to_state
from byol_func.errors import UserError
from byol_func.modes import EXPORT_FORMATS
from byol_func.utils.dataset import normalize_images
from cli import TINY_NETWORK, config, run_launch, succeed, tiny_digits
from configs import byol
from golden_io import DIRECTORY, images, load
from golden_networks import golden_network_fields

PATH = DIRECTORY / 'official_checkpoint.pkl'


def _network(encoder_class, **options):
    network = byol.get_config().network.to_dict()
    network['encoder_class'] = encoder_class
    network['encoder_config'] |= options
    return network


def _trained(network, in_channels=3):
    """An encoder whose every number has moved: its backbone, params and state."""
    backbone = eval_experiment.make_backbone(
        **{name: network[name] for name in ('encoder_class', 'encoder_config', 'bn_config')}, in_channels=in_channels
    )
    rng = torch.Generator().manual_seed(0)
    params, state = backbone.init(rng)
    moved = lambda x: x + 0.1 * torch.randn(x.shape, generator=rng) if x.ndim == 1 else x
    params = optree.tree_map(moved, params)
    with torch.no_grad():
        for _ in range(3):
            _, state = backbone.apply(params, state, torch.rand(8, in_channels, 40, 40, generator=rng), True)
    return backbone, params, state


def _largest(x, y):
    return (x - y).abs().max().item()


@pytest.mark.parametrize(
    'encoder_class, options, in_channels',
    [
        ('TinyResNet', {}, 3),
        ('TinyResNet', dict(stem='cifar', width_multiplier=2.0), 1),
        ('ResNet10', dict(width_multiplier=0.25, resnet_v2=True), 3),
        ('ResNet18', {}, 3),
        ('ResNet50', {}, 3),
        ('ResNet50', dict(resnet_v2=True, width_multiplier=0.25, stem='cifar'), 3),
    ],
)
def test_the_module_has_our_outputs(encoder_class, options, in_channels):
    network = _network(encoder_class, **options)
    backbone, params, state = _trained(network, in_channels)
    module = plain_module.make_module(params['encoder'], state['encoder'], network)
    assert not module.training
    with torch.no_grad():
        for height, width in ((40, 40), (33, 47)):  # Even and odd: SAME pads them differently.
            inputs = torch.rand(3, in_channels, height, width)
            expected, _ = backbone.apply(params, state, inputs, is_training=False)
            assert _largest(module(inputs), expected) <= 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.golden
def test_the_module_of_a_true_checkpoint_has_the_official_embeddings():
    official = read(PATH)
    network = byol.get_config().network.to_dict() | {k: v for k, v in official.network.items() if k != 'num_classes'}
    state = to_state(official, network)
    module = plain_module.make_module(state.online_params['encoder'], state.online_state['encoder'], network)
    expected = load('official_checkpoint_outputs.npz')
    with torch.no_grad():
        embedding = module(images(expected['images']))
    assert _largest(embedding, torch.from_numpy(expected['embedding'])) <= 1e-5


@pytest.mark.parametrize('options', [{}, dict(resnet_v2=True), dict(width_multiplier=0.5)])
def test_timm_loads_it_and_has_the_same_outputs(options):
    network = _network('ResNet50', **options)
    backbone, params, state = _trained(network)
    module = plain_module.make_module(params['encoder'], state['encoder'], network)
    classifier = {'w': 0.1 * torch.randn(backbone.output_size, 7), 'b': torch.randn(7)}
    code = resnets.timm_arguments(network)
    model = eval(code, {'timm': timm, 'functools': functools, 'K': 7}).eval()
    model.load_state_dict(resnets.to_timm(module, classifier, network))
    inputs = torch.rand(2, 3, 65, 64)
    with torch.no_grad():
        embedding = module(inputs)
        logits = model(normalize_images(inputs))
    expected = embedding @ classifier['w'] + classifier['b']
    assert _largest(logits, expected) <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    'make',
    [
        lambda: torchvision.models.resnet50(num_classes=7),
        lambda: timm.create_model('resnet50', num_classes=7),
    ],
    ids=['torchvision', 'timm'],
)
def test_the_weights_fit_torchvision_whose_padding_differs(make):
    network = _network('ResNet50')
    _, params, state = _trained(network)
    module = plain_module.make_module(params['encoder'], state['encoder'], network)
    classifier = {'w': torch.randn(2048, 7), 'b': torch.randn(7)}
    model = make().eval()
    model.load_state_dict(resnets.to_torchvision(module, classifier, network))
    model.fc = torch.nn.Identity()
    inputs = torch.rand(2, 3, 64, 64)
    # Padded on both sides, our module does what theirs does: nothing but the padding differs.
    same = plain_module._pad_same
    plain_module._pad_same = lambda x, kernel_size, stride, value=0.0: torch.nn.functional.pad(
        x, [kernel_size // 2] * 4, value=value
    )
    try:
        with torch.no_grad():
            symmetric, theirs = module(inputs), model(normalize_images(inputs))
    finally:
        plain_module._pad_same = same
    with torch.no_grad():
        ours = module(inputs)
    scale = ours.abs().max()
    assert _largest(theirs, symmetric) <= 1e-5 * scale
    assert _largest(theirs, ours) > 0.01 * scale


@pytest.mark.parametrize('function', [resnets.to_torchvision, resnets.to_timm])
@pytest.mark.parametrize(
    'encoder_class, options, message',
    [
        ('ResNet18', {}, "config.network.encoder_class='ResNet18': .* the identity there"),
        ('ResNet50', dict(stem='cifar'), "config.network.encoder_config.stem='cifar': .* expected imagenet"),
    ],
)
def test_what_does_not_fit_is_said(function, encoder_class, options, message):
    with pytest.raises(UserError, match=message):
        function(torch.nn.Identity(), {}, _network(encoder_class, **options))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(resnet_v2=True), 'encoder_config.resnet_v2=True: torchvision has no such network, expected False'),
        (dict(width_multiplier=2.0), 'encoder_config.width_multiplier=2.0: torchvision has no such network'),
    ],
)
def test_torchvision_has_version_1_and_width_1(options, message):
    with pytest.raises(UserError, match=message):
        resnets.to_torchvision(torch.nn.Identity(), {}, _network('ResNet50', **options))


@pytest.mark.golden
def test_files_of_the_command_line(tmp_path):
    flags = [
        *tiny_digits(
            **golden_network_fields(read(PATH).network),
            image_size=load('byol_update.npz')['inputs/view1'].shape[2],
        ),
        '--workdir=run',
    ]
    succeed(*flags, '--mode=import', f'--checkpoint={PATH}', cwd=tmp_path)
    export = lambda kind, name: [*flags, '--mode=export', f'--format={kind}', f'--output={name}']
    expected = load('official_checkpoint_outputs.npz')
    inputs, embedding = images(expected['images']), torch.from_numpy(expected['embedding'])

    succeed(*export('module', 'encoder.pt2'), cwd=tmp_path)
    module = torch.export.load(tmp_path / 'encoder.pt2').module()
    assert len(inputs) >= 3
    for batch in (slice(None), slice(0, 3), slice(0, 1)):  # Any batch size.
        assert _largest(module(inputs[batch]), embedding[batch]) <= 1e-5

    succeed(*export('safetensors', 'out/encoder.safetensors'), cwd=tmp_path)
    path = tmp_path / 'out/encoder.safetensors'
    with safetensors.safe_open(path, framework='pt') as file:
        network = json.loads(file.metadata()['network'])
    assert network['encoder_class'] == 'TinyResNet'
    assert 'layer4.0.downsample.1.running_var' in safetensors.torch.load_file(path)

    refused = run_launch(*export('torchvision', 'x.safetensors'), cwd=tmp_path)
    assert refused.code == 1 and "config.network.encoder_class='TinyResNet'" in refused.stderr
    assert not (tmp_path / 'x.safetensors').exists()


def test_a_pre_training_without_labels(tmp_path):
    """The formats that hold the encoder alone are written; the others say what they lack."""
    (tmp_path / 'images/train').mkdir(parents=True)
    for i in range(4):
        Image.effect_noise((8, 8), 90 + i).convert('RGB').save(tmp_path / f'images/train/{i}.png')
    flags = [
        *config(
            'folder.py',
            **TINY_NETWORK,
            dataset__root='images',
            dataset__source_size=0,
            image_size=8,
            batch_size=2,
            num_epochs=1,
            compile=False,
            pictures=False,
            lr_schedule__warmup_epochs=0.0,
        ),
        '--workdir=run',
    ]
    succeed(*flags, cwd=tmp_path)
    for kind in EXPORT_FORMATS:
        outcome = run_launch(*flags, '--mode=export', f'--format={kind}', f'--output={kind}.pt2', cwd=tmp_path)
        if kind in ('module', 'safetensors'):
            assert outcome.code == 0, outcome.stderr
            continue
        assert outcome.code == 1 and 'Traceback' not in outcome.stderr
        assert f'Error: --format={kind}: needs the online classifier' in outcome.stderr.splitlines()[-1]
        assert not (tmp_path / f'{kind}.pt2').exists()
    module = torch.export.load(tmp_path / 'module.pt2').module()
    assert module(torch.rand(3, 3, 8, 8)).shape == (3, 8)
    assert 'layer1.0.conv1.weight' in safetensors.torch.load_file(tmp_path / 'safetensors.pt2')


def test_seeds_have_folders_of_their_own(tmp_path):
    flags = tiny_digits(num_seeds=2, batch_size=512)
    succeed(*flags, '--workdir=run', cwd=tmp_path)
    outcome = run_launch(*flags, '--mode=export', '--format=module', '--output=x', '--workdir=run', cwd=tmp_path)
    error = outcome.stderr.splitlines()[-1]
    assert outcome.code == 1 and 'give --workdir=run/seed_0 (or one of 1 more seeds)' in error
    succeed(*flags, '--mode=export', '--format=module', '--output=x', '--workdir=run/seed_0', cwd=tmp_path)
