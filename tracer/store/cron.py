"""When a schedule such as ``*/15 * * * *`` is due, in UTC."""

import datetime

from cronsim import CronSim, CronSimError

from tracer.errors import UsageError


class Schedule:
    """A cron expression: minute, hour, day, month, weekday."""

    def __init__(self, text: str) -> None:
        """Raises UsageError if it cannot be read, or is never due."""
        self._text = text
        try:
            self.after(datetime.datetime.now(datetime.UTC))
        except CronSimError as error:
            raise UsageError(
                f"the schedule {text!r} cannot be read: {error}; write it as cron does, such as '*/15 * * * *'"
            ) from error
        except StopIteration as error:
            raise UsageError(
                f"the schedule {text!r} is never due; write one that is, such as '*/15 * * * *'"
            ) from error

    def after(self, now: datetime.datetime) -> datetime.datetime:
        """When it is due next."""
        return next(CronSim(self._text, now))

    def seconds(self) -> float:
        """How long it is until then."""
        now = datetime.datetime.now(datetime.UTC)
        return max(0.0, (self.after(now) - now).total_seconds())
