"""The interface between experiments and training loops, and the assembly of an experiment from functions."""

import contextlib
import difflib
import functools
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import optree
import torch

from byol_func.errors import UserError
from byol_func.runtime import collectives, transfer
from byol_func.utils import dataset, helpers, optimizers

Batch = Mapping[str, torch.Tensor]
Logs = dict[str, torch.Tensor]
Parts = TypeVar('Parts', bound=tuple)  # A NamedTuple of unbound functions and values.


class Experiment(NamedTuple):
    """The functions of an experiment that loops and modes call, all bound to its config.

    Attributes:
      init: `init() -> state`.
      sample: `sample(step) -> draws` for the batch of that step.
      update: `update(state, global_step, draws, inputs) -> (state, logs)`. `torch.func.vmap` over it trains several
        seeds in one step, which pays for tiny ones: on one core 8 seeds x batch 16 of the digits took 1.5 times less
        time than one after the other, traced, and 4 x 64 as much (benchmarks/seeds_at_once.py).
      evaluate: `evaluate(state, inputs) -> per-example scalars`.
      predict: `predict(state, inputs) -> logits` of the classifier that `evaluate` uses.
      batch_size: images per step.
      max_steps: number of steps of the whole training.
      postprocess: `postprocess(inputs, draws) -> {'view1', 'view2', 'labels'}`, if there are two views.
      outputs: `outputs(state, draws, inputs) -> (online, target)`, the outputs of both networks for a training batch.
      relative_crops: `relative_crops(step) -> {view: [B, 4]}`, the crops of `sample(step)` in shares of the image, for
        a stream that crops the views while it decodes.
      image_size: the side of these views, or `{view: side}`.
      parts: the functions before they were bound to each other, a NamedTuple for `assemble`.
    """

    init: Callable[[], Any]
    sample: Callable[[int], Any]
    update: Callable[..., tuple[Any, Logs]]
    evaluate: Callable[[Any, Batch], Logs]
    predict: Callable[[Any, Batch], torch.Tensor]
    batch_size: int
    max_steps: int
    postprocess: Callable[[Batch, Any], Batch] | None = None
    outputs: Callable[[Any, Any, Batch], tuple[Batch, Batch]] | None = None
    relative_crops: Callable[[int], dict[str, torch.Tensor]] | None = None
    image_size: int | Mapping[str, int] = 0
    parts: Any = None


def assemble(parts: Parts) -> Parts:
    """Binds every keyword-only argument without a default to the part of the same name.

    In `def update_fn(state, draws, inputs, *, loss_fn)` the argument `loss_fn` becomes the part `loss_fn`, whose
    own keyword-only arguments are bound likewise. Every part is bound once. Parts that are values stay as they are.

    Args:
      parts: a NamedTuple of functions and values.

    Returns:
      The same NamedTuple, whose functions need only their positional arguments.

    Raises:
      UserError: a function asks for a part that does not exist, or, directly or indirectly, for itself.
    """
    bound: dict[str, Any] = {}

    def bind(name: str, askers: tuple[str, ...]) -> Any:
        if name in askers:
            raise UserError(f'{askers[-1]}(..., *, {name}): {" -> ".join((*askers, name))} ask for each other')
        if name not in bound:
            part = getattr(parts, name)
            arguments = {}
            for argument in _unbound_arguments(part):
                # A TypeVar cannot be bound to NamedTuple.
                if argument not in parts._fields:  # type: ignore[attr-defined]
                    raise _no_such_part(name, argument, parts._fields)  # type: ignore[attr-defined]
                arguments[argument] = bind(argument, (*askers, name))
            bound[name] = functools.partial(part, **arguments) if arguments else part
        return bound[name]

    fields = parts._fields  # type: ignore[attr-defined]
    return parts._replace(**{name: bind(name, ()) for name in fields})  # type: ignore[attr-defined]


def _unbound_arguments(part: Any) -> list[str]:
    if not callable(part):
        return []
    try:
        parameters = inspect.signature(part).parameters.values()
    except ValueError:  # Some builtins have no signature.
        return []
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def _no_such_part(name: str, argument: str, fields: tuple[str, ...]) -> UserError:
    close = difflib.get_close_matches(argument, fields, n=1)
    hint = f'did you mean {close[0]}?' if close else f'expected a default or one of {", ".join(fields)}'
    return UserError(f'{name}(..., *, {argument}): no such part; {hint}')


def step_inputs(
    experiment: Experiment, data: dataset.Examples, steps: range, *, seed: int, device: torch.device
) -> Generator[tuple[torch.Tensor, Any, dataset.Batch], None, None]:
    """Yields the arguments of `experiment.update` after the state: (global_step, draws, inputs) of each step.

    All replicas draw for the whole batch and take their share, so the numbers of a run do not depend on the number of
    replicas. `seed` is that of the shuffling. Closing the generator ends the workers of a stream.
    """
    rank, num_replicas = collectives.replica_index(), collectives.num_replicas()
    batches = dataset.train_batches(
        data,
        steps,
        seed=seed,
        batch_size=experiment.batch_size,
        rank=rank,
        num_replicas=num_replicas,
        relative_crops=experiment.relative_crops,
        image_size=experiment.image_size,
    )
    with contextlib.closing(batches):
        for step, inputs in zip(steps, batches, strict=True):
            draws = optree.tree_map(lambda d: d.chunk(num_replicas)[rank], experiment.sample(step))
            # Filled on the device: a copy of the step would make the host wait.
            yield torch.full((), step, device=device), transfer.to_device(draws, device), inputs


def step_arguments(experiment: Experiment, image_shape: Sequence[int | None]) -> tuple[Any, torch.Tensor, Any, Batch]:
    """Returns the arguments of `experiment.update` for a first step of this replica on black images of this shape."""
    share = experiment.batch_size // collectives.num_replicas()
    channels, *size = image_shape
    shapes: dict[str, list] = {'images': size}
    if None in size and experiment.relative_crops:  # The workers of a stream crop the views.
        sides, views = experiment.image_size, experiment.relative_crops(0)
        shapes = {view: [sides[view] if isinstance(sides, Mapping) else sides] * 2 for view in views}
    black = torch.zeros(1, dtype=torch.uint8)
    inputs = {name: black.expand(share, channels or 1, *shape) for name, shape in shapes.items()}
    inputs['labels'] = torch.zeros(share, dtype=torch.int64)
    draws = optree.tree_map(lambda d: d[:share], experiment.sample(0))
    return experiment.init(), torch.zeros((), dtype=torch.int64), draws, inputs


def update_and_gradients(
    experiment: Experiment, state: Any, global_step: torch.Tensor, draws: Any, inputs: Any
) -> tuple[Any, Logs, list[Any]]:
    """Runs one step and also returns the gradients passed to its optimiser, one tree per call.

    The list of gradients is empty if the optimiser was not called. The arguments are those of `experiment.update`.
    """
    if not hasattr(experiment.parts, 'optimizer'):
        return *experiment.update(state, global_step, draws, inputs), []
    gradients: list[Any] = []
    optimizer = assemble(experiment.parts).optimizer

    def listening(learning_rate):
        transformation = optimizer(learning_rate)

        def update(grads, opt_state, params):
            gradients.append(grads)
            return transformation.update(grads, opt_state, params)

        return optimizers.GradientTransformation(transformation.init, update)

    update_fn = assemble(experiment.parts._replace(optimizer=listening)).update_fn
    return *update_fn(state, global_step, draws, inputs), gradients


def eval_scalars(logits: torch.Tensor, labels: torch.Tensor, num_classes: int) -> Logs:
    """Returns the cross entropy and the top-1 and top-5 hits of logits `[B, K]`, per example."""
    one_hot = helpers.one_hot(labels, num_classes)
    return {
        'eval_loss': helpers.softmax_cross_entropy(logits, one_hot, reduction='none'),
        'top1_accuracy': helpers.topk_accuracy(logits, labels, topk=1),
        'top5_accuracy': helpers.topk_accuracy(logits, labels, topk=5),
    }


class TrainResult(NamedTuple):
    """The result of a finished loop.

    Attributes:
      state: the state of the first replica, on all replicas.
      logs: the logs of the last step.
      steps: number of steps done by this process, not by earlier ones.
      images_per_second: the rate of this process.
      seconds: the time of this process and of the earlier ones that it resumed, up to their last checkpoints.
    """

    state: Any
    logs: dict[str, float]
    steps: int
    images_per_second: float
    seconds: float
