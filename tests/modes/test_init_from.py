"""Pre-training that starts from an encoder in a file, `config.init_from`."""

import functools
import json
import logging
import shutil

import optree
import pytest
import safetensors.torch
import timm
import torch
import torchvision

from byol_func import byol_experiment
from byol_func.bridge import official, plain_module, resnets
from byol_func.modes import init_from
from byol_func.utils import checkpointing
from byol_func.workdir.run import Run
from cli import assert_refused, run_launch, succeed, tiny_digits
from configs import byol
from golden_io import DIRECTORY
from runs import error_of


def _start(path, channels=3, heads=8, **fields):
    """The first state of a run that starts from a file, and its config."""
    config = byol.get_config()
    sizes = {f'network.{name}_size': heads for name in ('projector_hidden', 'projector_output', 'predictor_hidden')}
    config.update_from_flattened_dict({'batch_size': 8, 'init_from': str(path), **sizes, **fields})
    run = Run(config, 'no_workdir', torch.device('cpu'), None, 10.0)
    init_from.resolve(run)
    made = byol_experiment.make(config, num_examples=80, num_classes=3, image_shape=(channels, 8, 8))
    return init_from.start_from(run, made).init(), config


def _moved(model):
    """A state dict of which no number is that of a new network."""
    rng = torch.Generator().manual_seed(1)
    return {
        name: tensor + 0.01 * torch.rand(tensor.shape, generator=rng) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }


def test_a_resnet_of_torchvision(tmp_path, caplog):
    expected = _moved(torchvision.models.resnet50())
    safetensors.torch.save_file(expected, tmp_path / 'resnet50.safetensors')
    with caplog.at_level(logging.INFO):
        state, config = _start(tmp_path / 'resnet50.safetensors')
    assert (
        'all 477 tensors of the encoder (ResNet50) taken for the online and the target network; not taken: fc; '
        in caplog.text
    )
    assert 'drawn anew: projector, predictor, classifier' in caplog.text
    for params, averages in ((state.online_params, state.online_state), (state.target_params, state.target_state)):
        # Our export writes torchvision's names.
        module = plain_module.make_module(params['encoder'], averages['encoder'], config.network.to_dict())
        found = module.state_dict()
        assert found.keys() == expected.keys() - {'fc.weight', 'fc.bias'}
        assert all(torch.equal(found[k], expected[k]) for k in found if not k.endswith('num_batches_tracked'))
    memory = [{leaf.data_ptr() for leaf in optree.tree_leaves(tree)} for tree in state[:4]]
    assert not memory[0] & memory[1] and not memory[2] & memory[3]


@pytest.mark.parametrize('is_v2', [False, True])
def test_a_resnet_of_timm(is_v2, tmp_path):
    network = byol.get_config().network.to_dict()
    network['encoder_config'] |= dict(resnet_v2=is_v2, width_multiplier=0.125)
    model = eval(resnets.timm_arguments(network), {'timm': timm, 'functools': functools, 'K': 7})
    expected = _moved(model)
    safetensors.torch.save_file(expected, tmp_path / 'timm.safetensors')
    fields = {f'network.encoder_config.{name}': value for name, value in network['encoder_config'].items()}
    state, _ = _start(tmp_path / 'timm.safetensors', **fields)
    module = plain_module.make_module(state.online_params['encoder'], state.online_state['encoder'], network)
    found = resnets.to_timm(module, {'w': torch.zeros(256, 7), 'b': torch.zeros(7)}, network)
    assert found.keys() == expected.keys()
    for name in found:
        if not name.startswith('head') and not name.endswith('num_batches_tracked'):
            assert torch.equal(found[name], expected[name]), name


@pytest.mark.golden
def test_an_official_checkpoint():
    path = DIRECTORY / 'official_checkpoint.pkl'
    expected = official.read(path)
    network = {k: v for k, v in expected.network.items() if k.startswith('encoder')}
    state, _ = _start(path, **{'network.encoder_class': 'TinyResNet'}, heads=expected.network['projector_hidden_size'])
    assert network['encoder_class'] == 'TinyResNet'
    for name in ('params', 'state'):
        for part in ('online', 'target'):
            tree = getattr(state, f'{part}_{name}')['encoder']
            for leaf_name, leaf in zip(checkpointing.leaf_names(tree), optree.tree_leaves(tree), strict=True):
                assert torch.equal(leaf, expected.trees[f'online_{name}'][f'encoder/{leaf_name}'])


def _resnet18(path):
    safetensors.torch.save_file(torchvision.models.resnet18().state_dict(), path)


def _vit(path):
    safetensors.torch.save_file({'blocks.0.attn.qkv.weight': torch.zeros(3, 3)}, path)


_REFUSED = {
    'missing': (lambda path: None, ['no such file or folder; expected a checkpoint']),
    'other': (
        _resnet18,
        ['holds ResNet18, resnet_v2 False, width_multiplier 1.0', 'the config describes TinyResNet, resnet_v2 False'],
    ),
    'pickle': (
        lambda path: torch.save(torchvision.models.resnet18().state_dict(), path),
        ['it is a PyTorch file (torch.save)', 'safetensors.torch.save_file(model.state_dict(), FILE)'],
    ),
    'vit': (_vit, ['there is no encoder/initial_conv/w among the parameters']),
    'text': (lambda path: path.write_text('hello'), ['expected a checkpoint']),
}


@pytest.mark.parametrize('write, fragments', _REFUSED.values(), ids=_REFUSED)
def test_what_is_refused(write, fragments, tmp_path):
    path = tmp_path / 'file'
    write(path)
    message = error_of(_start, path, **{'network.encoder_class': 'TinyResNet'})
    assert message.startswith(f'config.init_from={str(path)!r}: ')
    assert all(fragment in message for fragment in fragments), message


def test_a_small_resnet_lacks_a_shortcut(tmp_path):
    _resnet18(tmp_path / 'file')
    message = error_of(_start, tmp_path / 'file', **{'network.encoder_class': 'ResNet18'})
    assert 'ResNet-18 and 34 of torchvision and timm have no convolution in this shortcut' in message


def test_a_run_from_our_own_files(tmp_path):
    """From a workdir, an exported encoder and its state dict: the same run, which resumes without the file."""
    succeed(*tiny_digits(), '--workdir=first', cwd=tmp_path)
    sources = {'encoder': 'encoder.safetensors', 'safetensors': 'plain.safetensors'}
    for kind, path in sources.items():
        succeed('--mode=export', f'--format={kind}', f'--output={path}', '--workdir=first', cwd=tmp_path)
    lines = {}
    for source in ('first', *sources.values()):
        name = source.partition('.')[0]
        run = tiny_digits(init_from=source, random_seed=1)
        outcome = succeed(*run, f'--workdir=from_{name}', cwd=tmp_path)
        assert 'of the encoder (TinyResNet) taken for the online and the target network' in outcome.stderr
        lines[name] = (tmp_path / f'from_{name}/metrics.jsonl').read_text()
        summary = json.loads((tmp_path / f'from_{name}/summary.json').read_text())
        assert summary['init_from'].startswith(source) and len(summary['init_digest']) == 64
    losses = [[json.loads(line).get('loss') for line in text.splitlines()] for text in lines.values()]
    assert losses[0] == losses[1] == losses[2]

    again = [*tiny_digits(init_from='encoder.safetensors', random_seed=1), '--workdir=from_encoder']
    shutil.copy(tmp_path / 'encoder.safetensors', tmp_path / 'elsewhere.safetensors')
    succeed(*tiny_digits(init_from='elsewhere.safetensors', random_seed=1), '--workdir=from_encoder', cwd=tmp_path)
    (tmp_path / 'elsewhere.safetensors').unlink()
    succeed('--workdir=from_encoder', cwd=tmp_path)
    succeed('--workdir=from_encoder', '--mode=knn', cwd=tmp_path)
    shutil.copy(tmp_path / 'plain.safetensors', tmp_path / 'encoder.safetensors')
    assert_refused(run_launch(*again, cwd=tmp_path), "another file of the name config.init_from='encoder.safetensors'")
    (tmp_path / 'encoder.safetensors').unlink()
    assert_refused(run_launch(*tiny_digits(random_seed=1), '--workdir=from_encoder', cwd=tmp_path), 'config.init_from=')
    assert_refused(run_launch(*again[:-1], '--workdir=new', cwd=tmp_path), 'no such file')
