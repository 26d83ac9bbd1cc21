"""Lets replicas tell each other from time to time that one of them has received a signal or has diverged."""

import time

from byol_func.runtime import collectives

_SECONDS = 0.5  # Between two meetings, as long as the speed does not change.
_MOST_STEPS = 32  # Between two meetings. It bounds the delay if the steps suddenly take longer.


class Meetings:
    """Says after which steps all replicas talk, and tells all of them what one has to say.

    Talking after every step would cost a message between hosts per step. How many steps lie between two meetings is
    agreed at each meeting, from the speed of the slowest replica; all count the same steps, so none decides alone. A
    single process meets nobody, and every step is due.
    """

    def __init__(self):
        self._every, self._steps, self._since = 1, 0, time.monotonic()

    def is_due(self, at_once: bool = False) -> bool:
        """Counts a step, and returns whether `any_replica` must be called after it.

        All replicas must call this after every step, with the same `at_once`, which makes the meeting due now.
        """
        self._steps += 1
        return at_once or self._steps >= self._every or collectives.num_replicas() == 1

    def any_replica(self, flag: bool) -> bool:
        """Returns whether the flag is set on any replica; all call it after the same steps and get the same answer."""
        now = time.monotonic()
        fitting = int(_SECONDS * max(self._steps, 1) / max(now - self._since, 1e-9))
        wish = max(1, min(fitting, 2 * self._every, _MOST_STEPS))
        found, least_wish = collectives.largest([flag, -wish])
        self._every, self._steps, self._since = -least_wish, 0, now
        return bool(found)
