"""The interface between experiments and loops, and how an experiment is put together from functions."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from byol_func.errors import UserError
from byol_func.utils import helpers, optimizers

Batch = Mapping[str, torch.Tensor]
Logs = dict[str, torch.Tensor]
Parts = TypeVar('Parts', bound=tuple)  # A NamedTuple of unbound functions and of values.


class Experiment(NamedTuple):
    """What the loops and modes need to know about an experiment; every function is bound to its config.

    `init() -> state`. `sample(step) -> draws` for the batch of that step. `update(state,
    global_step, draws, inputs) -> (state, logs)`. `evaluate(state, inputs) -> per-example scalars`;
    `predict(state, inputs) -> logits` of the same classifier.
    `postprocess(inputs, draws) -> {'view1', 'view2', 'labels'}`, where there are two views.
    `outputs(state, draws, inputs) -> (online, target)`: what the networks make of a training batch.
    `crops(step) -> {view: [B, 4]}` gives the crops of `sample(step)` in relative numbers, for a stream that
    cuts the views while it decodes; `image_size` is the side of these views, or `{view: side}`.
    `parts` are the functions before they were bound to each other, a NamedTuple for `assemble`.
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
    crops: Callable[[int], dict[str, torch.Tensor]] | None = None
    image_size: int | Mapping[str, int] = 0
    parts: Any = None


def assemble(parts: Parts) -> Parts:
    """Binds every keyword-only argument that has no default to the part of the same name, once.

    In `def update_fn(state, draws, inputs, *, loss_fn)` the argument `loss_fn` becomes the part `loss_fn`, whose
    own keyword-only arguments are bound likewise. Parts that are values are left as they are.

    Args:
      parts: a NamedTuple of functions and values.

    Returns:
      The same NamedTuple with functions of positional arguments alone.

    Raises:
      UserError: a function asks for a part that does not exist, or for itself.
    """
    bound: dict[str, Any] = {}

    def bind(name: str, askers: tuple[str, ...]) -> Any:
        if name in askers:
            raise UserError(f'{askers[-1]}(..., *, {name}): {" -> ".join((*askers, name))} ask for each other')
        if name not in bound:
            part = getattr(parts, name)
            arguments = {}
            for argument in _unbound_arguments(part):
                if argument not in parts._fields:  # type: ignore[attr-defined]  # A TypeVar cannot say NamedTuple.
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


def update_and_gradients(
    experiment: Experiment, state: Any, global_step: torch.Tensor, draws: Any, inputs: Any
) -> tuple[Any, Logs, list[Any]]:
    """One step, and the gradients that its optimiser was given, one tree per call; none if it was not asked.

    The arguments are those of `experiment.update`.
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
    """Cross entropy and top-1 and top-5 hits of logits `[B, K]`, per example."""
    one_hot = helpers.one_hot(labels, num_classes)
    return {
        'eval_loss': helpers.softmax_cross_entropy(logits, one_hot, reduction='none'),
        'top1_accuracy': helpers.topk_accuracy(logits, labels, topk=1),
        'top5_accuracy': helpers.topk_accuracy(logits, labels, topk=5),
    }


class TrainResult(NamedTuple):
    """What a finished loop leaves; rates and seconds count this process only, not earlier ones.

    `state` is that of the first replica, on all. `logs` are those of the last step; `steps` is the number of steps
    that this process did.
    """

    state: Any
    logs: dict[str, float]
    steps: int
    images_per_second: float
    seconds: float
