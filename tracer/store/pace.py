"""How fast bytes may go, and how long one waits before trying again."""

import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds before the second attempt, the third and so on; each is taken at half to its whole length.
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)


class Pace:
    """At most so many bytes a second, on average from its first to its last; None: as fast as it goes."""

    def __init__(
        self,
        bytes_per_s: int | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._rate, self._monotonic, self._sleep = bytes_per_s, monotonic, sleep
        self._free_at = monotonic()
        #: How much is sent in one piece: a tenth of a second's worth, within reason.
        self.piece = 1 << 20 if bytes_per_s is None else min(1 << 20, max(4096, bytes_per_s // 10))

    def spend(self, count: int) -> None:
        """Waits until so many bytes more have had their time."""
        if self._rate is None:
            return
        now = self._monotonic()
        self._free_at = max(now, self._free_at) + count / self._rate
        self._sleep(self._free_at - now)


def retried(
    action: Callable[[], T],
    lasting: Callable[[OSError], bool],
    what: str,
    waits_s: Sequence[float] = WAITS_S,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """What `action` returns, tried again after each OSError that is not `lasting`. Raises the last one."""
    for number, wait_s in enumerate(waits_s, 1):
        try:
            return action()
        except OSError as error:
            if lasting(error):
                raise
            _log.info("%s did not work (attempt %d of %d) and is tried again", what, number, len(waits_s) + 1)
            sleep(wait_s * random.uniform(0.5, 1.0))
    return action()
