"""Reports the progress of long phases: as a bar on a terminal, otherwise as a log line at intervals."""

import contextlib
import datetime
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import TypeVar

import tqdm
from absl import logging

from byol_func.errors import counted
from byol_func.runtime import collectives

T = TypeVar('T')
_DELAY = 1.0  # Seconds before the bar of a short phase appears.
_every_seconds = 10.0


def readable(name: str) -> str:
    r"""Returns a file name as text that can be written to any file, picture or server.

    File names are bytes on disk. Python represents bytes that are not UTF-8 as lone surrogates, which cannot be
    encoded; here they become `\xNN`.
    """
    return name.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')


def set_pace(every_seconds: float) -> None:
    """Sets the seconds between two progress lines of this process where the output is not a terminal (default 10)."""
    global _every_seconds
    _every_seconds = every_seconds


def watch(
    items: Iterable[T], what: str, total: int, count: Callable[[T], int] = lambda item: 1, unit: str = 'image'
) -> Generator[T, None, None]:
    """Yields the items and reports the progress on the first replica.

    Args:
      items: for example batches of images.
      what: the name of the phase.
      total: the number of images (or other units) in all items together.
      count: returns the number of units in an item.
      unit: the name of one unit.
    """
    shown = collectives.replica_index() == 0
    start, done = time.monotonic(), 0
    with contextlib.closing(Progress(what, total, unit=unit, shown=shown, is_short=True)) as progress:
        for item in items:
            yield item
            done += count(item)
            progress.update(count(item), rate=done / max(time.monotonic() - start, 1e-9))


def _plural(noun: str) -> str:
    return counted(2, noun).split()[-1]


def _is_terminal() -> bool:
    """Returns whether stderr is a terminal that can show a bar; some report that they have no columns."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def _in_notebook() -> bool:
    """Returns whether this process is the kernel of a notebook, which can redraw a bar as a terminal does."""
    ipython = sys.modules.get('IPython')
    return ipython is not None and hasattr(ipython.get_ipython(), 'kernel')


class Progress:
    """A progress bar on a terminal; otherwise a log line at intervals.

    Args:
      what: the name of the phase.
      total: the number of images (or other units) in the whole phase.
      done: the number of units that an earlier run has finished.
      unit: the name of one unit.
      every_seconds: the seconds between two lines; None takes those of `set_pace`.
      shown: whether to report anything; False on all replicas but one.
      is_short: whether to remove the bar at the end, and to log no line at the beginning and at the end.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        done: int = 0,
        unit: str = 'image',
        every_seconds: float | None = None,
        shown: bool = True,
        is_short: bool = False,
    ):
        self._what, self._total, self._done, self._unit = what, total, done, unit
        self._every, self._shown, self._is_short = every_seconds, shown, is_short
        self._is_terminal = shown and (_is_terminal() or _in_notebook())
        self._bar = tqdm.tqdm(
            desc=what,
            total=total,
            initial=done,
            unit=f' {_plural(unit)}',
            unit_scale=True,
            smoothing=0.05,
            leave=not is_short,
            delay=_DELAY if is_short else 0,
            disable=not self._is_terminal,
            dynamic_ncols=True,
        )
        self._lasted = time.monotonic()  # When `say_that_it_lasts` last logged a line.
        self._said = self._lasted if is_short else -math.inf

    def is_due(self) -> bool:
        """Returns whether it is time for a line, or for new numbers beside the bar."""
        return self._shown and time.monotonic() - self._said >= self._pace()

    def _pace(self) -> float:
        return _every_seconds if self._every is None else self._every

    def update(self, count: int, rate: float | None = None, numbers: Mapping[str, str] | None = None) -> None:
        """Advances by `count` units, and logs a line if one is due.

        Args:
          count: the number of units finished since the last call.
          rate: units per second; None if it is not known yet.
          numbers: numbers to show, by name. With None, a phase logs no line unless it is short.
        """
        self._done += count
        if self._is_terminal:
            if numbers:
                self._said = time.monotonic()
                self._bar.set_postfix(numbers, refresh=False)
            self._bar.update(count)
        elif self.is_due() and (self._done < self._total if self._is_short else numbers is not None):
            words = [f'{name} {value}' for name, value in (numbers or {}).items()]
            if rate:
                left = datetime.timedelta(seconds=round((self._total - self._done) / rate))
                words += [f'{rate:.1f} {_plural(self._unit)}/s', f'{left} left']
            self._said = time.monotonic()
            self._log(words)

    def say_that_it_lasts(self, why: str) -> None:
        """Logs `why` if there has been no line for long; this does not delay the next progress line."""
        now = time.monotonic()
        if self._shown and not self._is_terminal and now - max(self._said, self._lasted) >= 1.5 * self._pace():
            self._lasted = now
            self._log([why])

    def _log(self, words: list[str]) -> None:
        logging.info('%s', ', '.join([f'{self._what}: {self._done} of {counted(self._total, self._unit)}', *words]))

    def close(self) -> None:
        """Closes the bar."""
        self._bar.close()
