"""The stop signals of the commands that run until they are stopped."""

import signal


def hold() -> None:
    """Keeps SIGTERM and Ctrl-C until `tracer.agent.follow` asks for them.

    Before NumPy and Arrow are loaded, whose threads inherit this: a signal that finds one thread without it, while the
    main thread is not just waiting for it, kills the process with all rows that are not published yet.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
