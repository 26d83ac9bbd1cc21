"""Gradient transformations in the style of optax, the building blocks of `optimizers`.

An update is a tree that is *added* to the parameters; states are NamedTuples of trees.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optree
import torch

from byol_func.errors import UserError
from byol_func.runtime.fused import fused_map

Params = Any
Updates = Any
OptState = Any
# Takes the path of dict keys and the parameter, and returns whether the rule applies to it.
FilterFn = Callable[[tuple[str, ...], torch.Tensor], bool]


class GradientTransformation(NamedTuple):
    """A pair of pure functions, `init(params)` and `update(updates, state, params)`."""

    init: Callable[[Params], OptState]
    update: Callable[[Updates, OptState, Params], tuple[Updates, OptState]]


class EmptyState(NamedTuple):
    """An empty state."""


def scale(factor: float | torch.Tensor) -> GradientTransformation:
    """Multiplies every update by `factor`, as `optax.scale`."""

    def update(updates, state, params):
        del params
        return fused_map(lambda u: factor * u, updates), state

    return GradientTransformation(lambda params: EmptyState(), update)


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Applies transformations one after the other, as `optax.chain`."""

    def init(params):
        return tuple(t.init(params) for t in transformations)

    def update(updates, state, params):
        new_state = []
        for transformation, s in zip(transformations, state, strict=True):
            updates, s = transformation.update(updates, s, params)
            new_state.append(s)
        return updates, tuple(new_state)

    return GradientTransformation(init, update)


class TraceState(NamedTuple):
    """The momentum `trace`, a tree like the parameters."""

    trace: Any


def trace(decay: float, nesterov: bool = False) -> GradientTransformation:
    """Applies momentum, t <- u + decay t, as `optax.trace`.

    The update is t, or u + decay t with the new t for Nesterov momentum.
    """

    def init(params):
        return TraceState(trace=optree.tree_map(torch.zeros_like, params))

    def update(updates, state, params):
        del params
        step = lambda u, t: u + decay * t
        new_trace = fused_map(step, updates, state.trace)
        updates = fused_map(step, updates, new_trace) if nesterov else new_trace
        return updates, TraceState(trace=new_trace)

    return GradientTransformation(init, update)


class ScaleByAdamState(NamedTuple):
    """The step `count`, int32 [], and the first and second moments `mu` and `nu`, trees like the parameters."""

    count: torch.Tensor  # type: ignore[assignment]  # Named as in optax; it hides tuple.count.
    mu: Any
    nu: Any


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> GradientTransformation:
    """Rescales updates to Adam's m_hat / (sqrt(v_hat) + eps) (arXiv 1412.6980), as `optax.scale_by_adam`."""

    def init(params):
        device = optree.tree_leaves(params)[0].device
        zeros = lambda: optree.tree_map(torch.zeros_like, params)
        count = torch.zeros((), dtype=torch.int32, device=device)
        return ScaleByAdamState(count=count, mu=zeros(), nu=zeros())

    def update(updates, state, params):
        del params
        count = state.count + 1
        mu = fused_map(lambda m, u: b1 * m + (1 - b1) * u, state.mu, updates)
        nu = fused_map(lambda v, u: b2 * v + (1 - b2) * u * u, state.nu, updates)
        mu_scale, nu_scale = 1 - torch.pow(b1, count), 1 - torch.pow(b2, count)
        direction = lambda m, v: (m / mu_scale) / ((v / nu_scale).sqrt() + eps)
        return fused_map(direction, mu, nu), ScaleByAdamState(count, mu, nu)

    return GradientTransformation(init, update)


class ScaleByLionState(NamedTuple):
    """The momentum `mu`, a tree like the parameters."""

    mu: Any


def scale_by_lion(b1: float = 0.9, b2: float = 0.99) -> GradientTransformation:
    """Rescales updates to sign(b1 m + (1 - b1) u), as `optax.scale_by_lion` (arXiv 2302.06675).

    The momentum then becomes m <- b2 m + (1 - b2) u.
    """

    def init(params):
        return ScaleByLionState(mu=optree.tree_map(torch.zeros_like, params))

    def update(updates, state, params):
        del params
        signs = fused_map(lambda m, u: (b1 * m + (1 - b1) * u).sign(), state.mu, updates)
        return signs, ScaleByLionState(fused_map(lambda m, u: b2 * m + (1 - b2) * u, state.mu, updates))

    return GradientTransformation(init, update)


def orthogonalized(matrix: torch.Tensor, num_iterations: int = 5) -> torch.Tensor:
    """Approximates U V^T of a matrix U S V^T: Newton-Schulz iterations bring every singular value to 0.7..1.2.

    Args:
      matrix: `[m, n]`.
      num_iterations: number of iterations of the quintic x <- a x + (b x x^T + c (x x^T)^2) x, with Muon's
        coefficients.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(num_iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def scale_by_muon(momentum: float = 0.95, nesterov: bool = True, num_iterations: int = 5) -> GradientTransformation:
    """Applies momentum, orthogonalises every matrix and scales it to the root mean square of Adam's updates, 0.2.

    Kernels `[out, in, k, k]` are treated as matrices `[out, in k k]`. The scale 0.2 sqrt(max(m, n)) is that of
    arXiv 2502.16982, which makes AdamW's learning rate and weight decay suitable; `torch.optim.Muon` calls it
    'match_rms_adamw'.

    Args:
      momentum: decay of the momentum t <- momentum t + (1 - momentum) u.
      nesterov: whether to orthogonalise (1 - momentum) u + momentum t instead of t.
      num_iterations: number of iterations of `orthogonalized`.
    """

    def direction(u):
        matrix = u.flatten(1)
        return (orthogonalized(matrix, num_iterations) * (0.2 * max(matrix.shape) ** 0.5)).view(u.shape)

    def init(params):
        return TraceState(trace=optree.tree_map(torch.zeros_like, params))

    def update(updates, state, params):
        del params
        blend = lambda t, u: momentum * t + (1 - momentum) * u
        new_trace = fused_map(blend, state.trace, updates)
        updates = fused_map(blend, new_trace, updates) if nesterov else new_trace
        return optree.tree_map(direction, updates), TraceState(trace=new_trace)

    return GradientTransformation(init, update)


def partition(
    transformations: Mapping[str, GradientTransformation], label: Callable[[tuple[str, ...], torch.Tensor], str]
) -> GradientTransformation:
    """Applies a different transformation to each group of parameters, as `optax.multi_transform`.

    Args:
      transformations: group -> transformation; each receives a tree that contains only the group's parameters,
        under their original paths.
      label: a function from the path of dict keys and the parameter to the name of its group.

    Raises:
      KeyError: `init` or `update` finds a parameter of an unknown group.
    """

    def split(params, *trees):
        """Splits the trees into one set of trees per group, by the labels of the parameters."""
        groups: dict[str, list[dict]] = {name: [{} for _ in (params, *trees)] for name in transformations}
        paths, leaves, spec = optree.tree_flatten_with_path(params)
        for path, *values in zip(paths, leaves, *(spec.flatten_up_to(tree) for tree in trees), strict=True):
            for tree, value in zip(groups[label(path, values[0])], values, strict=True):
                for key in path[:-1]:
                    tree = tree.setdefault(key, {})
                tree[path[-1]] = value
        return groups

    def init(params):
        return {name: transformations[name].init(group) for name, (group,) in split(params).items() if group}

    def update(updates, state, params):
        merged, new_state = {}, {}
        for name, (of_params, of_updates) in split(params, updates).items():
            if not of_params:  # A network without a predictor, for example.
                continue
            changed, new_state[name] = transformations[name].update(of_updates, state[name], of_params)
            merged |= dict(zip(optree.tree_paths(changed), optree.tree_leaves(changed), strict=True))
        paths, _, spec = optree.tree_flatten_with_path(params)
        return optree.tree_unflatten(spec, [merged[path] for path in paths]), new_state

    return GradientTransformation(init, update)


def multi_steps(num_micro_batches: int, share: int = 0) -> Callable:
    """Returns a replacement of `torch.func.grad` for a BYOL loss that accumulates the gradients of micro-batches.

    The micro-batches are processed one after the other, so that only the activations of one are in memory at a time.
    The gradients are averaged over them, and each passes the network states (moving averages) on to the next. The
    caller then takes one optimiser step and one step of the target network, like `optax.MultiSteps` within a single
    step. The result equals that of the whole batch if the loss is a mean over examples; batch statistics are computed
    per micro-batch.

    Args:
      num_micro_batches: the number of parts into which this replica's batch is split; 1 returns `torch.func.grad`.
      share: the number of examples in this replica's batch. A smaller batch, such as that of the health panel, is then
        split into fewer micro-batches of the same size. 0: every batch is split into `num_micro_batches`.

    Returns:
      A function with the signature of `torch.func.grad`, whose result raises a UserError if the batch cannot be
      divided evenly.
    """
    if num_micro_batches == 1:
        return torch.func.grad

    def grad(loss_fn, has_aux=True):
        def accumulated(online_params, target_params, online_state, target_state, draws, inputs):
            size, count = len(optree.tree_leaves(inputs)[0]), num_micro_batches
            if size < share:
                count = max(size * num_micro_batches // share, 1)
            if size % count:
                raise UserError(
                    f'num_micro_batches={num_micro_batches}: expected a divisor of {size}, the examples of a replica'
                )
            total = None
            for i in range(count):
                # Take every k-th example, so that the micro-batches are the same for any number of replicas.
                part = optree.tree_map(lambda x, i=i: x[i::count], (draws, inputs))
                grads, (states, logs) = torch.func.grad(loss_fn, has_aux=has_aux)(
                    online_params, target_params, online_state, target_state, *part
                )
                online_state, target_state = states['online_state'], states['target_state']
                found = (grads, logs)
                total = found if total is None else fused_map(lambda x, y: x + y, total, found)
            grads, logs = fused_map(lambda x: x / count, total)
            return grads, (dict(online_state=online_state, target_state=target_state), logs)

        return accumulated

    return grad
