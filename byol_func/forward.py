"""Complete networks built from `utils.networks`, like the official `_forward`, `_backbone_fn` and `_classif_fn`."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from byol_func.runtime.precision import at_least_float32
from byol_func.utils import dataset, networks
from byol_func.utils.networks import Network

# The fields of `config.network` that define the encoder.
ENCODER_FIELDS = ('encoder_class', 'encoder_config', 'bn_config', 'norm')


def make_network(
    *,
    encoder_class: str,
    encoder_config: Mapping[str, Any],
    bn_config: Mapping[str, Any],
    projector_hidden_size: int,
    projector_output_size: int,
    predictor_hidden_size: int,
    num_classes: int,
    projector_depth: int = 2,
    predictor_depth: int = 2,
    norm: str = 'batch_norm',
    head_norm: str = 'batch_norm',
    in_channels: int = 3,
    compute_dtype: torch.dtype = torch.float32,
) -> Network:
    """Returns encoder f, projector g, predictor q and an online classifier as one network.

    The classifier receives the embedding through a stop-gradient: it measures the representation during
    training without affecting it. The target network has a predictor and a classifier as well.

    Port of `ByolExperiment._forward`; differences: in training, consecutive views of the same size are processed as
    one batch, normalised per view, which gives the same numbers as separate passes.

    Args:
      encoder_class: name of an encoder in `networks.make_encoder`.
      encoder_config: options of the encoder.
      bn_config: keyword arguments of `batch_norm`.
      projector_hidden_size: width of the projector's hidden layers.
      projector_output_size: output size of projector and predictor.
      predictor_hidden_size: width of the predictor's hidden layers.
      num_classes: number of outputs of the classifier; 0 without labels, for no classifier.
      projector_depth: number of linear layers of the projector; with 0 the projection is the embedding.
      predictor_depth: number of linear layers of the predictor; with 0 the prediction is the projection.
      norm: normalisation of the encoder, a name in `networks.NORMS`.
      head_norm: normalisation of projector and predictor.
      in_channels: number of channels C of the images.
      compute_dtype: dtype of convolutions, products and activations; parameters, statistics and outputs
        are float32 (float64 if the inputs are).

    Returns:
      A network that takes `{'view1', 'view2'}` (and further views) in training and `{'images'}` in evaluation,
      `[B, C, H, W]` in 0..1, and returns `embedding`, `projection`, `prediction` and `logits`, `[B, D]`,
      with the suffixes `_view1` and `_view2` in training.
    """
    encoder = networks.make_encoder(encoder_class, encoder_config, bn_config, in_channels, norm)
    output_size = projector_output_size if projector_depth else encoder.output_size
    head: dict[str, Any] = dict(bn_config=bn_config, norm=head_norm)
    modules = {
        'encoder': encoder,
        'projector': networks.MLP(encoder.output_size, projector_hidden_size, output_size, projector_depth, **head),
        'predictor': networks.MLP(output_size, predictor_hidden_size, output_size, predictor_depth, **head),
    }
    compute = _to(compute_dtype)

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

    return Network(init, _on_views(apply_once), output_size)


def _on_views(apply_once: Callable) -> Callable:
    """Returns a function that applies a network to `images` in evaluation, and to all views in training."""

    def apply(params, state, inputs, is_training):
        if not is_training:
            return apply_once(params, state, inputs['images'], False)
        outputs = {}
        views = [name for name in inputs if name.startswith('view')]
        for _, group in itertools.groupby(views, lambda name: inputs[name].shape):
            names = list(group)
            of_all, state = apply_once(params, state, torch.cat([inputs[n] for n in names]), True, len(names))
            for output, values in of_all.items():
                chunks = zip(names, values.chunk(len(names)), strict=True)
                outputs |= {f'{output}_{name}': chunk for name, chunk in chunks}
        return outputs, state

    return apply


def make_backbone(
    *,
    encoder_class: str,
    encoder_config: Mapping[str, Any],
    bn_config: Mapping[str, Any],
    norm: str = 'batch_norm',
    in_channels: int = 3,
    compute_dtype: torch.dtype = torch.float32,
) -> Network:
    """Returns the encoder alone, from images `[B, C, H, W]` in 0..1 to embeddings `[B, D]`.

    Port of `EvalExperiment._backbone_fn`; differences: `norm` and `compute_dtype`, as in `make_network`. Its trees
    have the single key 'encoder', so that those of a pre-trained network can be used unchanged.
    """
    encoder = networks.make_encoder(encoder_class, encoder_config, bn_config, in_channels, norm)
    compute = _to(compute_dtype)

    def init(generator):
        params, state = encoder.init(generator)
        return {'encoder': params}, {'encoder': state}

    def apply(params, state, images, is_training, num_views=1):
        images = compute(dataset.normalize_images(images))
        embeddings, encoder_state = encoder.apply(params['encoder'], state['encoder'], images, is_training, num_views)
        return embeddings, {'encoder': encoder_state}

    return Network(init, apply, encoder.output_size)


def make_classifier(in_size: int, num_classes: int) -> Network:
    """Returns a linear layer from embeddings `[B, in_size]` to logits `[B, num_classes]`.

    Port of `EvalExperiment._classif_fn`; differences: none.
    """

    def init(generator):
        return {'classifier': networks.linear_init(generator, in_size, num_classes)}, {}

    def apply(params, state, inputs, is_training, num_views=1):
        del is_training, num_views
        return networks.linear(params['classifier'], inputs), state

    return Network(init, apply, num_classes)


def make_nothing() -> Network:
    """Returns a network without parameters, state or outputs, for update rules without a target network."""
    return Network(lambda generator: ({}, {}), lambda params, state, inputs, is_training: ({}, state), 0)


def _to(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a cast to a narrower dtype; float32 means no cast, so that golden tests keep their float64."""
    return (lambda x: x) if dtype == torch.float32 else (lambda x: x.to(dtype))
