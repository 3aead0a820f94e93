"""The miniature cluster: one node, client pods, backend pods, and services that lead from the ones to the others.

Wires namespaces, network, rules and workers together, and takes all of it down again. What travels over it is
the caller's choice (`scenario` has a ready one). Make it in a thread that lives as long as the cluster (see `netns`).
"""

import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tracer.errors import TracerError, UsageError
from tracer.lab import rules, topology
from tracer.lab.iptables import Loader
from tracer.lab.netns import Namespace, open_all, wait_until
from tracer.lab.topology import Conntrack, Pod
from tracer.lab.traffic import Client, Server


@dataclass(frozen=True)
class LabService:
    """One service: its virtual address in each family, and the numbers of the backends it has now."""

    namespace: str
    name: str
    port_name: str
    ips: dict[int, str]
    port: int
    target_port: int
    backends: tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """From `time_ns` (CLOCK_REALTIME) on, the service had these backends."""

    time_ns: int
    service: str
    backends: tuple[int, ...]


class Cluster:
    """`with Cluster(backends=6, clients=2) as cluster:` builds it; leaving the block leaves nothing behind."""

    def __init__(
        self,
        backends: int = 6,
        clients: int = 2,
        *,
        families: str = "ipv4",
        iptables: str = "auto",
        conntrack: Conntrack | None = None,
        node: str = "node-1",
    ) -> None:
        """`families` is "ipv4", "ipv6" or "dual", `iptables` "auto", "nft" or "legacy".

        It begins with one service, "web", port 80, on all backends.
        """
        if families not in topology.FAMILIES:
            raise UsageError(f"There are no families {families!r}: choose ipv4, ipv6 or dual")
        if not (0 <= backends <= topology.MOST_BACKENDS and 0 <= clients <= topology.MOST_CLIENTS):
            raise UsageError(
                f"The lab's node has room for {topology.MOST_BACKENDS} backends and {topology.MOST_CLIENTS} clients: "
                f"{backends} and {clients} were asked for"
            )
        self.families = topology.FAMILIES[families]
        self._counts = (backends, clients)
        self._iptables = iptables
        self._conntrack = conntrack or Conntrack()
        self._node_name = node
        self._stack = ExitStack()
        self._loaders: dict[int, Loader] = {}
        self._ports: set[int] = set()
        self.node: Namespace
        self.backend_pods: list[Pod] = []
        self.client_pods: list[Pod] = []
        self.servers: list[Server] = []
        self.clients: list[Client] = []
        self.services: dict[str, LabService] = {}
        self.history: list[Change] = []

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process of the cluster and, with them, its namespaces. Idempotent."""
        self._stack.close()

    def _build(self) -> None:
        backends, clients = self._counts
        names = [f"web-{index}" for index in range(backends)] + [f"client-{index}" for index in range(clients)]
        self.node, *namespaces = open_all([self._node_name, *names])
        for namespace in (self.node, *namespaces):
            self._stack.callback(namespace.close)
        self.backend_pods = [
            topology.make_pod(netns, "backend", index, self.families)
            for index, netns in enumerate(namespaces[:backends])
        ]
        self.client_pods = [
            topology.make_pod(netns, "client", index, self.families)
            for index, netns in enumerate(namespaces[backends:])
        ]
        # the workers start while the network is being built
        self.servers = [self._stack.enter_context(Server(pod.netns)) for pod in self.backend_pods]
        self.clients = [self._stack.enter_context(Client(pod.netns)) for pod in self.client_pods]
        topology.connect(self.node, [*self.backend_pods, *self.client_pods], self.families, self._conntrack)
        self._loaders = {
            family: Loader(self.node, topology.POD_CIDR[family], self._iptables) for family in self.families
        }
        self.add_service("web")

    @property
    def iptables(self) -> str:
        """The iptables backend in use: "nft" or "legacy"."""
        return self._loaders[self.families[0]].backend

    def saved_rules(self, family: int | None = None, table: str = "nat") -> str:
        """The rules that the node's kernel holds, as iptables-save prints them."""
        return self._loaders[family or self.families[0]].save(table)

    def add_service(
        self,
        name: str,
        backends: Iterable[int] | None = None,
        *,
        port: int = 80,
        target_port: int = 8080,
        namespace: str = "shop",
        port_name: str = "http",
    ) -> LabService:
        """A further service, on all backends unless some are given; its backends serve on `target_port`."""
        if name in self.services:
            raise UsageError(f"The lab has a service {name} already: choose another name or use set_backends")
        chosen = self._checked(range(len(self.servers)) if backends is None else backends)
        if target_port not in self._ports:
            for server, pod in zip(self.servers, self.backend_pods, strict=True):
                server.listen(pod.addresses, target_port)
            self._ports.add(target_port)
        ips = {family: topology.virtual_address(family, len(self.services)) for family in self.families}
        service = LabService(namespace, name, port_name, ips, port, target_port, chosen)
        self._change(service)
        return service

    def set_backends(self, name: str, backends: Iterable[int]) -> LabService:
        """Replaces the service's backends, by number, as kube-proxy would; standing connections stay where they are."""
        old = self.services[name]
        service = LabService(
            old.namespace, name, old.port_name, old.ips, old.port, old.target_port, self._checked(backends)
        )
        self._change(service)
        return service

    def vip(self, name: str = "web", family: int | None = None) -> tuple[str, int]:
        """Virtual address and port of a service, as a client dials it."""
        service = self.services[name]
        return service.ips[family or self.families[0]], service.port

    def settle(self) -> None:
        """Waits until the servers have seen every connection that the clients made, and every close.

        Holds only while all connections lead to these servers. Raises TracerError if it takes too long.
        """

        def settled() -> bool:
            clients = [client.totals() for client in self.clients]
            servers = [server.totals() for server in self.servers]
            return sum(c["established"] for c in clients) == sum(s["accepted"] for s in servers) and sum(
                c["held"] for c in clients
            ) == sum(s["open"] for s in servers)

        wait_until(settled, "the servers to see every connection of the clients")

    def _checked(self, backends: Iterable[int]) -> tuple[int, ...]:
        chosen = tuple(backends)
        if any(not 0 <= number < len(self.servers) for number in chosen):
            raise UsageError(f"The lab has backends 0 to {len(self.servers) - 1}, not {chosen}: choose among them")
        return chosen

    def _change(self, changed: LabService) -> None:
        """Loads the rules with one service changed or added; nothing changes here if the kernel refuses them."""
        if not self._loaders:
            raise TracerError(f"The lab is not open, so service {changed.name} cannot change: use it in a with block")
        services = self.services | {changed.name: changed}
        for family, loader in self._loaders.items():
            loader.load([self._rule(service, family) for service in services.values()])
        self.services = services
        self.history.append(Change(time.time_ns(), changed.name, changed.backends))

    def _rule(self, service: LabService, family: int) -> rules.Service:
        endpoints = tuple((self.backend_pods[index].ips[family], service.target_port) for index in service.backends)
        return rules.Service(
            service.namespace, service.name, service.port_name, service.ips[family], service.port, endpoints
        )
