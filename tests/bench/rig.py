"""Where the benchmark runs: a node with pods, services, and clients and servers in C (traffic.c) that load it.

Knows how the traffic is made and what the servers saw; leaves to others what is measured.
The programs of this machine go on where they are: everything is in namespaces of the lab.
"""

import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tracer.lab.cluster import Cluster
from tracer.lab.netns import Namespace
from tracer.lab.topology import Conntrack, Pod

SOURCE = Path(__file__).with_name("traffic.c")
#: The services' ports, each with a virtual address of its own: so many of TCP that a client finds a free port for each
#: connection of a minute.
PORTS = {"tcp": tuple(range(81, 97)), "udp": (53, 54)}
#: A service behind which nobody listens.
REFUSED_PORT = 99
_TARGET, _NOBODY = 9090, 9999
#: How long conntrack may take to forget: its timeouts here are seconds.
_EXPIRES_S = 60

#: `struct accepted` of traffic.c.
ACCEPTED = np.dtype([("peer", ">u4"), ("local", ">u4"), ("peer_port", ">u2"), ("dialled", "<u2"), ("protocol", "<u4")])


@dataclass(frozen=True)
class Work:
    """What a client did."""

    operations: int
    failures: int
    seconds: float


class Worker:
    """A client process of traffic.c, ready to work."""

    def __init__(self, pod: Pod, program: Path, *arguments: object) -> None:
        self.address = pod.ips[4]
        self.process = pod.netns.popen(
            [str(program), *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._line() == "ready", f"{arguments} did not get ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def begin(self, seconds: float) -> None:
        """Starts to work for so long."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n".encode())
        self.process.stdin.flush()

    def finish(self) -> Work:
        """Waits for the end of what was begun."""
        operations, failures, nanoseconds = map(int, self._line().split())
        return Work(operations, failures, nanoseconds / 1e9)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


class Rig:
    """`with Rig() as rig:` builds it; leaving the block leaves nothing behind."""

    def __init__(self, backends: int = 6, clients: int = 4, conntrack: Conntrack | None = None) -> None:
        """conntrack's timeouts are seconds by default, so that entries end while it is looked at."""
        self._stack = ExitStack()
        self._cluster = Cluster(backends, clients, conntrack=conntrack or Conntrack(timeouts=dict(Conntrack.SHORT)))
        self._servers: list[tuple[subprocess.Popen[bytes], Path]] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.program = self.directory / "traffic"
            subprocess.run(["cc", "-O2", "-o", str(self.program), str(SOURCE)], check=True)
            self.cluster = stack.enter_context(self._cluster)
            for protocol, ports in PORTS.items():
                for port in ports:
                    self._service(port, protocol, _TARGET)
            self._service(REFUSED_PORT, "tcp", _NOBODY)
            for index, pod in enumerate(self.cluster.backend_pods):
                log = self.directory / f"accepted-{index}"
                server = pod.netns.popen([str(self.program), "serve", str(_TARGET), str(log)], stdout=subprocess.PIPE)
                stack.callback(server.wait)
                stack.callback(server.kill)
                assert server.stdout is not None
                assert server.stdout.readline() == b"ready\n"
                self._servers.append((server, log))
            self._stack = stack.pop_all()
        return self

    def _service(self, port: int, protocol: str, target: int) -> None:
        self.cluster.add_service(
            f"bench-{protocol}-{port}", port=port, target_port=target, protocol=protocol, served=False
        )

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def node(self) -> Namespace:
        """The node's namespace."""
        return self.cluster.node

    def expire(self) -> None:
        """Waits until conntrack has forgotten every TCP connection. It is slow by itself; a listing makes it look.

        Raises RuntimeError if it does not.
        """
        end = time.monotonic() + _EXPIRES_S
        while self.node.run(["conntrack", "-L", "-p", "tcp"]):
            if time.monotonic() > end:
                raise RuntimeError(f"connections did not leave conntrack within {_EXPIRES_S} s")
            time.sleep(0.5)

    def ledger(self) -> npt.NDArray[Any]:
        """What the servers accepted and saw the end of since this was asked last, of ACCEPTED."""
        parts = []
        for server, log in self._servers:
            server.send_signal(signal.SIGUSR1)
            assert server.stdout is not None
            assert server.stdout.readline() == b"written\n"
            parts.append(np.fromfile(log, ACCEPTED))
        return np.concatenate(parts, dtype=ACCEPTED)

    def targets(self, protocol: str = "tcp") -> list[str]:
        """The services, as traffic.c takes them."""
        return [f"{self.cluster.vip(f'bench-{protocol}-{port}')[0]}:{port}" for port in PORTS[protocol]]

    def refusing(self) -> str:
        """The service behind which nobody listens."""
        return f"{self.cluster.vip(f'bench-tcp-{REFUSED_PORT}')[0]}:{REFUSED_PORT}"

    def workers(self, what: str, *arguments: object, count: int | None = None) -> list[Worker]:
        """`count` client processes, dealt over the client pods; by default one in each. They end with the rig."""
        pods = self.cluster.client_pods
        made = [Worker(pods[index % len(pods)], self.program, what, *arguments) for index in range(count or len(pods))]
        for worker in made:
            self._stack.callback(worker.close)
        return made
