"""Arithmetic on all leaves of a tree at once: one kernel per operation in place of one per leaf.

`fused_map(lambda m, u: 0.9 * m + u, mu, updates)` is `optree.tree_map` with the same numbers; the
lambda sees every leaf of a tree as one operand, whose operators are PyTorch's functions on lists of tensors.
"""

from collections.abc import Callable, Iterable
from typing import Any

import optree
import torch

from byol_func.runtime.torch_internals import foreach


class Leaves:
    """The leaves of a tree as one operand of `+ - * /`, with numbers, 0-d tensors or its like."""

    def __init__(self, leaves: Iterable[torch.Tensor]):
        self.leaves = list(leaves)

    def __add__(self, other):
        return Leaves(foreach.add(self.leaves, _operand(other)))

    def __sub__(self, other):
        return Leaves(foreach.sub(self.leaves, _operand(other)))

    def __mul__(self, other):
        return Leaves(foreach.mul(self.leaves, _operand(other)))

    def __truediv__(self, other):
        return Leaves(foreach.div(self.leaves, _operand(other)))

    def __rsub__(self, other):
        return self * -1 + other

    def __rpow__(self, base):
        return Leaves(foreach.pow(base, self.leaves))

    __radd__, __rmul__ = __add__, __mul__

    def to(self, dtype: torch.dtype) -> 'Leaves':
        """All leaves in another dtype."""
        return Leaves([leaf.to(dtype) for leaf in self.leaves])

    def sqrt(self) -> 'Leaves':
        """The square root of every element."""
        return Leaves(foreach.sqrt(self.leaves))

    def norms(self) -> torch.Tensor:
        """The Euclidean norm of every leaf, `[number of leaves]`."""
        return torch.stack(foreach.norm(self.leaves))

    def times_each(self, factors: torch.Tensor) -> 'Leaves':
        """Every leaf times its own factor of `[number of leaves]`."""
        each: Any = factors.unbind()  # PyTorch's stub knows numbers only; tensors of one element do as well.
        return Leaves(foreach.mul(self.leaves, each))


def _operand(other: Any) -> Any:
    return other.leaves if isinstance(other, Leaves) else other


def fused_map(fn: Callable[..., Leaves], *trees: Any) -> Any:
    """`optree.tree_map` for functions of `Leaves`; trees of one structure, float leaves, one device."""
    spec = optree.tree_structure(trees[0])
    operands = [Leaves(spec.flatten_up_to(tree)) for tree in trees]
    if not spec.num_leaves:
        return trees[0]
    return optree.tree_unflatten(spec, fn(*operands).leaves)
