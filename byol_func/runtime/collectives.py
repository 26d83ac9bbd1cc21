"""Means over replicas and their batches: `jax.lax.pmean` and `all_gather` as differentiable functions."""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, cast

import optree
import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from byol_func.runtime.torch_internals import functional_collectives as funcol

# Replica 0 may decode a large data set, or draw, while the others wait for it: a day of half hours.
_PATIENCE = 48 * default_pg_timeout


def num_replicas() -> int:
    """Number of processes in the default group, 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def replica_index() -> int:
    """Rank of this process in the default group, 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def initialize(device: torch.device) -> None:
    """Makes the run's GPU the current one, and joins the process group that `torchrun` describes, if it does.

    Events, CUDA graphs and pinned memory belong to the *current* GPU, wherever the tensors are: left at
    the first one, an event there would say that copies from another are done as soon as they are asked for.
    """
    replicated = 'WORLD_SIZE' in os.environ
    if device.type == 'cuda':
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']) if replicated else device.index or 0)
    if replicated and not dist.is_initialized():
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        _host_group()


@contextlib.contextmanager
def first_replica_first() -> Iterator[None]:
    """Lets replica 0 through before the others: it downloads and decodes, they find the files."""
    if replica_index() > 0:
        barrier()
    try:
        yield
    finally:
        if replica_index() == 0:
            barrier()


class _PMean(torch.autograd.Function):
    """Mean over the group. It is linear and symmetric, so its transpose is itself.

    The functional all_reduce of `torch.distributed` has no derivative under `torch.func.grad`; a
    Function with `setup_context` has one, eager and compiled.
    """

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        total = funcol.all_reduce(x.contiguous(), 'sum', cast(dist.ProcessGroup, dist.group.WORLD))
        return funcol.wait_tensor(total) / dist.get_world_size()

    @staticmethod
    def setup_context(ctx, inputs, output):
        del ctx, inputs, output  # Linear: nothing to remember.

    @staticmethod
    def backward(ctx, grad):
        return _PMean.apply(grad)


def pmean(tree: Any) -> Any:
    """Means every tensor of a tree over all replicas; differentiable; the identity without a group.

    Equation: y = (1/R) sum_r x_r on every replica. The derivative of the *sum over replicas* of
    their losses is meant, as in JAX: the cotangents are averaged in the same way.

    All tensors of one dtype travel as one: what a collective costs is its start, and a network has
    hundreds of tensors.

    Args:
      tree: a tensor or a tree of floating-point tensors, the same shapes on every replica.

    Returns:
      The tree of means.
    """
    if num_replicas() == 1:
        return tree
    leaves, spec = optree.tree_flatten(tree)
    means = list(leaves)
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
        places = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
        block = _PMean.apply(torch.cat([leaves[i].flatten() for i in places]))
        parts = block.split([leaves[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            means[i] = part.view(leaves[i].shape)
    return optree.tree_unflatten(spec, means)


class _AllGather(torch.autograd.Function):
    """The tensors of all replicas, one after the other. Its transpose sums the cotangents and takes the own part."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return funcol.wait_tensor(
            funcol.all_gather_tensor(x.contiguous(), 0, cast(dist.ProcessGroup, dist.group.WORLD))
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        del ctx, inputs, output  # Linear: nothing to remember.

    @staticmethod
    def backward(ctx, grad):
        return _OwnSum.apply(grad)


class _OwnSum(torch.autograd.Function):
    """The transpose of `_AllGather`: this replica's part of the sum over replicas."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        total = funcol.wait_tensor(funcol.all_reduce(x.contiguous(), 'sum', cast(dist.ProcessGroup, dist.group.WORLD)))
        return total.chunk(dist.get_world_size())[dist.get_rank()].clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        del ctx, inputs, output

    @staticmethod
    def backward(ctx, grad):
        return _AllGather.apply(grad)


def all_gather(x: torch.Tensor) -> torch.Tensor:
    """The batch of all replicas, `[R B, ...]` in the order of their ranks, from this one's share `[B, ...]`.

    For losses that couple the examples of a batch. Every replica then computes the loss of the whole batch, and
    the mean over replicas of its gradients (`pmean`) is the gradient that one process would have. Differentiable;
    the identity without a group.

    Args:
      x: the same shape on every replica.
    """
    return x if num_replicas() == 1 else _AllGather.apply(x)


def of_first_replica(tree: Any) -> Any:
    """Every tensor of a tree as replica 0 has it, on all; they must have the same shapes everywhere."""
    if num_replicas() == 1:
        return tree

    def copy(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(x, 0, group=_host_group() if x.device.type == 'cpu' else None)
        return x

    return optree.tree_map(copy, tree)


def any_replica(flag: bool) -> bool:
    """Whether the flag is set on any replica; all must call it, and all get the same answer.

    It travels between the hosts and does not wait for the devices.
    """
    if num_replicas() == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=_host_group())
    return bool(flags.item())


@functools.cache
def _host_group() -> dist.ProcessGroup:
    """All processes, for what the hosts tell each other; made by all of them at once.

    Here one may wait long for another, where devices that wait for each other have hung. Whoever dies
    is noticed at once in any case.
    """
    return cast(dist.ProcessGroup, dist.new_group(backend='gloo', timeout=_PATIENCE))


def barrier() -> None:
    """Waits until all replicas are here; nothing without a group."""
    if num_replicas() > 1:
        dist.barrier(group=_host_group())
