"""The two errors a user sees. Each message says what failed, where, and what to do next."""


class TracerError(Exception):
    """Something could not be done (exit code 1)."""


class UsageError(TracerError):
    """What was asked for makes no sense (exit code 2)."""


class NoDataError(TracerError):
    """There is nothing to show (exit code 3)."""
