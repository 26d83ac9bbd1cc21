"""Finds mistakes in a variant's update rule that only show when it runs, before anything is written."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optree
import torch

from byol_func.errors import UserError
from byol_func.experiment import Experiment, step_arguments
from byol_func.utils import variants
from byol_func.utils.checkpointing import leaf_names
from byol_func.utils.networks import Network


def check(path: str, experiment: Experiment, image_shape: Sequence[int | None], backbone: Network) -> None:
    """Runs one step of a variant and checks the new state; `backbone` is the encoder of the config.

    Raises:
      UserError: the step raises an error, the new state has another structure, shape or dtype than the old one, or
        the state does not contain the encoder of the config.
    """
    field = f'config.variant={path!r}'
    try:
        # Contiguous, so that a rule may change the batch in place, which is a mistake of another kind.
        arguments = optree.tree_map(torch.Tensor.contiguous, step_arguments(experiment, image_shape))
        state, new_state = arguments[0], _step(experiment, arguments)
    except UserError:
        raise
    except Exception as error:  # A user's function may raise anything.
        raise variants.failure(path, error) from error
    if optree.tree_structure(new_state) != optree.tree_structure(state):
        raise UserError(f'{field}: update_fn returned a state of another structure; expected that of init_state')
    leaves = zip(leaf_names(state), optree.tree_leaves(state), optree.tree_leaves(new_state), strict=True)
    for name, old, new in leaves:
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise UserError(
                f'{field}: update_fn changed {name} from {list(old.shape)} {old.dtype} to {list(new.shape)} {new.dtype}'
            )
    for name, tree in zip(('online_params', 'online_state'), backbone.init(torch.Generator()), strict=True):
        found = getattr(state, name, None)
        own = found.get('encoder') if isinstance(found, Mapping) else None
        if optree.tree_structure(own) != optree.tree_structure(tree['encoder']):
            raise UserError(
                f"{field}: its state has no {name}['encoder'] of config.network; expected one, because evaluation and "
                'export need it'
            )


@contextlib.contextmanager
def mistakes(path: str) -> Iterator[None]:
    """Reports a variant's step that breaks the donation contract, or reads a value during tracing, in one line.

    `path` is '' for BYOL itself, whose errors are not the user's mistakes.

    Raises:
      UserError: replaces the ValueError raised by `compilation.compile_update`.
    """
    try:
        yield
    except ValueError as error:
        if not path:
            raise
        raise UserError(f'config.variant={path!r}: {error}') from error


def _step(experiment: Experiment, arguments: tuple) -> Any:
    """Returns the state after one step.

    The step runs on meta tensors, which have no data, unless the rule needs their values.
    """
    try:
        return experiment.update(*optree.tree_map(lambda x: x.to('meta'), arguments))[0]
    except RuntimeError:
        return experiment.update(*arguments)[0]
