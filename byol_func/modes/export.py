"""`--mode=export`: converts a checkpoint of this code for the official code or for another library."""

import contextlib
import io
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import safetensors.torch
import torch

from byol_func import library
from byol_func.bridge import official, plain_module, resnets
from byol_func.byol_experiment import ByolState, make_network
from byol_func.errors import UserError, counted, one_of, redact
from byol_func.modes import EXPORT_FORMATS, checkpoints, given, hub, mlflow_model
from byol_func.runtime import atomic
from byol_func.utils import checkpointing, optimizers, variants
from byol_func.workdir.run import Run


def export(run: Run) -> None:
    """Writes the pre-trained checkpoint of a workdir, or the one in --checkpoint, to --output in format --format.

    The network is taken from the checkpoint, not from the config.

    Raises:
      UserError: there is no checkpoint, the format cannot represent the network, or the file exists already.
    """
    function = one_of('--format', run.format or 'official', _FORMATS)
    if not run.output:
        raise UserError('--output: required by --mode=export, the file to write')
    output = run.output
    if run.format == 'module' and not output.endswith('.pt2'):
        output += '.pt2'  # torch.export.load requires this extension.
    given.check_output(output, 'file')
    if run.push:
        one_of('--push: --format', run.format or 'official', ('hub',))
        hub.check_push(run.push)
    target = _target(run)
    checkpoint = checkpoints.find_checkpoint(run, ('pretrain',))
    print(function(output, checkpoint))
    if run.push:
        print(hub.push(pathlib.Path(output), run.push))
    if target:
        print(mlflow_model.log(pathlib.Path(output), target, checkpoint.step, run.register))


def _target(run: Run) -> mlflow_model.Target | None:
    """Returns where mlflow keeps the model; None if it is not tracked."""
    if run.register:
        one_of(f'--register={run.register}: --format', run.format or 'official', ('mlflow',))
        if not run.register.strip() or set(run.register) & {*'/:'}:
            raise UserError(f'--register={run.register}: expected a name without / and :, as mlflow requires')
    if run.register and not run.tracking:
        raise UserError(f'--register={run.register}: needs --mlflow_tracking_uri, the server with the registry')
    if not run.tracking:
        return None
    one_of(f'--mlflow_tracking_uri={redact(run.tracking.uri)}: --format', run.format or 'official', ('mlflow',))
    return mlflow_model.find_target(run)


def load_state(checkpoint: checkpointing.Checkpoint) -> ByolState:
    """Returns the state of a pre-training, built from the config that was saved with it.

    Raises:
      UserError: the state does not have the structure of `ByolState`, as with some variants.
    """
    config = checkpoint.config
    in_channels = checkpoint.tensors['online_params/encoder/initial_conv/w'].shape[1]
    classifier = checkpoint.tensors.get('online_params/classifier/w')  # None if pre-training had no labels.
    num_classes = 0 if classifier is None else classifier.shape[1]
    forward = make_network(**config['network'], num_classes=num_classes, in_channels=in_channels)
    params, state = forward.init(torch.Generator())
    optimizer = optimizers.make_optimizer(config['optimizer'], config['optimizer_config'])
    template = ByolState(params, params, state, state, optimizer(torch.tensor(0.0)).init(params))
    try:
        return checkpointing.restore(checkpoint, template)
    except UserError as error:
        if not config.get('variant'):
            raise
        raise UserError(
            f'--format=official: the update rule {variants.label(config)} has no counterpart in the official code; '
            'expected encoder, module, onnx, hub, mlflow or safetensors, which hold only the encoder'
        ) from error


def _official(output: str, checkpoint: checkpointing.Checkpoint) -> str:
    _classifier(checkpoint, 'official')  # Every network of the official code has a classifier.
    state, network = load_state(checkpoint), checkpoint.config['network']
    official.write(output, state, step=checkpoint.step, network=network)
    momentum = '' if checkpoint.config['optimizer'] == 'lars' else ' Its LARS momentum is zero.'
    done = counted(checkpoint.step + 1, 'step')
    return (
        f'{output}: {network["encoder_class"]}, saved after {done}. The official code loads it as '
        f'<checkpoint_root>/pretrain.pkl and feeds it images [B, H, W, C] in 0..1.{momentum}'
    )


def _encoder(checkpoint: checkpointing.Checkpoint) -> plain_module.Encoder:
    return library.encoder_of(checkpoint, torch.device('cpu')).as_module()


def _inputs(checkpoint: checkpointing.Checkpoint, normalised: bool) -> dict[str, Any]:
    """Returns the description of the network's inputs that is stored in the exported file.

    Args:
      checkpoint: a checkpoint of a pre-training.
      normalised: whether the caller must normalise the images; if False, the network does it itself.
    """
    config = checkpoint.config
    channels = checkpoint.tensors['online_params/encoder/initial_conv/w'].shape[1]
    mean, std = plain_module.normalisation(channels)
    return {
        'layout': 'NCHW',
        'channels': channels,
        'dtype': 'float32',
        'range': [0.0, 1.0],
        'then_normalised_by': {'mean': mean, 'std': std} if normalised else None,
        'image_size': config['image_size'],
        'center_crop': config.get('eval_crop_fraction', 0.875),
        'interpolation': 'bicubic',
    }


def _in_words(inputs: Mapping[str, Any]) -> str:
    """Returns the closing message that describes the inputs of an exported network."""
    size, channels = inputs['image_size'], inputs['channels']
    words = f'Input: float32 [B, {channels}, H, W] in 0..1, '
    if normalise := inputs['then_normalised_by']:
        mean, std = (', '.join(f'{value:.3f}' for value in normalise[key]) for key in ('mean', 'std'))
        words += f'then normalised: (x - ({mean})) / ({std})'
    else:
        words += 'not normalised, because the network does that itself'
    fraction = inputs['center_crop']
    square = 'the central square' if fraction == 1 else f'a central square of {fraction:g} times the shorter side'
    return f'{words}. Trained on {size} x {size} pixels, evaluated on {square}, resized to that size.'


def _classifier(checkpoint: checkpointing.Checkpoint, wanted_by: str) -> dict[str, torch.Tensor]:
    if 'online_params/classifier/w' not in checkpoint.tensors:
        raise UserError(
            f'--format={wanted_by}: needs the online classifier, and {checkpoint.path} has none (pre-trained without '
            'labels, or the encoder alone); expected encoder, module, onnx, hub, mlflow or safetensors, which hold '
            'only the encoder'
        )
    return {name: checkpoint.tensors[f'online_params/classifier/{name}'] for name in ('w', 'b')}


def _save(output: str, checkpoint: checkpointing.Checkpoint, tensors: resnets.StateDict, normalised: bool) -> str:
    """Writes a safetensors file whose header describes the network; returns the closing message about its inputs."""
    inputs = _inputs(checkpoint, normalised)
    described = {
        'network': json.dumps(checkpoint.config['network']),
        'step': str(checkpoint.step),
        'input': json.dumps(inputs),
    }
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, described)
    _write(output, data)
    return _in_words(inputs)


def _write(path: str, data: bytes) -> None:
    """Writes a file atomically."""
    with _output_errors(path):
        atomic.write_bytes(path, data)


@contextlib.contextmanager
def _output_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f'--output={path}: {error.strerror or error}') from error


def _torchvision(output: str, checkpoint: checkpointing.Checkpoint) -> str:
    network = checkpoint.config['network']
    resnets.check_bottleneck(network, 'torchvision')  # A classifier would not help a network that does not fit.
    classifier = _classifier(checkpoint, 'torchvision')
    tensors = resnets.to_torchvision(_encoder(checkpoint), classifier, network)
    inputs = _save(output, checkpoint, tensors, normalised=True)
    name, classes = network['encoder_class'].lower(), len(classifier['b'])
    return (
        f'{output}: for torchvision.models.{name}(num_classes={classes}).load_state_dict('
        "safetensors.torch.load_file(...)) and timm's model of that name. Their strided layers pad on both sides, but "
        'these weights were trained with SAME padding, so the outputs differ; --format=timm and module keep them. '
        f'{inputs}'
    )


def _timm(output: str, checkpoint: checkpointing.Checkpoint) -> str:
    network = checkpoint.config['network']
    resnets.check_bottleneck(network, 'timm')
    classifier = _classifier(checkpoint, 'timm')
    module = _encoder(checkpoint)
    inputs = _save(output, checkpoint, resnets.to_timm(module, classifier, network), normalised=True)
    built = resnets.timm_arguments(network, module.conv1.in_channels).replace(
        'num_classes=K', f'num_classes={len(classifier["b"])}'
    )
    return f'{output}: for {built}.load_state_dict(safetensors.torch.load_file(...)), the same outputs. {inputs}'


def _safetensors(output: str, checkpoint: checkpointing.Checkpoint) -> str:
    inputs = _save(output, checkpoint, _encoder(checkpoint).state_dict(), normalised=False)
    return (
        f"{output}: the state dict of byol_func.bridge.plain_module.Encoder, under torchvision's names; "
        f'the network is in the header as JSON. {inputs}'
    )


def _encoder_only(output: str, checkpoint: checkpointing.Checkpoint) -> str:
    encoder = checkpointing.encoder_only(checkpoint, output)
    with _output_errors(output):
        checkpointing.write(encoder)
    size = os.path.getsize(output) / 2**20
    return (
        f'{output}: the encoder alone, {size:.1f} MiB, for byol_func.load_encoder({output!r}) and for --checkpoint. '
        f'{_in_words(_inputs(checkpoint, normalised=False))}'
    )


class _Graph(NamedTuple):
    """An exported graph, the description of its inputs, the sizes that it accepts in words, and its features, D."""

    program: torch.export.ExportedProgram
    inputs: dict[str, Any]
    sizes: str
    features: int


def _trace(checkpoint: checkpointing.Checkpoint) -> _Graph:
    """Exports a graph for any batch size, and for any image size whose last feature map has more than one pixel.

    `torch.export` treats a size of one as a constant, so a network trained on smaller images accepts only their size.
    """
    encoder = library.encoder_of(checkpoint, torch.device('cpu'))
    module, inputs = encoder.as_module(), _inputs(checkpoint, normalised=False)
    size, open_size = inputs['image_size'], torch.export.Dim.DYNAMIC
    is_open = size > module.total_stride
    dims = {0: open_size, **({2: open_size, 3: open_size} if is_open else {})}
    program = torch.export.export(module, (torch.zeros(2, inputs['channels'], size, size),), dynamic_shapes=(dims,))
    program.example_inputs = None  # The only part that PyTorch would pickle.
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # It names files of this machine.
    smallest = module.total_stride + 1
    inputs |= {'smallest_size': smallest if is_open else size, 'largest_size': None if is_open else size}
    sizes = f'any B, and H and W of at least {smallest}' if is_open else f'any B, H and W {size} only'
    return _Graph(program, inputs, sizes, encoder.output_size)


def _hub(output: str, checkpoint: checkpointing.Checkpoint) -> str:
    encoder = library.encoder_of(checkpoint, torch.device('cpu'))
    with _output_errors(output):
        loaded = hub.write(pathlib.Path(output), checkpoint, encoder)
    return (
        f'{output}: {loaded} loads it; README.md is its model card. '
        f'{_in_words(_inputs(checkpoint, normalised="timm" in loaded))}'
    )


def _module(output: str, checkpoint: checkpointing.Checkpoint) -> str:
    graph, buffer = _trace(checkpoint), io.BytesIO()
    torch.export.save(graph.program, buffer, extra_files={'input.json': json.dumps(graph.inputs)})
    _write(output, buffer.getvalue())
    return (
        f'{output}: torch.export.load(...).module() returns embeddings [B, D] and needs only PyTorch; {graph.sizes}. '
        f'{_in_words(graph.inputs)}'
    )


def _onnx(output: str, checkpoint: checkpointing.Checkpoint) -> str:
    try:
        import onnx  # noqa: F401 (torch.onnx imports both, and would report it less clearly)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format=onnx: {error}; pip install onnx onnxscript, or 'byol_func[onnx]'") from error
    graph = _trace(checkpoint)
    logging.getLogger('onnxscript').setLevel(logging.WARNING)  # It tells what it simplified.
    axes = {0: 'batch', **({2: 'height', 3: 'width'} if graph.inputs['largest_size'] is None else {})}
    converted = torch.onnx.export(
        graph.program,
        (),
        dynamo=True,
        dynamic_shapes=(axes,),
        input_names=['images'],
        output_names=['embeddings'],
        verbose=False,
    )
    assert converted is not None
    converted.model.metadata_props['input'] = json.dumps(graph.inputs)
    _write(output, converted.model_proto.SerializeToString())
    return (
        f'{output}: onnxruntime.InferenceSession(...).run(None, {{"images": ...}}) returns embeddings [B, D]; '
        f'{graph.sizes}. {_in_words(graph.inputs)}'
    )


def _mlflow(output: str, checkpoint: checkpointing.Checkpoint) -> str:
    mlflow_model.check()
    graph = _trace(checkpoint)
    with _output_errors(output):
        mlflow_model.write(pathlib.Path(output), graph.program, graph.inputs, graph.features)
    return (
        f'{output}: mlflow.pyfunc.load_model({output!r}).predict(images) takes a NumPy array and returns embeddings '
        f'float32 [B, {graph.features}]; {graph.sizes}. {_in_words(graph.inputs)}'
    )


_WRITERS = (_official, _encoder_only, _module, _timm, _torchvision, _safetensors, _onnx, _hub, _mlflow)
_FORMATS = dict(zip(EXPORT_FORMATS, _WRITERS, strict=True))
