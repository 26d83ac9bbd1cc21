"""`--mode=export`: a checkpoint of ours for the official code and for other libraries."""

import io
import json
import os

import safetensors.torch
import torch

from byol_func.bridge import official, plain_module, resnets
from byol_func.byol_experiment import ByolState, make_network
from byol_func.errors import UserError, one_of
from byol_func.modes import EXPORT_FORMATS, checkpoints
from byol_func.utils import checkpointing, optimizers
from byol_func.workdir.run import Run


def export(run: Run) -> None:
    """Writes the pre-training of a workdir, or of --checkpoint, to --output in the --format asked for.

    The network is the one in the checkpoint, whatever the config says.

    Raises:
      UserError: there is no checkpoint, the format has no such network, or the file is there already.
    """
    function = one_of('--format', run.format or 'official', _FORMATS)
    if not run.output:
        raise UserError('--output: required by --mode=export, the file to write')
    if os.path.exists(run.output):
        raise UserError(f'--output={run.output}: is there already; remove it or choose another name')
    checkpoint = checkpoints.find_checkpoint(run, ('pretrain',))
    print(function(run, checkpoint))


def load_state(checkpoint: checkpointing.Checkpoint) -> ByolState:
    """The state of a pre-training, by the config that was saved with it."""
    config = checkpoint.config
    in_channels = checkpoint.tensors['online_params/encoder/initial_conv/w'].shape[1]
    classifier = checkpoint.tensors.get('online_params/classifier/w')  # None after a pre-training without labels.
    num_classes = 0 if classifier is None else classifier.shape[1]
    forward = make_network(**config['network'], num_classes=num_classes, in_channels=in_channels)
    params, state = forward.init(torch.Generator())
    optimizer = optimizers.make_optimizer(config['optimizer'], config['optimizer_config'])
    template = ByolState(params, params, state, state, optimizer(0.0).init(params))
    return checkpointing.restore(checkpoint, template)


def _official(run: Run, checkpoint: checkpointing.Checkpoint) -> str:
    _classifier(run, checkpoint)  # The official code has no networks without one.
    state, network = load_state(checkpoint), checkpoint.config['network']
    official.write(run.output, state, step=checkpoint.step, network=network)
    momentum = '' if checkpoint.config['optimizer'] == 'lars' else ' Its momentum of LARS is zero.'
    return (
        f'{run.output}: {network["encoder_class"]}, saved after step {checkpoint.step}. The official code '
        f'takes it as <checkpoint_root>/pretrain.pkl.{momentum}'
    )


def _encoder(checkpoint: checkpointing.Checkpoint) -> plain_module.Encoder:
    state = load_state(checkpoint)
    return plain_module.make_module(
        state.online_params['encoder'], state.online_state['encoder'], checkpoint.config['network']
    )


def _classifier(run: Run, checkpoint: checkpointing.Checkpoint) -> dict[str, torch.Tensor]:
    if 'online_params/classifier/w' not in checkpoint.tensors:
        raise UserError(
            f'--format={run.format or "official"}: needs the online classifier, and {checkpoint.path} is of a '
            'pre-training without labels; expected module or safetensors, which hold the encoder alone'
        )
    return {name: checkpoint.tensors[f'online_params/classifier/{name}'] for name in ('w', 'b')}


def _save(run: Run, checkpoint: checkpointing.Checkpoint, tensors: resnets.StateDict) -> None:
    described = {'network': json.dumps(checkpoint.config['network']), 'step': str(checkpoint.step)}
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, described)
    _write(run.output, data)


def _write(path: str, data: bytes) -> None:
    """Writes a file whole or not at all."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with open(f'{path}.tmp', 'wb') as file:
            file.write(data)
        os.replace(f'{path}.tmp', path)
    except OSError as error:
        raise UserError(f'--output={path}: {error.strerror or error}') from error


def _torchvision(run: Run, checkpoint: checkpointing.Checkpoint) -> str:
    network, classifier = checkpoint.config['network'], _classifier(run, checkpoint)
    _save(run, checkpoint, resnets.to_torchvision(_encoder(checkpoint), classifier, network))
    name, classes = network['encoder_class'].lower(), len(classifier['b'])
    return (
        f'{run.output}: for torchvision.models.{name}(num_classes={classes}).load_state_dict('
        "safetensors.torch.load_file(...)) and timm's model of that name. Their strided layers pad on both sides "
        'where these weights were trained with SAME: outputs differ; --format=timm and module keep them.'
    )


def _timm(run: Run, checkpoint: checkpointing.Checkpoint) -> str:
    network, classifier = checkpoint.config['network'], _classifier(run, checkpoint)
    _save(run, checkpoint, resnets.to_timm(_encoder(checkpoint), classifier, network))
    built = resnets.timm_arguments(network).replace('num_classes=K', f'num_classes={len(classifier["b"])}')
    return f'{run.output}: for {built}.load_state_dict(safetensors.torch.load_file(...)), the same outputs.'


def _safetensors(run: Run, checkpoint: checkpointing.Checkpoint) -> str:
    _save(run, checkpoint, _encoder(checkpoint).state_dict())
    return (
        f"{run.output}: the state dict of byol_func.bridge.plain_module.Encoder, under torchvision's names; "
        'the network is in the header as JSON.'
    )


def _module(run: Run, checkpoint: checkpointing.Checkpoint) -> str:
    module, size = _encoder(checkpoint), checkpoint.config['image_size']
    images = torch.zeros(2, module.conv1.in_channels, size, size)
    batch = torch.export.Dim('batch', min=1)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    _write(run.output, buffer.getvalue())
    return (
        f'{run.output}: torch.export.load(...).module() takes images [B, {images.shape[1]}, {size}, {size}] in 0..1 '
        'and returns embeddings; it needs PyTorch alone.'
    )


_FORMATS = dict(zip(EXPORT_FORMATS, (_official, _module, _timm, _torchvision, _safetensors), strict=True))
