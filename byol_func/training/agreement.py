"""Checks that all replicas are about to do the same: before the first step, and before they share an evaluation."""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import optree
import torch

import byol_func
from byol_func.data.examples import Examples
from byol_func.data.fingerprint import fingerprint
from byol_func.errors import UserError, counted
from byol_func.runtime import collectives

_ADVICE = 'start all replicas with the same command, code and data'


def agree(state: Any, first_step: int, config: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[Any, int]:
    """Checks that all replicas have the same step, state, config, data and versions; returns the state and the step.

    Replicas without a checkpoint receive the state of replica 0, so no shared disk is needed. `config` and `data`, the
    fingerprint of the training set, are plain values that may not differ between replicas.

    Raises:
      UserError: the replicas differ; all of them raise it.
    """
    if collectives.num_replicas() == 1:
        return state, first_step
    own = {
        'version of torch': _number(torch.__version__),
        'code of byol_func': _number(_code()),
        'config': _number(json.dumps(config, sort_keys=True)),
        'training set': _number(json.dumps(data, sort_keys=True)),
    }
    _compare(own)
    steps = [step for (step,) in collectives.gather_numbers([first_step])]
    others = [(rank, step) for rank, step in enumerate(steps) if step not in (steps[0], 0)]
    for rank, step in others:
        here = f'after {steps[0]}' if steps[0] else 'finds no checkpoint'
        raise UserError(
            f'replica {rank} resumes after {counted(step, "step")}, but replica 0 {here}: the replicas see different '
            'disks; give all of them the --workdir of one run, or all but the first an empty one'
        )
    if 0 in steps and steps[0]:
        state = collectives.of_first_replica(state)
    _compare({'state': _number(_bytes(state))})
    return state, steps[0]


def same_data(splits: Mapping[str, Examples | None]) -> None:
    """Checks that all replicas have the same images, by their fingerprints; `splits` are data sets by their names.

    Raises:
      UserError: the replicas differ; all of them raise it.
    """
    if collectives.num_replicas() > 1:
        facts = {name: {} if data is None else fingerprint(data) for name, data in splits.items()}
        _compare({name: _number(json.dumps(found)) for name, found in facts.items()})


def same_checkpoint(tensors: Mapping[str, torch.Tensor]) -> None:
    """Checks that all replicas have the same checkpoint, of which each will evaluate a part of the images.

    Raises:
      UserError: the replicas differ; all of them raise it.
    """
    if collectives.num_replicas() > 1:
        _compare({'checkpoint': _number(_bytes(dict(tensors)))})


def _compare(own: Mapping[str, int]) -> None:
    """Raises a `UserError` on all replicas if their numbers differ; it names those that differ from the most common."""
    rows = collectives.gather_numbers(list(own.values()))
    for name, numbers in zip(own, zip(*rows, strict=True), strict=True):
        common = max(numbers, key=numbers.count)  # Of equally common ones that of the first replica.
        different = [str(rank) for rank, number in enumerate(numbers) if number != common]
        if different:
            other = f'that of replica {numbers.index(common)}'
            raise UserError(f'replica {", ".join(different)}: {name} differs from {other}; {_ADVICE}')


def _number(text: str | bytes) -> int:
    digest = hashlib.blake2b(text.encode() if isinstance(text, str) else text, digest_size=8)
    return int.from_bytes(digest.digest(), 'big') >> 1


def _code() -> bytes:
    folder = pathlib.Path(byol_func.__file__).parent
    return b'\0'.join(path.read_bytes() for path in sorted(folder.rglob('*.py')))


def _bytes(state: Any) -> bytes:
    """Returns a digest of all values in a state."""
    digest = hashlib.blake2b()
    for leaf in optree.tree_leaves(state):
        digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()
