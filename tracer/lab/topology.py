"""The lab's network: addresses, and the veth pairs and bridge that join the pods to their node.

Knows interfaces and settings. Services and traffic are elsewhere. Every setting is made inside the lab's own
namespaces; nothing of the host changes.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tracer.errors import UsageError
from tracer.lab.netns import Namespace

POD_CIDR = {4: "10.244.0.0/16", 6: "fd00:10:244::/48"}
_POD_NETWORK = {4: "10.244.1.{}/24", 6: "fd00:10:244:1::{}/64"}
_VIRTUAL = {4: "10.96.0.{}", 6: "fd00:10:96::{}"}
#: The node's own network, with a gateway that nobody is: what is sent there gets no answer.
_NODE = {4: ("172.30.0.2/24", "172.30.0.1"), 6: ("fd00:172:30::2/64", "fd00:172:30::1")}
_FIRST_BACKEND, _FIRST_CLIENT, _LAST = 10, 150, 250
MOST_BACKENDS = _FIRST_CLIENT - _FIRST_BACKEND
MOST_CLIENTS = _LAST - _FIRST_CLIENT

#: Addresses can be used at once: nobody looks for duplicates or for routers.
_QUIET_IPV6: dict[str, str | int] = {
    "net.ipv6.conf.default.accept_dad": 0,
    "net.ipv6.conf.default.dad_transmits": 0,
    "net.ipv6.conf.default.accept_ra": 0,
    "net.ipv6.conf.default.router_solicitations": 0,
}

FAMILIES = {"ipv4": (4,), "ipv6": (6,), "dual": (4, 6)}


@dataclass(frozen=True)
class Pod:
    """One pod: its namespace and its address in each family."""

    name: str
    netns: Namespace
    ips: dict[int, str]
    last: int  # the end of its addresses

    @property
    def addresses(self) -> list[str]:
        """Its addresses in all families, IPv4 first."""
        return list(self.ips.values())


@dataclass(frozen=True)
class Conntrack:
    """What the node's connection tracking shall do. Timeouts are in seconds, by the state they are for."""

    accounting: bool = True
    timestamps: bool = False
    timeouts: dict[str, int] = field(default_factory=dict)

    #: Timeouts under which entries go within seconds, for tests that wait for their end.
    SHORT: ClassVar = {
        "time_wait": 2,
        "close": 1,
        "close_wait": 5,
        "fin_wait": 5,
        "last_ack": 5,
        "syn_sent": 5,
        "syn_recv": 5,
    }

    def settings(self) -> dict[str, str | int]:
        """The same as sysctl keys and values."""
        prefix = "net.netfilter.nf_conntrack_"
        return {
            f"{prefix}acct": int(self.accounting),
            f"{prefix}timestamp": int(self.timestamps),
            **{f"{prefix}tcp_timeout_{state}": seconds for state, seconds in self.timeouts.items()},
        }


def virtual_address(family: int, number: int) -> str:
    """The virtual IP of the service with that number, from 0."""
    return _VIRTUAL[family].format(number + 10)


def make_pod(netns: Namespace, role: str, index: int, families: Sequence[int]) -> Pod:
    """The pod with its addresses; `role` is "backend" or "client"."""
    first, most = (_FIRST_BACKEND, MOST_BACKENDS) if role == "backend" else (_FIRST_CLIENT, MOST_CLIENTS)
    if index >= most:
        raise UsageError(f"The lab's node has room for {most} {role} pods: ask for fewer")
    ips = {family: _POD_NETWORK[family].format(first + index).split("/")[0] for family in families}
    return Pod(netns.name, netns, ips, first + index)


def _node_settings(families: Iterable[int]) -> dict[str, str | int]:
    settings: dict[str, str | int] = {}
    for family in families:
        if family == 4:
            settings["net.ipv4.ip_forward"] = 1
            settings["net.bridge.bridge-nf-call-iptables"] = 1
            for device in ("all", "default"):
                settings[f"net.ipv4.conf.{device}.rp_filter"] = 0
                # client and backend share the bridge, and a redirect would lead past the rewrite
                settings[f"net.ipv4.conf.{device}.send_redirects"] = 0
        else:
            settings["net.ipv6.conf.all.forwarding"] = 1
            settings["net.bridge.bridge-nf-call-ip6tables"] = 1
            settings |= _QUIET_IPV6
    return settings


def _pod_settings(families: Iterable[int]) -> dict[str, str | int]:
    """So that tens of thousands of connections find a fresh port each, and end as usual."""
    settings: dict[str, str | int] = {
        "net.ipv4.ip_local_port_range": "10240 65535",
        "net.ipv4.tcp_tw_reuse": 0,
        "net.ipv4.tcp_max_tw_buckets": 262144,
        "net.core.somaxconn": 4096,
    }
    return settings | (_QUIET_IPV6 if 6 in families else {})


def _addresses(device: str, families: Iterable[int], last: int) -> list[str]:
    return [
        f"addr add {_POD_NETWORK[family].format(last)} dev {device}" + (" nodad" if family == 6 else "")
        for family in families
    ]


def _pod_script(pod: Pod) -> str:
    lines = ["link set lo up", *_addresses("eth0", pod.ips, pod.last), "link set eth0 up"]
    for family in pod.ips:
        gateway = _POD_NETWORK[family].format(1).split("/")[0]
        lines.append(f"route add default via {gateway}")
    return "\n".join(lines) + "\n"


def connect(node: Namespace, pods: Sequence[Pod], families: Sequence[int], conntrack: Conntrack) -> None:
    """Builds the bridge in the node and a veth pair from it to each pod, and makes all settings."""
    for pod in pods:
        pod.netns.sysctl(_pod_settings(families))
    if 6 not in families:
        for namespace in (node, *(pod.netns for pod in pods)):
            namespace.call(_without_ipv6)
    node.sysctl(_node_settings(families) | conntrack.settings())

    lines = [
        "link set lo up",
        "link add cni0 type bridge mcast_snooping 0",
        *_addresses("cni0", families, 1),
        "link set cni0 up",
        # without a default route the node could neither dial a virtual address nor refuse one
        "link add eth0 type veth peer name uplink",
        "link set uplink up",
        "link set eth0 up",
    ]
    for family in families:
        address, gateway = _NODE[family]
        lines.append(f"addr add {address} dev eth0" + (" nodad" if family == 6 else ""))
        lines.append(f"route add default via {gateway}")
    for number, pod in enumerate(pods):
        lines.append(f"link add veth{number} type veth peer name eth0 netns {pod.netns.pid}")
        lines.append(f"link set veth{number} master cni0 up")
    node.run(["ip", "-batch", "-"], "\n".join(lines) + "\n")
    started = [pod.netns.start(["ip", "-batch", "-"], _pod_script(pod)) for pod in pods]
    for command in started:
        command.finish()


def _without_ipv6() -> None:
    """Spares the pods router solicitations; a kernel without IPv6 has no such setting."""
    with suppress(FileNotFoundError):
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1\n", encoding="ascii")
