"""BYOL pre-training: the algorithm, whole. Namesake of the official `byol/byol_experiment.py`.

Everything a step replaces is in `ByolState`; everything else is bound once in `make`. `update_fn`
is Algorithm 1 of the paper (arXiv 2006.07733) and a pure function; compiling it, writing its result
into the old buffers and running it on several devices are wrappers around it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from byol_func.experiment import Batch, Experiment, Logs, eval_scalars
from byol_func.runtime import collectives, prng
from byol_func.runtime.fused import fused_map
from byol_func.runtime.precision import DTYPES, at_least_float32
from byol_func.utils import augmentations, dataset, helpers, networks, optimizers, sampling, schedules
from byol_func.utils.networks import Network


class ByolState(NamedTuple):
    """The trees that a step replaces. Port of `_ByolExperimentState`."""

    online_params: networks.Params
    target_params: networks.Params
    online_state: networks.NetState
    target_state: networks.NetState
    opt_state: optimizers.OptState


def make_network(
    *,
    encoder_class: str,
    encoder_config: Mapping[str, Any],
    bn_config: Mapping[str, Any],
    projector_hidden_size: int,
    projector_output_size: int,
    predictor_hidden_size: int,
    num_classes: int,
    in_channels: int = 3,
    compute_dtype: torch.dtype = torch.float32,
) -> Network:
    """Encoder f, projector g, predictor q and an online classifier as one network.

    The classifier sees the embedding through a stop-gradient: it measures the representation while
    it is trained and leaves it alone. The target network owns a predictor and a classifier as well.

    Port of `ByolExperiment._forward`; differences: in training both views pass through as one batch
    of 2 B, normalised per view, which gives the numbers of two passes.

    Args:
      encoder_class: a name that `networks.make_encoder` knows.
      encoder_config: its options.
      bn_config: keyword arguments of `batch_norm`.
      projector_hidden_size: hidden size of the projector.
      projector_output_size: output size of projector and predictor.
      predictor_hidden_size: hidden size of the predictor.
      num_classes: outputs of the classifier; 0, for a set without labels: there is no classifier.
      in_channels: C of the images.
      compute_dtype: of convolutions, products and activations; parameters, statistics and outputs
        are float32 (float64, if that is what goes in).

    Returns:
      A network that takes `{'view1', 'view2'}` in training and `{'images'}` in evaluation, `[B, C,
      H, W]` in 0..1, and returns `embedding`, `projection`, `prediction` and `logits`, `[B, D]`,
      with the suffixes `_view1` and `_view2` in training.
    """
    encoder = networks.make_encoder(encoder_class, encoder_config, bn_config, in_channels)
    projector = networks.MLP(encoder.output_size, projector_hidden_size, projector_output_size, bn_config)
    predictor = networks.MLP(projector_output_size, predictor_hidden_size, projector_output_size, bn_config)
    modules = {'encoder': encoder, 'projector': projector, 'predictor': predictor}
    # Golden tests run in float64; only a narrower dtype is asked for.
    compute = (lambda x: x) if compute_dtype == torch.float32 else (lambda x: x.to(compute_dtype))

    def init(generator):
        params, state = {}, {}
        for name, module in modules.items():
            params[name], state[name] = module.init(generator)
        if num_classes:
            params['classifier'] = networks.linear_init(generator, encoder.output_size, num_classes)
        return params, state

    def apply_once(params, state, images, is_training, num_views=1):
        new_state = {}

        def run(name, inputs):
            outputs, new_state[name] = modules[name].apply(params[name], state[name], inputs, is_training, num_views)
            return outputs

        embedding = run('encoder', compute(dataset.normalize_images(images)))
        projection = run('projector', compute(embedding))
        prediction = run('predictor', projection)
        outputs = {'embedding': embedding, 'projection': projection, 'prediction': prediction}
        if num_classes:
            outputs['logits'] = networks.linear(params['classifier'], embedding.detach())
        return {name: at_least_float32(values) for name, values in outputs.items()}, new_state

    def apply(params, state, inputs, is_training):
        if not is_training:
            return apply_once(params, state, inputs['images'], False)
        both = torch.cat([inputs['view1'], inputs['view2']])
        outputs, new_state = apply_once(params, state, both, True, num_views=2)
        view1, view2 = {}, {}
        for name, values in outputs.items():
            view1[f'{name}_view1'], view2[f'{name}_view2'] = values.chunk(2)
        return {**view1, **view2}, new_state

    return Network(init, apply, projector_output_size)


def loss_fn(
    online_params: networks.Params,
    target_params: networks.Params,
    online_state: networks.NetState,
    target_state: networks.NetState,
    draws: Any,
    inputs: Batch,
    *,
    forward: Network,
    postprocess: Callable[[Batch, Any], Batch],
    num_classes: int,
) -> tuple[torch.Tensor, tuple[dict[str, networks.NetState], Logs]]:
    """BYOL's loss |q(z) - z'|^2 of normalised vectors, both directions summed (0..8), and the classifier's.

    Port of `ByolExperiment.loss_fn`; differences: `draws` in place of `rng`.

    Args:
      online_params: parameters of the online network, which the loss is differentiated by.
      target_params: parameters of the target network.
      online_state: its moving averages.
      target_state: its moving averages.
      draws: the randomness of both views, already drawn.
      inputs: `images` uint8 `[B, C, H, W]` and `labels` `[B]`, or whatever `postprocess` takes.
      forward: the network of `make_network`.
      postprocess: makes `view1`, `view2` and `labels` of inputs and draws.
      num_classes: number of classes; 0 without labels, where only the first of the two losses is left.

    Returns:
      The loss, a 0-d tensor; the new `online_state` and `target_state`; the logs.
    """
    inputs = postprocess(inputs, draws)
    labels = inputs['labels']

    online_out, online_state = forward.apply(online_params, online_state, inputs, is_training=True)
    target_out, target_state = forward.apply(target_params, target_state, inputs, is_training=True)

    # Gradients are taken with respect to the online parameters only; detach says so again.
    repr_loss = helpers.regression_loss(online_out['prediction_view1'], target_out['projection_view2'].detach())
    repr_loss = repr_loss + helpers.regression_loss(
        online_out['prediction_view2'], target_out['projection_view1'].detach()
    )
    repr_loss = repr_loss.mean()

    loss, logs = repr_loss, dict(repr_loss=repr_loss)
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
    optimizer: Callable[[torch.Tensor], optimizers.GradientTransformation],
    learning_schedule: Callable[[torch.Tensor], torch.Tensor],
    target_ema: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[ByolState, Logs]:
    """One step of BYOL: theta <- optimizer(grad L), xi <- tau xi + (1 - tau) theta (Algorithm 1).

    Port of `ByolExperiment._update_fn`; differences: none.

    Args:
      byol_state: the state before the step.
      global_step: index of the step, from 0, a 0-d int64 tensor.
      draws: the randomness of the step.
      inputs: the batch.
      loss_fn: the loss above, bound to network and augmentations.
      optimizer: from a learning rate to a transformation.
      learning_schedule: from a step to a learning rate.
      target_ema: from a step to tau.

    Returns:
      The state after the step and its logs, 0-d tensors, means over all replicas.
    """
    online_params, target_params, online_state, target_state, opt_state = byol_state

    # update online network
    grads, (net_states, logs) = torch.func.grad(loss_fn, has_aux=True)(
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
    return byol_state, {**logs, 'tau': tau, 'learning_rate': learning_rate}


def init_state(random_seed: int, *, forward: Network, optimizer: Callable) -> ByolState:
    """The initial state; online and target start from different random numbers.

    Port of `ByolExperiment._make_initial_state`; differences: none but the generator.
    """
    online_params, online_state = forward.init(prng.fold_in(random_seed, 'online'))
    target_params, target_state = forward.init(prng.fold_in(random_seed, 'target'))
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
    """Loss and accuracy of the online classifier in evaluation mode, per example.

    Port of `ByolExperiment._eval_batch`; differences: none.

    Args:
      params: parameters, typically the online ones.
      state: the moving averages that belong to them.
      inputs: `images` `[B, C, H, W]` in 0..1 and `labels` `[B]`.
      forward: the network of `make_network`.
      num_classes: number of classes.

    Returns:
      `eval_loss` float32 `[B]`, `top1_accuracy` and `top5_accuracy` bool `[B]`.
    """
    outputs, _ = forward.apply(params, state, inputs, is_training=False)
    return eval_scalars(outputs['logits'], inputs['labels'], num_classes)


def make(config: Mapping[str, Any], *, num_examples: int, num_classes: int, image_shape: tuple[int, ...]) -> Experiment:
    """Binds the whole experiment to its config; nothing after this sees a config again.

    Args:
      config: a resolved config of `configs/`.
      num_examples: N of the training set, for the number of steps.
      num_classes: of the data set.
      image_shape: (C, H, W) of the stored images; (C, None, None) if they have their own sizes.

    Raises:
      UserError: an unknown name or a value out of range.
    """
    batch_size, seed = config.batch_size, config.random_seed
    channels, *source_size = image_shape
    presets = config.augmentations.to_dict()
    sampling.validate_presets(presets)
    dataset.check_batch_size('config.batch_size', batch_size, num_examples, collectives.num_replicas())
    max_steps = schedules.num_steps(config.num_epochs, num_examples, batch_size)
    network = functools.partial(make_network, **config.network.to_dict(), num_classes=num_classes, in_channels=channels)
    # The precision is that of the training; what only looks is computed in float32.
    forward, exact = network(compute_dtype=DTYPES[config.precision]), network()
    optimizer = optimizers.make_optimizer(config.optimizer, config.optimizer_config.to_dict())
    online = lambda state: (state.online_params, state.online_state)
    postprocess = functools.partial(augmentations.postprocess, presets=presets, image_size=config.image_size)
    bound_loss = functools.partial(loss_fn, forward=forward, postprocess=postprocess, num_classes=num_classes)
    update = functools.partial(
        update_fn,
        loss_fn=bound_loss,
        optimizer=optimizer,
        learning_schedule=schedules.make_learning_schedule(
            **config.lr_schedule,
            batch_size=batch_size,
            num_examples=num_examples,
            total_steps=max_steps,
        ),
        target_ema=functools.partial(schedules.target_ema, base_ema=config.base_target_ema, max_steps=max_steps),
    )

    def generators(step):
        return (prng.fold_in(seed, 'augment', step, view) for view in (1, 2))

    def sample(step):
        return sampling.sample_pair(*generators(step), batch_size, presets, tuple(source_size))

    def crops(step):
        views = zip(('view1', 'view2'), generators(step))
        return {view: sampling.sample_crops(rng, batch_size, presets[view]) for view, rng in views}

    def crop(inputs, image_size=config.image_size, fraction=config.eval_crop_fraction):
        return {**inputs, 'images': augmentations.center_view(inputs, image_size, fraction)}

    def predict(state, inputs):
        return exact.apply(*online(state), crop(inputs), is_training=False)[0]['logits']

    def evaluate(state, inputs):
        return eval_batch(*online(state), crop(inputs), forward=exact, num_classes=num_classes)

    return Experiment(
        init=functools.partial(init_state, seed, forward=forward, optimizer=optimizer),
        sample=sample,
        update=update,
        evaluate=evaluate,
        loss_fn=bound_loss,
        predict=predict,
        batch_size=batch_size,
        max_steps=max_steps,
        postprocess=postprocess,
        crops=crops,
        image_size=config.image_size,
    )
