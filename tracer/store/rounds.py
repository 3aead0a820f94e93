"""When an exporter makes its passes: once, or by a schedule until it is told to stop; and how it ends.

A stop signal lets the file that is going out finish. With a schedule, a last pass follows, within the grace time, once
the agent has published what it had: both are told to stop at the same moment, where they are containers of one pod.
The second signal ends the process at once, which loses nothing.
"""

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from tracer.errors import TracerError, UsageError
from tracer.store import locks
from tracer.store.cron import Schedule
from tracer.store.export import Exporter, Passed

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: How often it is looked whether to stop. A signal may be taken by a thread that is not the waiting one.
_LOOK_S = 0.25


class Stop:
    """What was told, and until when work may still go on."""

    def __init__(self, grace_s: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.grace_s = grace_s
        #: No threading.Event: its lock is not to be had in a signal's handler that interrupts a wait for it.
        self.told = False
        self._until: float | None = None
        self._monotonic = monotonic

    def __call__(self) -> bool:
        """Whether no further file is to be begun."""
        return self.told and self.left_s() <= 0

    def tell(self) -> None:
        """It is to end."""
        self._until = self._monotonic() + self.grace_s
        self.told = True

    def left_s(self) -> float:
        """Seconds left of the grace time."""
        return 0.0 if self._until is None else self._until - self._monotonic()

    def wait(self, seconds: float) -> bool:
        """Waits so long; true if told to stop before."""
        deadline = self._monotonic() + seconds
        while not self.told:
            left = deadline - self._monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, _LOOK_S))
        return True


@contextlib.contextmanager
def signals(stop: Stop) -> Iterator[None]:
    """While in here, the first SIGTERM or Ctrl-C tells `stop`; the next one does what it does by itself."""

    def told(number: int, frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        stop.tell()

    before = [signal.signal(each, told) for each in _SIGNALS]
    try:
        yield
    finally:
        for each, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(each, handler)


def rounds(exporter: Exporter, root: Path, schedule: Schedule, stop: Stop) -> None:
    """Passes at once, then whenever the schedule is due, until `stop`; then a last one.

    A pass that fails is said, once for as long as it is the same failure, and the next one is made when it is due.

    Raises:
        TracerError: the last one fails, or leaves files.
        UsageError: there can be no such destination.
    """
    said = ""
    while not stop.told:
        try:
            tell(exporter.run())
            said = ""
        except UsageError:
            raise
        except TracerError as error:
            again = str(error) == said
            _log.log(logging.INFO if again else logging.ERROR, "%s (tried again by the schedule)", error)
            said = str(error)
        stop.wait(schedule.seconds())
    while locks.is_written(root) and stop.left_s() > stop.grace_s / 2:
        time.sleep(_LOOK_S)
    last = exporter.run()
    tell(last)
    complain(last)


def tell(done: Passed) -> None:
    """Logs what a pass did, if it did anything."""
    expired = done.expired
    if done != Passed():
        _log.info(
            "exported %d files (%d bytes), %d were there already, %d failed, %d left; %d hours closed; deleted %d "
            "files here (%d bytes), %d of them not exported",
            done.exported, done.bytes, done.found, done.failed, done.left, done.markers, expired.files, expired.disk,
            expired.unexported,
        )  # fmt: skip


def complain(done: Passed) -> None:
    """Raises TracerError if something is not exported."""
    if done.left:
        raise TracerError(f"stopped with {done.left} files not exported yet; the next export goes on with them")
    if done.failed:
        raise TracerError(f"{done.failed} files could not be exported, as said above; see to them, and export again")
