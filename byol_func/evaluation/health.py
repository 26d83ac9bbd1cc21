"""Measures whether a training is healthy: signs of a collapse, and the norms of every module.

BYOL has no term that keeps its embeddings apart: a network that maps every image to the same vector
has a loss of 0. The loss alone therefore cannot tell success from collapse; these numbers can.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from byol_func.experiment import Batch, Experiment, update_and_gradients
from byol_func.runtime import collectives
from byol_func.runtime.fused import fused_map
from byol_func.utils import helpers
from byol_func.utils.networks import Params


def projection_std(projections: torch.Tensor) -> torch.Tensor:
    """Returns the standard deviation of l2-normalised vectors over the batch, averaged over the dimensions.

    It is 1/sqrt(D) if the directions are spread evenly and 0 if they are all the same (section 4.1 of
    SimSiam, arXiv 2011.10566).

    Args:
      projections: `[B, D]`.

    Returns:
      0-d, in 0..1/sqrt(D).
    """
    return helpers.l2_normalize(projections, axis=-1).std(dim=0, correction=0).mean()


def effective_rank(embeddings: torch.Tensor) -> torch.Tensor:
    """Computes exp(-sum_k p_k log p_k) with p_k = sigma_k / sum_j sigma_j, where sigma are the singular values.

    This is a real-valued count of the directions that the embeddings use: min(B, D) for orthogonal
    vectors of equal length, r for r equal singular values, 1 for vectors on one line. See Roy and
    Vetterli, "The effective rank" (EUSIPCO 2007). RankMe (arXiv 2210.02885) uses it to judge the
    quality of a representation; as in both, the mean is not subtracted.

    Args:
      embeddings: `[B, D]`.

    Returns:
      0-d, in 1..min(B, D); 1 if all embeddings are zero, nan if an embedding is not finite.
    """
    finite = embeddings.isfinite().all()
    # svdvals raises an error for non-finite input.
    sigma = torch.linalg.svdvals(torch.where(finite, embeddings, 0.0))
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.where(finite, torch.special.entr(p).sum().exp(), torch.nan)


def cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns the mean cosine between the rows of two tensors `[B, D]`, 0-d in -1..1."""
    return 1 - helpers.regression_loss(x, y).mean() / 2


def module_norms(tree: Params) -> dict[str, torch.Tensor]:
    """Computes the Euclidean norm of every module of a tree of the parameters' structure, and of the whole tree.

    The modules are the encoder's children (such as `encoder/block_group_0`), the projector, the
    predictor and the classifier.

    Returns:
      A dict of names to 0-d tensors; 'all' is the norm of the whole tree.
    """
    squares: dict[str, torch.Tensor] = {}

    def add(name, node):
        if isinstance(node, Mapping):
            for child in node.values():
                add(name, child)
        else:
            squares[name] = squares.get(name, 0.0) + node.detach().float().square().sum()

    for name, module in tree.items():
        if name == 'encoder':
            for child, node in module.items():
                add(f'encoder/{child}', node)
        else:
            add(name, module)
    return {name: s.sqrt() for name, s in {**squares, 'all': functools.reduce(torch.add, squares.values())}.items()}


def panel(
    experiment: Experiment, state: Any, global_step: torch.Tensor, draws: Any, inputs: Batch
) -> dict[str, torch.Tensor]:
    """Computes the health measures of one state on one batch, without changing the state.

    The step is recomputed apart from the training. Given the state before a step and the index, draws and
    batch of that step, the norms are exactly those of the step. For a variant of BYOL, measures that it
    does not define are left out.

    Args:
      experiment: the result of `byol_experiment.make`.
      state: its state.
      global_step: index of the step, a 0-d int64 tensor.
      draws: the randomness of the step.
      inputs: the batch of the step, or this replica's share of it.

    Returns:
      0-d tensors by name:
      `projection_std` of the online projections of view 1; `projection_spread`, the same as a
      fraction of 1/sqrt(D), in 0..1; `effective_rank` of the embeddings of view 1 and
      `effective_rank_limit`, its upper bound min(B, D); `cosine` between the online predictions
      and the target projections of the other view, averaged over both directions, if there is a target
      network; `tau`, `learning_rate` and `loss` of the step; `grad_norm/MODULE`, `param_norm/MODULE` and
      `update_norm/MODULE` with the names of `module_norms`. On several replicas, the measures of
      activations are means over the replicas' shares.
    """
    new_state, logs, gradients = update_and_gradients(experiment, state, global_step, draws, inputs)
    params = state.online_params
    updates = fused_map(lambda new, old: new - old, new_state.online_params, params)
    trees = {'param': params, 'update': updates} | ({'grad': gradients[0]} if gradients else {})
    assert experiment.outputs is not None
    with torch.no_grad():
        online, target = experiment.outputs(state, draws, inputs)
        activations = collectives.pmean(_activations(online, target))
    embedding = online['embedding_view1']
    limit = torch.full((), min(embedding.shape), dtype=embedding.dtype, device=embedding.device)
    return {
        **activations,
        'effective_rank_limit': limit,
        **{name: logs[name] for name in ('loss', 'tau', 'learning_rate') if name in logs},
        **{f'{kind}_norm/{name}': value for kind, tree in trees.items() for name, value in module_norms(tree).items()},
    }


def _activations(online: Batch, target: Batch) -> dict[str, torch.Tensor]:
    projection = online['projection_view1']
    std = projection_std(projection)
    found = {
        'projection_std': std,
        'projection_spread': std * math.sqrt(projection.shape[1]),
        'effective_rank': effective_rank(online['embedding_view1']),
    }
    if 'projection_view2' in target and 'prediction_view1' in online:
        there = cosine(online['prediction_view1'], target['projection_view2'])
        back = cosine(online['prediction_view2'], target['projection_view1'])
        found['cosine'] = (there + back) / 2
    return found


class Sign(NamedTuple):
    """A measure that shows a collapse: its name, its value and the threshold that it crossed."""

    measure: str
    value: float
    threshold: float


# A measure below its first threshold is a collapse; a run has recovered when every measure is above its second one.
# Healthy runs stay far away from both (see tests/test_health.py).
THRESHOLDS = {'projection_spread': (0.1, 0.2), 'effective_rank': (1.1, 1.5)}


def collapse_sign(scalars: Mapping[str, float], already: bool = False) -> Sign | None:
    """Returns the first measure of a panel that shows a collapse, or None if the run is healthy.

    Args:
      scalars: the result of `panel`, as numbers.
      already: whether the previous panel showed a collapse. If so, the higher threshold applies: this
        hysteresis keeps a value near the threshold from reporting collapses and recoveries in turn.
    """
    for name, thresholds in THRESHOLDS.items():
        if scalars[name] < thresholds[already]:
            return Sign(name, scalars[name], thresholds[already])
    return None
