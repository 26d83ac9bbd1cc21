"""Converts between the names and layouts of Haiku's trees and ours.

Haiku keeps a flat dict of modules, `{'res_net50/~/block_group_0/~/block_0/~/conv_0': {'w': ...}}`; our
trees are nested. Haiku names the encoder after its class, we name it 'encoder'. Haiku's kernels are
`[kh, kw, in, out]`, ours `[out, in, kh, kw]`; its normalisation parameters and moving averages keep the
reduced axes, `[1, 1, 1, C]`, ours are `[C]`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch

from byol_func.bridge.stand_ins import Array, PickleError
from byol_func.utils.networks import ENCODERS

HEADS = ('projector', 'predictor', 'classifier')
_NORM_LEAVES = ('scale', 'offset', 'hidden', 'average')
# Both networks of a ResNet-200, their states and the momentum have about 4,300 arrays.
_MAX_NODES, _MAX_DEPTH = 50_000, 16


def plain_name(*keys: str) -> str:
    """Joins the keys that lead to a leaf into one name with '/' between its parts, leaving out Haiku's '~'."""
    return '/'.join(part for key in keys for part in key.split('/') if part not in ('', '~'))


def our_name(name: str, root: str) -> str:
    """Replaces `root`, Haiku's name of the encoder, by 'encoder' in a plain name."""
    head, _, rest = name.partition('/')
    return f'encoder/{rest}' if head == root else name


def flatten(tree: Any) -> dict[str, Array]:
    """Flattens a tree of dicts into its arrays by plain name, see `plain_name`.

    Raises:
      PickleError: the tree holds anything but arrays in dicts, is too large or too deep, or has a name twice.
    """
    arrays: dict[str, Array] = {}
    pending: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    for _ in range(_MAX_NODES):
        if not pending:
            return arrays
        path, node = pending.pop()
        if isinstance(node, dict) and len(path) < _MAX_DEPTH:
            pending.extend(((*path, key), value) for key, value in node.items())
        elif isinstance(node, Array):
            name = plain_name(*path)
            if name in arrays:
                raise PickleError(f'{name} appears twice')
            arrays[name] = node
        else:
            raise PickleError(f'{"/".join(path)} is not an array but {type(node).__name__}')
    raise PickleError(f'its tree has more than {_MAX_NODES} nodes')


def encoder_root(names: Iterable[str]) -> str:
    """Finds Haiku's name of the encoder in the names of the parameters.

    Raises:
      PickleError: there is not exactly one encoder of the official code.
    """
    roots = {name.split('/')[0] for name in names if name.endswith('/initial_conv/w')}
    if len(roots) != 1:
        raise PickleError(f'expected one encoder with initial_conv/w among the parameters, found {len(roots)}')
    return roots.pop()


def to_ours(name: str, array: np.ndarray) -> torch.Tensor:
    """Converts a leaf to our layout; the last part of its name tells its kind."""
    leaf = name.split('/')[-1]
    if leaf == 'w' and array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif leaf in _NORM_LEAVES:
        array = array.reshape(-1)
    return torch.from_numpy(np.array(array, order='C'))  # Always a copy, even of a 0-d array.


def to_haiku(name: str, tensor: torch.Tensor) -> np.ndarray:
    """Converts a leaf to Haiku's layout, the inverse of `to_ours`."""
    leaf, array = name.split('/')[-1], tensor.detach().cpu().numpy()
    if leaf == 'w' and array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif leaf in _NORM_LEAVES:
        # The norm follows a convolution or, in the heads, a linear layer.
        array = array.reshape((1, -1) if name.split('/')[0] in HEADS else (1, 1, 1, -1))
    return np.array(array, order='C')


def read_tree(arrays: Mapping[str, Array], root: str, file: BinaryIO) -> dict[str, torch.Tensor]:
    """Reads the `arrays` of params or state from their file as tensors, with our names and in our layout.

    Raises:
      PickleError: an array is damaged or contains a non-finite number.
    """
    tensors = {}
    for name, array in arrays.items():
        ours = our_name(name, root)
        values = array.read(file)
        if not np.isfinite(values).all():
            raise PickleError(f'{name}: expected finite numbers')
        tensors[ours] = to_ours(ours, values)
    return tensors


def haiku_tree(leaves: Mapping[str, torch.Tensor], root: str) -> dict[str, dict[str, np.ndarray]]:
    """Converts our leaves to Haiku's dict of modules.

    Args:
      leaves: the leaves of params or state by our names, such as 'encoder/initial_conv/w'.
      root: Haiku's name of the encoder.
    """
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in leaves.items():
        *path, leaf = name.split('/')
        # Haiku puts '~' before the name of a module made in a constructor; heads make theirs when called.
        is_average = path[-1] in ('mean_ema', 'var_ema')
        if path[0] == 'encoder':
            module = '/~/'.join((root, *path[1:]))
        else:
            module = '/'.join(path[:-1]) + f'/~/{path[-1]}' if is_average else '/'.join(path)
        modules.setdefault(module, {})[leaf] = to_haiku(name, tensor)
    return dict(sorted(modules.items()))


def class_root(encoder_class: str) -> str:
    """Converts the name of a class to Haiku's: `TinyResNet` to `tiny_res_net`, `ResNet50` to `res_net50`."""
    return re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', encoder_class).lower()


def infer_network(params: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Infers the fields of `config.network`, and `num_classes`, from the shapes of the parameters.

    Args:
      params: the parameters by our names.

    Raises:
      PickleError: no network of this code has such parameters.
    """
    hidden, output = _shape(params, 'projector/linear_1/w')
    return dict(
        infer_encoder(params),
        projector_hidden_size=hidden,
        projector_output_size=output,
        predictor_hidden_size=_shape(params, 'predictor/linear_1/w')[0],
        num_classes=_shape(params, 'classifier/w')[1],
    )


def infer_encoder(params: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Infers `encoder_class` and `encoder_config` of `config.network`; arguments and errors as `infer_network`."""
    blocks = set(re.findall(r'^encoder/block_group_(\d)/block_(\d+)/conv_0/w$', '\n'.join(params), re.M))
    per_group = tuple(sum(group == str(g) for group, _ in blocks) for g in range(4))
    bottleneck = 'encoder/block_group_0/block_0/conv_2/w' in params
    stem_channels, _, kernel_size, _ = _shape(params, 'encoder/initial_conv/w')
    last_channels = _shape(params, f'encoder/block_group_3/block_0/conv_{2 if bottleneck else 1}/w')[0]
    fitting = [
        name
        for name, encoder in ENCODERS.items()
        if (per_group, bottleneck) == (encoder.blocks_per_group, encoder.bottleneck)
        and last_channels * 64 == stem_channels * encoder.channels_per_group[-1]
    ]
    if len(fitting) != 1 or kernel_size not in (3, 7):
        raise PickleError(
            f'an encoder of {per_group} {"bottleneck" if bottleneck else "basic"} blocks with '
            f'{stem_channels} to {last_channels} channels, expected one of {", ".join(ENCODERS)}'
        )
    return dict(
        encoder_class=fitting[0],
        encoder_config=dict(
            resnet_v2='encoder/final_batchnorm/scale' in params,
            width_multiplier=stem_channels / 64,
            stem='imagenet' if kernel_size == 7 else 'cifar',
        ),
    )


def _shape(params: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    if name not in params:
        raise PickleError(f'there is no {name} among the parameters')
    return tuple(params[name].shape)
