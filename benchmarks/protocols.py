"""The sides of `compare_official.py` for linear evaluation and fine-tuning: each trains on top of one encoder.

The encoder is that of the official code after a few updates of its pre-training, since an untrained one has no moving
averages. Both sides start from its values and from the official classifier, and see the same images; the crops and
flips are this code's, because the official ones are TensorFlow's.
"""

from typing import Any

import jax
import numpy as np
import optree
import torch
from ml_collections import ConfigDict

import official_code
import side_by_side
from byol_func import eval_experiment
from byol_func.experiment import assemble
from byol_func.utils import dataset
from byol_func.utils.checkpointing import leaf_names

_PRETRAINING = 5  # Updates.


def start(mode: str, ours, official, data: dataset.Dataset, seed: int) -> tuple['Ours', 'Official']:
    """Pre-trains the official side and returns both sides of a protocol on its encoder.

    Args:
      mode: 'linear_eval' or 'fine_tune'.
      ours: our side of the pre-training, which makes the views; its config gives the protocol.
      official: the official side of the pre-training.
      data: the images.
      seed: the seed of images and classifier.
    """
    for step in range(_PRETRAINING):
        official.step(step, ours.make_views(data, step, official_code, seed).official)
    config = ours.config.copy_and_resolve_references()
    config[mode].batch_size = config.batch_size
    config[mode].bn_config.decay_rate = 0.9  # The published one; ours follows the paper.
    protocol = Ours(config, mode, data, ours.dtype)
    return protocol, Official(protocol, official, seed)


class Official:
    """The official `EvalExperiment` on one device, on the encoder of a pre-training; gives `ours` its initial state."""

    def __init__(self, ours: 'Ours', pretrained, seed: int):
        from byol import eval_experiment as official_eval

        config = official_code.published_evaluation(ours.batch_size)
        network = pretrained.config['network_config']
        config.update(num_classes=ours.num_classes, freeze_backbone=ours.freezes, random_seed=seed)
        config['network_config'].update({name: network[name] for name in ('encoder_class', 'encoder_config')})
        config['checkpointing_config']['use_checkpointing'] = False
        if ours.freezes:
            assert config['max_steps'] == ours.max_steps
        else:  # There is no published configuration of fine-tuning: ours, which follows the paper.
            config['max_steps'] = ours.max_steps
            config['lr_schedule_config']['base_learning_rate'] = ours.base_learning_rate
        self.experiment = official_eval.EvalExperiment(**config)
        images = np.zeros((1, ours.batch_size, ours.image_size, ours.image_size, 3), official_code.float_type())
        state = jax.pmap(self.experiment._make_initial_state, axis_name='i')(
            rng=jax.random.PRNGKey(seed)[None],
            dummy_input={'images': images, 'labels': np.zeros((1, ours.batch_size), np.int32)},
            backbone_params=pretrained.state.online_params,
            backbone_state=pretrained.state.online_state,
        )
        if ours.freezes:
            state = state._replace(backbone_opt_state=None)
        self.state = official_code.cast(state, official_code.float_type())
        ours.begin(self.trees())

        def gradient(state, inputs):
            grads, _ = jax.grad(self.experiment._loss_fn, has_aux=True, argnums=(0, 1))(*state[:3], inputs)
            return grads

        self._gradient = jax.pmap(gradient, axis_name='i')

    def step(self, step: int, inputs: dict[str, np.ndarray]) -> dict[str, float]:
        """Does one official update and returns its loss."""
        self.state, logs = self.experiment.update_pmap(self.state, np.array([step]), official_code.stack(inputs))
        return {'loss': float(logs['train_loss'][0])}

    def trees(self, inputs: dict[str, np.ndarray] | None = None) -> dict[str, dict[str, torch.Tensor]]:
        """Returns every tree of the state with our names and layouts, and the gradients if inputs are given."""
        state, frozen = self.state, self.state.backbone_opt_state is None
        trace = lambda opt_state: next(s.trace for s in opt_state if hasattr(s, 'trace'))
        classif = trace(state.classif_opt_state)
        trees = {
            'params': _ours(state.backbone_params, state.classif_params),
            'state': _ours(state.backbone_state, {}),
            'momentum': _ours({} if frozen else trace(state.backbone_opt_state), classif),
        }
        if inputs is not None:
            backbone, classif = self._gradient(state, official_code.stack(inputs))
            trees['gradients'] = _ours({} if frozen else backbone, classif)
        return trees


def _ours(backbone: Any, classifier: Any) -> dict[str, torch.Tensor]:
    """Returns the leaves of encoder and classifier; the heads of the pre-training stay in the official trees."""
    encoder = official_code.to_ours(backbone) if backbone else {}
    linear = official_code.to_ours(classifier) if classifier else {}
    return {
        **{name: leaf for name, leaf in encoder.items() if name.startswith('encoder/')},
        **{name.replace('encoder/', 'classifier/'): leaf for name, leaf in linear.items()},
    }


class Ours:
    """Our linear evaluation or fine-tuning, trained on given images."""

    def __init__(self, config: ConfigDict, mode: str, data: dataset.Dataset, dtype: torch.dtype):
        about = dict(num_classes=data.num_classes, image_shape=(3, *data.images.shape[2:]))
        parts = eval_experiment.make_parts(config, mode, num_examples=official_code.images_of_imagenet(), **about)
        self._parts, self.dtype = assemble(parts._replace(postprocess=lambda inputs, draws: inputs)), dtype
        self.batch_size, self.num_classes, self.max_steps = parts.batch_size, parts.num_classes, parts.max_steps
        self.image_size, self.freezes = parts.image_size, parts.freeze_backbone
        self.base_learning_rate = config[mode].lr_schedule.base_learning_rate

    def begin(self, trees: dict[str, dict[str, torch.Tensor]]) -> None:
        """Sets the initial state to the values of the official one."""
        params, state = self._parts.backbone.init(torch.Generator())
        initial = self._parts.init_state(0, _fill(params, trees['params']), _fill(state, trees['state']))
        classifier = _fill(initial.classif_params, trees['params'])
        self.state = self.cast(initial._replace(classif_params=classifier))

    def cast(self, tree):
        """Returns the tree with its floats in the dtype of the comparison."""
        return optree.tree_map(lambda x: x.to(self.dtype) if x.is_floating_point() else x, tree)

    def make_views(self, data: dataset.Dataset, step: int, official_code, seed: int) -> side_by_side.Views:
        """Returns the images of a step, with one crop and flip for both sides."""
        del official_code
        parts = self._parts
        batch = dataset.train_batch(data, step, seed=seed, batch_size=parts.batch_size)
        draws = parts.sample(step, random_seed=seed)
        augmented = eval_experiment.postprocess(batch, draws, presets=parts.presets, image_size=parts.image_size)
        images = augmented['images'].to(self.dtype)
        nhwc = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        labels = {'labels': batch['labels'].numpy().astype(np.int32)}
        official = {'images': nhwc, **labels}
        moved = {'images': side_by_side.move_first(nhwc), **labels}
        return side_by_side.Views({'images': images, 'labels': batch['labels']}, official, moved, official)

    def step(self, step: int, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
        """Does one update and returns its loss."""
        # With a float64 step, schedules are computed in float64, as in JAX.
        global_step = torch.tensor(step, dtype=torch.float64 if self.dtype == torch.float64 else None)
        self.state, logs = self._parts.update_fn(self.state, global_step, None, inputs)
        return {'loss': float(logs['train_loss'])}

    def trees(self, inputs: dict[str, torch.Tensor] | None = None) -> dict[str, dict[str, torch.Tensor]]:
        """Returns the trees of our state, as `Official.trees` does for the official one."""
        state = self.state
        optimisers = [state.classif_opt_state, *([] if self.freezes else [state.backbone_opt_state])]
        trees = {
            'params': [state.backbone_params, state.classif_params],
            'state': [state.backbone_state],
            'momentum': [next(s.trace for s in opt_state if hasattr(s, 'trace')) for opt_state in optimisers],
        }
        if inputs is not None:
            loss = lambda backbone, classifier: self._parts.loss_fn(backbone, classifier, state.backbone_state, inputs)
            arguments = (1,) if self.freezes else (0, 1)
            gradients, _ = torch.func.grad(loss, argnums=arguments, has_aux=True)(*state[:2])
            trees['gradients'] = list(gradients)
        return {
            name: {leaf: value for tree in of_name for leaf, value in _leaves(tree)} for name, of_name in trees.items()
        }

    def sign_changes(self, official: dict[str, dict[str, torch.Tensor]], views) -> tuple[int, int]:
        """Counts inputs of the encoder's ReLUs as `side_by_side.Ours.sign_changes` does."""
        own = self.state.backbone_params, self.state.backbone_state
        exact = [_fill(tree, official[name]) for tree, name in zip(own, ('params', 'state'), strict=True)]
        apply = lambda params, state, views: self._parts.backbone.apply(
            params, state, views['images'], is_training=not self.freezes
        )
        return side_by_side.count_sign_changes(apply, (*own, views), (*exact, views))


def _leaves(tree: Any):
    return zip(leaf_names(tree), optree.tree_leaves(tree), strict=True)


def _fill(tree: Any, leaves: dict[str, torch.Tensor]) -> Any:
    """Returns a tree of this structure with leaves by their names."""
    return optree.tree_unflatten(optree.tree_structure(tree), [leaves[name] for name in leaf_names(tree)])
