"""Linear evaluation and fine-tuning. Counterpart of the official `byol/eval_experiment.py`.

Linear evaluation (`freeze_backbone=True`) trains a linear classifier on a frozen encoder in evaluation mode.
Fine-tuning trains both, with the encoder in training mode. In fine-tuning every replica keeps its own moving
averages; those of the first replica are saved and evaluated, as in the official code.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optree
import torch
from ml_collections import ConfigDict

from byol_func.experiment import Batch, Experiment, Logs, assemble, eval_scalars
from byol_func.forward import ENCODER_FIELDS, make_backbone, make_classifier
from byol_func.runtime import collectives, prng
from byol_func.runtime.precision import DTYPES
from byol_func.utils import augmentations, dataset, helpers, networks, optimizers, sampling, schedules
from byol_func.utils.networks import Network


class EvalState(NamedTuple):
    """The trees that a step updates. Port of `_EvalExperimentState`.

    `backbone_opt_state` is None when the backbone is frozen.
    """

    backbone_params: networks.Params
    classif_params: networks.Params
    backbone_state: networks.NetState
    backbone_opt_state: optimizers.OptState | None
    classif_opt_state: optimizers.OptState


def loss_fn(
    backbone_params: networks.Params,
    classif_params: networks.Params,
    backbone_state: networks.NetState,
    inputs: Batch,
    *,
    backbone: Network,
    classifier: Network,
    freeze_backbone: bool,
    num_classes: int,
) -> tuple[torch.Tensor, networks.NetState]:
    """Computes the mean cross entropy of the classifier.

    Port of `EvalExperiment._loss_fn`; differences: the loss is not divided by the number of
    devices, because the gradients are averaged, not summed.

    Args:
      backbone_params: parameters of the encoder.
      classif_params: parameters of the classifier.
      backbone_state: the encoder's moving averages.
      inputs: `images` and `labels` `[B]`.
      backbone: the encoder.
      classifier: the linear layer.
      freeze_backbone: whether to run the encoder in evaluation mode.
      num_classes: number of classes.

    Returns:
      The loss and the encoder's new state.
    """
    embeddings, backbone_state = backbone.apply(
        backbone_params, backbone_state, inputs['images'], is_training=not freeze_backbone
    )
    logits, _ = classifier.apply(classif_params, {}, embeddings, is_training=True)
    labels = helpers.one_hot(inputs['labels'], num_classes)
    return helpers.softmax_cross_entropy(logits, labels, reduction='mean'), backbone_state


def update_fn(
    eval_state: EvalState,
    global_step: torch.Tensor,
    draws: Any,
    inputs: Batch,
    *,
    loss_fn: Callable,
    postprocess: Callable[[Batch, Any], Batch],
    optimizer: Callable[[torch.Tensor], optimizers.GradientTransformation],
    learning_schedule: Callable[[torch.Tensor], torch.Tensor],
    freeze_backbone: bool,
) -> tuple[EvalState, Logs]:
    """Runs one step of gradient descent on the classifier, and on the encoder unless it is frozen.

    Port of `EvalExperiment._update_func`; differences: no gradients are computed for a frozen encoder;
    the official code computes and discards them.

    Args:
      eval_state: the state before the step.
      global_step: index of the step, from 0, a 0-d int64 tensor.
      draws: the randomness of the step.
      inputs: the batch.
      loss_fn: the loss above, bound to the networks.
      postprocess: computes `images` and `labels` from inputs and draws.
      optimizer: maps a learning rate to a gradient transformation.
      learning_schedule: maps a step to a learning rate.
      freeze_backbone: whether to leave the encoder unchanged.

    Returns:
      The state after the step, and its logs: 0-d tensors, averaged over all replicas.
    """
    inputs = postprocess(inputs, draws)
    trainable = (1,) if freeze_backbone else (0, 1)
    grads, (train_loss, backbone_state) = torch.func.grad(
        lambda *args: _with_aux(loss_fn(*args)), argnums=trainable, has_aux=True
    )(eval_state.backbone_params, eval_state.classif_params, eval_state.backbone_state, inputs)
    grads, train_loss = collectives.pmean((grads, train_loss))

    learning_rate = learning_schedule(global_step)
    transformation = optimizer(learning_rate)
    classif_updates, classif_opt_state = transformation.update(
        grads[-1], eval_state.classif_opt_state, eval_state.classif_params
    )
    new_state = eval_state._replace(
        classif_params=optimizers.apply_updates(eval_state.classif_params, classif_updates),
        classif_opt_state=classif_opt_state,
    )
    if not freeze_backbone:
        backbone_updates, backbone_opt_state = transformation.update(
            grads[0], eval_state.backbone_opt_state, eval_state.backbone_params
        )
        new_state = new_state._replace(
            backbone_params=optimizers.apply_updates(eval_state.backbone_params, backbone_updates),
            backbone_state=backbone_state,
            backbone_opt_state=backbone_opt_state,
        )
    return new_state, {'train_loss': train_loss, 'learning_rate': learning_rate}


def _with_aux(loss_and_state):
    loss, state = loss_and_state
    return loss, (loss, state)


def init_state(
    random_seed: int,
    backbone_params: networks.Params,
    backbone_state: networks.NetState,
    *,
    classifier: Network,
    optimizer: Callable,
    freeze_backbone: bool,
) -> EvalState:
    """Returns the initial state: the given encoder and a new classifier.

    Port of `EvalExperiment._make_initial_state`; differences: only the random generator.
    """
    classif_params, _ = classifier.init(prng.fold_in(random_seed, 'classifier'))
    device = next(iter(optree.tree_leaves(backbone_params)), torch.empty(0)).device
    classif_params = optree.tree_map(lambda p: p.to(device), classif_params)
    transformation = optimizer(0.0)
    return EvalState(
        backbone_params=backbone_params,
        classif_params=classif_params,
        backbone_state=backbone_state,
        backbone_opt_state=None if freeze_backbone else transformation.init(backbone_params),
        classif_opt_state=transformation.init(classif_params),
    )


def eval_batch(
    eval_state: EvalState,
    inputs: Batch,
    *,
    backbone: Network,
    classifier: Network,
    num_classes: int,
) -> Logs:
    """Computes loss and accuracy in evaluation mode, per example.

    Port of `EvalExperiment._eval_batch`; differences: none.

    Returns:
      `eval_loss` float32 `[B]`, `top1_accuracy` and `top5_accuracy` bool `[B]`.
    """
    embeddings, _ = backbone.apply(
        eval_state.backbone_params, eval_state.backbone_state, inputs['images'], is_training=False
    )
    logits, _ = classifier.apply(eval_state.classif_params, {}, embeddings, is_training=False)
    return eval_scalars(logits, inputs['labels'], num_classes)


def fine_tune_bn_decay(steps_per_epoch: float) -> float:
    """Returns max(1 - 10 / steps_per_epoch, 0.9), the decay rate of moving averages in fine-tuning (appendix D.3)."""
    return max(1.0 - 10.0 / steps_per_epoch, 0.9)


class Parts(NamedTuple):
    """All functions and values of a linear evaluation or fine-tuning; `assemble` binds arguments to these fields."""

    loss_fn: Callable[..., tuple[torch.Tensor, networks.NetState]]
    update_fn: Callable[..., tuple[EvalState, Logs]]
    init_state: Callable[..., EvalState]
    eval_batch: Callable[..., Logs]
    backbone: Network
    eval_backbone: Network  # The same in float32.
    classifier: Network
    optimizer: Callable[..., optimizers.GradientTransformation]
    learning_schedule: Callable[..., torch.Tensor]
    sample: Callable[..., Any]
    relative_crops: Callable[..., dict[str, torch.Tensor]]
    postprocess: Callable[..., Batch]
    presets: Mapping[str, Any]
    freeze_backbone: bool
    random_seed: int
    batch_size: int
    max_steps: int
    num_classes: int
    source_size: tuple[int | None, ...]  # Empty for cached embeddings.
    image_size: int
    eval_crop_fraction: float


def sample(
    step: int, *, random_seed: int, batch_size: int, presets: Mapping[str, Any], source_size: tuple[int | None, ...]
) -> sampling.ViewDraws:
    """Draws the augmentations of one step."""
    return sampling.sample(prng.fold_in(random_seed, 'augment_eval', step), batch_size, presets, source_size)


def relative_crops(
    step: int, *, random_seed: int, batch_size: int, presets: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Returns the crops of `sample(step)` in shares of the image, `[B, 4]` (`sampling.sample_relative_crops`)."""
    return {
        'view': sampling.sample_relative_crops(prng.fold_in(random_seed, 'augment_eval', step), batch_size, presets)
    }


def postprocess(inputs: Batch, draws: Any, *, presets: Mapping[str, Any], image_size: int) -> Batch:
    """Returns the augmented `images` `[B, C, S, S]` in 0..1 of a batch, and its `labels`."""
    images = augmentations.random_view(inputs, draws, image_size)
    return {'images': augmentations.postprocess_view(images, draws, presets), 'labels': inputs['labels']}


def _make_backbones(config: ConfigDict, mode: str, steps_per_epoch: float, in_channels: int) -> tuple[Network, Network]:
    """Returns the encoder in the precision of training, and in float32 for evaluation."""
    network, bn_config = config.network.to_dict(), config[mode].bn_config.to_dict()
    if bn_config['decay_rate'] is None:
        bn_config['decay_rate'] = fine_tune_bn_decay(steps_per_epoch)
    arguments = {name: network[name] for name in ENCODER_FIELDS} | {'bn_config': bn_config, 'in_channels': in_channels}
    return make_backbone(**arguments, compute_dtype=DTYPES[config.precision]), make_backbone(**arguments)


def make_parts(
    config: ConfigDict, mode: str, *, num_examples: int, num_classes: int, image_shape: tuple[int, ...]
) -> Parts:
    """Returns the parts of a protocol; arguments and errors are those of `make`."""
    eval_config = config[mode]
    batch_size, presets = eval_config.batch_size, eval_config.augmentations.to_dict()
    dataset.check_batch_size(f'config.{mode}.batch_size', batch_size, num_examples, collectives.num_replicas())
    max_steps = schedules.num_steps(eval_config.num_epochs, num_examples, batch_size)
    if len(image_shape) == 1:  # Cached embeddings.
        backbone = eval_backbone = networks.make_identity(image_shape[0])
    else:
        sampling.validate_view(presets, f'config.{mode}.augmentations')
        backbone, eval_backbone = _make_backbones(config, mode, num_examples / batch_size, image_shape[0])
    return Parts(
        loss_fn=loss_fn,
        update_fn=update_fn,
        init_state=init_state,
        eval_batch=functools.partial(eval_batch, backbone=eval_backbone),
        backbone=backbone,
        eval_backbone=eval_backbone,
        classifier=make_classifier(backbone.output_size, num_classes),
        optimizer=optimizers.make_optimizer(
            eval_config.optimizer, eval_config.optimizer_config.to_dict(), f'config.{mode}'
        ),
        learning_schedule=schedules.make_learning_schedule(
            **eval_config.lr_schedule,
            batch_size=batch_size,
            num_examples=num_examples,
            total_steps=max_steps,
            section=f'config.{mode}',
        ),
        sample=sample if image_shape[1:] else lambda step: None,
        relative_crops=relative_crops,
        postprocess=postprocess if image_shape[1:] else lambda inputs, draws: inputs,
        presets=presets,
        freeze_backbone=eval_config.freeze_backbone,
        random_seed=config.random_seed,
        batch_size=batch_size,
        max_steps=max_steps,
        num_classes=num_classes,
        source_size=image_shape[1:],
        image_size=config.image_size,
        eval_crop_fraction=config.eval_crop_fraction,
    )


def make_experiment(parts: Parts, backbone_params: networks.Params, backbone_state: networks.NetState) -> Experiment:
    """Assembles the parts of a protocol and a pre-trained encoder into an `Experiment` for loops and modes."""
    bound = assemble(parts)

    def crop(inputs: Batch) -> Batch:
        if not parts.source_size:
            return inputs
        return {**inputs, 'images': augmentations.center_view(inputs, parts.image_size, parts.eval_crop_fraction)}

    def predict(state: EvalState, inputs: Batch) -> torch.Tensor:
        encoder = state.backbone_params, state.backbone_state
        embeddings, _ = parts.eval_backbone.apply(*encoder, crop(inputs)['images'], is_training=False)
        return parts.classifier.apply(state.classif_params, {}, embeddings, is_training=False)[0]

    return Experiment(
        init=functools.partial(bound.init_state, parts.random_seed, backbone_params, backbone_state),
        sample=bound.sample,
        update=bound.update_fn,
        evaluate=lambda state, inputs: bound.eval_batch(state, crop(inputs)),
        predict=predict,
        batch_size=parts.batch_size,
        max_steps=parts.max_steps,
        relative_crops=bound.relative_crops,
        image_size=parts.image_size,
        parts=parts,
    )


def make(
    config: ConfigDict,
    mode: str,
    backbone_params: networks.Params,
    backbone_state: networks.NetState,
    *,
    num_examples: int,
    num_classes: int,
    image_shape: tuple[int, ...],
) -> Experiment:
    """Builds a linear evaluation or a fine-tuning from its config and a pre-trained encoder.

    Args:
      config: a resolved config from `configs/`.
      mode: 'linear_eval' or 'fine_tune', the section of the config with the protocol.
      backbone_params: parameters of the pre-trained encoder, `{'encoder': ...}`; with cached embeddings they
        are unused and only stored, so that a checkpoint is complete.
      backbone_state: moving averages of the pre-trained encoder.
      num_examples: number of training examples.
      num_classes: number of classes of the data set.
      image_shape: (C, H, W) of the stored images, (C, None, None) if their sizes differ, or
        (D,) of cached embeddings.

    Raises:
      UserError: an unknown name or a value out of range.
    """
    parts = make_parts(config, mode, num_examples=num_examples, num_classes=num_classes, image_shape=image_shape)
    return make_experiment(parts, backbone_params, backbone_state)
