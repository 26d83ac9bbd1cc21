"""Communicates between replicas: `jax.lax.pmean` and `all_gather` as differentiable functions."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import optree
import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from byol_func.runtime import launchers, rendezvous
from byol_func.runtime.torch_internals import functional_collectives as funcol

# Replica 0 may decode a large data set, or plot, while the others wait for it, so this is a day: 48 times
# PyTorch's default of 30 minutes.
_PATIENCE = 48 * default_pg_timeout


def num_replicas() -> int:
    """Returns the number of processes in the default group, 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def replica_index() -> int:
    """Returns the rank of this process in the default group, 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def initialize(device: torch.device) -> str:
    """Makes the run's GPU the current one and, if a launcher started several processes, joins their group.

    Events, CUDA graphs and pinned memory belong to the *current* GPU, regardless of where the tensors are. If
    the first GPU stayed current, an event on it would report copies from another GPU as finished right away.

    Returns:
      A text such as 'replica 0 of 2, started by torchrun'; '' without a group.

    Raises:
      UserError: the other processes cannot be found.
    """
    world = launchers.find()
    if device.type == 'cuda':
        torch.cuda.set_device(world.local_rank if world else device.index or 0)
    if world is None:
        return ''
    if not dist.is_initialized():
        rendezvous.wait_for_all(world)
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=rendezvous.store(world), rank=world.rank, world_size=world.size)
        _host_group()
    return f'replica {world.rank} of {world.size}, started by {world.launcher}'


def leave() -> None:
    """Leaves the group at the end of the work, because leftover communication threads may abort the process."""
    if num_replicas() > 1:
        _host_group.cache_clear()
        dist.destroy_process_group()


def hang_up() -> None:
    """Closes the connections between hosts, so that others that wait for this replica stop waiting."""
    if not dist.is_initialized() or dist.get_backend() == 'gloo':
        leave()
    else:  # Groups of GPUs wait for their kernels, which would wait for a lost replica.
        dist.destroy_process_group(_host_group())


@contextlib.contextmanager
def first_replica_first() -> Iterator[None]:
    """Runs the body on replica 0 first: it downloads and decodes, and the others then find the files."""
    if replica_index() > 0:
        barrier()
    try:
        yield
    finally:
        if replica_index() == 0:
            barrier()


class _PMean(torch.autograd.Function):
    """The mean over the group, which is linear and symmetric and therefore its own transpose.

    The functional all_reduce of `torch.distributed` has no derivative under `torch.func.grad`; a Function with
    `setup_context` has one, both eagerly and compiled.
    """

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        total = funcol.all_reduce(x.contiguous(), 'sum', cast(dist.ProcessGroup, dist.group.WORLD))
        return funcol.wait_tensor(total) / dist.get_world_size()

    @staticmethod
    def setup_context(ctx, inputs, output):
        del ctx, inputs, output  # A linear function needs to save nothing.

    @staticmethod
    def backward(ctx, grad):
        return _PMean.apply(grad)


def pmean(tree: Any) -> Any:
    """Averages every tensor of a tree over all replicas; differentiable; the identity without a group.

    Equation: y = (1/R) sum_r x_r on every replica. As in JAX, the derivative is that of the *sum over replicas*
    of their losses: the cotangents are averaged in the same way.

    All tensors of one dtype are sent as one, because the cost of a collective is mostly its launch and a network
    has hundreds of tensors. A traced step may split a large mean (`buckets.split_means`).

    Args:
      tree: a tensor or a tree of floating-point tensors, with the same shapes on every replica.

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


_all_gather = getattr(funcol, 'all_gather_single', None) or funcol.all_gather_tensor  # Its name before torch 2.14.


class _AllGather(torch.autograd.Function):
    """The concatenated tensors of all replicas; the transpose sums the cotangents and keeps this replica's part."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return funcol.wait_tensor(_all_gather(x.contiguous(), 0, cast(dist.ProcessGroup, dist.group.WORLD)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        del ctx, inputs, output  # A linear function needs to save nothing.

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
    """Concatenates the shares `[B, ...]` of all replicas to the whole batch `[R B, ...]`, in the order of ranks.

    Losses that couple the examples of a batch use it. Every replica then computes the loss of the whole batch, and
    the mean of the gradients over replicas (`pmean`) is the gradient that a single process would compute.
    Differentiable; the identity without a group.

    Args:
      x: this replica's share, of the same shape on every replica.
    """
    return x if num_replicas() == 1 else _AllGather.apply(x)


def of_first_replica(tree: Any) -> Any:
    """Returns replica 0's values of a tree on every replica; the shapes must be the same everywhere."""
    if num_replicas() == 1:
        return tree

    def copy(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(x, 0, group=_host_group() if x.device.type == 'cpu' else None)
        return x

    return optree.tree_map(copy, tree)


def largest(numbers: Sequence[int]) -> list[int]:
    """Returns the largest of each number over all replicas; all must call it, with equally many integers.

    They are exchanged between the hosts, without waiting for the devices.
    """
    found = torch.tensor(numbers, dtype=torch.int64)
    if num_replicas() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=_host_group())
    return found.tolist()


@functools.cache
def _host_group() -> Any:
    """Returns a gloo group of all processes for messages between hosts; all processes must create it together.

    Its timeout is long, because a host may rightly wait long for another one, whereas devices that wait that long
    have hung. A process that dies is noticed at once in either case.
    """
    return cast(dist.ProcessGroup, dist.new_group(backend='gloo', timeout=_PATIENCE))


def gather_numbers(numbers: Sequence[int]) -> list[list[int]]:
    """Returns the numbers of all replicas, in the order of their ranks.

    Every replica must pass equally many numbers, each of which must fit in an int64.
    """
    own = torch.tensor(numbers, dtype=torch.int64)
    if num_replicas() == 1:
        return [own.tolist()]
    gathered = [torch.empty_like(own) for _ in range(num_replicas())]
    dist.all_gather(gathered, own, group=_host_group())
    return [row.tolist() for row in gathered]


def text_of_first_replica(text: str) -> str:
    """Returns replica 0's text, of at most 4096 bytes, on every replica."""
    if num_replicas() == 1:
        return text
    block = torch.zeros(4096, dtype=torch.uint8)
    data = torch.frombuffer(bytearray(text.encode('utf-8', 'surrogateescape')) or bytearray(1), dtype=torch.uint8)
    block[: len(data)] = data
    dist.broadcast(block, 0, group=_host_group())
    return bytes(block.tolist()).rstrip(b'\0').decode('utf-8', 'surrogateescape')


def barrier() -> None:
    """Waits until all replicas have called it; does nothing without a group."""
    if num_replicas() > 1:
        dist.barrier(group=_host_group())
