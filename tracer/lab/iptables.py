"""Loads rule sets into a namespace with iptables-restore, legacy or nft, and finds out which of them works.

Knows the commands. What the rules say is in `rules`.
"""

import ipaddress
from collections.abc import Sequence

from tracer.errors import TracerError, UsageError
from tracer.lab import rules
from tracer.lab.netns import Namespace

BACKENDS = ("nft", "legacy")


class Loader:
    """kube-proxy's rules of one address family in one namespace; remembers what is loaded."""

    def __init__(self, namespace: Namespace, pod_cidr: str, backend: str = "auto") -> None:
        """`backend` is "nft", "legacy" or "auto": nft if this machine can do it, else legacy."""
        if backend not in ("auto", *BACKENDS):
            raise UsageError(f"There is no iptables backend {backend!r}: choose nft, legacy or auto")
        self._namespace = namespace
        self._pod_cidr = pod_cidr
        self._choices = list(BACKENDS) if backend == "auto" else [backend]
        self._loaded: tuple[rules.Service, ...] | None = None
        self._program = "ip6tables" if ipaddress.ip_network(pod_cidr).version == 6 else "iptables"

    @property
    def backend(self) -> str:
        """The backend in use, "nft" or "legacy"; settled by the first load."""
        return self._choices[0]

    def load(self, services: Sequence[rules.Service]) -> None:
        """Replaces the rules by those for these services. Raises TracerError with what iptables said.

        Connections stay where they are, and so do the clients of a service with session affinity: the new rules take
        over a list of `xt_recent` by its name before the old ones let go of it.
        """
        text = rules.document(services, self._pod_cidr, self._loaded)
        failures: list[TracerError] = []
        for backend in list(self._choices):
            try:
                self._namespace.run([f"{self._program}-{backend}-restore", "-w", "10", "--noflush"], text)
            except TracerError as error:
                failures.append(error)
                continue
            self._choices = [backend]
            self._loaded = tuple(services)
            return
        raise TracerError("; ".join(str(failure) for failure in failures))

    def save(self, table: str = "nat") -> str:
        """What the kernel holds, as iptables-save prints it."""
        return self._namespace.run([f"{self._program}-{self.backend}-save", "-t", table])
