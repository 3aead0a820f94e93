"""A service as kube-proxy sees it, and kube-proxy's iptables rules for it, as the text that iptables-restore takes.

Pure: services in, text out. Chain names, order and matches are kube-proxy's own (pkg/proxy/iptables/proxier.go), spelt
as iptables-save prints them, so that a trace of the lab looks like a trace of a node. Left out: source ranges of load
balancers, health check ports, and the `nfacct` counters, which no kernel needs for the same effect. Loading the text is
in `iptables`; the same services in nftables mode are in `nftables`.
"""

import base64
import hashlib
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tracer.errors import UsageError

#: (ip, port)
Endpoint = tuple[str, int]

#: The hooks into the built-in chains, put in once; everything else is replaced when it changes.
_NAT_HOOKS = (
    '-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    '-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
    '-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',
)
_NEW = "-m conntrack --ctstate NEW -m comment --comment"
_FILTER_HOOKS = (
    f'-A INPUT {_NEW} "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL',
    '-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS',
    f'-A INPUT {_NEW} "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES',
    f'-A FORWARD {_NEW} "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL',
    '-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD',
    f'-A FORWARD {_NEW} "kubernetes service portals" -j KUBE-SERVICES',
    f'-A FORWARD {_NEW} "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES',
    f'-A OUTPUT {_NEW} "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL',
    f'-A OUTPUT {_NEW} "kubernetes service portals" -j KUBE-SERVICES',
)
_NAT_BASE = ("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ")
_FILTER_BASE = ("KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS", "KUBE-FORWARD", "KUBE-PROXY-FIREWALL")

_FORWARD = (
    "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
    '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT',
    '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" '
    "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
)
_MASQUERADE = (
    "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
    "-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000",
    '-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully',
    "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000",
)


@dataclass(frozen=True)
class Service:
    """One port of one Kubernetes service, in one address family, as one node sees it.

    `load_balancers` are the addresses of its load balancer; `node_port` is 0 where it has none. `local_endpoints` are
    those of `endpoints` that run on this node: they serve where a traffic policy is "Local". `affinity_seconds` above 0
    is session affinity ClientIP. Raises UsageError for what kube-proxy could not be told either.
    """

    namespace: str
    name: str
    port_name: str
    address: str
    port: int
    endpoints: tuple[Endpoint, ...]
    protocol: str = "tcp"
    node_port: int = 0
    load_balancers: tuple[str, ...] = ()
    local_endpoints: tuple[Endpoint, ...] = ()
    external_policy: str = "Cluster"
    affinity_seconds: int = 0
    internal_policy: str = "Cluster"

    def __post_init__(self) -> None:
        if self.protocol not in ("tcp", "udp"):
            raise UsageError(f"Service {self.title} has the protocol {self.protocol!r}: choose tcp or udp")
        for policy in (self.external_policy, self.internal_policy):
            if policy not in ("Cluster", "Local"):
                raise UsageError(f"Service {self.title} has the traffic policy {policy!r}: choose Cluster or Local")
        if strangers := set(self.local_endpoints) - set(self.endpoints):
            raise UsageError(
                f"Service {self.title} has local endpoints that are none of its endpoints ({sorted(strangers)}): "
                "local_endpoints must be a part of endpoints"
            )

    @property
    def title(self) -> str:
        """`shop/web:http`, as kube-proxy writes it in comments and hashes it into names."""
        return f"{self.namespace}/{self.name}" + (f":{self.port_name}" if self.port_name else "")

    @property
    def family(self) -> int:
        """4 or 6."""
        return ipaddress.ip_address(self.address).version

    @property
    def is_external(self) -> bool:
        """Whether it can be reached from outside the cluster."""
        return bool(self.node_port or self.load_balancers)

    @property
    def cluster_endpoints(self) -> tuple[Endpoint, ...]:
        """Where the policy Cluster leads; pods and the node take it to external addresses under either policy."""
        return self.endpoints if self.internal_policy == "Cluster" or self.is_external else ()

    @property
    def policy_endpoints(self) -> tuple[Endpoint, ...]:
        """Where the policy Local leads; empty if neither policy is Local."""
        local = self.internal_policy == "Local" or (self.external_policy == "Local" and self.is_external)
        return self.local_endpoints if local else ()

    @property
    def reachable(self) -> tuple[Endpoint, ...]:
        """Every endpoint that the rules of this node lead to."""
        return self.cluster_endpoints or self.policy_endpoints

    @property
    def serves_inside(self) -> bool:
        """Whether the cluster address leads to an endpoint from here."""
        return bool(self.local_endpoints if self.internal_policy == "Local" else self.endpoints)

    @property
    def serves_outside(self) -> bool:
        """Whether who comes from outside the cluster, through this node, finds an endpoint."""
        return bool(self.local_endpoints if self.external_policy == "Local" else self.endpoints)


def digest(text: str) -> str:
    """The hash that kube-proxy puts into names: SHA-256 in base 32; 52 characters and padding, of which it uses few."""
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode()


def joined(address: str, port: int) -> str:
    """`10.0.0.1:80` or `[fd00::1]:80`."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def service_chain(service: Service, kind: str = "SVC") -> str:
    """KUBE-SVC- (all endpoints), KUBE-SVL- (local ones), KUBE-EXT- (from outside), and the hash of the port."""
    return f"KUBE-{kind}-{digest(service.title + service.protocol)[:16]}"


def endpoint_chain(service: Service, endpoint: Endpoint) -> str:
    """KUBE-SEP- and the hash of the service's port and the endpoint."""
    return "KUBE-SEP-" + digest(service.title + service.protocol + joined(*endpoint))[:16]


def chains(services: Iterable[Service]) -> set[str]:
    """The chains that belong to these services, so those to remove when they are gone."""
    found: set[str] = set()
    for service in services:
        if service.cluster_endpoints:
            found.add(service_chain(service))
            if service.is_external:
                found.add(service_chain(service, "EXT"))
        if service.policy_endpoints:
            found.add(service_chain(service, "SVL"))
        found.update(endpoint_chain(service, endpoint) for endpoint in service.reachable)
    return found


def _host(address: str) -> str:
    return f"{address}/{ipaddress.ip_address(address).max_prefixlen}"


def _portal(service: Service, address: str, comment: str) -> str:
    return (
        f'-d {_host(address)} -p {service.protocol} -m comment --comment "{service.title} {comment}" '
        f"-m {service.protocol} --dport {service.port}"
    )


def _refusal_rules(service: Service) -> list[str]:
    """The filter table's answer where nothing was rewritten.

    No endpoints at all: an error comes back. None on this node, by a policy that allows no other: silence, as a load
    balancer that looks for a node with endpoints expects it.
    """
    if service.endpoints:
        comment, target = "has no local endpoints", "DROP"
    else:
        reject = "icmp-port-unreachable" if service.family == 4 else "icmp6-port-unreachable"
        comment, target = "has no endpoints", f"REJECT --reject-with {reject}"
    rules = []
    if not service.serves_inside:
        rules.append(f"-A KUBE-SERVICES {_portal(service, service.address, comment)} -j {target}")
    if not service.serves_outside:
        rules += [
            f"-A KUBE-EXTERNAL-SERVICES {_portal(service, address, comment)} -j {target}"
            for address in service.load_balancers
        ]
        if service.node_port:
            rules.append(
                f'-A KUBE-EXTERNAL-SERVICES -p {service.protocol} -m comment --comment "{service.title} {comment}" '
                f"-m addrtype --dst-type LOCAL -m {service.protocol} --dport {service.node_port} -j {target}"
            )
    return rules


def _portal_rules(service: Service) -> list[str]:
    """The ways into the service's chains: by its cluster address, by its load balancer's, by its node port."""
    rules = []
    if service.serves_inside:
        chain = service_chain(service, "SVL" if service.internal_policy == "Local" else "SVC")
        rules.append(f"-A KUBE-SERVICES {_portal(service, service.address, 'cluster IP')} -j {chain}")
    if service.endpoints:
        external = service_chain(service, "EXT")
        rules += [
            f"-A KUBE-SERVICES {_portal(service, address, 'loadbalancer IP')} -j {external}"
            for address in service.load_balancers
        ]
        if service.node_port:
            rules.append(
                f'-A KUBE-NODEPORTS -p {service.protocol} -m comment --comment "{service.title}" '
                f"-m {service.protocol} --dport {service.node_port} -j {external}"
            )
    return rules


def _external_rules(service: Service, pod_cidr: str) -> list[str]:
    """What comes in by an external address, before an endpoint is chosen.

    Policy Cluster masquerades, since the endpoint may be on another node, which would answer past this one. Policy
    Local keeps the client's address; pods and the node itself may still go to any endpoint.
    """
    start = f"-A {service_chain(service, 'EXT')}"
    where = f'{service.title} external destinations"'
    cluster = service_chain(service)
    if service.external_policy == "Cluster":
        return [
            f'{start} -m comment --comment "masquerade traffic for {where} -j KUBE-MARK-MASQ',
            f"{start} -j {cluster}",
        ]
    local = "-m addrtype --src-type LOCAL"
    rules = [
        f'{start} -s {pod_cidr} -m comment --comment "pod traffic for {where} -j {cluster}',
        f'{start} -m comment --comment "masquerade LOCAL traffic for {where} {local} -j KUBE-MARK-MASQ',
        f'{start} -m comment --comment "route LOCAL traffic for {where} {local} -j {cluster}',
    ]
    if service.serves_outside:
        rules.append(f"{start} -j {service_chain(service, 'SVL')}")
    return rules


def _choice_rules(service: Service, chain: str, endpoints: Sequence[Endpoint]) -> list[str]:
    """Where this client went before, if that is to be kept; else a fair choice.

    Endpoint i of n is taken with probability 1/(n-i) if the earlier ones were not: 1/n for each.
    """
    starts = [f'-A {chain} -m comment --comment "{service.title} -> {joined(*endpoint)}"' for endpoint in endpoints]
    targets = [endpoint_chain(service, endpoint) for endpoint in endpoints]
    rules = []
    if service.affinity_seconds:
        rules += [
            f"{start} -m recent --rcheck --seconds {service.affinity_seconds} --reap --name {target} --rsource "
            f"-j {target}"
            for start, target in zip(starts, targets, strict=True)
        ]
    for left, start, target in zip(range(len(endpoints), 0, -1), starts, targets, strict=True):
        chance = f" -m statistic --mode random --probability {1 / left:0.10f}" if left > 1 else ""
        rules.append(f"{start}{chance} -j {target}")
    return rules


def _endpoint_rules(service: Service) -> list[str]:
    """One chain an endpoint: a pod that reaches itself is masqueraded, then the rewrite."""
    rules = []
    protocol = service.protocol
    for endpoint in service.reachable:
        chain = endpoint_chain(service, endpoint)
        comment = f'-m comment --comment "{service.title}"'
        keep = f" -m recent --set --name {chain} --rsource" if service.affinity_seconds else ""
        rules.append(f"-A {chain} -s {_host(endpoint[0])} {comment} -j KUBE-MARK-MASQ")
        rules.append(
            f"-A {chain} -p {protocol} {comment}{keep} -m {protocol} -j DNAT --to-destination {joined(*endpoint)}"
        )
    return rules


def _chain_rules(service: Service, pod_cidr: str) -> list[str]:
    """All rules in the service's own chains."""
    rules = []
    cluster, local = service_chain(service), service_chain(service, "SVL")
    if service.serves_inside:
        inside = local if service.internal_policy == "Local" else cluster
        rules.append(f"-A {inside} ! -s {pod_cidr} {_portal(service, service.address, 'cluster IP')} -j KUBE-MARK-MASQ")
    if service.is_external and service.endpoints:
        rules += _external_rules(service, pod_cidr)
    rules += _choice_rules(service, cluster, service.cluster_endpoints)
    rules += _choice_rules(service, local, service.policy_endpoints)
    return rules + _endpoint_rules(service)


def _table(name: str, owned: Sequence[str], rules: Sequence[str], stale: Sequence[str] = ()) -> list[str]:
    declared = [f":{chain} - [0:0]" for chain in (*owned, *stale)]
    return [f"*{name}", *declared, *rules, *(f"-X {chain}" for chain in stale), "COMMIT"]


def document(services: Sequence[Service], pod_cidr: str, before: Sequence[Service] | None = None) -> str:
    """The input of `iptables-restore --noflush` for these services, all of the family of `pod_cidr`.

    `before` are the services of the rules that are loaded; without it, the hooks into the built-in chains are made too.
    Chains that are declared are emptied, so each table changes from the old rules to the new ones in one step; the
    chains of a service that stays as it was are left out, and so left alone.
    """
    kept = set(before or ())
    changed = [service for service in services if service not in kept]
    filters = [
        *(_FILTER_HOOKS if before is None else ()),
        *(rule for service in services for rule in _refusal_rules(service)),
        *_FORWARD,
    ]
    # IPv6 has no route_localnet, so no node port on its loopback address
    but = "! -d ::1/128 " if ipaddress.ip_network(pod_cidr).version == 6 else ""
    nat = [
        *(_NAT_HOOKS if before is None else ()),
        *_MASQUERADE,
        *(rule for service in services for rule in _portal_rules(service)),
        f"-A KUBE-SERVICES {but}-m comment --comment "
        '"kubernetes service nodeports; NOTE: this must be the last rule in this chain" '
        "-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS",
        *(rule for service in changed for rule in _chain_rules(service, pod_cidr)),
    ]
    owned = sorted(chains(changed))
    gone = sorted(chains(before or ()) - chains(services))
    return "\n".join([*_table("filter", _FILTER_BASE, filters), *_table("nat", [*_NAT_BASE, *owned], nat, gone), ""])
