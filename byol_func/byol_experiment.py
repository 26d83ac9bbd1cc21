"""BYOL pre-training: the complete algorithm. Counterpart of the official `byol/byol_experiment.py`.

`update_fn` is a pure function that implements Algorithm 1 of the paper (arXiv 2006.07733). `ByolState` holds
everything that a step changes. `Parts` holds everything else that a step needs, under the names of keyword-only
arguments, and `assemble` binds the parts to these arguments. A variant of BYOL is a function from `Parts` to `Parts`.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from ml_collections import ConfigDict

from byol_func.experiment import Batch, Experiment, Logs, assemble, eval_scalars
from byol_func.forward import make_network
from byol_func.runtime import collectives, prng
from byol_func.runtime.fused import fused_map
from byol_func.runtime.precision import DTYPES
from byol_func.utils import augmentations, dataset, helpers, networks, optimizers, sampling, schedules, variants
from byol_func.utils.networks import Network


class ByolState(NamedTuple):
    """The trees that a step updates. Port of `_ByolExperimentState`."""

    online_params: networks.Params
    target_params: networks.Params
    online_state: networks.NetState
    target_state: networks.NetState
    opt_state: optimizers.OptState


def repr_loss_fn(online_out: Batch, target_out: Batch) -> torch.Tensor:
    """Returns |q(z) - z'|^2 of normalised vectors, summed over both directions (0..8), as a 0-d mean over the batch.

    Args:
      online_out: `prediction_view1` and `prediction_view2`, `[B, D]`, of the online network.
      target_out: `projection_view1` and `projection_view2`, `[B, D]`, of the target network.

    A variant may return `(loss, logs)` instead, with 0-d tensors by name; see `variants.loss_and_logs`.
    """
    # Gradients are taken with respect to the online parameters only; detach makes this explicit.
    repr_loss = helpers.regression_loss(online_out['prediction_view1'], target_out['projection_view2'].detach())
    repr_loss = repr_loss + helpers.regression_loss(
        online_out['prediction_view2'], target_out['projection_view1'].detach()
    )
    return repr_loss.mean()


def loss_fn(
    online_params: networks.Params,
    target_params: networks.Params,
    online_state: networks.NetState,
    target_state: networks.NetState,
    draws: Any,
    inputs: Batch,
    *,
    forward: Network,
    target_forward: Network,
    postprocess: Callable[[Batch, Any], Batch],
    repr_loss_fn: Callable[[Batch, Batch], torch.Tensor | tuple[torch.Tensor, Logs]],
    num_classes: int,
) -> tuple[torch.Tensor, tuple[dict[str, networks.NetState], Logs]]:
    """Computes BYOL's loss plus the cross entropy of the online classifier.

    Port of `ByolExperiment.loss_fn`; differences: `draws` in place of `rng`.

    Args:
      online_params: parameters of the online network; the loss is differentiated with respect to them.
      target_params: parameters of the target network.
      online_state: moving averages of the online network.
      target_state: moving averages of the target network.
      draws: the randomness of both views, already drawn.
      inputs: `images` uint8 `[B, C, H, W]` and `labels` `[B]`, or any other input of `postprocess`.
      forward: the online network, as `make_network` returns it.
      target_forward: the target network; in BYOL the same functions as `forward`.
      postprocess: computes `view1`, `view2` and `labels` from inputs and draws.
      repr_loss_fn: the loss of the representation.
      num_classes: number of classes; 0 without labels, which leaves only the first of the two losses.

    Returns:
      The loss, a 0-d tensor; the new `online_state` and `target_state`; the logs.
    """
    inputs = postprocess(inputs, draws)
    labels = inputs['labels']

    online_out, online_state = forward.apply(online_params, online_state, inputs, is_training=True)
    target_out, target_state = target_forward.apply(target_params, target_state, inputs, is_training=True)
    repr_loss, own_logs = variants.loss_and_logs(repr_loss_fn(online_out, target_out))

    loss, logs = repr_loss, dict(repr_loss=repr_loss, **own_logs)
    if num_classes:  # 0: there are no labels.
        logits = online_out['logits_view1']
        classif_loss = helpers.softmax_cross_entropy(logits, helpers.one_hot(labels, num_classes))
        loss = repr_loss + classif_loss
        logs |= dict(
            classif_loss=classif_loss,
            top1_accuracy=helpers.topk_accuracy(logits, labels, topk=1).float().mean(),
            top5_accuracy=helpers.topk_accuracy(logits, labels, topk=5).float().mean(),
        )
    logs = dict(loss=loss, **logs)
    return loss, (dict(online_state=online_state, target_state=target_state), logs)


def update_fn(
    byol_state: ByolState,
    global_step: torch.Tensor,
    draws: Any,
    inputs: Batch,
    *,
    loss_fn: Callable,
    grad: Callable,
    optimizer: Callable[[torch.Tensor], optimizers.GradientTransformation],
    learning_schedule: Callable[[torch.Tensor], torch.Tensor],
    target_ema: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[ByolState, Logs]:
    """Runs one step of BYOL: theta <- optimizer(grad L), xi <- tau xi + (1 - tau) theta (Algorithm 1).

    Port of `ByolExperiment._update_fn`; differences: none.

    Args:
      byol_state: the state before the step.
      global_step: index of the step, from 0, a 0-d int64 tensor.
      draws: the randomness of the step.
      inputs: the batch.
      loss_fn: the loss above, bound to networks and augmentations.
      grad: `torch.func.grad`, or another derivative of the same signature.
      optimizer: maps a learning rate to a gradient transformation.
      learning_schedule: maps a step to a learning rate.
      target_ema: maps a step to tau.

    Returns:
      The state after the step, and its logs: 0-d tensors, averaged over all replicas.
    """
    online_params, target_params, online_state, target_state, opt_state = byol_state

    # update online network
    grads, (net_states, logs) = grad(loss_fn, has_aux=True)(
        online_params, target_params, online_state, target_state, draws, inputs
    )
    grads, logs = collectives.pmean((grads, logs))
    learning_rate = learning_schedule(global_step)
    updates, opt_state = optimizer(learning_rate).update(grads, opt_state, online_params)
    online_params = optimizers.apply_updates(online_params, updates)

    # update target network, towards the *new* online parameters
    tau = target_ema(global_step)
    target_params = fused_map(lambda x, y: x + (1 - tau) * (y - x), target_params, online_params)
    byol_state = ByolState(
        online_params=online_params,
        target_params=target_params,
        online_state=net_states['online_state'],
        target_state=net_states['target_state'],
        opt_state=opt_state,
    )
    return byol_state, {**logs, **({'tau': tau} if target_params else {}), 'learning_rate': learning_rate}


def init_state(random_seed: int, *, forward: Network, target_forward: Network, optimizer: Callable) -> ByolState:
    """Returns the initial state; online and target network start from different random numbers.

    Port of `ByolExperiment._make_initial_state`; differences: only the random generator.
    """
    online_params, online_state = forward.init(prng.fold_in(random_seed, 'online'))
    target_params, target_state = target_forward.init(prng.fold_in(random_seed, 'target'))
    return ByolState(
        online_params=online_params,
        target_params=target_params,
        online_state=online_state,
        target_state=target_state,
        opt_state=optimizer(0.0).init(online_params),
    )


def eval_batch(
    params: networks.Params,
    state: networks.NetState,
    inputs: Batch,
    *,
    forward: Network,
    num_classes: int,
) -> Logs:
    """Computes loss and accuracy of the online classifier in evaluation mode, per example.

    Port of `ByolExperiment._eval_batch`; differences: none.

    Args:
      params: parameters, typically those of the online network.
      state: the moving averages that belong to them.
      inputs: `images` `[B, C, H, W]` in 0..1 and `labels` `[B]`.
      forward: the network, as `make_network` returns it.
      num_classes: number of classes.

    Returns:
      `eval_loss` float32 `[B]`, `top1_accuracy` and `top5_accuracy` bool `[B]`.
    """
    outputs, _ = forward.apply(params, state, inputs, is_training=False)
    return eval_scalars(outputs['logits'], inputs['labels'], num_classes)


def sample(
    step: int, *, random_seed: int, batch_size: int, presets: Mapping[str, Any], source_size: tuple[int | None, ...]
) -> dict[str, sampling.ViewDraws]:
    """Draws the augmentations of every view of a step; each view has its own generator."""
    generators = zip(presets, _generators(random_seed, step), strict=False)
    return {view: sampling.sample(rng, batch_size, presets[view], source_size) for view, rng in generators}


def relative_crops(
    step: int, *, random_seed: int, batch_size: int, presets: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Returns the crops of `sample(step)` in shares of the image, `[B, 4]`; see `sampling.sample_relative_crops`."""
    generators = zip(presets, _generators(random_seed, step), strict=False)
    return {view: sampling.sample_relative_crops(rng, batch_size, presets[view]) for view, rng in generators}


def _generators(random_seed: int, step: int) -> Iterator[torch.Generator]:
    return (prng.fold_in(random_seed, 'augment', step, view) for view in itertools.count(1))


def postprocess(inputs: Batch, draws: Any, *, presets: Mapping[str, Any], image_size: int) -> dict[str, torch.Tensor]:
    """Returns the views of a batch, `[B, C, S, S]` in 0..1, and its labels; see `augmentations.postprocess`."""
    return augmentations.postprocess(inputs, draws, presets, image_size)


class Parts(NamedTuple):
    """All functions and values of a pre-training; `assemble` binds keyword-only arguments to these fields."""

    repr_loss_fn: Callable[..., torch.Tensor | tuple[torch.Tensor, Logs]]
    loss_fn: Callable[..., tuple[torch.Tensor, Any]]
    grad: Callable
    update_fn: Callable[..., tuple[Any, Logs]]
    init_state: Callable[..., Any]
    eval_batch: Callable[..., Logs]
    forward: Network  # The online network.
    target_forward: Network  # The target network.
    eval_forward: Network  # The online network in float32.
    optimizer: Callable[..., optimizers.GradientTransformation]
    learning_schedule: Callable[..., torch.Tensor]
    target_ema: Callable[..., torch.Tensor]
    sample: Callable[..., Any]  # step -> draws
    relative_crops: Callable[..., dict[str, torch.Tensor]]  # step -> the relative crops among the draws
    postprocess: Callable[..., Batch]  # inputs, draws -> views and labels
    presets: Mapping[str, Any]  # view -> its augmentations; a view may have its own `image_size`.
    random_seed: int
    batch_size: int
    max_steps: int
    num_classes: int
    source_size: tuple[int | None, ...]
    image_size: int
    eval_crop_fraction: float


def make_parts(config: ConfigDict, *, num_examples: int, num_classes: int, image_shape: tuple[int, ...]) -> Parts:
    """Returns the parts of BYOL itself; arguments and errors are those of `make`."""
    batch_size = config.batch_size
    channels, *source_size = image_shape
    presets = config.augmentations.to_dict()
    sampling.validate_presets(presets)
    if config.view_size:
        presets = {view: preset | {'image_size': config.view_size} for view, preset in presets.items()}
    k, num_replicas = config.accumulate_steps, collectives.num_replicas()
    dataset.check_batch_size('config.batch_size', batch_size, num_examples, num_replicas, k)
    max_steps = schedules.num_steps(config.num_epochs, num_examples, batch_size)
    network = functools.partial(make_network, **config.network.to_dict(), num_classes=num_classes, in_channels=channels)
    # Evaluation always runs in float32.
    forward, eval_forward = network(compute_dtype=DTYPES[config.precision]), network()
    return Parts(
        repr_loss_fn=repr_loss_fn,
        loss_fn=loss_fn,
        grad=optimizers.multi_steps(k, share=batch_size // num_replicas),
        update_fn=update_fn,
        init_state=init_state,
        eval_batch=functools.partial(eval_batch, forward=eval_forward),
        forward=forward,
        target_forward=forward,
        eval_forward=eval_forward,
        optimizer=optimizers.make_optimizer(config.optimizer, config.optimizer_config.to_dict()),
        learning_schedule=schedules.make_learning_schedule(
            **config.lr_schedule, batch_size=batch_size, num_examples=num_examples, total_steps=max_steps
        ),
        target_ema=functools.partial(schedules.target_ema, base_ema=config.base_target_ema, max_steps=max_steps),
        sample=sample,
        relative_crops=relative_crops,
        postprocess=postprocess,
        presets=presets,
        random_seed=config.random_seed,
        batch_size=batch_size,
        max_steps=max_steps,
        num_classes=num_classes,
        source_size=tuple(source_size),
        image_size=config.image_size,
        eval_crop_fraction=config.eval_crop_fraction,
    )


def make_experiment(parts: Parts) -> Experiment:
    """Assembles the parts of BYOL, or of a variant, into an `Experiment` for loops and modes."""
    bound = assemble(parts)

    def crop(inputs: Batch) -> Batch:
        images = augmentations.center_view(inputs, parts.image_size, parts.eval_crop_fraction)
        return {**inputs, 'images': images}

    def predict(state, inputs):
        outputs, _ = parts.eval_forward.apply(state.online_params, state.online_state, crop(inputs), is_training=False)
        return outputs['logits']

    def outputs(state, draws, inputs):
        views = bound.postprocess(inputs, draws)
        online_out, _ = parts.forward.apply(state.online_params, state.online_state, views, is_training=True)
        target_out, _ = parts.target_forward.apply(state.target_params, state.target_state, views, is_training=True)
        return online_out, target_out

    return Experiment(
        init=functools.partial(bound.init_state, parts.random_seed),
        sample=bound.sample,
        update=bound.update_fn,
        evaluate=lambda state, inputs: bound.eval_batch(state.online_params, state.online_state, crop(inputs)),
        predict=predict,
        batch_size=parts.batch_size,
        max_steps=parts.max_steps,
        postprocess=bound.postprocess,
        outputs=outputs,
        relative_crops=bound.relative_crops,
        image_size={view: preset.get('image_size', parts.image_size) for view, preset in parts.presets.items()},
        parts=parts,
    )


def make(config: ConfigDict, *, num_examples: int, num_classes: int, image_shape: tuple[int, ...]) -> Experiment:
    """Builds the experiment from its config; no later function reads the config.

    Args:
      config: a resolved config from `configs/`. Its `variant`, if any, is applied to the parts of BYOL.
      num_examples: number of training examples, which determines the number of steps.
      num_classes: number of classes of the data set.
      image_shape: (C, H, W) of the stored images; (C, None, None) if their sizes differ.

    Raises:
      UserError: an unknown name or a value out of range.
    """
    parts = make_parts(config, num_examples=num_examples, num_classes=num_classes, image_shape=image_shape)
    if config.variant:
        plain, parts = parts, variants.apply(config.variant, parts, config.variant_config)
        if config.accumulate_steps > 1:
            variants.check_accumulates(config.variant, plain, parts)
    return make_experiment(parts)
