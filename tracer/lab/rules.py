"""kube-proxy's iptables rules for a list of services, as the text that iptables-restore takes.

Pure: services in, text out. Chain names, order and matches are kube-proxy's own (pkg/proxy/iptables/proxier.go),
so that a trace of the lab looks like a trace of a node. Loading the text is in `iptables`.
"""

import base64
import hashlib
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: The hooks into the built-in chains, put in once; everything else is replaced on every change.
_NAT_HOOKS = (
    '-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    '-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    '-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',
)
_FILTER_HOOKS = (
    '-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD',
    '-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    '-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
)
_NAT_BASE = ("KUBE-SERVICES", "KUBE-POSTROUTING", "KUBE-MARK-MASQ")
_FILTER_BASE = ("KUBE-SERVICES", "KUBE-FORWARD")


@dataclass(frozen=True)
class Service:
    """One port of one Kubernetes service, in one address family."""

    namespace: str
    name: str
    port_name: str
    address: str
    port: int
    endpoints: tuple[tuple[str, int], ...]
    protocol: str = "tcp"

    @property
    def title(self) -> str:
        """`shop/web:http`, as kube-proxy writes it in comments and hashes it into names."""
        return f"{self.namespace}/{self.name}" + (f":{self.port_name}" if self.port_name else "")

    @property
    def family(self) -> int:
        """4 or 6."""
        return ipaddress.ip_address(self.address).version


def _hash(text: str) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()[:16]


def joined(address: str, port: int) -> str:
    """`10.0.0.1:80` or `[fd00::1]:80`."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def service_chain(service: Service) -> str:
    """KUBE-SVC- and the hash of the service's port."""
    return "KUBE-SVC-" + _hash(service.title + service.protocol)


def endpoint_chain(service: Service, endpoint: tuple[str, int]) -> str:
    """KUBE-SEP- and the hash of the service's port and the endpoint."""
    return "KUBE-SEP-" + _hash(service.title + service.protocol + joined(*endpoint))


def chains(services: Iterable[Service]) -> set[str]:
    """The chains that belong to these services, so those to remove when they are gone."""
    found: set[str] = set()
    for service in services:
        if service.endpoints:
            found.add(service_chain(service))
            found.update(endpoint_chain(service, endpoint) for endpoint in service.endpoints)
    return found


def _host(address: str) -> str:
    return f"{address}/{ipaddress.ip_address(address).max_prefixlen}"


def _portal(service: Service, comment: str) -> str:
    return (
        f'-d {_host(service.address)} -p {service.protocol} -m comment --comment "{service.title} {comment}" '
        f"-m {service.protocol} --dport {service.port}"
    )


def _service_rules(service: Service, pod_cidr: str) -> list[str]:
    """The service's own chain: masquerade what is no pod's, then a fair choice among the endpoints.

    Endpoint i of n is taken with probability 1/(n-i) if the earlier ones were not: 1/n for each.
    """
    chain = service_chain(service)
    rules = [f"-A {chain} ! -s {pod_cidr} {_portal(service, 'cluster IP')} -j KUBE-MARK-MASQ"]
    count = len(service.endpoints)
    for index, endpoint in enumerate(service.endpoints):
        rule = f'-A {chain} -m comment --comment "{service.title} -> {joined(*endpoint)}"'
        if index < count - 1:
            rule += f" -m statistic --mode random --probability {1 / (count - index):0.10f}"
        rules.append(f"{rule} -j {endpoint_chain(service, endpoint)}")
    return rules


def _endpoint_rules(service: Service) -> list[str]:
    """One chain an endpoint: a pod that reaches itself is masqueraded, then the rewrite."""
    rules = []
    protocol = service.protocol
    for endpoint in service.endpoints:
        start = f"-A {endpoint_chain(service, endpoint)}"
        comment = f'-m comment --comment "{service.title}"'
        rules.append(f"{start} -s {_host(endpoint[0])} {comment} -j KUBE-MARK-MASQ")
        rules.append(f"{start} -p {protocol} {comment} -m {protocol} -j DNAT --to-destination {joined(*endpoint)}")
    return rules


def _table(name: str, owned: Sequence[str], rules: Sequence[str], stale: Sequence[str] = ()) -> list[str]:
    declared = [f":{chain} - [0:0]" for chain in (*owned, *stale)]
    return [f"*{name}", *declared, *rules, *(f"-X {chain}" for chain in stale), "COMMIT"]


def document(services: Sequence[Service], pod_cidr: str, *, first: bool = False, stale: Iterable[str] = ()) -> str:
    """The input of `iptables-restore --noflush` for these services, all of the family of `pod_cidr`.

    `first` adds the hooks into the built-in chains; `stale` names service and endpoint chains to remove. Chains that
    are declared are emptied, so each table changes from the old rules to the new ones in one step.
    """
    version = ipaddress.ip_network(pod_cidr).version
    served = [service for service in services if service.endpoints]
    refused = [service for service in services if not service.endpoints]
    reject = "icmp-port-unreachable" if version == 4 else "icmp6-port-unreachable"

    filters = list(_FILTER_HOOKS) if first else []
    filters += [
        f"-A KUBE-SERVICES {_portal(service, 'has no endpoints')} -j REJECT --reject-with {reject}"
        for service in refused
    ]
    filters += [
        "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
        '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT',
        '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" '
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    ]

    nat = list(_NAT_HOOKS) if first else []
    nat += [
        "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
        "-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000",
        '-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" '
        "-j MASQUERADE --random-fully",
        "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000",
    ]
    for service in served:
        nat.append(f"-A KUBE-SERVICES {_portal(service, 'cluster IP')} -j {service_chain(service)}")
        nat += _service_rules(service, pod_cidr)
        nat += _endpoint_rules(service)

    owned = sorted(chains(served))
    gone = sorted(set(stale) - set(owned))
    return "\n".join([*_table("filter", _FILTER_BASE, filters), *_table("nat", [*_NAT_BASE, *owned], nat, gone), ""])
