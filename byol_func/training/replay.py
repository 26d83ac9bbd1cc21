"""Repeats one step and reports where its numbers stop being finite."""

import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple

import optree
import torch

from byol_func.experiment import Experiment, update_and_gradients
from byol_func.runtime.torch_internals import TorchDispatchMode
from byol_func.utils.checkpointing import leaf_names


class Replay(NamedTuple):
    """The report on one step. Names are those of the leaves of the trees."""

    logs: dict[str, float]
    gradient_norms: dict[str, float]  # Per module.
    not_finite: dict[str, list[str]]  # State before, gradients, state after -> names of leaves.
    first_operation: str | None  # The first operation with a non-finite output, and its line.


def replay(experiment: Experiment, state: Any, global_step: torch.Tensor, draws: Any, inputs: Any) -> Replay:
    """Runs one step without compilation and inspects all intermediate values; the state is not modified."""
    with FirstNotFinite() as first:
        new_state, logs, gradients = update_and_gradients(experiment, state, global_step, draws, inputs)
    # If the optimiser is called several times, its gradients are numbered in the order of the calls.
    grads = {str(i): g for i, g in enumerate(gradients)} if len(gradients) > 1 else dict(*gradients)
    return Replay(
        logs={name: float(value) for name, value in logs.items()},
        gradient_norms=norms_by_path(grads),
        not_finite={
            'the state before the step': not_finite(state),
            'the gradients': not_finite(grads),
            'the state after the step': not_finite(new_state),
        },
        first_operation=first.found,
    )


def not_finite(tree: Any) -> list[str]:
    """Returns the names of the leaves that hold a NaN or an infinity, in the order of the tree."""
    leaves = zip(leaf_names(tree), optree.tree_leaves(tree), strict=True)
    return [name for name, leaf in leaves if not leaf.isfinite().all()]


def norms_by_path(tree: Mapping[str, Any]) -> dict[str, float]:
    """Returns the Euclidean norm of each module's leaves; a module's name is the path up to the leaf."""
    squares: dict[str, float] = {}
    for name, leaf in zip(leaf_names(tree), optree.tree_leaves(tree), strict=True):
        module = name.rpartition('/')[0]
        squares[module] = squares.get(module, 0.0) + float(leaf.double().square().sum())
    return {module: square**0.5 for module, square in squares.items()}


class FirstNotFinite(TorchDispatchMode):
    """Finds the first operation that turns finite inputs into a NaN or an infinity.

    `found` holds its name and the innermost line of this package that called it.
    """

    found: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.found is None and _bad(out) and not _bad((args, kwargs)):
            where = [f for f in traceback.extract_stack() if 'byol_func' in f.filename and f.filename != __file__]
            line = f', {where[-1].filename}:{where[-1].lineno}: {where[-1].line}' if where else ''
            self.found = f'{func}{line}'
        return out


def _bad(tree: Any) -> bool:
    leaves = optree.tree_leaves(tree, none_is_leaf=False)
    tensors = [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel()]
    return any(not x.isfinite().all() for x in tensors)
