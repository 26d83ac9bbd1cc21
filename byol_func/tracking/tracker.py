"""The trackers of a run: mlflow and TensorBoard.

A tracker is a module with a function `start(run, mode, parent)`. It returns None if its flag is not given, or else an
object whose method `close(status)` ends the tracking. It reads what the training writes to the workdir, in a thread of
its own; `tail` helps with that. To add one, write such a module and list it in `_TRACKERS`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from byol_func.errors import Stopped
from byol_func.runtime import collectives
from byol_func.tracking import mlflow_tracker, tensorboard_tracker
from byol_func.workdir.run import Run


class Tracker(Protocol):
    """What tracks one run."""

    def close(self, status: str) -> None:
        """Sends the rest and ends the tracking of a run that is FINISHED, FAILED or KILLED."""


_TRACKERS: dict[str, Callable[[Run, str, Any], Tracker | None]] = {
    'mlflow': mlflow_tracker.start,
    'tensorboard': tensorboard_tracker.start,
}


@contextlib.contextmanager
def track(run: Run, mode: str, parents: Mapping[str, Tracker] | None = None) -> Iterator[Mapping[str, Tracker]]:
    """Tracks the run within the `with` block, by every tracker whose flag is given.

    Args:
      run: the run.
      mode: its mode, or `finder.FOLLOWER`.
      parents: for one of several seeds, the trackers of the run of all seeds, by name.

    Raises:
      UserError: a tracker is not installed or cannot be used.
    """
    trackers: dict[str, Tracker] = {}
    status = 'FAILED'
    try:
        if collectives.replica_index() == 0:
            for name, start in _TRACKERS.items():
                if (tracker := start(run, mode, (parents or {}).get(name))) is not None:
                    trackers[name] = tracker
        yield trackers
        status = 'FINISHED'
    except (KeyboardInterrupt, SystemExit, Stopped):
        status = 'KILLED'
        raise
    finally:
        for tracker in trackers.values():
            tracker.close(status)
