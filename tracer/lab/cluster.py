"""The miniature cluster: nodes, client pods, backend pods, and services that lead from the ones to the others.

Wires namespaces, network, rules and workers together, and takes all of it down again. What travels over it is
the caller's choice (`scenario` has a ready one). Make it in a thread that lives as long as the cluster (see `netns`).
"""

import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from tracer.errors import TracerError, UsageError
from tracer.lab import iptables as iptables_rules
from tracer.lab import ipvs, rules, topology
from tracer.lab import nftables as nftables_rules
from tracer.lab.netns import Namespace, open_all, wait_until
from tracer.lab.topology import Conntrack, Loader, Node, Pod
from tracer.lab.traffic import Client, Server

#: What kube-proxy's rules are made with.
PROXIES = ("iptables", "nftables", "ipvs")
POLICIES = ("Cluster", "Local")


@dataclass(frozen=True)
class LabService:
    """One service: its addresses in each family, and the numbers of the backends it has now.

    `node_port` is 0 and `load_balancers` empty where it has none.
    """

    namespace: str
    name: str
    port_name: str
    ips: dict[int, str]
    port: int
    target_port: int
    backends: tuple[int, ...]
    protocol: str
    node_port: int
    load_balancers: dict[int, str]
    external_policy: str
    affinity_seconds: int


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
        proxy: str = "iptables",
        iptables: str = "auto",
        conntrack: Conntrack | None = None,
        node: str = "node-1",
        nodes: int = 1,
        network: str = "bridge",
        outside: bool = False,
        hosts: int = 0,
        syn_retries: int | None = None,
        synack_retries: int | None = None,
    ) -> None:
        """`families` is "ipv4", "ipv6" or "dual", `iptables` "auto", "nft" or "legacy" (for the proxy "iptables").

        `network` is one of `topology.NETWORKS`. Backends and clients are dealt round robin over the `nodes`; `node` is
        the first one's name. With `outside` there is a host in the nodes' network that is no part of the cluster.
        `hosts` client processes run in the nodes' own namespaces, dealt likewise. The retries are TCP's, everywhere.

        It begins with one service, "web", port 80, on all backends.
        """
        _choose("families", families, tuple(topology.FAMILIES))
        _choose("proxy", proxy, PROXIES)
        _choose("network", network, topology.NETWORKS)
        if not 1 <= nodes <= topology.MOST_NODES:
            raise UsageError(f"The lab has room for 1 to {topology.MOST_NODES} nodes: {nodes} were asked for")
        most_backends, most_clients = nodes * topology.MOST_BACKENDS, nodes * topology.MOST_CLIENTS
        if not (0 <= backends <= most_backends and 0 <= clients <= most_clients):
            raise UsageError(
                f"The lab's {nodes} node(s) have room for {most_backends} backends and {most_clients} clients: "
                f"{backends} and {clients} were asked for"
            )
        self.families = topology.FAMILIES[families]
        self._counts = (backends, clients, hosts)
        self._proxy = proxy
        self._iptables = iptables
        self._conntrack = conntrack or Conntrack()
        self._node_names = [node, *(f"{node.removesuffix('-1')}-{number}" for number in range(2, nodes + 1))]
        self._network = network
        self._with_outside = outside
        retries = {"net.ipv4.tcp_syn_retries": syn_retries, "net.ipv4.tcp_synack_retries": synack_retries}
        self._tcp: dict[str, str | int] = {key: value for key, value in retries.items() if value is not None}
        self._stack = ExitStack()
        self._ports: set[tuple[str, int]] = set()
        self._open = False
        self._further: list[Client] = []
        self.node: Namespace  # the first of the nodes
        self.nodes: list[Node] = []
        self.backend_pods: list[Pod] = []
        self.client_pods: list[Pod] = []
        self.servers: list[Server] = []
        self.clients: list[Client] = []
        self.host_clients: list[Client] = []
        self.outside: Namespace
        self.outside_client: Client
        self.outside_server: Server  # listens to nothing until told to
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
        backends, clients, hosts = self._counts
        names = [f"web-{index}" for index in range(backends)] + [f"client-{index}" for index in range(clients)]
        segmented = self._with_outside or len(self._node_names) > 1
        further = ["segment"] * segmented + ["outside"] * self._with_outside
        namespaces = open_all([*self._node_names, *names, *further])
        for namespace in namespaces:
            self._stack.callback(namespace.close)
        made = iter(namespaces)
        self.nodes = [
            topology.make_node(next(made), number, self.families) for number in range(1, len(self._node_names) + 1)
        ]
        self.node = self.nodes[0].netns
        self.backend_pods = [self._make_pod(next(made), "backend", index) for index in range(backends)]
        self.client_pods = [self._make_pod(next(made), "client", index) for index in range(clients)]
        segment = next(made) if segmented else None
        outside = next(made) if self._with_outside else None
        # the workers start while the network is being built
        self.servers = [self._stack.enter_context(Server(pod.netns)) for pod in self.backend_pods]
        self.clients = [self._stack.enter_context(Client(pod.netns)) for pod in self.client_pods]
        if outside:
            self.outside = outside
            self.outside_server = self._stack.enter_context(Server(outside))
            self.outside_client = self.client_in(outside)
        self.host_clients = [self.client_in(self.nodes[index % len(self.nodes)]) for index in range(hosts)]
        topology.connect(self.nodes, self._conntrack, self._network, segment=segment, outside=outside, tcp=self._tcp)
        for node in self.nodes:
            node.loaders = {family: self._loader(node, family) for family in self.families}
        self._open = True
        self.add_service("web")

    def _make_pod(self, netns: Namespace, role: str, index: int) -> Pod:
        nodes = self.nodes
        return topology.make_pod(netns, role, index // len(nodes), nodes[index % len(nodes)])

    def _loader(self, node: Node, family: int) -> Loader:
        if self._proxy == "iptables":
            return iptables_rules.Loader(node.netns, topology.POD_CIDR[family], self._iptables)
        if self._proxy == "ipvs":
            return ipvs.Loader(node.netns, topology.POD_CIDR[family], [node.addresses[family]])
        return nftables_rules.Loader(node.netns, topology.POD_CIDR[family], node_addresses=[node.addresses[family]])

    def client_in(self, where: Pod | Node | Namespace) -> Client:
        """A further client process, in this pod, or as a host process in this node. It ends with the cluster."""
        client = self._stack.enter_context(Client(where if isinstance(where, Namespace) else where.netns))
        self._further.append(client)
        return client

    @property
    def iptables(self) -> str:
        """What the rules are made with: "nft" or "legacy" iptables, "nftables" or "ipvs"."""
        return self.nodes[0].loaders[self.families[0]].backend

    def saved_rules(self, family: int | None = None, table: str = "nat", node: int = 0) -> str:
        """The rules that this node's kernel holds, as iptables-save (or `nft list`) prints them."""
        return self.nodes[node].loaders[family or self.families[0]].save(table)

    def add_service(
        self,
        name: str,
        backends: Iterable[int] | None = None,
        *,
        port: int = 80,
        target_port: int = 8080,
        namespace: str = "shop",
        port_name: str = "http",
        protocol: str = "tcp",
        node_port: int = 0,
        load_balancer: bool = False,
        external_policy: str = "Cluster",
        affinity_seconds: int = 0,
        served: bool = True,
    ) -> LabService:
        """A further service, on all backends unless some are given; its backends serve on `target_port`.

        Unless it is to be `served`: then what listens there, if anything, is the caller's business.

        `external_policy` is "Cluster" or "Local", for what comes in by the node port or the load balancer (whose
        traffic reaches the first node). `affinity_seconds`: so long a client stays with its backend (sessionAffinity:
        ClientIP); 0 for none.
        """
        if name in self.services:
            raise UsageError(f"The lab has a service {name} already: choose another name or use set_backends")
        _choose("external_policy", external_policy, POLICIES)
        chosen = self._checked(range(len(self.servers)) if backends is None else backends)
        if served and (protocol, target_port) not in self._ports:
            for server, pod in zip(self.servers, self.backend_pods, strict=True):
                server.listen(pod.addresses, target_port, protocol)
            self._ports.add((protocol, target_port))
        number = len(self.services)
        balanced = self.families if load_balancer else ()
        service = LabService(
            namespace=namespace,
            name=name,
            port_name=port_name,
            ips={family: topology.virtual_address(family, number) for family in self.families},
            port=port,
            target_port=target_port,
            backends=chosen,
            protocol=protocol,
            node_port=node_port,
            load_balancers={family: topology.load_balancer_address(family, number) for family in balanced},
            external_policy=external_policy,
            affinity_seconds=affinity_seconds,
        )
        self._change(service)
        return service

    def set_backends(self, name: str, backends: Iterable[int]) -> LabService:
        """Replaces the service's backends, by number, as kube-proxy would; standing connections stay where they are."""
        service = replace(self.services[name], backends=self._checked(backends))
        self._change(service)
        return service

    def vip(self, name: str = "web", family: int | None = None) -> tuple[str, int]:
        """Virtual address and port of a service, as a client dials it."""
        service = self.services[name]
        return service.ips[family or self.families[0]], service.port

    def node_port(self, name: str, node: int = 0, family: int | None = None) -> tuple[str, int]:
        """Address of a node, by its place in `nodes`, and the service's port there."""
        service = self.services[name]
        if not service.node_port:
            raise UsageError(f"The service {name} has no node port: add it with node_port=30000, say")
        return self.nodes[node].addresses[family or self.families[0]], service.node_port

    def load_balancer(self, name: str, family: int | None = None) -> tuple[str, int]:
        """The load balancer's address for a service, and the port."""
        service = self.services[name]
        if not service.load_balancers:
            raise UsageError(f"The service {name} has no load balancer: add it with load_balancer=True")
        return service.load_balancers[family or self.families[0]], service.port

    def settle(self) -> None:
        """Waits until the servers have seen every connection that the clients made, and every close.

        Holds only while all connections lead to these servers. Raises TracerError if it takes too long.
        """

        def settled() -> bool:
            clients = [client.totals() for client in (*self.clients, *self._further)]
            servers = [server.totals() for server in self._every_server()]
            return sum(c["established"] for c in clients) == sum(s["accepted"] for s in servers) and sum(
                c["held"] for c in clients
            ) == sum(s["open"] for s in servers)

        wait_until(settled, "the servers to see every connection of the clients")

    def _every_server(self) -> list[Server]:
        return [*self.servers, *([self.outside_server] if self._with_outside else [])]

    def _checked(self, backends: Iterable[int]) -> tuple[int, ...]:
        chosen = tuple(backends)
        if any(not 0 <= number < len(self.servers) for number in chosen):
            raise UsageError(f"The lab has backends 0 to {len(self.servers) - 1}, not {chosen}: choose among them")
        return chosen

    def _change(self, changed: LabService) -> None:
        """Loads the rules with one service changed or added; nothing changes here if the kernel refuses them."""
        if not self._open:
            raise TracerError(f"The lab is not open, so service {changed.name} cannot change: use it in a with block")
        services = self.services | {changed.name: changed}
        for node in self.nodes:
            for family, loader in node.loaders.items():
                loader.load([self._rule(service, node, family) for service in services.values()])
        self.services = services
        self.history.append(Change(time.time_ns(), changed.name, changed.backends))

    def _rule(self, service: LabService, node: Node, family: int) -> rules.Service:
        """The service as this node's kube-proxy knows it."""
        pods = [self.backend_pods[index] for index in service.backends]
        return rules.Service(
            service.namespace,
            service.name,
            service.port_name,
            service.ips[family],
            service.port,
            tuple((pod.ips[family], service.target_port) for pod in pods),
            protocol=service.protocol,
            node_port=service.node_port,
            load_balancers=tuple(ip for ip_family, ip in service.load_balancers.items() if ip_family == family),
            local_endpoints=tuple((pod.ips[family], service.target_port) for pod in pods if pod.node is node),
            external_policy=service.external_policy,
            affinity_seconds=service.affinity_seconds,
        )


def _choose(what: str, given: str, among: tuple[str, ...]) -> None:
    if given not in among:
        raise UsageError(f"There is no {what} {given!r} in the lab: choose among {', '.join(among)}")
