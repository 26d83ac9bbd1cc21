"""Converts checkpoints of the official code to and from our state, without JAX, Haiku, optax or dill.

`read` reads the files that `byol/utils/checkpointing.py` has written from 2020 to today; `write` writes
files that it loads. The weights published by DeepMind are licensed under CC BY-NC 4.0, unlike either code.
"""

import os
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import optree
import torch

from byol_func.bridge import foreign, haiku, pickling, unpickling
from byol_func.bridge.stand_ins import Array, PickleError, Record
from byol_func.byol_experiment import ByolState, make_network
from byol_func.errors import UserError, counted
from byol_func.runtime import atomic
from byol_func.utils import checkpointing, optimizers

_TREES = ('online_params', 'target_params', 'online_state', 'target_state')


class OfficialCheckpoint(NamedTuple):
    """The contents of a file; `trees`, which include `momentum`, have our names and layouts.

    `step` is the index of the last finished update. `network` holds `num_classes` and the fields of
    `config.network` that the shapes determine.
    """

    path: str
    step: int
    trees: Mapping[str, Mapping[str, torch.Tensor]]
    network: Mapping[str, Any]


def read(path: str | os.PathLike) -> OfficialCheckpoint:
    """Reads a checkpoint of the official pre-training.

    Nothing in the file is executed: `bridge.unpickling` builds arrays and plain containers and refuses
    everything else. The networks are recognised by their structure, not by the names of classes.

    Args:
      path: a file such as `pretrain.pkl`.

    Returns:
      The trees, the step, and the network inferred from them.

    Raises:
      UserError: the file cannot be read, or is not a checkpoint of the official pre-training.
    """
    path = os.fspath(path)
    try:
        if found := foreign.recognise(path) or _own_checkpoint(path):
            raise PickleError(found)
        with open(path, 'rb') as file:
            return _read(path, file)
    except PickleError as error:
        raise UserError(
            f'--checkpoint={path}: expected a checkpoint of the official pre-training, such as pretrain.pkl; {error}'
        ) from error
    except OSError as error:
        raise UserError(f'--checkpoint={path}: {error.strerror or error}') from error


def _own_checkpoint(path: str) -> str:
    try:
        checkpointing.load_scalars(path)
    except UserError:
        return ''
    return 'it is already a checkpoint of byol_func; give it as --checkpoint to --mode=linear_eval, knn, eval or export'


def _read(path: str, file: BinaryIO) -> OfficialCheckpoint:
    content = _fields(unpickling.load(file), 'the file')
    for name in ('experiment_state', 'step'):
        if name not in content:
            raise PickleError(f'it has no {name}')
    state = _fields(content['experiment_state'], 'experiment_state')
    missing = [name for name in (*_TREES, 'opt_state') if name not in state]
    if missing:
        raise PickleError(f'its experiment_state has no {missing[0]}')
    arrays = {name: haiku.flatten(_plain(state[name])) for name in _TREES}
    arrays['momentum'] = _find_momentum(state['opt_state'], arrays['online_params'])
    # In a genuine checkpoint no two names share an array.
    found = [id(array) for tree in arrays.values() for array in tree.values()]
    if len(set(found)) < len(found):
        raise PickleError('it holds the same array in two places')
    root = haiku.encoder_root(arrays['online_params'])
    trees = {name: haiku.read_tree(tree, root, file) for name, tree in arrays.items()}
    step = _read_step(content['step'], file)
    return OfficialCheckpoint(path, step, trees, haiku.infer_network(trees['online_params']))


def _fields(value: Any, what: str) -> Mapping[str, Any]:
    """Returns the fields of a dict or a named tuple; raises a PickleError for anything else."""
    fields = value.fields if isinstance(value, Record) else value
    if not isinstance(fields, dict):
        raise PickleError(f'{what} is {type(value).__name__}')
    return fields


def _plain(tree: Any) -> Any:
    return tree.fields if isinstance(tree, Record) else tree


def _find_momentum(opt_state: Any, params: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the tree in the optimiser's state, which must have the names of the parameters."""
    states = opt_state if isinstance(opt_state, (tuple, list)) else [opt_state]
    candidates = [
        tree
        for state in states
        if isinstance(state, (Record, dict))
        for tree in _plain(state).values()
        if isinstance(tree, (dict, Record))
    ]
    if len(candidates) != 1:
        raise PickleError(f'its opt_state has {counted(len(candidates), "tree")}, expected one, the momentum of LARS')
    momentum = haiku.flatten(_plain(candidates[0]))
    if momentum.keys() != params.keys():
        raise PickleError('the momentum in its opt_state does not match the parameters')
    return momentum


def _read_step(step: Any, file: BinaryIO) -> int:
    if isinstance(step, Array):
        array = step.read(file)
        step = array.item() if array.size == 1 and array.dtype.kind in 'iu' else None
    if type(step) is not int or not 0 <= step < 2**40:
        raise PickleError('its step is not the index of an update')
    return step


# --- To our state -----------------------------------------------------------------------------------


def to_state(checkpoint: OfficialCheckpoint, network: Mapping[str, Any]) -> ByolState:
    """Returns the complete state of an experiment with this network and LARS.

    Args:
      checkpoint: the result of `read`.
      network: `config.network` as plain values.

    Raises:
      UserError: the file holds another network; the message names the flags that fit, if there are any.
    """
    _check_network(checkpoint, network)
    template = _template(network, checkpoint.network['num_classes'], _in_channels(checkpoint))
    names, leaves = checkpointing.leaf_names(template), optree.tree_leaves(template)
    tensors = {f'{name}/{key}': tensor for name in _TREES for key, tensor in checkpoint.trees[name].items()}
    tensors |= {f'opt_state/1/mu/{key}': tensor for key, tensor in checkpoint.trees['momentum'].items()}
    left_over = sorted(tensors.keys() - set(names))
    if left_over:
        raise _misfit(checkpoint, f'it has {left_over[0]}, which {_title(network)} lacks')
    for name, leaf in zip(names, leaves, strict=True):
        if name not in tensors:
            raise _misfit(checkpoint, f'it has no {name}, which {_title(network)} has')
        found = tensors[name]
        if found.shape != leaf.shape or found.dtype != leaf.dtype:
            raise _misfit(
                checkpoint, f'{name} is {list(found.shape)} {found.dtype}, expected {list(leaf.shape)} {leaf.dtype}'
            )
    return optree.tree_unflatten(optree.tree_structure(template), [tensors[name] for name in names])


def _template(network: Mapping[str, Any], num_classes: int, in_channels: int) -> ByolState:
    forward = make_network(**network, num_classes=num_classes, in_channels=in_channels)
    params, state = forward.init(torch.Generator())  # Only names and shapes matter; both networks share them.
    return ByolState(params, params, state, state, optimizers.lars(0.0).init(params))


def _in_channels(checkpoint: OfficialCheckpoint) -> int:
    return checkpoint.trees['online_params']['encoder/initial_conv/w'].shape[1]


def _title(network: Mapping[str, Any]) -> str:
    width = network['encoder_config']['width_multiplier']
    return f'{network["encoder_class"]} of width {width:g}'


def _misfit(checkpoint: OfficialCheckpoint, problem: str) -> UserError:
    return UserError(f'--checkpoint={checkpoint.path} does not fit the config: {problem}')


def _check_network(checkpoint: OfficialCheckpoint, network: Mapping[str, Any]) -> None:
    found = {key: value for key, value in checkpoint.network.items() if key != 'num_classes'}
    options = found.pop('encoder_config')
    pairs = [(f'encoder_config.{key}', network['encoder_config'][key], value) for key, value in options.items()]
    pairs += [(key, network[key], value) for key, value in found.items()]
    flags = [f'--config.network.{key}={value}' for key, asked, value in pairs if asked != value]
    if flags:
        raise _misfit(checkpoint, f'it holds {_title(checkpoint.network)}; add {" ".join(flags)}')


# --- To the official state --------------------------------------------------------------------------


def write(path: str | os.PathLike, state: ByolState, *, step: int, network: Mapping[str, Any]) -> None:
    """Writes a state as a checkpoint from which the official code can resume or evaluate.

    The random key in it is that of seed 0. If the state has no momentum of LARS, because it was trained
    with another optimiser, the momentum in the checkpoint is zero.

    Args:
      path: path of the file, which is written under a temporary name and then renamed.
      state: our state.
      step: index of the last finished update.
      network: `config.network` as plain values.

    Raises:
      UserError: the official code has no such network, or the file cannot be written.
    """
    _check_official(network)
    root = haiku.class_root(network['encoder_class'])

    def tree(values):
        leaves = zip(checkpointing.leaf_names(values), optree.tree_leaves(values), strict=True)
        return haiku.haiku_tree(dict(leaves), root)

    found = [s.mu for s in state.opt_state if isinstance(s, optimizers.ScaleByLarsState)]
    momentum = found[0] if found else optree.tree_map(torch.zeros_like, state.online_params)
    in_optimizers, in_experiment = 'byol.utils.optimizers', 'byol.byol_experiment'
    opt_state = (
        pickling.NamedTupleOf(in_optimizers, 'AddWeightDecayState', {}),
        pickling.NamedTupleOf(in_optimizers, 'ScaleByLarsState', {'mu': tree(momentum)}),
        pickling.NamedTupleOf('optax._src.base', 'EmptyState', {}),
    )
    trees = {name: tree(getattr(state, name)) for name in _TREES}
    content = {
        'experiment_state': pickling.NamedTupleOf(
            in_experiment, '_ByolExperimentState', {**trees, 'opt_state': opt_state}
        ),
        'step': step,
        'rng': np.zeros(2, np.uint32),
    }
    path = os.fspath(path)
    try:
        with atomic.replacing(path, durable=True) as temporary, open(temporary, 'wb') as file:
            pickling.dump(content, file)
    except OSError as error:
        raise UserError(f'--output={path}: {error.strerror or error}') from error


# Fields of the network that the official code does not have, and the values that match it.
_OFFICIAL = {'norm': 'batch_norm', 'head_norm': 'batch_norm', 'projector_depth': 2, 'predictor_depth': 2}


def _check_official(network: Mapping[str, Any]) -> None:
    encoder, options = network['encoder_class'], network['encoder_config']
    stem, width = options['stem'], options['width_multiplier']
    checks = [
        ('encoder_class', encoder, encoder != 'ResNet10', 'TinyResNet, ResNet18 or deeper'),
        ('encoder_config.stem', stem, stem == 'imagenet', "'imagenet'"),
        ('encoder_config.width_multiplier', width, width % 1 == 0, 'a whole number'),
    ]
    for field, value in _OFFICIAL.items():
        if field in network:
            checks.append((field, network[field], network[field] == value, repr(value)))
    for field, value, fits, accepted in checks:
        if not fits:
            raise UserError(f'config.network.{field}={value!r}: expected {accepted}; the official code has no other')
