"""Arithmetic on all leaves of a tree at once: one kernel per operation instead of one per leaf.

`fused_map(lambda m, u: 0.9 * m + u, mu, updates)` computes the same numbers as `optree.tree_map`, but the lambda
sees all leaves of a tree as one operand, whose operators are PyTorch's functions on lists of tensors.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import optree
import torch

from byol_func.runtime.torch_internals import foreach, is_batched


def _binary(of_list: Callable, single: Callable) -> Callable:
    def operate(self: 'Leaves', other: Any) -> 'Leaves':
        other = other.leaves if isinstance(other, Leaves) else other
        if not _in_vmap([*self.leaves, *(other if isinstance(other, list) else [other])]):
            return Leaves(of_list(self.leaves, other))
        others = other if isinstance(other, list) else [other] * len(self.leaves)
        return Leaves([single(x, y) for x, y in zip(self.leaves, others, strict=True)])

    return operate


def _unary(of_list: Callable, single: Callable) -> Callable:
    def operate(self: 'Leaves') -> 'Leaves':
        return Leaves([single(x) for x in self.leaves] if _in_vmap(self.leaves) else of_list(self.leaves))

    return operate


def _in_vmap(operands: Sequence[Any]) -> bool:
    """Returns whether `torch.func.vmap` batches an operand; the `_foreach` functions have no batching rules."""
    return any(is_batched(x) for x in operands if isinstance(x, torch.Tensor))


class Leaves:
    """The leaves of a tree as one operand of `+ - * /`; the other is a number, a 0-d tensor or another `Leaves`.

    Under `torch.func.vmap` each leaf is computed separately.
    """

    def __init__(self, leaves: Iterable[torch.Tensor]):
        self.leaves = list(leaves)

    __add__ = __radd__ = _binary(foreach.add, operator.add)
    __sub__ = _binary(foreach.sub, operator.sub)
    __mul__ = __rmul__ = _binary(foreach.mul, operator.mul)
    __truediv__ = _binary(foreach.div, operator.truediv)
    sqrt = _unary(foreach.sqrt, torch.sqrt)
    sign = _unary(foreach.sign, torch.sign)

    def __rsub__(self, other):
        return self * -1 + other

    def __rpow__(self, base):
        if _in_vmap(self.leaves):
            return Leaves([base**leaf for leaf in self.leaves])
        return Leaves(foreach.pow(base, self.leaves))

    def to(self, dtype: torch.dtype) -> 'Leaves':
        """Returns all leaves converted to `dtype`."""
        return Leaves([leaf.to(dtype) for leaf in self.leaves])

    def norms(self) -> torch.Tensor:
        """Returns the Euclidean norm of every leaf, `[number of leaves]`."""
        norms = _unary(foreach.norm, torch.linalg.vector_norm)
        return torch.stack(norms(self).leaves)

    def times_each(self, factors: torch.Tensor) -> 'Leaves':
        """Multiplies every leaf by its own factor; `factors` is `[number of leaves]`."""
        return self * Leaves(list(factors.unbind()))


def fused_map(fn: Callable[..., Leaves], *trees: Any) -> Any:
    """Maps a function of `Leaves` over trees, as `optree.tree_map` maps a function of tensors.

    The trees must have the same structure and float leaves on one device. If the first tree has no leaves, it is
    returned as it is and the others are ignored.
    """
    spec = optree.tree_structure(trees[0])
    if not spec.num_leaves:
        return trees[0]
    operands = [Leaves(spec.flatten_up_to(tree)) for tree in trees]
    return optree.tree_unflatten(spec, fn(*operands).leaves)
