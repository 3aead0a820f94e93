"""Who may hold an address or a port, read from the API's objects, and what is to be said where several do.

Pure functions; the course of time is `book`'s.

Whom to believe about an address, at one moment:
- A pod of this node has it from its status.startTime on (rounded down to the second, and before it really had the
  address) until it is heard to be deleted or finished. Two at once: nobody can tell, so no name.
- Otherwise the pod that EndpointSlices say; if they name different pods: no name.
- A node's address is shared by its host-network pods and everything else on the node: only the port of a slice
  tells a backend there. Until the nodes are known, any address may be such.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from tracer.naming.objects import Key, Node, Pod, Service, Slice, SlicePort

T = TypeVar("T")


class Who(NamedTuple):
    """Whose an address is; `ambiguous`: more than one pod has a claim, so none is named."""

    namespace: str | None
    pod: str | None
    workload: str | None
    node: str | None
    zone: str | None
    ambiguous: bool = False


class ServiceName(NamedTuple):
    """Which service and port; `ambiguous`: more than one has a claim, so none is named."""

    namespace: str | None
    service: str | None
    port: str | None
    ambiguous: bool = False


class Local(NamedTuple):
    """A pod of this node has the address; `heard`: it was heard to have it, not only believed to from its start."""

    uid: str
    heard: bool


class Claim(NamedTuple):
    """An endpoint of a slice has the address; not `sure`: it may have lost it already, for aught we know."""

    slice: Key
    ports: tuple[SlicePort, ...]
    namespace: str | None
    pod: str | None
    uid: str | None
    node: str | None
    zone: str | None
    sure: bool = True

    def other_than(self, pod: "Pod | Claim | None") -> bool:
        """Whether this names a pod, and another one. A targetRef made by hand may have no uid: then names decide."""
        if self.pod is None or pod is None or (isinstance(pod, Claim) and pod.pod is None):
            return False
        if self.uid is not None and pod.uid is not None:
            return self.uid != pod.uid
        return (self.namespace, self.pod) != (pod.namespace, pod.name if isinstance(pod, Pod) else pod.pod)


class OnNode(NamedTuple):
    """A node has the address."""

    node: str


Address = Local | Claim | OnNode
#: An address, an IANA protocol number, a port.
Virtual = tuple[bytes, int, int]
#: An IANA protocol number, a NodePort.
NodePort = tuple[int, int]


def claims(of: Slice | None) -> set[tuple[bytes, Claim]]:
    """The addresses of a slice's endpoints, and as whose."""
    if of is None:
        return set()
    key, ports = of.key, of.ports
    return {
        (address, Claim(key, ports, e.pod_namespace, e.pod, e.uid, e.node, e.zone))
        for e in of.endpoints
        for address in e.addresses
    }


def sharing(new: Slice, old: Slice) -> Slice:
    """The new state of a slice, with the old one's endpoints where they are equal: a change costs what it changed."""
    known = {endpoint.addresses: endpoint for endpoint in old.endpoints}
    same = (known.get(endpoint.addresses) for endpoint in new.endpoints)
    kept = tuple(b if b == e and b is not None else e for b, e in zip(same, new.endpoints, strict=True))
    return dataclasses.replace(new, endpoints=kept)


def virtual(of: Service | None) -> dict[Virtual, ServiceName]:
    """Every virtual address, protocol and port of a service."""
    if of is None:
        return {}
    return {
        (address, port.protocol, port.port): ServiceName(of.namespace, of.name, port.name)
        for address in of.addresses
        for port in of.ports
    }


def node_ports(of: Service | None) -> dict[NodePort, ServiceName]:
    """Every protocol and NodePort of a service."""
    if of is None:
        return {}
    return {
        (port.protocol, port.node_port): ServiceName(of.namespace, of.name, port.name)
        for port in of.ports
        if port.node_port
    }


def own_addresses(of: Pod | None) -> set[bytes]:
    """The addresses that are a pod's own: none on the node's network, none once it has finished."""
    return set() if of is None or of.host_network or of.finished else set(of.addresses)


def node_addresses(of: Node | None) -> dict[bytes, OnNode]:
    """A node's addresses."""
    return {} if of is None else {address: OnNode(of.name) for address in of.addresses}


def identities(of: Pod | None) -> set[str]:
    """What cgroups may call a pod: its uid, that of its file if it is a static pod, its containers' ids."""
    return set() if of is None else {of.uid, *of.containers, *([of.static_uid] if of.static_uid else [])}


def pod_name(pod: Pod, zone: str | None) -> Who:
    """A pod as an answer."""
    return Who(pod.namespace, pod.name, pod.workload, pod.node, zone)


def whose(
    values: Sequence[Address],
    port: tuple[int, int],
    shared: bool,
    pod_of: Callable[[str], Pod | None],
    zone_of: Callable[[str | None], str | None],
) -> Who | None:
    """Whose an address is, from what is held at one moment; `port` is (protocol, port), as it is dialled.

    `shared`: the nodes' addresses are not known, so this may be one.
    """
    local = {value.uid for value in values if isinstance(value, Local)}
    nodes = {value.node for value in values if isinstance(value, OnNode)}
    claimed = [value for value in values if isinstance(value, Claim)]
    if nodes or shared:
        claimed = [claim for claim in claimed if any((p.protocol, p.port) == port for p in claim.ports)]
    if local:
        pod = pod_of(next(iter(local)))
        heard = any(isinstance(value, Local) and value.heard for value in values)
        if len(local) > 1 or pod is None or (not heard and any(claim.other_than(pod) for claim in claimed)):
            return Who(None, None, None, None, None, True)
        return pod_name(pod, zone_of(pod.node) or only({claim.zone for claim in claimed}))
    # An endpoint that names no pod says nothing against one that does.
    claimed = [claim for claim in claimed if claim.pod] or claimed
    differ = any(a.other_than(b) for a in claimed for b in claimed)
    claimed = [claim for claim in claimed if claim.sure]
    node = only({claim.node for claim in claimed} or nodes)
    zone = only({claim.zone for claim in claimed}) or zone_of(node)
    if differ:
        return Who(None, None, None, node, zone, True)
    if claimed and claimed[0].pod:
        known = next((claim.uid for claim in claimed if claim.uid), None)
        pod = pod_of(known) if known else None
        return Who(claimed[0].namespace, claimed[0].pod, pod.workload if pod else None, node, zone)
    return Who(None, None, None, node, zone) if claimed or node else None


def service(values: Sequence[ServiceName]) -> ServiceName:
    """Which service is meant, from those (one at least) that hold an address and port, or a NodePort, at one moment."""
    return values[0] if len(set(values)) == 1 else ServiceName(None, None, None, True)


def service_at_node(values: Sequence[ServiceName | OnNode]) -> ServiceName | None:
    """`service` for a NodePort: only at a moment at which a node has the address."""
    services = [value for value in values if isinstance(value, ServiceName)]
    return service(services) if services and len(services) < len(values) else None


def only(values: Iterable[T | None]) -> T | None:
    """The one value there is; None if there are several or none."""
    found = [value for value in values if value is not None]
    return found[0] if len(found) == 1 else None
