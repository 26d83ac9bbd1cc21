"""Measures the time of a loop, without pauses of the process, and calls a function every second."""

import threading
import time
from collections.abc import Callable

_TICK = 1.0  # Seconds.
_PAUSE = 3.0  # A gap of more than this between two readings, with
_IDLE = 0.05  # less than this fraction of it as CPU time, means that the process was stopped.


class Stopwatch:
    """Measures the seconds that the process could run; time stopped by SIGSTOP or a suspended machine is excluded.

    A thread reads the clock every second. It keeps running while the main thread waits for a disk or a GPU, so a
    gap between two readings with hardly any CPU time means that the whole process was stopped.

    Args:
      on_tick: a function that the thread calls every second.
    """

    def __init__(self, on_tick: Callable[[], None] = lambda: None):
        self._on_tick, self._lock, self._closed = on_tick, threading.Lock(), threading.Event()
        self._paused, self._seen, self._worked = 0.0, time.monotonic(), time.process_time()
        self._thread = threading.Thread(target=self._run, name='stopwatch', daemon=True)
        self._thread.start()

    def now(self) -> float:
        """Returns seconds since an arbitrary moment; only differences are meaningful."""
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
        """Stops the thread."""
        self._closed.set()
        self._thread.join()
