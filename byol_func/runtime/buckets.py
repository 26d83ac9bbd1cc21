"""Splits the mean of all gradients in a traced step, so that some are sent while others are still computed."""

from typing import Any

import torch
from torch.fx import Graph

from byol_func.runtime.torch_internals import all_reduce_op, unsafe_view_op, wait_op

Node = Any  # torch.fx declares that the arguments of a node may be anything.
_aten = torch.ops.aten
# Operations that only arrange the numbers of a gradient.
_ARRANGING = {
    _aten.clone.default,
    _aten.permute.default,
    _aten.t.default,
    _aten.transpose.int,
    _aten.view.default,
    unsafe_view_op,
}


def split_means(graph: Graph, bucket_bytes: int) -> None:
    """Splits every `collectives.pmean` of more than `bucket_bytes` in a traced step, in place.

    Its tensors are put into buckets of at least that size in the order in which the step computes them, which is that
    of the backward pass for gradients. Each bucket is sent as soon as its last tensor is there, and all are waited for
    where the mean was. A mean over two replicas is the same bit for bit; one over more may be rounded differently,
    because the order of a sum may depend on the size of the message.
    """
    for node in list(graph.nodes):
        if node.target is all_reduce_op:
            chain = _mean(node)
            if chain and sum(map(_bytes, node.args[0].args[0])) > bucket_bytes:
                _split(graph, chain, bucket_bytes)


def _mean(reduced: Node) -> list[Node] | None:
    """Returns what `pmean` leaves in a graph: concatenation, all-reduce, waits, quotient and split; None if it differs.

    Tracing adds a wait of its own, so there are two.
    """
    chain = [reduced.args[0], reduced]
    while len(chain[-1].users) == 1 and len(chain) < 6:
        chain.append(next(iter(chain[-1].users)))
    targets = [node.target for node in chain[2:] if node.target is not wait_op]
    is_mean = chain[0].target is _aten.cat.default and len(chain[0].users) == len(chain[0].args) == 1
    return chain if is_mean and targets == [_aten.div.Tensor, _aten.split_with_sizes.default] else None


def _split(graph: Graph, chain: list[Node], bucket_bytes: int) -> None:
    tensors, quotient, parts = chain[0].args[0], chain[-2], chain[-1]
    places = {node: place for place, node in enumerate(graph.nodes)}
    sources = [_source(tensor) for tensor in tensors]
    buckets: list[list[int]] = [[]]
    for i in sorted(range(len(tensors)), key=lambda i: places[sources[i]]):
        if sum(_bytes(tensors[k]) for k in buckets[-1]) >= bucket_bytes:
            buckets.append([])
        buckets[-1].append(i)
    where: dict[int, tuple[Node, int]] = {}
    for bucket in buckets:
        sent = _send(graph, chain[1], [tensors[i] for i in bucket], sources[bucket[-1]], places)
        with graph.inserting_before(quotient):
            arrived = graph.call_function(chain[2].target, (sent,))
            mean = graph.call_function(quotient.target, (arrived, *quotient.args[1:]))
            sizes = [tensors[i].meta['val'].numel() for i in bucket]
            split = graph.call_function(parts.target, (mean, sizes))
        where |= {i: (split, k) for k, i in enumerate(bucket)}
    for part in list(parts.users):
        part.args = where[part.args[1]]
    for node in reversed(chain):
        graph.erase_node(node)


def _send(graph: Graph, reduced: Node, tensors: list[Node], last: Node, places: dict[Node, int]) -> Node:
    """Sends tensors right after the operation `last`, which computes the last one, and returns the all-reduce."""
    for tensor in tensors:
        for node in reversed(_arrangement(tensor)):
            if places[node] > places[last]:
                last.append(node)
                # The next node comes after it.
                places[node], last = places[last], node
    with graph.inserting_after(last):
        block = graph.call_function(_aten.cat.default, (tensors,))
    with graph.inserting_after(block):
        return graph.call_function(reduced.target, (block, *reduced.args[1:]))


def _arrangement(tensor: Node) -> list[Node]:
    """Returns the operations that arrange a tensor, the last one first."""
    found = []
    while tensor.target in _ARRANGING:
        found.append(tensor)
        tensor = tensor.args[0]
    return found


def _source(tensor: Node) -> Node:
    found = _arrangement(tensor)
    return found[-1].args[0] if found else tensor


def _bytes(tensor: Node) -> int:
    value = tensor.meta['val']
    return value.numel() * value.element_size()
