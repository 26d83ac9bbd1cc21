"""Chooses the learning rate and weight decay for training on top of an encoder.

`config.dataset.val_fraction` of each class is held out from the training set. Every pair of
`config.MODE.sweep.learning_rates` and `sweep.weight_decays` is trained on the rest, and the pair with the
best top-1 on the held-out part is chosen. The test set is not used. If only one of the two lists is given,
the protocol's own value is used for the other.
"""

import math
from typing import Any, NamedTuple

import torch
from absl import logging
from ml_collections import ConfigDict

from byol_func import main_loop
from byol_func.errors import UserError, counted
from byol_func.evaluation.heads import grid, stack
from byol_func.modes import inputs
from byol_func.runtime import collectives
from byol_func.training import nonfinite
from byol_func.training.loop_config import LoopConfig
from byol_func.utils import dataset, optimizers


class Choice(NamedTuple):
    """The config to train with on the whole training set, and the result of the sweep, None without a sweep."""

    config: ConfigDict
    found: dict[str, Any] | None


def pairs_of(config: ConfigDict, mode: str) -> list[tuple[float, float]]:
    """Returns every pair (learning rate, weight decay) of a sweep; empty without a sweep.

    Raises:
      UserError: the encoder is frozen and the optimiser is not SGD.
    """
    eval_config = config[mode]
    rates, decays = (tuple(eval_config.sweep[name]) for name in ('learning_rates', 'weight_decays'))
    if not rates and not decays:
        return []
    if eval_config.freeze_backbone and eval_config.optimizer != 'sgd':
        raise UserError(
            f'config.{mode}.optimizer={eval_config.optimizer!r}: expected sgd, with which config.{mode}.sweep can '
            'train all heads together, or an empty sweep'
        )
    own = eval_config.lr_schedule.base_learning_rate, optimizer_config(config, mode).weight_decay
    return grid(rates or own[:1], decays or own[1:])


def choose(config: ConfigDict, mode: str, train: dataset.Examples, params, state, loop: LoopConfig) -> Choice:
    """Trains with every pair of a sweep on one part of the training set and chooses a pair on the rest.

    If the encoder is frozen, the heads are trained together in one pass; otherwise each pair is trained in turn.
    `train` holds images or cached embeddings. `_sweep` is appended to the mode of `loop`.

    Raises:
      UserError: a class has too few images to be divided, or no pair gives finite numbers.
    """
    pairs = pairs_of(config, mode)
    if not pairs:
        return Choice(config, None)
    mask = inputs.held_out(config, train, mode)
    part, rest = (train.take(indices.nonzero()[:, 0]) for indices in (~mask, mask))
    train_all = _together if config[mode].freeze_backbone else _one_by_one
    scores = train_all(config, mode, pairs, part, rest, params, state, loop)
    # Every replica must use the same pair.
    scores = collectives.of_first_replica(torch.tensor(scores, dtype=torch.float64)).tolist()
    best = max(range(len(pairs)), key=scores.__getitem__)
    if scores[best] == -math.inf:
        tried = sorted({rate for rate, _ in pairs})
        raise UserError(
            f'config.{mode}.sweep.learning_rates={tuple(tried)!r}: all of them give numbers that are not finite; '
            'expected smaller ones'
        )
    rate, decay = pairs[best]
    logging.info(
        '%s: learning rate %g and weight decay %g are the best of %s on %s, top-1 %.2f %%',
        loop.mode,
        rate,
        decay,
        counted(len(pairs), 'pair'),
        counted(rest.num_examples, 'held-out image'),
        100 * scores[best],
    )
    rates = {rate for rate, _ in pairs}
    if len(rates) > 2 and rate in (min(rates), max(rates)):
        logging.warning(
            'config.%s.sweep.learning_rates: the best, %g, is at the edge of the range; try a wider one', mode, rate
        )
    shown = [None if score == -math.inf else score for score in scores]  # JSON has no infinity.
    found = dict(
        learning_rate=rate,
        weight_decay=decay,
        held_out_top1=scores[best],
        held_out_images=rest.num_examples,
        sweep=[dict(learning_rate=r, weight_decay=d, held_out_top1=s) for (r, d), s in zip(pairs, shown, strict=True)],
    )
    return Choice(with_pair(config, mode, rate, decay), found)


def optimizer_config(config: ConfigDict, mode: str) -> ConfigDict:
    """Returns the arguments of a protocol's optimiser."""
    return config[mode].optimizer_config[config[mode].optimizer]


def with_pair(config, mode: str, rate: float, decay: float) -> ConfigDict:
    """Returns a copy of the config with the given learning rate and weight decay in the protocol `mode`."""
    config = config.copy_and_resolve_references()
    config[mode].lr_schedule.base_learning_rate = float(rate)
    optimizer_config(config, mode).weight_decay = float(decay)
    return config


def _together(config: ConfigDict, mode: str, pairs, part, rest, params, state, loop: LoopConfig) -> list[float]:
    """Returns the top-1 of every head on the held-out part."""
    one_head = inputs.make_protocol(with_pair(config, mode, 1.0, 0.0), mode, params, state, part)
    settings = optimizer_config(config, mode)
    heads = stack(
        one_head,
        pairs,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        decays=optimizers.FILTERS[settings.weight_decay_filter],
    )
    result = main_loop.train_loop(heads, part, loop._replace(mode=f'{loop.mode}_sweep', keep=1, is_trial=True))

    def evaluate(state, batch):
        hits = heads.evaluate(state, batch)['top1_accuracy']  # [B, H]
        return {f'head {i}': hits[:, i] for i in range(len(pairs))}

    return list(main_loop.eval_loop(evaluate, result.state, rest, config.evaluation.batch_size).values())


def _one_by_one(config: ConfigDict, mode: str, pairs, part, rest, params, state, loop: LoopConfig) -> list[float]:
    """Returns the top-1 of every pair on the held-out part; -inf for a pair whose numbers are not finite."""
    scores = []
    for i, pair in enumerate(pairs):
        experiment = inputs.make_protocol(with_pair(config, mode, *pair), mode, params, state, part)
        trial = loop._replace(mode=f'{loop.mode}_sweep_{i}', keep=1, is_trial=True)
        try:
            result = main_loop.train_loop(experiment, part, trial)
        except nonfinite.Diverged as error:
            logging.warning(
                '%s: learning rate %g and weight decay %g are left out: the numbers of step %d are not finite',
                trial.mode,
                *pair,
                error.step,
            )
            scores.append(-math.inf)
            continue
        scalars = main_loop.eval_loop(experiment.evaluate, result.state, rest, config.evaluation.batch_size)
        scores.append(scalars['top1_accuracy'])
    return scores
