"""The exported encoder in real hands: plain PyTorch, torch.export, torchvision and timm."""

import functools
import json
import re
import sys
import zipfile

import optree
import pytest
import safetensors
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image

from byol_func import byol_experiment, eval_experiment
from byol_func.bridge import plain_module, resnets
from byol_func.bridge.official import read, to_state
from byol_func.errors import UserError
from byol_func.forward import ENCODER_FIELDS
from byol_func.modes import EXPORT_FORMATS, export
from byol_func.utils import checkpointing, optimizers
from byol_func.utils.dataset import normalize_images
from byol_func.workdir.run import Run
from cli import ROOT, TINY_NETWORK, config, run_launch, succeed, tiny_digits
from configs import byol
from golden_io import DIRECTORY, images, load
from golden_networks import golden_network_fields
from variant_runs import load_config, make

PATH = DIRECTORY / 'official_checkpoint.pkl'


def _network(encoder_class, norm='batch_norm', **options):
    network = byol.get_config().network.to_dict() | dict(encoder_class=encoder_class, norm=norm)
    network['encoder_config'] |= options
    return network


def _trained(network, in_channels=3):
    """An encoder whose every number has moved: its backbone, params and state."""
    return _trained_once(json.dumps(network), in_channels)


@functools.cache  # A ResNet-50 takes seconds.
def _trained_once(network, in_channels):
    network = json.loads(network)
    backbone = eval_experiment.make_backbone(
        **{name: network[name] for name in ENCODER_FIELDS}, in_channels=in_channels
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
        ('ResNet18', dict(norm='group_norm'), 3),
        ('ResNet50', {}, 3),
        ('ResNet50', dict(resnet_v2=True, width_multiplier=0.25, stem='cifar'), 3),
    ],
)
def test_the_module_has_our_outputs(encoder_class, options, in_channels):
    network = _network(encoder_class, **options)
    backbone, params, state = _trained(network, in_channels)
    module = plain_module.make_module(params['encoder'], state['encoder'], network).double()
    assert not module.training
    double = lambda tree: optree.tree_map(lambda x: x.double() if x.is_floating_point() else x, tree)
    with torch.no_grad():
        for height, width in ((40, 40), (33, 47)):  # Even and odd: SAME pads them differently.
            inputs = torch.rand(3, in_channels, height, width, dtype=torch.float64)
            expected, _ = backbone.apply(double(params), double(state), inputs, is_training=False)
            # The module holds the mean of the colours in float32, whose rounding grows from layer to layer.
            assert _largest(module(inputs), expected) <= 2e-5 * max(1.0, expected.abs().max().item())


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
    inputs = torch.rand(2, 3, 65, 64, dtype=torch.float64)
    with torch.no_grad():
        embedding = module.double()(inputs)
        logits = model.double()(normalize_images(inputs))
    expected = embedding @ classifier['w'].double() + classifier['b'].double()
    assert _largest(logits, expected) <= 2e-5 * expected.abs().max()


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
    inputs = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    module, model = module.double(), model.double()
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
    assert _largest(theirs, symmetric) <= 2e-5 * scale
    assert _largest(theirs, ours) > 0.01 * scale


@pytest.mark.parametrize(
    'rule, message',
    [
        ('simsiam', '--format=official: the update rule simsiam has no counterpart in the official code'),
        ('dino', '--format=official: the update rule dino has no counterpart in the official code'),
        ('group_norm', "config.network.norm='group_norm': expected 'batch_norm'; the official code has no other"),
    ],
)
def test_update_rules_that_the_official_code_does_not_have(rule, message, tmp_path):
    config = load_config(ROOT / f'configs/variants/{rule}.py', **{'network.encoder_config.stem': 'imagenet'})
    state, plain = make(config).init(), json.loads(config.to_json())
    path = checkpointing.save(tmp_path, state, mode='pretrain', step=1, config=plain)
    output = tmp_path / 'x.pkl'
    with pytest.raises(UserError, match=message) as caught:
        export.export(Run(config, '', torch.device('cpu'), str(path), 60.0, output=str(output), format='official'))
    assert '\n' not in str(caught.value) and not output.exists()


@pytest.mark.golden
def test_files_of_the_command_line(tmp_path):
    size = load('byol_update.npz')['inputs/view1'].shape[2]
    flags = [
        *tiny_digits(
            **golden_network_fields(read(PATH).network),
            image_size=size,
        ),
        '--workdir=run',
    ]
    succeed(*flags, '--mode=import', f'--checkpoint={PATH}', cwd=tmp_path)
    export = lambda kind, name: [*flags, '--mode=export', f'--format={kind}', f'--output={name}']
    expected = load('official_checkpoint_outputs.npz')
    inputs, embedding = images(expected['images']), torch.from_numpy(expected['embedding'])

    told = succeed(*export('module', 'encoder'), cwd=tmp_path).stdout  # The ending is appended.
    extra = {'input.json': ''}
    with zipfile.ZipFile(tmp_path / 'encoder.pt2') as file:  # A sample input would be pickled, in a zip file.
        contents = [file.read(name) for name in file.namelist() if '/weights/' not in name]
    assert not any(content.startswith(b'PK') or b'.py' in content for content in contents)
    module = torch.export.load(tmp_path / 'encoder.pt2', extra_files=extra).module()
    described = json.loads(extra['input.json'])
    assert described['range'] == [0.0, 1.0] and described['then_normalised_by'] is None
    assert described['layout'] == 'NCHW' and described['image_size'] == size
    assert 'in 0..1, not normalised' in told and f'Trained on {size} x {size} pixels' in told
    assert len(inputs) >= 3
    for batch in (slice(None), slice(0, 3), slice(0, 1)):  # Any batch size.
        assert _largest(module(inputs[batch]), embedding[batch]) <= 1e-5

    succeed(*export('safetensors', 'out/encoder.safetensors'), cwd=tmp_path)
    path = tmp_path / 'out/encoder.safetensors'
    with safetensors.safe_open(path, framework='pt') as file:
        network, described = (json.loads(file.metadata()[name]) for name in ('network', 'input'))
    assert described['then_normalised_by'] is None and described['image_size'] == size
    assert network['encoder_class'] == 'TinyResNet'
    assert 'layer4.0.downsample.1.running_var' in safetensors.torch.load_file(path)

    refused = run_launch(*export('torchvision', 'x.safetensors'), cwd=tmp_path)
    assert refused.code == 1 and "config.network.encoder_class='TinyResNet'" in refused.stderr
    assert not (tmp_path / 'x.safetensors').exists()


def _save_pretraining(directory, encoder_class, image_size, in_channels=3, **options):
    """A checkpoint of a pre-training that never was, with a trained encoder; returns the encoder's outputs."""
    config = byol.get_config()
    config.image_size = image_size
    config.network = _network(encoder_class, **options) | dict(
        projector_hidden_size=8, projector_output_size=4, predictor_hidden_size=8
    )
    network = config.network.to_dict()
    forward = byol_experiment.make_network(**network, num_classes=7, in_channels=in_channels)
    params, state = forward.init(torch.Generator().manual_seed(0))
    backbone, trained_params, trained_state = _trained(network, in_channels)
    params, state = {**params, **trained_params}, {**state, **trained_state}
    whole = byol_experiment.ByolState(params, params, state, state, optimizers.lars(0.0).init(params))
    whole = optree.tree_map(torch.clone, whole)  # A file shares no memory.
    path = checkpointing.save(directory, whole, mode='pretrain', step=3, config=json.loads(config.to_json()))
    embed = lambda images: backbone.apply(trained_params, trained_state, images, is_training=False)[0]
    return path, embed, params['classifier']


@pytest.mark.parametrize('stem, image_size, smallest', [('imagenet', 48, 33), ('cifar', 16, 9), ('cifar', 8, 8)])
def test_an_exported_module_takes_other_sizes(stem, image_size, smallest, tmp_path):
    path, embed, _ = _save_pretraining(tmp_path, 'ResNet18', image_size, stem=stem, width_multiplier=0.125)
    flags = [*tiny_digits(), '--mode=export', '--format=module', f'--checkpoint={path}', '--output=x.pt2']
    told = succeed(*flags, cwd=tmp_path).stdout
    extra = {'input.json': ''}
    module = torch.export.load(tmp_path / 'x.pt2', extra_files=extra).module()
    described = json.loads(extra['input.json'])
    assert described['smallest_size'] == smallest
    sizes = [(1, image_size, image_size), (3, image_size, image_size)]
    if image_size > smallest:
        assert f'any B, and H and W of at least {smallest}' in told and described['largest_size'] is None
        sizes += [(2, smallest, smallest), (1, smallest + 3, smallest + 10), (2, 70, 101)]
    else:
        assert f'H and W {image_size} only' in told and described['largest_size'] == image_size
        with pytest.raises(Exception, match='size|shape'):
            module(torch.rand(2, 3, image_size + 8, image_size + 8))
    for batch, height, width in sizes:
        images = torch.rand(batch, 3, height, width)
        with torch.no_grad():
            assert _largest(module(images), embed(images)) <= 1e-5


@pytest.mark.parametrize('stem, image_size', [('imagenet', 48), ('cifar', 8)])
def test_onnxruntime_has_our_outputs(stem, image_size, tmp_path, monkeypatch, capsys):
    """By the snippet of docs/export.md."""
    monkeypatch.chdir(tmp_path)
    path, embed, _ = _save_pretraining(tmp_path, 'TinyResNet', image_size, stem=stem)
    run = Run(byol.get_config(), '', torch.device('cpu'), str(path), 60.0, output='encoder.onnx', format='onnx')
    export.export(run)
    told = capsys.readouterr().out
    assert 'in 0..1, not normalised' in told and f'Trained on {image_size} x {image_size} pixels' in told
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/export.md').read_text(), re.S)
    (block,) = (block for block in blocks if 'onnxruntime' in block)
    for batch, height, width in [(1, image_size, image_size), (3, image_size, image_size), (2, 41, 70)]:
        if image_size == 8 and height > 8:
            assert 'H and W 8 only' in told
            continue
        names = {'images': torch.rand(batch, 3, height, width)}
        exec(block, names)
        expected = embed(names['images'])
        assert _largest(torch.from_numpy(names['embeddings']), expected) <= 1e-5 * max(1.0, expected.abs().max())
        assert names['about']['range'] == [0.0, 1.0] and names['about']['image_size'] == image_size
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(UserError, match="--format=onnx: .*; pip install onnx onnxscript, or 'byol_func\\[onnx\\]'"):
        export.export(run._replace(output='again.onnx'))


def test_the_docs_snippets_give_the_same_embeddings(tmp_path, monkeypatch):
    """The first blocks of docs/export.md, on one batch: what goes in differs by format, what comes out does not."""
    monkeypatch.chdir(tmp_path)
    path, embed, classifier = _save_pretraining(tmp_path, 'ResNet50', 64, width_multiplier=0.25)
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/export.md').read_text(), re.S)
    images = torch.rand(2, 3, 64, 64)
    expected = embed(images)
    for kind, block in zip(('encoder', 'module', 'safetensors', 'timm'), blocks[:4], strict=True):
        output = 'module.pt2' if kind == 'module' else f'{kind}.safetensors'
        flags = ['--mode=export', f'--format={kind}', f'--checkpoint={path}', f'--output={output}']
        told = succeed(*tiny_digits(), *flags, cwd=tmp_path).stdout
        assert ('then normalised: (x - (0.485, 0.456, 0.406))' in told) == (kind == 'timm')
        names = {'images': images}
        exec(block, names)
        assert _largest(names['embeddings'], expected) <= 1e-5 * expected.abs().max(), kind
    logits = names['logits']
    wanted = expected @ classifier['w'] + classifier['b']
    assert _largest(logits, wanted) <= 1e-5 * wanted.abs().max()
    with safetensors.safe_open('timm.safetensors', framework='pt') as file:
        described = json.loads(file.metadata()['input'])
    assert described['then_normalised_by'] == {'mean': [0.485, 0.456, 0.406], 'std': [0.229, 0.224, 0.225]}


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
        if kind in ('encoder', 'module', 'safetensors', 'onnx', 'hub', 'mlflow'):
            assert outcome.code == 0, outcome.stderr
            continue
        assert outcome.code == 1 and 'Traceback' not in outcome.stderr
        # The others would not fit with a classifier either.
        lacks = '--format=official: needs the online' if kind == 'official' else f'{kind} has no such network'
        assert lacks in outcome.stderr.splitlines()[-1]
        assert not (tmp_path / f'{kind}.pt2').exists()
    module = torch.export.load(tmp_path / 'module.pt2').module()
    assert module(torch.rand(3, 3, 8, 8)).shape == (3, 8)
    assert 'layer1.0.conv1.weight' in safetensors.torch.load_file(tmp_path / 'safetensors.pt2')


def test_seeds_have_folders_of_their_own(tmp_path):
    flags = tiny_digits(num_seeds=2, batch_size=512)
    succeed(*flags, '--workdir=run', cwd=tmp_path)
    outcome = run_launch(*flags, '--mode=export', '--format=module', '--output=x', '--workdir=run', cwd=tmp_path)
    error = outcome.stderr.splitlines()[-1]
    assert outcome.code == 1 and 'give --workdir=run/seed_0 (the first of 2)' in error
    succeed(*flags, '--mode=export', '--format=module', '--output=x', '--workdir=run/seed_0', cwd=tmp_path)
