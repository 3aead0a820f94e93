"""kube-proxy's nftables mode: its own table `kube-proxy`, as the text that `nft -f` takes, and the loading of it.

Names, order and matches are kube-proxy's own (pkg/proxy/nftables/proxier.go, as of 1.36), spelt as `nft list` prints
them: maps lead a destination to the chain of its service, which rewrites to a random endpoint in a single rule. Only
with session affinity has each endpoint a chain, and a set of the clients that went there. Left out: source ranges of
load balancers. `document` is pure; what a service is, is in `rules`.
"""

import ipaddress
from collections.abc import Iterable, Sequence

from tracer.errors import TracerError
from tracer.lab.netns import Namespace, wait_until
from tracer.lab.rules import Endpoint, Service, digest, joined

_HOOKS = {
    "filter-prerouting-pre-dnat": "type filter hook prerouting priority -110 ;",
    "filter-output-pre-dnat": "type filter hook output priority -110 ;",
    "filter-input": "type filter hook input priority 0 ;",
    "filter-forward": "type filter hook forward priority 0 ;",
    "filter-output": "type filter hook output priority 0 ;",
    "nat-prerouting": "type nat hook prerouting priority -100 ;",
    "nat-output": "type nat hook output priority -100 ;",
    "nat-postrouting": "type nat hook postrouting priority 100 ;",
}
_CHAINS = (
    "nodeport-endpoints-check",
    "service-endpoints-check",
    "firewall-check",
    "services",
    "masquerading",
    "cluster-ips-check",
    "reject-chain",
)
#: name → (set or map, type, comment); ADDRESS is the family's.
_SETS = {
    "hairpin-connections": (
        "set",
        "ADDRESS . ADDRESS . inet_proto . inet_service",
        "service hairpin connections",
    ),
    "cluster-ips": ("set", "ADDRESS", "Active ClusterIPs"),
    "nodeport-ips": ("set", "ADDRESS", "IPs that accept NodePort traffic"),
    "no-endpoint-services": (
        "map",
        "ADDRESS . inet_proto . inet_service : verdict",
        "vmap to drop or reject packets to services with no endpoints",
    ),
    "no-endpoint-nodeports": (
        "map",
        "inet_proto . inet_service : verdict",
        "vmap to drop or reject packets to service nodeports with no endpoints",
    ),
    "firewall-ips": (
        "map",
        "ADDRESS . inet_proto . inet_service : verdict",
        "destinations that are subject to LoadBalancerSourceRanges",
    ),
    "service-ips": (
        "map",
        "ADDRESS . inet_proto . inet_service : verdict",
        "ClusterIP, ExternalIP and LoadBalancer IP traffic",
    ),
    "service-nodeports": ("map", "inet_proto . inet_service : verdict", "NodePort traffic"),
}
_MARK = "meta mark set meta mark | 0x00004000"

#: The chain, and its rule.
Rule = tuple[str, str]


def _hashed(name: str) -> str:
    """Eight characters of hash, then the name; kube-proxy shortens what the kernel would not take (240 of 256)."""
    full = f"{digest(name)[:8]}-{name}"
    return full if len(full) <= 240 else full[:237] + "..."


def service_chain(service: Service, kind: str = "service") -> str:
    """`service-` (all endpoints), `local-` (those of this node) or `external-`, a hash, and the port's full name."""
    return f"{kind}-" + _hashed(f"{service.namespace}/{service.name}/{service.protocol}/{service.port_name}")


def endpoint_name(service: Service, endpoint: Endpoint, kind: str = "endpoint") -> str:
    """The `endpoint-` chain or the `affinity-` set of one endpoint of a service. Names may not have colons."""
    address, port = endpoint
    port_name = f"{service.namespace}/{service.name}/{service.protocol}/{service.port_name}"
    return f"{kind}-" + _hashed(f"{port_name}__{address.replace(':', '.')}/{port}")


def chains(services: Iterable[Service]) -> dict[str, None]:
    """The chains that belong to these services, in kube-proxy's order."""
    found: dict[str, None] = {}
    for service in services:
        if service.affinity_seconds:
            found |= dict.fromkeys(endpoint_name(service, endpoint) for endpoint in service.reachable)
        if service.cluster_endpoints:
            found[service_chain(service)] = None
        if service.policy_endpoints:
            found[service_chain(service, "local")] = None
        if service.cluster_endpoints and service.is_external:
            found[service_chain(service, "external")] = None
    return found


def affinities(services: Iterable[Service]) -> dict[str, int]:
    """The sets that remember clients → for how many seconds."""
    return {
        endpoint_name(service, endpoint, "affinity"): service.affinity_seconds
        for service in services
        if service.affinity_seconds
        for endpoint in service.reachable
    }


def gone(services: Sequence[Service], before: Sequence[Service]) -> list[str]:
    """The chains that belonged to a service before and belong to none now."""
    wanted = chains(services)
    return [chain for chain in chains(before) if chain not in wanted]


def _elements(services: Sequence[Service]) -> dict[str, dict[str, None]]:
    """For each set and map, the elements that the services put there."""
    found: dict[str, dict[str, None]] = {name: {} for name in _SETS if name != "nodeport-ips"}
    for service in services:
        protocol, title = service.protocol, f'comment "{service.title}"'
        refusal = "drop" if service.endpoints else "goto reject-chain"
        # kube-proxy puts local endpoints alone; without them told apart, the others do no harm: they never loop here
        for address, port in service.local_endpoints or service.reachable:
            found["hairpin-connections"][f"{address} . {address} . {protocol} . {port}"] = None

        found["cluster-ips"][service.address] = None
        inside = f"{service.address} . {protocol} . {service.port}"
        if service.serves_inside:
            chain = service_chain(service, "local" if service.internal_policy == "Local" else "service")
            found["service-ips"][f"{inside} : goto {chain}"] = None
        else:
            found["no-endpoint-services"][f"{inside} {title} : {refusal}"] = None

        outside = service_chain(service, "external")
        for address in service.load_balancers:
            balanced = f"{address} . {protocol} . {service.port}"
            if service.endpoints:
                found["service-ips"][f"{balanced} : goto {outside}"] = None
            if not service.serves_outside:
                found["no-endpoint-services"][f"{balanced} {title} : {refusal}"] = None
        if service.node_port:
            port_key = f"{protocol} . {service.node_port}"
            if service.endpoints:
                found["service-nodeports"][f"{port_key} : goto {outside}"] = None
            if not service.serves_outside:
                found["no-endpoint-nodeports"][f"{port_key} {title} : {refusal}"] = None
    return found


def _base_rules(word: str, pod_cidr: str, service_cidrs: Sequence[str]) -> list[Rule]:
    """The rules that no service changes. `word` is `ip` or `ip6`."""
    by_port = "meta l4proto . th dport vmap"
    return [
        ("filter-prerouting-pre-dnat", "ct state new jump firewall-check"),
        ("filter-output-pre-dnat", "ct state new jump firewall-check"),
        ("filter-input", "ct state new jump nodeport-endpoints-check"),
        ("filter-input", "ct state new jump service-endpoints-check"),
        ("filter-forward", "ct state new jump service-endpoints-check"),
        ("filter-forward", "ct state new jump cluster-ips-check"),
        ("filter-output", "ct state new jump service-endpoints-check"),
        ("filter-output", "ct state new jump cluster-ips-check"),
        ("nat-prerouting", "jump services"),
        ("nat-output", "jump services"),
        ("nat-postrouting", "jump masquerading"),
        ("nodeport-endpoints-check", f"{word} daddr @nodeport-ips {by_port} @no-endpoint-nodeports"),
        ("service-endpoints-check", f"{word} daddr . {by_port} @no-endpoint-services"),
        ("firewall-check", f"{word} daddr . {by_port} @firewall-ips"),
        (
            "services",
            f"{word} daddr @cluster-ips {word} saddr != {pod_cidr} {_MARK} "
            'comment "masquerade clusterIP traffic from outside cluster"',
        ),
        ("services", f"{word} daddr . {by_port} @service-ips"),
        ("services", f"{word} daddr @nodeport-ips {by_port} @service-nodeports"),
        (
            "masquerading",
            "meta mark & 0x00004000 != 0x00000000 meta mark set meta mark ^ 0x00004000 masquerade fully-random",
        ),
        (
            "masquerading",
            f"ct status dnat {word} saddr . {word} daddr . meta l4proto . th dport @hairpin-connections "
            "masquerade fully-random",
        ),
        (
            "cluster-ips-check",
            f'{word} daddr @cluster-ips reject comment "Reject traffic to invalid ports of ClusterIPs"',
        ),
        *(
            ("cluster-ips-check", f'{word} daddr {cidr} drop comment "Drop traffic to unallocated ClusterIPs"')
            for cidr in service_cidrs
        ),
        ("reject-chain", "reject"),
    ]


def _choice_rules(service: Service, word: str, chain: str, endpoints: Sequence[Endpoint]) -> list[Rule]:
    """Where this client went before, if that is to be kept; else a fair choice."""
    if not endpoints:
        return []
    choice = f"numgen random mod {len(endpoints)}"
    if not service.affinity_seconds:
        targets = ", ".join(f"{index} : {address} . {port}" for index, (address, port) in enumerate(endpoints))
        return [(chain, f"meta l4proto {service.protocol} dnat {word} to {choice} map {{ {targets} }}")]
    names = [endpoint_name(service, endpoint) for endpoint in endpoints]
    sets = [endpoint_name(service, endpoint, "affinity") for endpoint in endpoints]
    verdicts = ", ".join(f"{index} : goto {name}" for index, name in enumerate(names))
    return [
        *((chain, f"{word} saddr @{clients} goto {name}") for clients, name in zip(sets, names, strict=True)),
        (chain, f"{choice} vmap {{ {verdicts} }}"),
    ]


def _external_rules(service: Service, word: str, pod_cidr: str) -> list[Rule]:
    """What comes in by an external address: as in `rules`, masquerade, or keep the client and stay on this node."""
    chain, cluster = service_chain(service, "external"), service_chain(service)
    if service.external_policy == "Cluster":
        return [(chain, f'{_MARK} comment "masquerade"'), (chain, f"goto {cluster}")]
    found = [
        (chain, f'{word} saddr {pod_cidr} goto {cluster} comment "short-circuit pod traffic"'),
        (chain, f'fib saddr type local {_MARK} comment "masquerade local traffic"'),
        (chain, f'fib saddr type local goto {cluster} comment "short-circuit local traffic"'),
    ]
    if service.serves_outside:
        found.append((chain, f"goto {service_chain(service, 'local')}"))
    return found


def _service_rules(service: Service, word: str, pod_cidr: str) -> list[Rule]:
    """All rules in the service's own chains."""
    found: list[Rule] = []
    if service.is_external and service.endpoints:
        found += _external_rules(service, word, pod_cidr)
    found += _choice_rules(service, word, service_chain(service), service.cluster_endpoints)
    found += _choice_rules(service, word, service_chain(service, "local"), service.policy_endpoints)
    if service.affinity_seconds:
        for endpoint in service.reachable:
            chain, clients = endpoint_name(service, endpoint), endpoint_name(service, endpoint, "affinity")
            found.append((chain, f"update @{clients} {{ {word} saddr }}"))
            found.append((chain, f"meta l4proto {service.protocol} dnat to {joined(*endpoint)}"))
    return found


def document(
    services: Sequence[Service],
    pod_cidr: str,
    node_addresses: Sequence[str],
    service_cidrs: Sequence[str] = (),
    before: Sequence[Service] | None = None,
) -> str:
    """The transaction for `nft -f` that makes the table serve these services, all of the family of `pod_cidr`.

    `before` are the services of the rules that are loaded; without it, the table is made. What a service that stays as
    it was has, is left alone; an affinity set is emptied only if its timeout changes, which the kernel cannot do
    otherwise. Chains that no service needs any more (`gone`) are left empty.
    """
    version = ipaddress.ip_network(pod_cidr).version
    word = "ip" if version == 4 else "ip6"
    table = f"{word} kube-proxy"
    kept = set(before or ())
    changed = [service for service in services if service not in kept]
    lines = []

    def add(name: str, elements: Iterable[str]) -> None:
        if listed := ", ".join(elements):
            lines.append(f"add element {table} {name} {{ {listed} }}")

    if before is None:
        lines.append(f'add table {table} {{ comment "rules for kube-proxy" ; }}')
        lines += [f"add chain {table} {chain} {{ {hook} }}" for chain, hook in _HOOKS.items()]
        lines += [f"add chain {table} {chain}" for chain in _CHAINS]
        for name, (kind, types, comment) in _SETS.items():
            typed = types.replace("ADDRESS", f"ipv{version}_addr")
            lines.append(f'add {kind} {table} {name} {{ type {typed} ; comment "{comment}" ; }}')
        lines += [f"add rule {table} {chain} {rule}" for chain, rule in _base_rules(word, pod_cidr, service_cidrs)]
        add("nodeport-ips", (one for one in node_addresses if ipaddress.ip_address(one).version == version))

    new = chains(changed)
    lines += [f"add chain {table} {chain}" for chain in new]
    lines += [f"flush chain {table} {chain}" for chain in (*new, *gone(services, before or ()))]
    wanted, found = affinities(services), affinities(before or ())
    lines += [f"delete set {table} {name}" for name, seconds in found.items() if wanted.get(name) != seconds]
    lines += [
        f"add set {table} {name} "
        f"{{ type ipv{version}_addr ; size 65535 ; flags dynamic,timeout ; timeout {seconds}s ; }}"
        for name, seconds in wanted.items()
        if found.get(name) != seconds
    ]
    for name, elements in _elements(services).items():
        lines.append(f"flush {_SETS[name][0]} {table} {name}")
        add(name, elements)
    for service in changed:
        lines += [f"add rule {table} {chain} {rule}" for chain, rule in _service_rules(service, word, pod_cidr)]
    return "\n".join(lines) + "\n"


class Loader:
    """kube-proxy's table of one address family in one namespace; remembers what is loaded."""

    backend = "nftables"

    def __init__(
        self,
        namespace: Namespace,
        pod_cidr: str,
        node_addresses: Sequence[str],
        service_cidrs: Sequence[str] = (),
    ) -> None:
        """`node_addresses` take node ports; those of the other family are passed over.

        What goes to an address of `service_cidrs` that no service has is dropped.
        """
        self._namespace = namespace
        self._pod_cidr = pod_cidr
        self._node_addresses = tuple(node_addresses)
        self._service_cidrs = tuple(service_cidrs)
        self._table = ("ip6" if ipaddress.ip_network(pod_cidr).version == 6 else "ip") + " kube-proxy"
        self._loaded: tuple[Service, ...] | None = None

    def load(self, services: Sequence[Service]) -> None:
        """Replaces the rules by those for these services. Raises TracerError with what nft said.

        One transaction: connections stay where they are, and so do the clients of a service with session affinity. A
        second one removes the chains that are no longer needed and empty by then. Before Linux 6.2 the kernel takes a
        chain for used until it has freed the map element that led there, a moment after the first transaction; so does
        kube-proxy, and waits.
        """
        before = self._loaded or ()
        text = document(services, self._pod_cidr, self._node_addresses, self._service_cidrs, self._loaded)
        self._namespace.run(["nft", "-f", "-"], text)
        self._loaded = tuple(services)
        if stale := gone(services, before):
            removal = "".join(f"delete chain {self._table} {chain}\n" for chain in stale)
            wait_until(lambda: self._free(removal), "the kernel to free the chains of services that are gone")

    def save(self, table: str = "nat") -> str:
        """What the kernel holds, as `nft list` prints it: all of it, since `table` is a thing of iptables."""
        return self._namespace.run(["nft", "list", "table", *self._table.split()])

    def _free(self, removal: str) -> bool:
        try:
            self._namespace.run(["nft", "-f", "-"], removal)
        except TracerError as error:
            if "Device or resource busy" not in str(error):
                raise
            return False
        return True
