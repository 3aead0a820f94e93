"""Network namespaces that are held by a process, never by a mount, so that none can outlive us.

Knows how to make one, run things in it and be rid of it. The holder is a `sleep` that the kernel kills with its
parent (PR_SET_PDEATHSIG), whatever kills that. The signal is bound to the *thread* that made the holder: make
namespaces, and start programs in them, in a thread that lives as long as they shall (the main one).
"""

import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tracer.errors import TracerError
from tracer.lab import child

Result = TypeVar("Result")

#: How long a fresh namespace, or the end of a killed process, may take on a machine that is very busy.
PATIENCE_SECONDS = 30.0

_PACKAGES = {
    "ip": "iproute2",
    "iptables": "iptables",
    "ip6tables": "iptables",
    "conntrack": "conntrack",
    "nft": "nftables",
}


def missing(program: str) -> TracerError:
    """The error for a program that is not installed."""
    package = _PACKAGES.get(program.partition("-")[0], "util-linux")
    return TracerError(f"The program {program} was not found on this machine: apt-get install {package}")


class Namespace:
    """One network namespace. `path` leads to it for as long as it is open."""

    def __init__(self, name: str) -> None:
        """Starts the holder without waiting for it: call `wait` (or `open_all`) before anything else."""
        self.name = name
        self._holder = subprocess.Popen(
            child.command(os.getpid(), "new", "sleep", "infinity"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # the terminal's Ctrl-C is for the parent alone
        )
        self.pid = self._holder.pid
        self.path = f"/proc/{self.pid}/ns/net"
        self.inode = 0

    def wait(self) -> Self:
        """Returns when the namespace exists. Raises TracerError, after closing it, when it cannot be had."""
        if self.inode:
            return self
        assert self._holder.stdout is not None
        assert self._holder.stderr is not None
        readable, _, _ = select.select([self._holder.stdout], [], [], PATIENCE_SECONDS)
        if not readable or self._holder.stdout.readline() != b"ready\n":
            self._holder.kill()
            reason = self._holder.stderr.read().decode(errors="replace").strip() or "no answer"
            self.close()
            raise TracerError(
                f"The network namespace {self.name} could not be made ({reason}): "
                "run as root, or with CAP_SYS_ADMIN and CAP_NET_ADMIN"
            )
        self.inode = Path(self.path).stat().st_ino
        return self

    def __enter__(self) -> Self:
        return self.wait()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Namespace {self.name} net:[{self.inode}] of process {self.pid}>"

    def close(self) -> None:
        """Kills and reaps the holder. The kernel takes the namespace down with its last process. Idempotent."""
        self._holder.kill()
        self._holder.wait()
        for pipe in (self._holder.stdout, self._holder.stderr):
            if pipe is not None:
                pipe.close()

    def start(self, command: Sequence[str], feed: str | None = None) -> "Command":
        """Begins a short command in the namespace; `feed` goes to its standard input, its output is captured."""
        inside = ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net={self.path}", *command]
        return Command(self.name, inside, list(command), feed)

    def run(self, command: Sequence[str], feed: str | None = None, timeout: float = PATIENCE_SECONDS) -> str:
        """Runs a short command in the namespace and returns what it printed. Raises TracerError if it fails."""
        return self.start(command, feed).finish(timeout)

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Starts a lasting program in the namespace; it dies with the calling thread. The caller reaps it."""
        options.setdefault("start_new_session", True)
        return subprocess.Popen(child.command(os.getpid(), self.path, *command), **options)

    def call(self, function: Callable[[], Result]) -> Result:
        """What `function` returns, or raises, in a short-lived thread of this process inside the namespace.

        For opening sockets and files there; a process started by `function` would be killed at once.
        """

        def inside() -> Result:
            child.enter(self.path)
            return function()

        with ThreadPoolExecutor(1, thread_name_prefix=f"in {self.name}") as pool:
            return pool.submit(inside).result()

    def sysctl(self, settings: Mapping[str, str | int]) -> None:
        """Writes settings under `net.`, which belong to the namespace alone. Raises TracerError."""

        def write() -> None:
            if Path("/proc/thread-self/ns/net").stat().st_ino != self.inode:
                raise TracerError(f"The namespace {self.name} was not entered: its settings are left alone")
            for key, value in settings.items():
                assert key.startswith("net.")
                try:
                    Path("/proc/sys", *key.split(".")).write_text(f"{value}\n", encoding="ascii")
                except OSError as error:
                    raise TracerError(
                        f"The setting {key}={value} was refused in the namespace {self.name} ({error.strerror}): "
                        "this kernel may lack the feature (bridge netfilter, conntrack or IPv6)"
                    ) from error

        self.call(write)


class Command:
    """A command that runs inside a namespace, so that several can run at once."""

    def __init__(self, where: str, inside: list[str], shown: list[str], feed: str | None) -> None:
        self._where = where
        self._shown = shown
        self._feed = feed
        try:
            self._process = subprocess.Popen(
                inside,
                stdin=subprocess.DEVNULL if feed is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise missing(inside[0]) from error

    def finish(self, timeout: float = PATIENCE_SECONDS) -> str:
        """Waits for the command and returns what it printed. Raises TracerError if it failed."""
        try:
            output, errors = self._process.communicate(self._feed, timeout)
        except BaseException as error:
            self._process.kill()
            self._process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TracerError(f"{self._line()} was not done after {timeout:.0f} s: is the machine busy?") from error
            raise
        if self._process.returncode == 127:
            raise missing(self._shown[0])
        if self._process.returncode != 0:
            said = (errors or output).strip() or f"exit code {self._process.returncode}"
            raise TracerError(f"{self._line()} failed: {said}")
        return output

    def _line(self) -> str:
        return f"`{' '.join(self._shown)}` in the namespace {self._where}"


def open_all(names: Sequence[str]) -> list[Namespace]:
    """One namespace for each name, made side by side. On any failure none is left."""
    made: list[Namespace] = []
    try:
        for name in names:
            made.append(Namespace(name))
        for namespace in made:
            namespace.wait()
    except BaseException:
        for namespace in made:
            namespace.close()
        raise
    return made


def wait_until(condition: Callable[[], bool], what: str, timeout: float = PATIENCE_SECONDS) -> None:
    """Returns when `condition` holds. Raises TracerError naming `what` was waited for."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TracerError(f"Waited {timeout:.0f} s in vain for {what}: is the machine overloaded?")
        time.sleep(0.003)
