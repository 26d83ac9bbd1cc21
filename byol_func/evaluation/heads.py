"""Trains many linear heads in one pass, one for every pair of learning rate and weight decay.

H heads of K classes form one linear layer of K * H outputs, with class k of head h in column k * H + h.
One matrix product serves all heads, which on a CPU is several times faster than `torch.func.vmap` over
heads, and the innermost dimension of the softmax is long. The heads share no parameters, so the gradient
of the sum of their losses contains the gradient of each loss: every head is trained as if it were alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch.nn import functional as F

from byol_func.eval_experiment import EvalState
from byol_func.experiment import Batch, Experiment, Logs, assemble
from byol_func.runtime import collectives
from byol_func.utils import optimizers
from byol_func.utils.networks import Network


class HeadsOptState(NamedTuple):
    """The momenta, and the hyperparameters of each column as tensors, so that they move with the state."""

    momenta: optimizers.OptState
    learning_rates: torch.Tensor  # [K * H], multiples of the schedule
    weight_decays: torch.Tensor  # [K * H]


def grid(learning_rates: Sequence[float], weight_decays: Sequence[float]) -> list[tuple[float, float]]:
    """Returns every pair (learning rate, weight decay), in the order of the heads."""
    return [(rate, decay) for decay in weight_decays for rate in learning_rates]


def stack(
    experiment: Experiment,
    pairs: Sequence[tuple[float, float]],
    *,
    momentum: float,
    nesterov: bool,
    decays: Callable[[tuple[str, ...], torch.Tensor], bool] | None = None,
) -> Experiment:
    """Returns the linear evaluation `experiment` with its head replaced by one head per pair.

    Data, augmentations, initial classifier and the shape of the schedule are those of `experiment`.
    `predict` returns logits `[B, H, K]`; `evaluate` returns the hits as `top1_accuracy`, bool `[B, H]`.

    Args:
      experiment: the result of `eval_experiment.make` for a frozen backbone and a base learning rate of 1.
      pairs: H pairs of base learning rate and weight decay.
      momentum: the momentum of SGD.
      nesterov: whether the momentum is Nesterov's.
      decays: selects the parameters that decay, as in `optimizers.add_weight_decay`.
    """
    num_heads = len(pairs)
    num_classes = experiment.parts.num_classes
    columns = lambda values: torch.tensor(values).repeat(num_classes)
    trace = optimizers.trace(momentum, nesterov)

    def init() -> EvalState:
        state = experiment.init()
        side_by_side = lambda p: p.repeat_interleave(num_heads, dim=-1)
        params = optree.tree_map(side_by_side, state.classif_params)
        rates, weight_decays = map(columns, zip(*pairs, strict=True))
        opt_state = HeadsOptState(trace.init(params), rates, weight_decays)
        return state._replace(classif_params=params, classif_opt_state=opt_state)

    def predict(state: EvalState, inputs: Batch) -> torch.Tensor:
        return experiment.predict(state, inputs).unflatten(1, (num_classes, num_heads)).mT

    def evaluate(state: EvalState, inputs: Batch) -> Logs:
        return {'top1_accuracy': predict(state, inputs).argmax(dim=2) == inputs['labels'][:, None]}

    update_fn = functools.partial(update_heads, num_heads=num_heads, trace=trace, decays=decays)
    parts = experiment.parts._replace(update_fn=update_fn)
    return experiment._replace(
        init=init, update=assemble(parts).update_fn, predict=predict, evaluate=evaluate, parts=parts
    )


def update_heads(
    state: EvalState,
    global_step: torch.Tensor,
    draws: Any,
    inputs: Batch,
    *,
    postprocess: Callable[[Batch, Any], Batch],
    backbone: Network,
    classifier: Network,
    num_heads: int,
    learning_schedule: Callable[[torch.Tensor], torch.Tensor],
    trace: optimizers.GradientTransformation,
    decays: Callable[[tuple[str, ...], torch.Tensor], bool] | None,
) -> tuple[EvalState, Logs]:
    """Runs `eval_experiment.update_fn` for all heads at once; the encoder sees the batch once.

    A head whose next parameters would not be finite keeps its current ones, and is judged by them; the
    other heads go on.

    Args:
      state: the state before the step. The last dimension of the parameters holds all heads, class by
        class; the optimiser's state is a `HeadsOptState`.
      global_step: index of the step, a 0-d int64 tensor.
      draws: the randomness of the step.
      inputs: the batch.
      postprocess: maps inputs and draws to `images` and `labels`.
      backbone: the encoder, frozen.
      classifier: a linear layer.
      num_heads: H.
      learning_schedule: maps a step to the rate of a head with learning rate 1.
      trace: the momentum transformation.
      decays: selects the parameters that decay; None means all.

    Returns:
      The state after the step, and the lowest loss of all heads as `train_loss`.
    """
    inputs = postprocess(inputs, draws)
    embeddings, _ = backbone.apply(state.backbone_params, state.backbone_state, inputs['images'], is_training=False)

    def losses(params):
        logits, _ = classifier.apply(params, {}, embeddings, is_training=True)
        log_probabilities = F.log_softmax(logits.unflatten(1, (-1, num_heads)), dim=1)
        labels = inputs['labels'][:, None, None].expand(-1, 1, num_heads)
        by_head = -log_probabilities.gather(1, labels)[:, 0].mean(dim=0)
        return by_head.sum(), by_head

    grads, by_head = torch.func.grad(losses, has_aux=True)(state.classif_params)
    grads = collectives.pmean(grads)
    opt_state = state.classif_opt_state
    rates = learning_schedule(global_step) * opt_state.learning_rates
    decay = lambda path, g, p: g + opt_state.weight_decays * p if decays is None or decays(path, p) else g
    grads = optree.tree_map_with_path(decay, grads, state.classif_params)
    updates, momenta = trace.update(grads, opt_state.momenta, state.classif_params)
    params = optree.tree_map(lambda p, u: p - rates * u, state.classif_params, updates)

    sound = _finite_columns(params, num_heads)
    keep = lambda new, old: torch.where(sound, new, old)
    new_state = state._replace(
        classif_params=optree.tree_map(keep, params, state.classif_params),
        classif_opt_state=opt_state._replace(momenta=optree.tree_map(keep, momenta, opt_state.momenta)),
    )
    least = by_head.nan_to_num(nan=torch.inf).min()
    return new_state, collectives.pmean({'train_loss': least})


def _finite_columns(params: Any, num_heads: int) -> torch.Tensor:
    """Returns whether all parameters of a column's head are finite, bool `[K * H]`."""
    # A non-finite parameter makes the sum of its column non-finite; a very large one may do so, too.
    sums = sum(leaf.reshape(-1, leaf.shape[-1]).sum(dim=0) for leaf in optree.tree_leaves(params))
    sound = sums.unflatten(0, (-1, num_heads)).sum(dim=0).isfinite()
    return sound.repeat(len(sums) // num_heads)
