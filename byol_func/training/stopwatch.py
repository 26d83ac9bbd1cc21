"""The time of a loop: without pauses of the process, and with a tick for whoever must speak meanwhile."""

import threading
import time
from collections.abc import Callable

_TICK = 1.0  # Seconds.
_PAUSE = 3.0  # A gap of so many seconds between two looks, and
_IDLE = 0.05  # no more than this share of it at work, means that the process was stopped.


class Stopwatch:
    """Seconds that the process was allowed to run: SIGSTOP and suspended machines do not count.

    A thread looks at the clock every second. It runs on while the main thread waits for a disk or a GPU; only
    when all of the process stands still does it miss its time without having used any.

    Args:
      on_tick: called by the thread every second.
    """

    def __init__(self, on_tick: Callable[[], None] = lambda: None):
        self._on_tick, self._lock, self._closed = on_tick, threading.Lock(), threading.Event()
        self._paused, self._seen, self._worked = 0.0, time.monotonic(), time.process_time()
        self._thread = threading.Thread(target=self._run, name='stopwatch', daemon=True)
        self._thread.start()

    def now(self) -> float:
        """Seconds since some moment, for differences."""
        with self._lock:
            now, worked = time.monotonic(), time.process_time()
            gap = now - self._seen
            if gap > _PAUSE and worked - self._worked < _IDLE * gap:
                self._paused += gap
            self._seen, self._worked = now, worked
            return now - self._paused

    def _run(self) -> None:
        while not self._closed.wait(_TICK):
            self.now()
            self._on_tick()

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join()
