"""A bar for a long phase on a terminal; elsewhere a line now and then."""

import contextlib
import datetime
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import tqdm
from absl import logging

from byol_func.runtime import collectives

T = TypeVar('T')
_DELAY = 1.0  # Seconds that a phase must take to get a bar.
_every_seconds = 10.0


def readable(name: str) -> str:
    r"""A name of the file system as text that any file, picture or server takes.

    Names are bytes on disk. Python keeps those that are not UTF-8 as lone surrogates, which nothing can
    write; here they become `\xNN`.
    """
    return name.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')


def set_pace(every_seconds: float) -> None:
    """How often a phase of this process says a line where the output is no terminal; 10 s if never told."""
    global _every_seconds
    _every_seconds = every_seconds


def watch(
    items: Iterable[T], what: str, total: int, count: Callable[[T], int] = lambda item: 1, unit: str = 'images'
) -> Iterator[T]:
    """Yields the items; the first replica tells how far it has come.

    Args:
      items: such as batches of images.
      what: a word for the phase.
      total: how many images there are in all, or whatever else is counted.
      count: how many of them an item holds.
      unit: what is counted.
    """
    shown = collectives.replica_index() == 0
    start, done = time.monotonic(), 0
    with contextlib.closing(Progress(what, total, unit=unit, shown=shown, is_short=True)) as progress:
        for item in items:
            yield item
            done += count(item)
            progress.update(count(item), rate=done / max(time.monotonic() - start, 1e-9))


class Progress:
    """A bar on a terminal; elsewhere a line now and then.

    Args:
      what: a word for the phase.
      total: how many images, or whatever else is counted, there are in all.
      done: how many of them an earlier run has done.
      unit: what is counted.
      every_seconds: between two lines; None: as `set_pace` has it.
      shown: False says nothing at all, for all replicas but one.
      is_short: whether nothing remains of the bar, and no line is said at the beginning and at the end.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        done: int = 0,
        unit: str = 'images',
        every_seconds: float | None = None,
        shown: bool = True,
        is_short: bool = False,
    ):
        self._what, self._total, self._done, self._unit = what, total, done, unit
        self._every, self._shown, self._is_short = every_seconds, shown, is_short
        self._is_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            desc=what,
            total=total,
            initial=done,
            unit=f' {unit}',
            unit_scale=True,
            smoothing=0.05,
            leave=not is_short,
            delay=_DELAY if is_short else 0,
            disable=not self._is_terminal,
            dynamic_ncols=True,
        )
        self._lasted = time.monotonic()  # When a line was last said of what takes long.
        self._said = self._lasted if is_short else -math.inf

    def is_due(self) -> bool:
        """Whether it is time for a line, or for new numbers beside the bar."""
        return self._shown and time.monotonic() - self._said >= self._pace()

    def _pace(self) -> float:
        return _every_seconds if self._every is None else self._every

    def update(self, count: int, rate: float | None = None, numbers: Mapping[str, str] | None = None) -> None:
        """Moves on by `count`.

        Args:
          count: how many more are done.
          rate: per second; None where it is not known yet.
          numbers: to show, by name; None where none are at hand, and then a longer phase says no line.
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
                words += [f'{rate:.1f} {self._unit}/s', f'{left} left']
            self._said = time.monotonic()
            self._log(words)

    def say_that_it_lasts(self, why: str) -> None:
        """Says a line if there has been none for long; the next line that tells of progress comes all the same."""
        now = time.monotonic()
        if self._shown and not self._is_terminal and now - max(self._said, self._lasted) >= 1.5 * self._pace():
            self._lasted = now
            self._log([why])

    def _log(self, words: list[str]) -> None:
        logging.info('%s', ', '.join([f'{self._what}: {self._done} of {self._total} {self._unit}', *words]))

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
