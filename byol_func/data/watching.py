"""A bar for a long phase on a terminal; elsewhere a line now and then."""

import datetime
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import tqdm
from absl import logging

from byol_func.runtime import collectives

T = TypeVar('T')
_DELAY = 1.0  # Seconds that a phase must take to get a bar.
_every_seconds = 10.0


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
    is_shown = collectives.replica_index() == 0
    is_terminal = is_shown and sys.stderr.isatty()
    start = said = time.monotonic()
    done = 0
    with tqdm.tqdm(
        desc=what,
        total=total,
        unit=f' {unit}',
        unit_scale=True,
        leave=False,
        delay=_DELAY,
        dynamic_ncols=True,
        disable=not is_terminal,
    ) as bar:
        for item in items:
            yield item
            done += count(item)
            bar.update(count(item))
            now = time.monotonic()
            if is_shown and not is_terminal and done < total and now - said >= _every_seconds:
                said = now
                left = datetime.timedelta(seconds=round((total - done) * (now - start) / done))
                logging.info('%s: %d of %d %s, %s left', what, done, total, unit, left)
