"""Means over replicas and their batches: `jax.lax.pmean` and `all_gather` as differentiable functions."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import optree
import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from byol_func.runtime import launchers
from byol_func.runtime.torch_internals import functional_collectives as funcol

# Replica 0 may decode a large data set, or draw, while the others wait for it: a day of half hours.
_PATIENCE = 48 * default_pg_timeout


def num_replicas() -> int:
    """Number of processes in the default group, 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def replica_index() -> int:
    """Rank of this process in the default group, 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def initialize(device: torch.device) -> str:
    """Makes the run's GPU the current one, and joins the group of processes that a launcher describes, if it does.

    Events, CUDA graphs and pinned memory belong to the *current* GPU, wherever the tensors are: left at
    the first one, an event there would say that copies from another are done as soon as they are asked for.

    Returns:
      Which of how many this process is, in words; '' without a group.
    """
    world = launchers.find()
    if device.type == 'cuda':
        torch.cuda.set_device(world.local_rank if world else device.index or 0)
    if world is None:
        return ''
    if not dist.is_initialized():
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=_store(), rank=world.rank, world_size=world.size)
        _host_group()
    return f'replica {world.rank} of {world.size}, started by {world.launcher}'


@functools.cache
def _store() -> dist.Store:
    """Where the processes of a launcher meet.

    The store of torchrun's agent outlives processes that die. Those that it starts in their place must not find
    the addresses of the dead: every attempt has names of its own.
    """
    world = launchers.find()
    assert world is not None
    is_master = world.rank == 0 and not world.has_agent
    store = dist.TCPStore(world.address, world.port, world.size, is_master, wait_for_workers=False)
    return dist.PrefixStore(f'attempt_{world.attempt}', store)


def leave() -> None:
    """Leaves the group, for a process that has done its work: threads that are left behind may abort it."""
    if num_replicas() > 1:
        _host_group.cache_clear()
        dist.destroy_process_group()


def lost_replicas(error: Exception) -> str | None:
    """Who is not there any more, in words, if that is why a collective failed; None for any other error."""
    text = str(error).lower()
    if num_replicas() == 1 or not (isinstance(error, dist.DistError) or 'gloo' in text or 'nccl' in text):
        return None
    others = [rank for rank in range(num_replicas()) if rank != replica_index()]
    try:
        _store().set(f'here_{replica_index()}', '')
        lost = [rank for rank in others if not _is_here(rank)]
    except RuntimeError:  # The store was in the process that is lost.
        lost = []
    return f'replica {", ".join(map(str, lost))} was lost' if lost else 'another replica was lost'


def _is_here(rank: int) -> bool:
    try:
        _store().wait([f'here_{rank}'], default_pg_timeout / 360)
        return True
    except dist.DistStoreError:
        return False


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
def _host_group() -> Any:
    """All processes, for what the hosts tell each other; made by all of them at once.

    Here one may wait long for another, where devices that wait for each other have hung. Whoever dies
    is noticed at once in any case.
    """
    return cast(dist.ProcessGroup, dist.new_group(backend='gloo', timeout=_PATIENCE))


def gather_numbers(numbers: Sequence[int]) -> list[list[int]]:
    """The numbers of all replicas, in the order of their ranks; as many of 63 bits on each."""
    own = torch.tensor(numbers, dtype=torch.int64)
    if num_replicas() == 1:
        return [own.tolist()]
    gathered = [torch.empty_like(own) for _ in range(num_replicas())]
    dist.all_gather(gathered, own, group=_host_group())
    return [row.tolist() for row in gathered]


def text_of_first_replica(text: str) -> str:
    """A short text as replica 0 has it, on all."""
    if num_replicas() == 1:
        return text
    block = torch.zeros(4096, dtype=torch.uint8)
    data = torch.frombuffer(bytearray(text.encode('utf-8', 'surrogateescape')) or bytearray(1), dtype=torch.uint8)
    block[: len(data)] = data
    dist.broadcast(block, 0, group=_host_group())
    return bytes(block.tolist()).rstrip(b'\0').decode('utf-8', 'surrogateescape')


def barrier() -> None:
    """Waits until all replicas are here; nothing without a group."""
    if num_replicas() > 1:
        dist.barrier(group=_host_group())
