"""Loads a trained encoder for use from Python: `byol_func.load_encoder(PATH)`."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from byol_func.bridge import exports, foreign, plain_module
from byol_func.data import decoding, levels, named
from byol_func.errors import UserError, counted
from byol_func.forward import ENCODER_FIELDS, make_backbone
from byol_func.runtime import transfer
from byol_func.training import resuming
from byol_func.utils import augmentations, checkpointing, networks

# The modes whose checkpoints contain an encoder, in the order in which a workdir is searched.
WITH_ENCODER = ('pretrain', 'fine_tune', 'linear_eval', 'logistic')
HUB_FILE = 'model.safetensors'  # In a folder that --format=hub wrote.
WITH_CLASSIFIER = ('fine_tune', 'linear_eval', 'logistic', 'pretrain')


class Encoder(NamedTuple):
    """A frozen encoder: `embed` accepts images of any size, a call accepts preprocessed tensors.

    `params` and `state` are the trees of `network`, a pair of pure functions, and are never mutated. `config` is the
    config that the checkpoint was trained with, `step` the index of its last update.
    """

    params: networks.Params
    state: networks.NetState
    network: networks.Network
    config: Mapping[str, Any]
    step: int
    num_channels: int
    device: torch.device

    def __repr__(self) -> str:
        return (
            f'Encoder({self.config["network"]["encoder_class"]}, {counted(self.output_size, "feature")}, '
            f'{counted(self.num_channels, "channel")}, step {self.step}, {self.device})'
        )

    def __call__(self, images: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Embeds images `[B, C, H, W]`, tensor or array, uint8 or float in 0..1, without cropping or resizing them.

        Floats of any precision are converted to float32. The `value_range` of the data set is not applied: it scales
        the values of files.

        Returns:
          The embeddings, float32 `[B, D]`, on the device of the encoder.

        Raises:
          UserError: the images have another shape, dtype or range.
        """
        given = _as_tensor(images)
        if not isinstance(given, torch.Tensor):
            raise UserError(
                f'images of type {type(images).__name__}: expected a tensor or an array [B, {self.num_channels}, H, '
                'W]; embed and predict take lists of paths or PIL images'
            )
        _check(given, self.num_channels)
        inputs = given.float() if given.is_floating_point() else given / 255
        with torch.no_grad():
            embeddings, _ = self.network.apply(self.params, self.state, inputs.to(self.device), is_training=False)
        return embeddings

    def embed(
        self, images: torch.Tensor | np.ndarray | Sequence[Image.Image | str | os.PathLike], batch_size: int = 256
    ) -> torch.Tensor:
        """Embeds images as `--mode=embed` does: takes the centre crop and resizes it to the training size.

        Args:
          images: PIL images or paths of image files, of any sizes; or a tensor or an array
            `[N, C, H, W]`, uint8 or float in 0..1, to which no `value_range` is applied.
          batch_size: the number of images to embed at a time.

        Returns:
          The embeddings, float32 `[N, D]`, on the CPU.

        Raises:
          UserError: a file cannot be read, or a tensor has another shape, dtype or range.
        """
        _check_several(images, batch_size)
        parts = [torch.zeros(0, self.output_size)]
        for start in range(0, len(images), batch_size):
            views = self.views(images[start : start + batch_size])
            parts.append(self(views).cpu())
        return torch.cat(parts)

    @property
    def output_size(self) -> int:
        """The number of features, D."""
        return self.network.output_size

    def as_module(self) -> plain_module.Encoder:
        """Returns the encoder as a `torch.nn.Module` in evaluation mode, from images in 0..1 to embeddings."""
        module = plain_module.make_module(self.params['encoder'], self.state['encoder'], self.config['network'])
        return module.to(self.device)

    def views(self, images: torch.Tensor | np.ndarray | Sequence[Image.Image | str | os.PathLike]) -> torch.Tensor:
        """Returns what the network sees of images, float32 `[N, C, S, S]` in 0..1; arguments and errors as `embed`."""
        size, fraction = self.config['image_size'], self.config['eval_crop_fraction']
        images = _as_tensor(images)
        if isinstance(images, torch.Tensor):
            _check(images, self.num_channels)
            return augmentations.center_crop(images, size, fraction)
        views = [augmentations.center_crop(self._pixels(image)[None], size, fraction) for image in images]
        return torch.cat(views)

    def _pixels(self, image: Image.Image | str | os.PathLike) -> torch.Tensor:
        """Reads one image as uint8 `[C, H, W]`, in the same way as training does."""
        data = self.config['dataset']
        if data.get('channels') and (not isinstance(image, Image.Image) or self.num_channels not in (1, 3)):
            return self._stacked(image)
        try:
            opened = image if isinstance(image, Image.Image) else Image.open(image)
            if data.get('exif_orientation'):
                opened = ImageOps.exif_transpose(opened)
            if not all(opened.size):
                raise ValueError('it has no pixels')
            converted = decoding.to_rgb(opened, tuple(data.get('value_range', ())))
        except (OSError, ValueError) as error:
            reason = getattr(error, 'strerror', None) or error
            name = f'a PIL image of mode {image.mode}' if isinstance(image, Image.Image) else image
            raise UserError(f'{name}: cannot be read as an image ({reason})') from error
        if self.num_channels == 1:
            converted = converted.convert('L')
        if side := data.get('source_size', 0) if data['name'] in named.FOLDERS else 0:
            converted = ImageOps.fit(converted, (side, side), Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(converted.tobytes()), dtype=torch.uint8)
        return pixels.view(converted.height, converted.width, self.num_channels).permute(2, 0, 1)

    def _stacked(self, image: Image.Image | str | os.PathLike) -> torch.Tensor:
        """Reads a file whose channels are kept, see `config.dataset.channels`."""
        data = self.config['dataset']
        if isinstance(image, Image.Image):
            raise UserError(
                f'a PIL image: expected the path of a TIFF or .npy file with {self.num_channels} channels, or a tensor '
                f'[N, {self.num_channels}, H, W]'
            )
        side, turned, channels = data['source_size'], data['exif_orientation'], data['channels']
        form = decoding.Form(side, False, turned, levels.as_range(data['value_range'], channels), channels)
        try:
            return torch.from_numpy(decoding.decode_file(os.fspath(image), form).copy()).permute(2, 0, 1)
        except decoding.BadImage as error:
            raise UserError(str(error)) from error


class Classifier(NamedTuple):
    """An encoder with the linear classifier that was trained on it; `class_names` are those of its K classes."""

    encoder: Encoder
    weights: networks.Params
    class_names: tuple[str, ...]

    def __repr__(self) -> str:
        return f'Classifier({counted(len(self.class_names), "class")}, {self.encoder})'

    def __call__(self, images: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Returns class probabilities, float32 `[B, K]`; arguments and errors as for the call of an `Encoder`."""
        return torch.softmax(networks.linear(self.weights, self.encoder(images)), dim=1)

    def predict(
        self, images: torch.Tensor | np.ndarray | Sequence[Image.Image | str | os.PathLike], batch_size: int = 256
    ) -> tuple[list[str], torch.Tensor]:
        """Returns the most probable class of each image, and the probabilities, float32 `[N, K]` on the CPU.

        Arguments and errors are those of `Encoder.embed`.
        """
        _check_several(images, batch_size)
        starts = range(0, len(images), batch_size)
        parts = [self(self.encoder.views(images[start : start + batch_size])).cpu() for start in starts]
        probabilities = torch.cat([torch.zeros(0, len(self.class_names)), *parts])
        return [self.class_names[i] for i in probabilities.argmax(dim=1).tolist()], probabilities


def load_classifier(path: str | os.PathLike, device: str | torch.device = 'cpu') -> Classifier:
    """Loads the classifier of a checkpoint or of a workdir.

    A workdir may have those of fine-tuning, linear evaluation, logistic regression and pre-training; the first counts.

    Args:
      path: a checkpoint written by `launch.py`, or its workdir.
      device: the device to classify on.

    Raises:
      UserError: there is no readable checkpoint, or it holds no classifier.
    """
    chosen = _device(device)
    return classifier_of(_open(path, WITH_CLASSIFIER), chosen)


def classifier_of(checkpoint: checkpointing.Checkpoint, device: torch.device) -> Classifier:
    """Returns the classifier of a checkpoint, with its encoder.

    Raises:
      UserError: the checkpoint has no classifier: it was trained without labels, or is the encoder alone.
    """
    prefix = f'{"online" if checkpoint.mode == "pretrain" else "classif"}_params/classifier/'
    if f'{prefix}b' not in checkpoint.tensors:
        raise UserError(
            f'{checkpoint.path}: holds no classifier (it was trained without labels, or is the encoder alone); run '
            '--mode=linear_eval, logistic or fine_tune on labelled images first'
        )
    weights = transfer.place({leaf: checkpoint.tensors[f'{prefix}{leaf}'] for leaf in ('w', 'b')}, device)
    names = tuple(checkpoint.class_names) or tuple(map(str, range(len(weights['b']))))
    return Classifier(encoder_of(checkpoint, device), weights, names)


def load_encoder(path: str | os.PathLike, device: str | torch.device = 'cpu') -> Encoder:
    """Loads the encoder of a checkpoint, or of the newest checkpoint of a workdir.

    Args:
      path: a checkpoint written by `launch.py`, its workdir, or a folder that `--mode=export --format=hub` wrote.
      device: the device to embed on.

    Raises:
      UserError: there is no readable checkpoint that contains an encoder.
    """
    chosen = _device(device)
    return encoder_of(_open(path, WITH_ENCODER), chosen)


def encoder_of(checkpoint: checkpointing.Checkpoint, device: torch.device) -> Encoder:
    """Returns the encoder of a checkpoint, with the network that the checkpoint's own config describes.

    Raises:
      UserError: the checkpoint contains no encoder, or not the one of its config.
    """
    if checkpoint.mode not in WITH_ENCODER:
        raise UserError(
            f'{checkpoint.path}: written by --mode={checkpoint.mode}, expected one of {", ".join(WITH_ENCODER)}'
        )
    prefix = 'online' if checkpoint.mode == 'pretrain' else 'backbone'
    config = checkpoint.config
    num_channels = checkpoint.tensors[f'{prefix}_params/encoder/initial_conv/w'].shape[1]
    fields = {name: config['network'][name] for name in ENCODER_FIELDS if name in config['network']}
    network = make_backbone(**fields, in_channels=num_channels)
    params, state = network.init(torch.Generator())
    params = checkpointing.restore(checkpoint, params, prefix=f'{prefix}_params/')
    state = checkpointing.restore(checkpoint, state, prefix=f'{prefix}_state/')
    params, state = transfer.place((params, state), device)
    return Encoder(params, state, network, config, checkpoint.step, num_channels, device)


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.zeros(0, device=found)
    except (AssertionError, RuntimeError, TypeError) as error:  # PyTorch's words may be a page.
        raise UserError(f"device={device!r}: there is none here; expected 'cpu', or 'cuda' with a GPU") from error
    return found


def _open(path: str | os.PathLike, modes: Sequence[str]) -> checkpointing.Checkpoint:
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f'path={path!r}: expected the path of a checkpoint, or of the workdir of a run')
    return open_checkpoint(path, modes, f'path={os.fspath(path)}')


def open_checkpoint(path: str | os.PathLike, modes: Sequence[str], called: str) -> checkpointing.Checkpoint:
    """Loads a checkpoint, or the newest one of a workdir, or what `--mode=export --format=hub` wrote.

    Args:
      path: the file or folder.
      modes: the modes whose checkpoints may be taken from a workdir; the first one that has any counts.
      called: how the caller named the path, such as '--checkpoint=FILE', for error messages.

    Raises:
      UserError: there is none, or none that can be read. The message says what else the file is.
    """
    path = os.path.expanduser(os.fspath(path))
    if not os.path.exists(path):
        raise UserError(f'{called}: no such file or folder; expected a checkpoint, or the workdir of a run')
    exported = os.path.join(path, HUB_FILE)
    file = exported if os.path.isfile(exported) else path
    try:
        return _newest(pathlib.Path(file), modes) if os.path.isdir(file) else exports.load(file)
    except UserError as error:
        reason = str(error).removeprefix('--checkpoint=').removeprefix(f'{path}: ')
        if found := os.path.isfile(file) and foreign.recognise(file):
            reason = f'expected a checkpoint of byol_func; {found}'
        elif os.path.isfile(file) and foreign.is_pickle(file):
            reason = f'{reason}; --mode=import converts a checkpoint of the official code'
        raise UserError(f'{called}: {reason}') from error


def _newest(workdir: pathlib.Path, modes: Sequence[str]) -> checkpointing.Checkpoint:
    for mode in modes:
        checkpoint, _ = resuming.newest_good(workdir / 'checkpoints', mode, resume='auto')
        if checkpoint is not None:
            return checkpoint
    if found := foreign.recognise_folder(workdir):
        raise UserError(f'{workdir}: {found}')
    seeds = sorted(os.fspath(folder) for folder in workdir.glob('seed_*'))
    hint = f'; each seed has a folder: {", ".join(seeds[:4])}' if seeds else '; expected the workdir of a run'
    raise UserError(f'{workdir}: no checkpoint of {" or ".join(modes)}{hint}')


def _check_several(images: Any, batch_size: Any) -> None:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f'batch_size={batch_size!r}: expected a whole number of at least 1')
    if isinstance(images, (str, os.PathLike, Image.Image)):
        single = 'a single PIL image' if isinstance(images, Image.Image) else f'{os.fspath(images)!r}, a single path'
        raise UserError(f'images={single}: expected a list of images or paths, or a tensor [N, C, H, W]')
    if isinstance(images, (torch.Tensor, np.ndarray)):
        if images.ndim != 4:  # A scalar has no length.
            raise UserError(f'images of shape {tuple(images.shape)}: expected [N, C, H, W]')
        return
    if not isinstance(images, Sequence):
        raise UserError(f'{type(images).__name__}: expected a list of images, or a tensor [N, C, H, W]')
    wrong = [type(image).__name__ for image in images if not isinstance(image, (str, os.PathLike, Image.Image))]
    if wrong:
        raise UserError(f'a list with {wrong[0]}: expected paths or PIL images, or a single tensor [N, C, H, W]')


def _as_tensor(images: Any) -> Any:
    if not isinstance(images, np.ndarray):
        return images
    try:
        # PyTorch has neither negative strides nor other byte orders nor, without a warning, read-only memory.
        return torch.from_numpy(np.require(images, images.dtype.newbyteorder('='), ['C', 'W']))
    except TypeError as error:
        raise UserError(f'images of {images.dtype}: expected floats in 0..1, or uint8') from error


def _check(images: torch.Tensor, num_channels: int) -> None:
    if images.dim() != 4 or images.shape[1] != num_channels:
        raise UserError(f'images of shape {tuple(images.shape)}: expected [B, {num_channels}, H, W]')
    if images.is_floating_point():
        if images.numel() and not (images.min() >= 0 and images.max() <= 1):
            raise UserError(f'images in {images.min():.3g}..{images.max():.3g}: expected floats in 0..1, or uint8')
    elif images.dtype != torch.uint8:
        raise UserError(f'images of {images.dtype}: expected floats in 0..1, or uint8')
