"""From the host to the device: a whole tree of small tensors in one copy, or no copy at all."""

from collections.abc import Sequence
from typing import Any

import optree
import torch


def to_device(tree: Any, device: torch.device) -> Any:
    """The same tree on `device`; to a GPU it travels as one block, and the host does not wait.

    Args:
      tree: tensors on the CPU.
      device: where they are wanted.
    """
    if device.type == 'cpu' or not optree.tree_leaves(tree):
        return tree
    block = pack(tree)
    if device.type == 'cuda':
        block = block.pin_memory()
    return unpack(block.to(device, non_blocking=True), like=tree)


def place(tree: Any, device: torch.device) -> Any:
    """A copy of parameters or a state on `device`, in the memory formats that are fastest there.

    Activations are channels-last everywhere. A GPU wants the kernels of convolutions so too. A CPU brings
    them into blocks of its own whatever they are, and takes contiguous ones faster.

    Args:
      tree: tensors of any device.
      device: where they are wanted.
    """

    def copy(x):
        kernel_on_gpu = x.ndim == 4 and device.type == 'cuda'
        memory_format = torch.channels_last if kernel_on_gpu else torch.contiguous_format
        return torch.empty_like(x, device=device, memory_format=memory_format).copy_(x)

    return optree.tree_map(copy, tree)


def pack(tree: Any) -> torch.Tensor:
    """The bytes of all leaves, one after the other, uint8 `[n]`."""
    leaves = optree.tree_leaves(tree)
    return torch.cat([leaves[i].contiguous().flatten().view(torch.uint8) for i in _order(leaves)])


def unpack(block: torch.Tensor, like: Any) -> Any:
    """The inverse of `pack`: views of the block in the places, shapes and dtypes of `like`."""
    leaves, spec = optree.tree_flatten(like)
    unpacked: dict[int, torch.Tensor] = {}
    start = 0
    for i in _order(leaves):
        stop = start + leaves[i].nbytes
        unpacked[i] = block[start:stop].view(leaves[i].dtype).view(leaves[i].shape)
        start = stop
    return optree.tree_unflatten(spec, [unpacked[i] for i in range(len(leaves))])


def _order(leaves: list[torch.Tensor]) -> list[int]:
    """The widest dtypes first: a view needs its numbers at multiples of their size."""
    return sorted(range(len(leaves)), key=lambda i: -leaves[i].element_size())


def constants(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """Numbers known beforehand as a tensor `[n]` of the dtype and on the device of `like`.

    Each is made there: `like.new_tensor(values)` would copy them from the host in every step, which
    cannot be captured in a CUDA graph.
    """
    return torch.stack([like.new_full((), value) for value in values])
