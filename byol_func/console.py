"""A bar for a long phase on a terminal; elsewhere a line now and then."""

import datetime
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
    """A name of the file system as text that any file, picture or server takes.

    Names are bytes on disk. Python keeps those that are not UTF-8 as lone surrogates, which nothing can
    write; here they become `\\xNN`.
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


class Progress:
    """A bar on a terminal; elsewhere a line every `every_seconds`.

    Args:
      what: a word for the phase.
      total_images: of the whole run.
      done_images: that an earlier run has done.
      every_seconds: between two lines.
      shown: False says nothing at all, for all replicas but one.
    """

    def __init__(self, what: str, total_images: int, done_images: int, every_seconds: float, shown: bool):
        self._what, self._total, self._every, self._shown = what, total_images, every_seconds, shown
        self._is_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            desc=what,
            total=total_images,
            initial=done_images,
            unit=' images',
            unit_scale=True,
            smoothing=0.05,
            disable=not self._is_terminal,
            dynamic_ncols=True,
        )
        self._last_line = None

    def update(
        self,
        images: int,
        done_images: int,
        rate: float,
        now: float,
        loss: float | None,
        accuracies: Mapping[str, float] | None = None,
    ):
        """Shows `images` more; `loss` is None where it was not fetched, accuracies are in 0..1."""
        percent = {name: f'{100 * value:.1f} %' for name, value in (accuracies or {}).items()}
        if self._is_terminal:
            if loss is not None:
                self._bar.set_postfix({'loss': f'{loss:.4f}', **percent}, refresh=False)
            self._bar.update(images)
        elif self._shown and loss is not None and (self._last_line is None or now - self._last_line >= self._every):
            self._last_line = now
            left = datetime.timedelta(seconds=round((self._total - done_images) / rate)) if rate else '?'
            logging.info(
                '%s: %d of %d images, loss %.4f, %s%.1f images/s, %s left',
                self._what,
                done_images,
                self._total,
                loss,
                ''.join(f'{name} {value}, ' for name, value in percent.items()),
                rate,
                left,
            )

    def close(self) -> None:
        self._bar.close()
