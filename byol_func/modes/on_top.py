"""`--mode=linear_eval` and `--mode=fine_tune`: training on top of a pre-trained encoder."""

import hashlib
from typing import Any, NamedTuple

import optree
from absl import logging
from ml_collections import ConfigDict

from byol_func import console, main_loop
from byol_func.errors import counted
from byol_func.evaluation import features
from byol_func.experiment import Experiment, TrainResult
from byol_func.modes import checkpoints, drawing, inputs, pixels, sizes, sweeps
from byol_func.runtime import prng, transfer
from byol_func.training import loop_config
from byol_func.utils import augmentations, dataset
from byol_func.workdir import summaries
from byol_func.workdir.run import Run

# Number of forward passes in training mode that compute the moving averages of an untrained encoder (decay 0.9).
_CALIBRATION_BATCHES = 50


def linear_eval(run: Run) -> dict[str, Any]:
    """Trains a linear classifier on the frozen encoder of a checkpoint (section 4.1 of the paper)."""
    return _train_from_checkpoint(run, 'linear_eval')


def fine_tune(run: Run) -> dict[str, Any]:
    """Trains the encoder and a classifier together, starting from a checkpoint (section 4.2 of the paper)."""
    return _train_from_checkpoint(run, 'fine_tune')


def _train_from_checkpoint(run: Run, mode: str) -> dict[str, Any]:
    checkpoint = checkpoints.find_checkpoint(run, ('pretrain',))
    train, test = inputs.load_labelled_data(run)
    params, state = checkpoints.restore_encoder(run, train, checkpoint)
    check_protocol(run.config, mode, train)
    train = inputs.labelled_part(run.config, mode, train)
    sizes.check_image_size(run, train)
    sizes.check_encoder_memory(run, train, params, state)
    if not run.config[mode].cache_features:
        sizes.check_memory(run, inputs.make_protocol(run.config, mode, params, state, train), train, mode)
    logging.info('%s: %s', mode, dataset.describe(train))
    outcome = evaluate_encoder(run, mode, train, test, params, state)
    trained = outcome.result.state
    looked = inputs.look_at_embeddings(run.config, test, trained.backbone_params, trained.backbone_state)
    if not run.config[mode].freeze_backbone:
        drawing.draw_encoder(run, test, trained.backbone_params, trained.backbone_state, f'_{mode}')
    length = summaries.length_of(outcome.experiment, train)
    summary = summaries.summarize(run, mode, train, length, outcome.result, outcome.metrics)
    return {**summary, **outcome.chosen, **looked, 'checkpoint': checkpoint.path}


def check_protocol(config: ConfigDict, mode: str, train: dataset.Examples) -> None:
    """Checks, before a long pre-training, that the protocol on top of it can run.

    Raises:
      UserError: the protocol does not fit its training set, or a value is out of its range.
    """
    train = inputs.labelled_part(config, mode, train)
    counts = {train.num_examples}
    has_sweep = bool(sweeps.pairs_of(config, mode))
    if has_sweep or _compares_pixels(config, mode):
        held_out = inputs.held_out(config, train, mode)
        counts |= {int((~held_out).sum())} if has_sweep else set()
    image_shape = train.image_shape
    if config[mode].cache_features:
        image_shape = (inputs.make_backbone(config, train).output_size,)
    for num_examples in counts:
        batch_size = inputs.make_protocol(
            config, mode, {}, {}, train, num_examples=num_examples, image_shape=image_shape
        ).batch_size
        if batch_size < config[mode].batch_size:
            logging.warning(
                'config.%s.batch_size=%d: only %s, so the batch is reduced to %d, and the learning rate in proportion',
                mode,
                config[mode].batch_size,
                counted(num_examples, 'training image'),
                batch_size,
            )


def _compares_pixels(config: ConfigDict, mode: str) -> bool:
    return mode == 'linear_eval' and config.linear_eval.compare_pixels


class Outcome(NamedTuple):
    """The results of training on top of an encoder."""

    metrics: dict[str, float]
    chosen: dict[str, Any]  # {'chosen': the result of the sweep}; empty without a sweep.
    experiment: Experiment
    result: TrainResult


def evaluate_encoder(run: Run, mode: str, train, test, params, state) -> Outcome:
    """Trains on top of an encoder by the protocol `config.MODE`, and measures the baselines that it asks for."""
    eval_config = run.config[mode]
    top1 = f'{summaries.CLASSIFIER_OF_MODE[mode]}_top1'
    split = run.config.dataset.eval_split
    metrics = pixels.baselines(run.config, mode, train, test) if _compares_pixels(run.config, mode) else {}
    if eval_config.compare_untrained:
        initial_params, initial_state = untrained_encoder(run, train)
        scalars = _train_and_test(run, mode, train, test, initial_params, initial_state, untrained=True)[0]
        metrics[f'{split}/untrained_{top1}'] = scalars['top1_accuracy']
    scalars, chosen, experiment, result = _train_and_test(run, mode, train, test, params, state)
    metrics |= {
        f'{split}/{top1}': scalars['top1_accuracy'],
        f'{split}/{top1[:-1]}5': scalars['top5_accuracy'],
        f'{split}/{top1[:-5]}_loss': scalars['eval_loss'],
        **{f'train/{top1[:-5]}_{name}': value for name, value in result.logs.items()},
    }
    return Outcome(metrics, chosen, experiment, result)


def _train_and_test(run: Run, mode: str, train, test, params, state, untrained: bool = False):
    eval_config = run.config[mode]
    backbone = _fingerprint((params, state))
    if eval_config.cache_features:
        train, test = (inputs.embed(run.config, split, params, state) for split in (train, test))
    loop = loop_config.of_run(run, f'{mode}_untrained' if untrained else mode, run.config.compile)
    loop = loop._replace(config={**loop.config, 'backbone': backbone})
    config, found = sweeps.choose(run.config, mode, train, params, state, loop)
    if found:  # A resumed training must use the same pair.
        loop = loop._replace(config={**loop.config, 'chosen': [found['learning_rate'], found['weight_decay']]})
    experiment = inputs.make_protocol(config, mode, params, state, train)
    result = main_loop.train_loop(experiment, train, loop)
    scalars = main_loop.eval_loop(experiment.evaluate, result.state, test, run.config.evaluation.batch_size)
    if not untrained:
        drawing.draw_classifier(run, summaries.CLASSIFIER_OF_MODE[mode], experiment, result.state, test)
    return scalars, {'chosen': found} if found else {}, experiment, result


def _fingerprint(tree: Any) -> str:
    """Returns a digest of an encoder, so that training on top of one encoder never resumes that of another."""
    digest = hashlib.blake2b(digest_size=8)
    for leaf in optree.tree_leaves(tree):
        digest.update(leaf.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def untrained_encoder(run: Run, train: dataset.Examples):
    """Returns parameters and state of the encoder before its first step.

    The moving averages in the state are computed from training images.
    """
    backbone = inputs.make_backbone(run.config, train)
    # The encoder is initialised first in the online network, so these are its actual initial values.
    initial = backbone.init(prng.fold_in(run.config.random_seed, 'online'))
    params, state = transfer.place(initial, run.device)
    batch_size = min(run.config.batch_size, 256, train.num_examples)
    batches = (
        augmentations.center_view(
            dataset.train_batch(train, step, seed=run.config.random_seed, batch_size=batch_size),
            run.config.image_size,
            run.config.eval_crop_fraction,
        )
        for step in range(_CALIBRATION_BATCHES)
    )
    watched = console.watch(batches, 'Calibrating', _CALIBRATION_BATCHES * batch_size, len)
    return params, features.calibrate(backbone, params, state, watched)
