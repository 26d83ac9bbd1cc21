"""What an experiment is to the loops, whichever it is: bound functions and the number of steps."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from byol_func.utils import helpers

Batch = Mapping[str, torch.Tensor]
Logs = dict[str, torch.Tensor]


class Experiment(NamedTuple):
    """What the main loop needs to know of an experiment, every function bound to its config.

    `init() -> state`. `sample(step) -> draws` for the batch of that step. `update(state,
    global_step, draws, inputs) -> (state, logs)`. `evaluate(state, inputs) -> per-example scalars`;
    `predict(state, inputs) -> logits` of the same classifier.
    `postprocess(inputs, draws) -> {'view1', 'view2', 'labels'}`, where there are two views.
    `crops(step) -> {view: [B, 4]}` are the crops of `sample(step)` before the size of an image is known,
    for whoever cuts views of `image_size` pixels from images of many sizes.
    `loss_fn` is what `update` descends, where something looks at it from outside.
    """

    init: Callable[[], Any]
    sample: Callable[[int], Any]
    update: Callable[..., tuple[Any, Logs]]
    evaluate: Callable[[Any, Batch], Logs]
    predict: Callable[[Any, Batch], torch.Tensor]
    batch_size: int
    max_steps: int
    postprocess: Callable[[Batch, Any], Batch] | None = None
    crops: Callable[[int], dict[str, torch.Tensor]] | None = None
    image_size: int = 0
    loss_fn: Callable | None = None


def eval_scalars(logits: torch.Tensor, labels: torch.Tensor, num_classes: int) -> Logs:
    """Cross entropy and top-1 and top-5 hits of logits `[B, K]`, per example."""
    one_hot = helpers.one_hot(labels, num_classes)
    return {
        'eval_loss': helpers.softmax_cross_entropy(logits, one_hot, reduction='none'),
        'top1_accuracy': helpers.topk_accuracy(logits, labels, topk=1),
        'top5_accuracy': helpers.topk_accuracy(logits, labels, topk=5),
    }


class TrainResult(NamedTuple):
    """What a finished loop leaves; rates and seconds are of this process, not of earlier ones.

    `state` is that of the first replica, on all. `logs` are those of the last step, `steps` is how many
    this process did.
    """

    state: Any
    logs: dict[str, float]
    steps: int
    images_per_second: float
    seconds: float
