"""Moves the logs of the steps from the device to the host without making the device wait."""

from collections.abc import Mapping
from typing import NamedTuple

import torch


class LoggedStep(NamedTuple):
    """A step whose logs have arrived on the host, with all losses since the previous `LoggedStep`."""

    step: int
    scalars: dict[str, float]
    losses: list[tuple[int, float]]  # (step, loss), in order; this step comes last.


class _Block(NamedTuple):
    steps: list[int]
    names: tuple[str, ...]
    values: torch.Tensor  # float64 [steps, names], on the host.
    arrived: torch.cuda.Event | None


class StepLogs:
    """Collects the logs of every step and returns them in blocks as they arrive.

    On a GPU the host runs ahead of the device. The copy of a block is queued behind the step that closes
    it, and the block is read once the copy is done, so neither side waits for the other.
    """

    def __init__(self):
        self._steps: list[int] = []
        self._rows: list[torch.Tensor] = []
        self._names: tuple[str, ...] = ()
        self._blocks: list[_Block] = []

    def add(self, step: int, logs: Mapping[str, torch.Tensor]) -> None:
        """Adds the logs of a step: 0-d tensors, still on the device, with the same names at every step."""
        self._names = tuple(logs)
        self._steps.append(step)
        # Copied to a new tensor, because a captured step writes its logs to the same memory every time.
        self._rows.append(torch.stack([value.detach().double() for value in logs.values()]))

    def close_block(self) -> None:
        """Starts the copy to the host of all logs added since the last call."""
        if not self._steps:
            return
        values, arrived = torch.stack(self._rows), None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._blocks.append(_Block(self._steps, self._names, values, arrived))
        self._steps, self._rows = [], []

    def take(self, leave: int | None = None) -> list[LoggedStep]:
        """Returns the blocks that have arrived, oldest first.

        Args:
          leave: waits until at most this many blocks are in flight; None never waits.
        """
        taken = []
        while self._blocks:
            block = self._blocks[0]
            if block.arrived is not None and not block.arrived.query():
                if leave is None or len(self._blocks) <= leave:
                    break
                block.arrived.synchronize()
            taken.append(_logged_step(self._blocks.pop(0)))
        return taken


def _logged_step(block: _Block) -> LoggedStep:
    rows = block.values.tolist()
    loss = block.names.index('loss' if 'loss' in block.names else 'train_loss')
    losses = [(step, row[loss]) for step, row in zip(block.steps, rows, strict=True)]
    return LoggedStep(block.steps[-1], dict(zip(block.names, rows[-1], strict=True)), losses)
