"""Names and layouts of Haiku's trees, and ours.

Haiku keeps a flat dict of modules, `{'res_net50/~/block_group_0/~/block_0/~/conv_0': {'w': ...}}`; ours
is nested. Its encoder is named after its class, ours is 'encoder'. Kernels are `[kh, kw, in, out]`
there; whatever belongs to a normalisation keeps the axes it was reduced over, `[1, 1, 1, C]`.
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
# ResNet-200, both networks, their states and the momentum, have about 4,300 arrays.
_MAX_NODES, _MAX_DEPTH = 50_000, 16


def plain_name(*keys: str) -> str:
    """The keys that lead to a leaf as one name, '/' between its parts, without Haiku's '~'."""
    return '/'.join(part for key in keys for part in key.split('/') if part not in ('', '~'))


def our_name(name: str, root: str) -> str:
    """A plain name with 'encoder' for the encoder's name in Haiku, `root`."""
    head, _, rest = name.partition('/')
    return f'encoder/{rest}' if head == root else name


def flatten(tree: Any) -> dict[str, Array]:
    """The arrays of a tree of dicts under their names, '/' between the levels, '~' left out.

    Raises:
      PickleError: something else than arrays in dicts, or too much of it.
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
                raise PickleError(f'{name} twice')
            arrays[name] = node
        else:
            raise PickleError(f'{"/".join(path)} is no array but {type(node).__name__}')
    raise PickleError(f'a tree of more than {_MAX_NODES} nodes')


def encoder_root(names: Iterable[str]) -> str:
    """What the encoder is called among the names of the parameters.

    Raises:
      PickleError: there is no encoder of the official code.
    """
    roots = {name.split('/')[0] for name in names if name.endswith('/initial_conv/w')}
    if len(roots) != 1:
        raise PickleError(f'expected one encoder with initial_conv/w among the parameters, found {len(roots)}')
    return roots.pop()


def to_ours(name: str, array: np.ndarray) -> torch.Tensor:
    """A leaf in our layout; the last part of its name says what it is."""
    leaf = name.split('/')[-1]
    if leaf == 'w' and array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif leaf in _NORM_LEAVES:
        array = array.reshape(-1)
    return torch.from_numpy(np.array(array, order='C'))  # A copy of its own, 0-d arrays too.


def to_haiku(name: str, tensor: torch.Tensor) -> np.ndarray:
    """The inverse of `to_ours`."""
    leaf, array = name.split('/')[-1], tensor.detach().cpu().numpy()
    if leaf == 'w' and array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif leaf in _NORM_LEAVES:
        # Behind a convolution or, in the heads, behind a linear layer.
        array = array.reshape((1, -1) if name.split('/')[0] in HEADS else (1, 1, 1, -1))
    return np.array(array, order='C')


def read_tree(arrays: Mapping[str, Array], root: str, file: BinaryIO) -> dict[str, torch.Tensor]:
    """Reads the arrays of params or state: tensors under our names, in our layout.

    Args:
      arrays: of `flatten`.
      root: the encoder's name.
      file: the file they are in.

    Raises:
      PickleError: an array is damaged or has a number that is not finite.
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
    """Our leaves, by their names, as Haiku's dict of modules.

    Args:
      leaves: of params or state, such as 'encoder/initial_conv/w'.
      root: what Haiku calls the encoder.
    """
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in leaves.items():
        *path, leaf = name.split('/')
        # A module made in another's constructor has a '~' before its name; heads make theirs when called.
        is_average = path[-1] in ('mean_ema', 'var_ema')
        if path[0] == 'encoder':
            module = '/~/'.join((root, *path[1:]))
        else:
            module = '/'.join(path[:-1]) + f'/~/{path[-1]}' if is_average else '/'.join(path)
        modules.setdefault(module, {})[leaf] = to_haiku(name, tensor)
    return dict(sorted(modules.items()))


def class_root(encoder_class: str) -> str:
    """Haiku's name of a class: `TinyResNet` is `tiny_res_net`, `ResNet50` is `res_net50`."""
    return re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', encoder_class).lower()


def infer_network(params: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The fields of `config.network` that made these parameters, and `num_classes`, from their shapes.

    Args:
      params: by our names.

    Raises:
      PickleError: no network of this code has such parameters.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in params:
            raise PickleError(f'there is no {name} among the parameters')
        return tuple(params[name].shape)

    blocks = set(re.findall(r'^encoder/block_group_(\d)/block_(\d+)/conv_0/w$', '\n'.join(params), re.M))
    per_group = tuple(sum(group == str(g) for group, _ in blocks) for g in range(4))
    bottleneck = 'encoder/block_group_0/block_0/conv_2/w' in params
    stem_channels, _, kernel_size, _ = shape('encoder/initial_conv/w')
    last_channels = shape(f'encoder/block_group_3/block_0/conv_{2 if bottleneck else 1}/w')[0]
    fitting = [
        name
        for name, encoder in ENCODERS.items()
        if (per_group, bottleneck) == encoder[:2]
        and last_channels * 64 == stem_channels * encoder.channels_per_group[-1]
    ]
    if len(fitting) != 1 or kernel_size not in (3, 7):
        raise PickleError(
            f'an encoder of {per_group} {"bottleneck" if bottleneck else "basic"} blocks with '
            f'{stem_channels} to {last_channels} channels, expected one of {", ".join(ENCODERS)}'
        )
    hidden, output = shape('projector/linear_1/w')
    return dict(
        encoder_class=fitting[0],
        encoder_config=dict(
            resnet_v2='encoder/final_batchnorm/scale' in params,
            width_multiplier=stem_channels / 64,
            stem='imagenet' if kernel_size == 7 else 'cifar',
        ),
        projector_hidden_size=hidden,
        projector_output_size=output,
        predictor_hidden_size=shape('predictor/linear_1/w')[0],
        num_classes=shape('classifier/w')[1],
    )
