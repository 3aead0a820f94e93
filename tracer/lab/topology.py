"""The lab's network: addresses, and the interfaces, routes and settings that join pods, nodes and the outside.

Knows what a CNI plugin knows: how the pods of a node are joined (`NETWORKS`), how nodes reach each other's pods, and
what leaves the cluster under a node's address. Services and traffic are elsewhere. Every setting is made inside the
lab's own namespaces; nothing of the host changes.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from tracer.errors import UsageError
from tracer.lab import rules
from tracer.lab.netns import Namespace

#: How the pods of a node are joined.
#: bridge: a bridge whose frames pass netfilter (br_netfilter), as with kubenet, flannel or the bridge plugin.
#: unfiltered: the same without br_netfilter. Two pods of one node reach each other past conntrack. An answer from a pod
#:   to its neighbour would go past the rewrite too, so what kube-proxy rewrote to a pod of the client's own node is
#:   masqueraded as well (with kube-proxy, that takes --masquerade-all).
#: routed: no bridge, a veth pair and a host route per pod, as with Calico.
NETWORKS = ("bridge", "unfiltered", "routed")

POD_CIDR = {4: "10.244.0.0/16", 6: "fd00:10:244::/48"}
#: By the number of the node, from 1.
_POD_NETWORK = {4: "10.244.{}.{}/24", 6: "fd00:10:244:{}::{}/64"}
_VIRTUAL = {4: "10.96.0.{}", 6: "fd00:10:96::{}"}
_BALANCED = {4: "172.31.0.{}", 6: "fd00:172:31::{}"}
#: The network of the nodes' eth0 (node 1 has address 2), and the outside host's address there.
_SEGMENT = {4: "172.30.0.{}/24", 6: "fd00:172:30::{}/64"}
_OUTSIDE = 100
#: The nodes' default gateway, which nobody is: what is sent there gets no answer.
_GATEWAY = {4: "172.30.0.1", 6: "fd00:172:30::1"}
#: What a routed pod takes for its gateway, and the hardware address behind it. The node answers for the IPv4 one by
#: proxy ARP; the IPv6 one follows from the hardware address (RFC 4291, appendix A).
_LINK_GATEWAY = {4: "169.254.1.1", 6: "fe80::ecee:eeff:feee:eeee"}
_GATEWAY_MAC = "ee:ee:ee:ee:ee:ee"
_FIRST_BACKEND, _FIRST_CLIENT, _LAST = 10, 150, 250
MOST_BACKENDS = _FIRST_CLIENT - _FIRST_BACKEND
MOST_CLIENTS = _LAST - _FIRST_CLIENT
MOST_NODES = 20

#: Addresses can be used at once: nobody looks for duplicates or for routers.
_QUIET_IPV6: dict[str, str | int] = {
    "net.ipv6.conf.default.accept_dad": 0,
    "net.ipv6.conf.default.dad_transmits": 0,
    "net.ipv6.conf.default.accept_ra": 0,
    "net.ipv6.conf.default.router_solicitations": 0,
}

FAMILIES = {"ipv4": (4,), "ipv6": (6,), "dual": (4, 6)}


class Loader(Protocol):
    """kube-proxy's rules of one family on one node: what `iptables.Loader` and `nftables.Loader` have in common."""

    @property
    def backend(self) -> str:
        """What the rules are made with."""

    def load(self, services: Sequence[rules.Service]) -> None:
        """Replaces the rules by those for these services."""

    def save(self, table: str = "nat") -> str:
        """What the kernel holds."""


@dataclass(eq=False)
class Node:
    """One node: its namespace, its address in each family, its pods, and the loaders of its kube-proxy rules."""

    name: str
    number: int  # from 1; decides its addresses
    netns: Namespace
    addresses: dict[int, str]
    pods: list["Pod"] = field(default_factory=list, repr=False)
    loaders: dict[int, Loader] = field(default_factory=dict, repr=False)

    def pod_network(self, family: int) -> str:
        """The part of the cluster's pod CIDR that its pods are in."""
        return str(ipaddress.ip_interface(_POD_NETWORK[family].format(self.number, 1)).network)


@dataclass(frozen=True)
class Pod:
    """One pod: its namespace, its address in each family, and its node."""

    name: str
    netns: Namespace
    ips: dict[int, str]
    last: int  # the end of its addresses
    node: Node = field(repr=False, compare=False)

    @property
    def addresses(self) -> list[str]:
        """Its addresses in all families, IPv4 first."""
        return list(self.ips.values())


@dataclass(frozen=True)
class Conntrack:
    """What the nodes' connection tracking shall do; None leaves a setting to the kernel.

    Timeouts are in seconds: by the TCP state they are for, or "udp" (nothing came back yet) and "udp_stream". Events
    are nf_conntrack_events: 0 off, 1 on, 2 while somebody listens (the kernel's default since 5.19).
    """

    accounting: bool = True
    timestamps: bool = False
    timeouts: dict[str, int] = field(default_factory=dict)
    events: int | None = None

    #: Timeouts under which entries go within seconds, for tests that wait for their end.
    SHORT: ClassVar = {
        "time_wait": 2,
        "close": 1,
        "close_wait": 5,
        "fin_wait": 5,
        "last_ack": 5,
        "syn_sent": 5,
        "syn_recv": 5,
        "udp": 2,
        "udp_stream": 3,
    }
    _UDP: ClassVar = {"udp": "udp_timeout", "udp_stream": "udp_timeout_stream"}

    def settings(self) -> dict[str, str | int]:
        """The same as sysctl keys and values."""
        prefix = "net.netfilter.nf_conntrack_"
        settings: dict[str, str | int] = {
            f"{prefix}acct": int(self.accounting),
            f"{prefix}timestamp": int(self.timestamps),
            **{
                prefix + self._UDP.get(state, f"tcp_timeout_{state}"): seconds
                for state, seconds in self.timeouts.items()
            },
        }
        if self.events is not None:
            settings[f"{prefix}events"] = self.events
        return settings


def virtual_address(family: int, number: int) -> str:
    """The virtual IP of the service with that number, from 0."""
    return _VIRTUAL[family].format(number + 10)


def load_balancer_address(family: int, number: int) -> str:
    """The load balancer's address for the service with that number, from 0; the outside host has a route to it."""
    return _BALANCED[family].format(number + 10)


def outside_addresses(families: Iterable[int]) -> dict[int, str]:
    """The outside host's address in each family."""
    return {family: _bare(_SEGMENT[family].format(_OUTSIDE)) for family in families}


def make_node(netns: Namespace, number: int, families: Iterable[int]) -> Node:
    """The node with its addresses; `number` counts from 1."""
    addresses = {family: _bare(_SEGMENT[family].format(number + 1)) for family in families}
    return Node(netns.name, number, netns, addresses)


def make_pod(netns: Namespace, role: str, index: int, node: Node) -> Pod:
    """The pod with its addresses, put on its node; `role` is "backend" or "client", `index` counts the node's."""
    first, most = (_FIRST_BACKEND, MOST_BACKENDS) if role == "backend" else (_FIRST_CLIENT, MOST_CLIENTS)
    if index >= most:
        raise UsageError(f"A node of the lab has room for {most} {role} pods: ask for fewer")
    ips = {family: _bare(_POD_NETWORK[family].format(node.number, first + index)) for family in node.addresses}
    pod = Pod(netns.name, netns, ips, first + index, node)
    node.pods.append(pod)
    return pod


def _bare(address: str) -> str:
    return address.split("/")[0]


def _node_settings(families: Iterable[int], network: str) -> dict[str, str | int]:
    settings: dict[str, str | int] = {}
    for family in families:
        if family == 4:
            settings["net.ipv4.ip_forward"] = 1
            for device in ("all", "default"):
                settings[f"net.ipv4.conf.{device}.rp_filter"] = 0
                # client and backend share the bridge, and a redirect would lead past the rewrite
                settings[f"net.ipv4.conf.{device}.send_redirects"] = 0
        else:
            settings["net.ipv6.conf.all.forwarding"] = 1
            settings |= _QUIET_IPV6
        if network == "bridge":
            settings[f"net.bridge.bridge-nf-call-ip{'6' if family == 6 else ''}tables"] = 1
    return settings


def _proxy_arp(pods: int) -> dict[str, str | int]:
    """The node answers for the routed pods' gateway, and without taking its time over it."""
    answers: dict[str, str | int] = {f"net.ipv4.conf.cali{number}.proxy_arp": 1 for number in range(pods)}
    return answers | {f"net.ipv4.neigh.cali{number}.proxy_delay": 0 for number in range(pods)}


def _host_settings(families: Iterable[int]) -> dict[str, str | int]:
    """So that tens of thousands of connections find a fresh port each, and end as usual."""
    settings: dict[str, str | int] = {
        "net.ipv4.ip_local_port_range": "10240 65535",
        "net.ipv4.tcp_tw_reuse": 0,
        "net.ipv4.tcp_max_tw_buckets": 262144,
        "net.core.somaxconn": 4096,
    }
    return settings | (_QUIET_IPV6 if 6 in families else {})


def _address(device: str, family: int, address: str) -> str:
    return f"addr add {address} dev {device}" + (" nodad" if family == 6 else "")


def _bridged_pod(pod: Pod) -> list[str]:
    """The pod's side where a bridge joins the node's pods."""
    lines = ["link set lo up"]
    lines += [_address("eth0", f, _POD_NETWORK[f].format(pod.node.number, pod.last)) for f in pod.ips]
    lines.append("link set eth0 up")
    lines += [f"route add default via {_bare(_POD_NETWORK[f].format(pod.node.number, 1))}" for f in pod.ips]
    return lines


def _routed_pod(pod: Pod) -> list[str]:
    """The pod's side where it has nothing but a link to its node."""
    lines = ["link set lo up", "link set eth0 up"]
    for family, address in pod.ips.items():
        gateway = _LINK_GATEWAY[family]
        lines.append(_address("eth0", family, address))
        if family == 4:
            lines.append(f"route add {gateway} dev eth0 scope link")
        lines.append(f"route add default via {gateway} dev eth0")
    return lines


def _bridged_node(node: Node) -> list[str]:
    """The bridge and a port for each pod. A frame may leave where it came in: a pod can be its own backend."""
    lines = ["link add cni0 type bridge mcast_snooping 0"]
    lines += [_address("cni0", family, _POD_NETWORK[family].format(node.number, 1)) for family in node.addresses]
    lines.append("link set cni0 up")
    for number, pod in enumerate(node.pods):
        lines.append(f"link add veth{number} type veth peer name eth0 netns {pod.netns.pid}")
        lines.append(f"link set veth{number} master cni0 up")
        lines.append(f"link set veth{number} type bridge_slave hairpin on")
    return lines


def _routed_node(node: Node) -> list[str]:
    """A link and a route for each pod."""
    lines = []
    for number, pod in enumerate(node.pods):
        lines.append(f"link add cali{number} address {_GATEWAY_MAC} type veth peer name eth0 netns {pod.netns.pid}")
        lines.append(f"link set cali{number} up")
        lines += [f"route add {address} dev cali{number}" for address in pod.addresses]
    return lines


def _uplink(node: Node, nodes: Sequence[Node]) -> list[str]:
    """The node's eth0, its routes to the other nodes' pods, and the default route.

    Without that one the node could neither dial a virtual address nor refuse one.
    """
    lines = ["link set eth0 up"]
    for family in node.addresses:
        lines.append(_address("eth0", family, _SEGMENT[family].format(node.number + 1)))
        lines.append(f"route add default via {_GATEWAY[family]}")
        for other in nodes:
            if other is not node:
                lines.append(f"route add {other.pod_network(family)} via {other.addresses[family]}")
    return lines


def _segment(nodes: Sequence[Node], outside: Namespace | None) -> list[str]:
    """The switch that the nodes' eth0 and the outside host's are plugged into."""
    lines = ["link add lan0 type bridge mcast_snooping 0", "link set lan0 up"]
    for number, netns in enumerate([*(node.netns for node in nodes), *([outside] if outside else [])]):
        lines.append(f"link add port{number} type veth peer name eth0 netns {netns.pid}")
        lines.append(f"link set port{number} master lan0 up")
    return lines


def _outside_host(node: Node) -> list[str]:
    """It knows the nodes, its neighbours, and sends what is for the load balancer to the first of them."""
    lines = ["link set lo up", "link set eth0 up"]
    for family, address in node.addresses.items():
        lines.append(_address("eth0", family, _SEGMENT[family].format(_OUTSIDE)))
        network = ipaddress.ip_network((load_balancer_address(family, 0), 24 if family == 4 else 64), strict=False)
        lines.append(f"route add {network} via {address}")
    return lines


def _masquerade(node: Node, network: str, segmented: bool) -> list[str]:
    """What a CNI plugin masquerades, in a table of its own, whatever kube-proxy's rules are made with.

    `ct status dnat`: the destination has been rewritten.
    """
    lines = []
    for family in node.addresses:
        word, own = ("ip" if family == 4 else "ip6"), node.pod_network(family)
        matches = []
        if segmented:
            matches.append(f"{word} saddr {own} {word} daddr != {POD_CIDR[family]}")
        if network == "unfiltered":
            matches.append(f"{word} saddr {own} {word} daddr {own} ct status dnat")
        if matches:
            chain = f"{word} cni-masquerade postrouting"
            lines.append(f"add table {word} cni-masquerade")
            lines.append(f"add chain {chain} {{ type nat hook postrouting priority srcnat ; }}")
            lines += [f"add rule {chain} {match} masquerade" for match in matches]
    return lines


def connect(
    nodes: Sequence[Node],
    conntrack: Conntrack,
    network: str = "bridge",
    *,
    segment: Namespace | None = None,
    outside: Namespace | None = None,
    tcp: dict[str, str | int] | None = None,
) -> None:
    """Builds all interfaces and routes, and makes all settings; `tcp` are further ones for all of pods, nodes, outside.

    With a `segment`, the nodes and the outside host share it; a single node without one has an eth0 that leads nowhere.
    Raises TracerError with what `ip`, `nft` or the kernel said.
    """
    families = list(nodes[0].addresses)
    hosts = [pod.netns for node in nodes for pod in node.pods] + ([outside] if outside else [])
    for host in hosts:
        host.sysctl(_host_settings(families) | (tcp or {}))
    if segment:
        segment.call(_without_ipv6)
        segment.call(_without_bridge_netfilter)
    if 6 not in families:
        for namespace in (*(node.netns for node in nodes), *hosts):
            namespace.call(_without_ipv6)
    for node in nodes:
        node.netns.sysctl(_node_settings(families, network) | conntrack.settings() | (tcp or {}))
        if network == "unfiltered":
            node.netns.call(_without_bridge_netfilter)

    if segment:
        _ip(segment, _segment(nodes, outside))
    for node in nodes:
        lines = ["link set lo up"]
        if not segment:
            lines += ["link add eth0 type veth peer name uplink", "link set uplink up"]
        lines += _uplink(node, nodes)
        lines += _routed_node(node) if network == "routed" else _bridged_node(node)
        _ip(node.netns, lines)
        if network == "routed" and 4 in families:
            node.netns.sysctl(_proxy_arp(len(node.pods)))
        tables = _masquerade(node, network, segment is not None)
        if tables:
            node.netns.run(["nft", "-f", "-"], "\n".join(tables) + "\n")
    inside = _routed_pod if network == "routed" else _bridged_pod
    scripts = [(pod.netns, inside(pod)) for node in nodes for pod in node.pods]
    if outside:
        scripts.append((outside, _outside_host(nodes[0])))
    started = [netns.start(_IP_BATCH, "\n".join(lines) + "\n") for netns, lines in scripts]
    for command in started:
        command.finish()


_IP_BATCH = ["ip", "-batch", "-"]


def _ip(netns: Namespace, lines: Sequence[str]) -> None:
    netns.run(_IP_BATCH, "\n".join(lines) + "\n")


def _without_ipv6() -> None:
    """Spares the pods router solicitations; a kernel without IPv6 has no such setting."""
    with suppress(FileNotFoundError):
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1\n", encoding="ascii")


def _without_bridge_netfilter() -> None:
    """Has frames on bridges pass no netfilter; without br_netfilter in the kernel none do anyway."""
    for program in ("iptables", "ip6tables"):
        with suppress(FileNotFoundError):
            Path(f"/proc/sys/net/bridge/bridge-nf-call-{program}").write_text("0\n", encoding="ascii")
