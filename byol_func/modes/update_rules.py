"""Mistakes in the file of an update rule that show only when it is run, found before anything is written."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optree
import torch

from byol_func.errors import UserError
from byol_func.experiment import Experiment
from byol_func.utils import variants
from byol_func.utils.checkpointing import leaf_names
from byol_func.utils.networks import Network


def check(path: str, experiment: Experiment, image_shape: Sequence[int | None], backbone: Network) -> None:
    """Does one step of a variant and looks at the state that comes out.

    Args:
      path: of its file, `config.variant`.
      experiment: under this rule.
      image_shape: (C, H, W) of the images, (C, None, None) where a stream cuts the views.
      backbone: the encoder of the config, under the key 'encoder'.

    Raises:
      UserError: the step raises, its state is not of the form of the old one, or there is no such encoder in it.
    """
    field = f'config.variant={path!r}'
    try:
        state = experiment.init()
        new_state = _step(experiment, state, image_shape)
    except UserError:
        raise
    except Exception as error:  # Whatever a user's functions may raise.
        raise variants.failure(path, error) from error
    if optree.tree_structure(new_state) != optree.tree_structure(state):
        raise UserError(f'{field}: update_fn returned a state of another structure; expected that of init_state')
    leaves = zip(leaf_names(state), optree.tree_leaves(state), optree.tree_leaves(new_state), strict=True)
    for name, old, new in leaves:
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise UserError(
                f'{field}: update_fn made {name}, {list(old.shape)} {old.dtype}, into {list(new.shape)} {new.dtype}'
            )
    for name, tree in zip(('online_params', 'online_state'), backbone.init(torch.Generator()), strict=True):
        found = getattr(state, name, None)
        own = found.get('encoder') if isinstance(found, Mapping) else None
        if optree.tree_structure(own) != optree.tree_structure(tree['encoder']):
            raise UserError(
                f"{field}: its state has no {name}['encoder'] of config.network; expected one, which evaluations and "
                'exports need'
            )


@contextlib.contextmanager
def mistakes(path: str) -> Iterator[None]:
    """Tells a step that breaks the contract of donation, or looks at a value while it is traced, in one line.

    Args:
      path: of the variant's file; '' for BYOL itself, whose errors are no user's mistakes.

    Raises:
      UserError: in the place of the ValueError of `compilation.compile_update`.
    """
    try:
        yield
    except ValueError as error:
        if not path:
            raise
        raise UserError(f'config.variant={path!r}: {error}') from error


def _step(experiment: Experiment, state: Any, image_shape: Sequence[int | None]) -> Any:
    """The state after a step on black images: on tensors without data, unless the rule needs their values."""
    channels, *sides = image_shape
    sizes = experiment.image_size if isinstance(experiment.image_size, Mapping) else {}
    shapes = {'images': sides} if None not in sides else {view: [side, side] for view, side in sizes.items()}
    size = experiment.batch_size
    inputs = {
        name: torch.zeros(size, channels, *shape, dtype=torch.uint8)  # type: ignore[arg-type]  # Only sides can be None.
        for name, shape in shapes.items()
    }
    inputs['labels'] = torch.zeros(size, dtype=torch.int64)
    arguments = (state, torch.tensor(0), experiment.sample(0), inputs)
    try:
        return experiment.update(*optree.tree_map(lambda x: x.to('meta'), arguments))[0]
    except (RuntimeError, NotImplementedError):
        return experiment.update(*arguments)[0]
