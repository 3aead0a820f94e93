"""The stop signals of the commands that run until they are stopped."""

import signal


def hold(*more: signal.Signals) -> None:
    """Keeps SIGTERM, Ctrl-C, and what else is named, until `tracer.agent` asks for them.

    Before NumPy and Arrow are loaded, whose threads inherit this: a signal that finds one thread without it, while the
    main thread is not just waiting for it, kills the process with all rows that are not published yet.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, *more})
