"""kube-proxy's IPVS mode: virtual servers, their addresses on a dummy device, and what iptables still does beside them.

Knows ipvsadm's language and kube-proxy's settings (pkg/proxy/ipvs/proxier.go). Left out: ipsets, which only make the
masquerade rules fewer; here each service has its own.
"""

import ipaddress
from collections.abc import Iterable, Sequence

from tracer.lab.netns import Namespace
from tracer.lab.rules import Endpoint, Service, joined

#: kube-proxy's device, which makes virtual addresses the node's own: what goes there comes to IPVS' hook on the input.
DEVICE = "kube-ipvs0"
#: As kube-proxy sets them: conntrack hears of every choice, and a connection from a port used before is chosen anew.
SETTINGS = {"net.ipv4.vs.conntrack": 1, "net.ipv4.vs.conn_reuse_mode": 0, "net.ipv4.vs.expire_nodest_conn": 1,
            "net.ipv4.vs.expire_quiescent_template": 1}  # fmt: skip
MARK = "0x4000/0x4000"


class Loader:
    """kube-proxy's virtual servers of one address family in one namespace; remembers what is loaded."""

    backend = "ipvs"

    def __init__(
        self, namespace: Namespace, pod_cidr: str, node_addresses: Sequence[str], scheduler: str = "rr"
    ) -> None:
        """`node_addresses` take node ports. Nothing is changed before the first load."""
        self._namespace = namespace
        self._pod_cidr = pod_cidr
        self._node_addresses = tuple(node_addresses)
        self._scheduler = scheduler
        self._bits = ipaddress.ip_network(pod_cidr).max_prefixlen
        self._iptables = "iptables" if self._bits == 32 else "ip6tables"
        self._loaded: tuple[Service, ...] | None = None

    def load(self, services: Sequence[Service]) -> None:
        """Replaces servers and rules by those for these services. Raises TracerError with what a command said.

        Connections stay where they are: IPVS keeps those to a server that is gone until they end.
        """
        if self._loaded is None:
            self._namespace.sysctl(SETTINGS)
            self._namespace.run(["ip", "link", "add", DEVICE, "type", "dummy"])
        has = set(_addresses(self._loaded or ()))
        wanted = set(_addresses(services))
        for word, addresses in (("add", wanted - has), ("del", has - wanted)):
            for address in sorted(addresses):
                self._namespace.run(["ip", "addr", word, f"{address}/{self._bits}", "dev", DEVICE])
        before, after = self._servers(self._loaded or ()), self._servers(services)
        lines = [f"-D {server}" for server in before if server not in after]
        for server, (options, endpoints) in after.items():
            _, old = before.get(server, ("", []))
            lines.append(f"{'-E' if server in before else '-A'} {server} {options}")
            lines += [f"-a {server} -r {joined(*endpoint)} -m -w 1" for endpoint in endpoints if endpoint not in old]
            lines += [f"-d {server} -r {joined(*endpoint)}" for endpoint in old if endpoint not in endpoints]
        self._namespace.run(["ipvsadm", "-R"], "\n".join([*lines, ""]))
        self._namespace.run([f"{self._iptables}-restore", "-w", "10", "--noflush"], self._masquerade(services))
        self._loaded = tuple(services)

    def save(self, table: str = "nat") -> str:
        """What the kernel holds, as `ipvsadm -S -n` prints it."""
        return self._namespace.run(["ipvsadm", "-S", "-n"])

    def _servers(self, services: Iterable[Service]) -> dict[str, tuple[str, list[Endpoint]]]:
        """ipvsadm's name of each virtual server, its options, and the endpoints behind it."""
        found = {}
        for service in services:
            flag = "-t" if service.protocol == "tcp" else "-u"
            options = f"-s {self._scheduler}" + (f" -p {service.affinity_seconds}" if service.affinity_seconds else "")
            inside = service.local_endpoints if service.internal_policy == "Local" else service.endpoints
            outside = service.local_endpoints if service.external_policy == "Local" else service.endpoints
            found[f"{flag} {joined(service.address, service.port)}"] = options, list(inside)
            for address in service.load_balancers:
                found[f"{flag} {joined(address, service.port)}"] = options, list(outside)
            if service.node_port:
                for address in self._node_addresses:
                    found[f"{flag} {joined(address, service.node_port)}"] = options, list(outside)
        return found

    def _masquerade(self, services: Iterable[Service]) -> str:
        """The nat table: what must come back through this node is marked on its way in, and masqueraded on its way out.

        IPVS rewrites between the two. Chains that are declared are emptied, all else is left alone.
        """
        lines = ["*nat", ":KUBE-SERVICES - [0:0]", ":KUBE-POSTROUTING - [0:0]"]
        if self._loaded is None:
            hooks = ("PREROUTING -j KUBE-SERVICES", "OUTPUT -j KUBE-SERVICES", "POSTROUTING -j KUBE-POSTROUTING")
            lines += [f"-A {hook}" for hook in hooks]
        lines.append(f"-A KUBE-POSTROUTING -m mark --mark {MARK} -j MASQUERADE --random-fully")
        for service in services:
            start = f"-A KUBE-SERVICES -p {service.protocol} -m {service.protocol}"
            mark = f"-j MARK --or-mark {MARK.partition('/')[0]}"
            lines.append(f"{start} ! -s {self._pod_cidr} -d {service.address} --dport {service.port} {mark}")
            if service.external_policy == "Cluster":
                lines += [f"{start} -d {address} --dport {service.port} {mark}" for address in service.load_balancers]
                if service.node_port:
                    local = "-m addrtype --dst-type LOCAL"
                    lines.append(f"{start} {local} --dport {service.node_port} {mark}")
        # A pod that is led to itself must not see its own address as the peer's.
        lines += [
            f"-A KUBE-POSTROUTING -s {ip} -d {ip} -j MASQUERADE"
            for ip in sorted({ip for service in services for ip, _ in service.endpoints})
        ]
        return "\n".join([*lines, "COMMIT", ""])


def _addresses(services: Iterable[Service]) -> list[str]:
    return [address for service in services for address in (service.address, *service.load_balancers)]
