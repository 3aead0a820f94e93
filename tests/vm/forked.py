"""A pytest plugin for guests: agents are forked from the tests' process, where everything is imported already.

An agent's start is two Python processes that import for most of their time, twenty times as long under emulation. What
runs is the same code, from the command line's options on; `tests/vm/inside/test_start.py` starts one the usual way.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import IO, Any

import agent_world
import pyarrow.parquet  # noqa: F401  the agent imports it, and the rest of these

import tracer.agent
import tracer.kernel.loader
import tracer.naming.live
import tracer.naming.watch
import tracer.operations.vitals
import tracer.store.coverage
import tracer.store.writer
from tracer.cli import main
from tracer.kernel import handover


class Forked:
    """As much of subprocess.Popen as is used of a child that runs a function."""

    def __init__(self, run: Callable[[], Any], keep: Sequence[int], said: IO[bytes]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                _become_new(keep, said.fileno())
                run()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                logging.exception("forked")
            finally:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(["forked"], timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become_new(keep: Sequence[int], said: int) -> None:
    """Nothing of the tests' stays open, and nothing of pytest listens."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 2)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number not in keep:
            with contextlib.suppress(OSError):  # the listing's own is closed
                os.close(number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    logging.getLogger().handlers.clear()
    os.chdir("/")


def _launch(arguments: Sequence[str], stderr: IO[bytes]) -> Forked:
    return Forked(lambda: _agent(arguments), [], stderr)


def _agent(arguments: Sequence[str]) -> None:
    handover.subprocess = types.SimpleNamespace(
        Popen=_loader, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )
    main(list(arguments), prog_name="vip-tracer")


def _loader(command: Sequence[str], *, pass_fds: Sequence[int], stderr: IO[bytes], **_: Any) -> Forked:
    def run() -> None:
        sys.argv = ["loader", command[-1]]
        tracer.kernel.loader.main()

    return Forked(run, pass_fds, stderr)


agent_world.launch = _launch
