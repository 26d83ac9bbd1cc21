"""`config.init_from`: continues the pre-training of an encoder from a file; the heads are drawn anew."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import optree
import safetensors
import safetensors.torch
import torch
from absl import logging
from ml_collections import ConfigDict

from byol_func import library
from byol_func.bridge import foreign, haiku, official, resnets
from byol_func.bridge.stand_ins import PickleError
from byol_func.errors import UserError, counted
from byol_func.experiment import Experiment
from byol_func.runtime import collectives
from byol_func.utils import checkpointing
from byol_func.workdir import files
from byol_func.workdir.run import Run

_ACCEPTED = (
    'a checkpoint, an exported encoder, a hub folder or a workdir of byol_func, a checkpoint of the official code, or '
    'a ResNet of torchvision or timm as safetensors'
)


class Found(NamedTuple):
    """The encoder in a file: the fields of `config.network` that it tells, and its tensors by our names."""

    network: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    others: Iterable[str]  # Names of the tensors in the file that are not the encoder's.


def resolve(run: Run) -> None:
    """Replaces a folder in `config.init_from` by the file in it that counts, and sets `config.init_digest`.

    If the file is gone, the digest is that of the run in the workdir, which can be resumed without the file.

    Raises:
      UserError: there is neither such a file nor such a run.
    """
    config = run.config
    if not config.init_from:
        config.init_digest = ''
        return
    path = os.path.expanduser(config.init_from)
    if os.path.isdir(path):
        exported = os.path.join(path, library.HUB_FILE)  # timm's folders of the hub have it too.
        if os.path.isfile(exported):
            path = exported
        else:
            path = library.open_checkpoint(path, library.WITH_ENCODER, f'config.init_from={config.init_from!r}').path
    if os.path.isfile(path):
        with open(path, 'rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
    else:
        digest = _digest_of_run(run.workdir, path)
        if not digest:
            raise UserError(f'config.init_from={config.init_from!r}: no such file or folder; expected {_ACCEPTED}')
    config.init_from, config.init_digest = path, digest


def _digest_of_run(workdir: str, path: str) -> str:
    saved = files.read_json(os.path.join(workdir, 'config.pretrain.json'))
    return saved.get('init_digest', '') if saved.get('init_from') == path else ''


def start_from(run: Run, experiment: Experiment) -> Experiment:
    """Returns the experiment with the encoder of `config.init_from` in the first state of both its networks.

    A run that resumes from a checkpoint does not read the file.

    Raises:
      UserError: the file cannot be used, or holds another encoder.
    """
    path = run.config.init_from
    if not path or checkpointing.list_checkpoints(os.path.join(run.workdir, 'checkpoints'), 'pretrain'):
        return experiment
    found = _read(path)
    state = experiment.init()
    trees = {'params': state.online_params['encoder'], 'state': state.online_state['encoder']}
    _check_network(path, found, run.config.network, trees['params'])
    taken, used = _fill(path, found.tensors, trees)
    parts = [part for part in ('online', 'target') if 'encoder' in getattr(state, f'{part}_params', ())]
    if collectives.replica_index() == 0:
        left = _groups([*found.others, *(found.tensors.keys() - used)])
        heads = [name for name in state.online_params if name != 'encoder']
        logging.info(
            'config.init_from=%s: all %s of the encoder (%s) taken for the %s network; not taken: %s; drawn anew: %s',
            path,
            counted(len(used), 'tensor'),
            found.network['encoder_class'],
            ' and the '.join(parts),
            ', '.join(left) or 'none',
            ', '.join(heads) or 'none',
        )

    def init() -> Any:
        state = experiment.init()
        changed = {}
        for part in parts:
            for kind, tree in taken.items():
                own = optree.tree_map(torch.clone, tree)  # A step that writes in place must not find a tensor twice.
                changed[f'{part}_{kind}'] = {**getattr(state, f'{part}_{kind}'), 'encoder': own}
        return state._replace(**changed)

    return experiment._replace(init=init)


def _read(path: str) -> Found:
    try:
        with open(path, 'rb') as file:
            start = file.read(9)
        if start[8:] == b'{':
            with safetensors.safe_open(path, framework='pt') as header:
                metadata = header.metadata() or {}
            return _own(path) if 'format_version' in metadata else _resnet(safetensors.torch.load_file(path))
        if found := foreign.recognise(path, advice=''):
            how = ': safetensors.torch.save_file(model.state_dict(), FILE)' if 'PyTorch file' in found else ''
            raise UserError(f'config.init_from={path!r}: {found}; expected {_ACCEPTED}{how}')
        return _official(path)
    except UserError as error:
        raise UserError(str(error).replace(f'--checkpoint={path}', f'config.init_from={path!r}')) from error
    except (OSError, safetensors.SafetensorError, PickleError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'config.init_from={path!r}: {reason}; expected {_ACCEPTED}') from error


def _own(path: str) -> Found:
    checkpoint = checkpointing.load(path)
    encoder = library.encoder_of(checkpoint, torch.device('cpu'))
    tensors = {
        name: leaf
        for tree in (encoder.params, encoder.state)
        for name, leaf in zip(checkpointing.leaf_names(tree), optree.tree_leaves(tree), strict=True)
    }
    used = re.compile(r'(online|backbone)_(params|state)/encoder/')
    return Found(checkpoint.config['network'], tensors, [name for name in checkpoint.tensors if not used.match(name)])


def _official(path: str) -> Found:
    checkpoint = official.read(path)
    named = {f'{tree}/{name}': tensor for tree, part in checkpoint.trees.items() for name, tensor in part.items()}
    used = re.compile(r'online_(params|state)/(?=encoder/)')
    tensors = {used.sub('', name, count=1): tensor for name, tensor in named.items() if used.match(name)}
    return Found(checkpoint.network, tensors, [name for name in named if not used.match(name)])


def _resnet(state_dict: resnets.StateDict) -> Found:
    tensors, others = resnets.from_state_dict(state_dict)
    return Found(haiku.infer_encoder(tensors), tensors, others)


def _check_network(path: str, found: Found, network: ConfigDict, encoder: Mapping[str, Any]) -> None:
    channels = {'channels': encoder['initial_conv']['w'].shape[1]}
    asked = _facts({'norm': 'batch_norm', **network}) | channels
    held = {'norm': asked['norm']} if not any('mean_ema' in name for name in found.tensors) else {}
    channels = {'channels': found.tensors['encoder/initial_conv/w'].shape[1]}
    holds = _facts({'norm': 'batch_norm', **held, **found.network}) | channels
    if holds != asked:
        title = lambda facts: ', '.join(
            f'{value}' if key == 'encoder_class' else f'{key} {value}' for key, value in facts.items()
        )
        raise UserError(
            f'config.init_from={path!r}: holds {title(holds)}, but the config describes {title(asked)}; expected the '
            'same encoder (see config.network and config.dataset)'
        )


def _facts(network: Mapping[str, Any]) -> dict[str, Any]:
    return {'encoder_class': network['encoder_class'], **network['encoder_config'], 'norm': network['norm']}


def _fill(path: str, tensors: Mapping[str, torch.Tensor], trees: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Returns trees of the same structure with the tensors of the file, and the names of the tensors used."""
    filled, used = {}, set()
    for kind, tree in trees.items():
        leaves, spec = optree.tree_flatten(tree)
        names = [f'encoder/{name}' for name in checkpointing.leaf_names(tree)]
        for name, leaf in zip(names, leaves, strict=True):
            if name not in tensors:
                why = ''
                if name.startswith('encoder/block_group_0/block_0/shortcut_'):
                    why = '; ResNet-18 and 34 of torchvision and timm have no convolution in this shortcut'
                raise UserError(
                    f'config.init_from={path!r}: it has no {name}, which the encoder of the config has{why}'
                )
            shape = tuple(tensors[name].shape)
            if shape != tuple(leaf.shape):
                raise UserError(f'config.init_from={path!r}: {name} is {shape}, expected {tuple(leaf.shape)}')
        filled[kind] = optree.tree_unflatten(
            spec, [tensors[name].to(leaf.dtype).clone() for name, leaf in zip(names, leaves, strict=True)]
        )
        used |= set(names)
    return filled, used


def _groups(names: Iterable[str]) -> list[str]:
    """Returns the first parts of names, such as 'fc', 'opt_state' and 'online_params/projector'."""
    return sorted({re.sub(r'((?:online_\w+|encoder)/[^/]+|[^/.]+).*', r'\1', name) for name in names})
