"""Moves trees of small tensors from the host to the device in one copy, or avoids the copy altogether."""

from collections.abc import Sequence
from typing import Any

import optree
import torch


def to_device(tree: Any, device: torch.device) -> Any:
    """Copies a tree to `device` as one block; the host does not wait for a GPU.

    Args:
      tree: tensors on the CPU.
      device: the target; on the CPU the tree is returned without a copy.
    """
    if device.type == 'cpu' or not optree.tree_leaves(tree):
        return tree
    block = pack(tree)
    if device.type == 'cuda':
        block = block.pin_memory()
    return unpack(block.to(device, non_blocking=True), like=tree)


def place(tree: Any, device: torch.device) -> Any:
    """Copies parameters or a state to `device`, in the memory formats that are fastest there.

    Activations are channels-last everywhere. On a GPU, convolution kernels are fastest in channels-last too. A CPU
    reorders kernels into its own blocked layout in any case, which is faster from contiguous ones.

    Args:
      tree: tensors on any device.
      device: the target.
    """

    def copy(x):
        kernel_on_gpu = x.ndim == 4 and device.type == 'cuda'
        memory_format = torch.channels_last if kernel_on_gpu else torch.contiguous_format
        return torch.empty_like(x, device=device, memory_format=memory_format).copy_(x)

    return optree.tree_map(copy, tree)


def pack(tree: Any) -> torch.Tensor:
    """Concatenates the bytes of all leaves to uint8 `[n]`."""
    leaves = optree.tree_leaves(tree)
    return torch.cat([leaves[i].contiguous().flatten().view(torch.uint8) for i in _order(leaves)])


def unpack(block: torch.Tensor, like: Any) -> Any:
    """Inverts `pack`: returns views of the block in the structure, shapes and dtypes of `like`."""
    leaves, spec = optree.tree_flatten(like)
    unpacked: dict[int, torch.Tensor] = {}
    start = 0
    for i in _order(leaves):
        stop = start + leaves[i].nbytes
        unpacked[i] = block[start:stop].view(leaves[i].dtype).view(leaves[i].shape)
        start = stop
    return optree.tree_unflatten(spec, [unpacked[i] for i in range(len(leaves))])


def _order(leaves: list[torch.Tensor]) -> list[int]:
    """Returns the order of the leaves in a block, widest dtypes first, so that each view is aligned to its dtype."""
    return sorted(range(len(leaves)), key=lambda i: -leaves[i].element_size())


def constants(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """Returns Python numbers as a tensor `[n]` with the dtype and on the device of `like`.

    Each number is filled in on the device: `like.new_tensor(values)` would copy them from the host in every step,
    which cannot be captured in a CUDA graph.
    """
    return torch.stack([like.new_full((), value) for value in values])
