"""What is kept of the API server's objects: small frozen values, read from JSON that nobody vouches for.

Knows the fields of Service, EndpointSlice, Pod and Node
(https://kubernetes.io/docs/reference/kubernetes-api/) with the API's own defaults. How values are checked, and in what
units they are, is `fields`'s: whatever is missing, of another type or too long counts as not said, and text that could
drive a terminal is escaped.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tracer.naming import fields

#: The kinds that are read, as the API's paths name them.
KINDS = ("services", "endpointslices", "pods", "nodes")
#: timeoutSeconds of ClientIP affinity where a service does not say.
DEFAULT_AFFINITY_S = 10_800

#: Namespace and name.
Key = tuple[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a service; `node_port` 0: none."""

    name: str | None
    port: int
    protocol: int
    node_port: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Service:
    """A service; `addresses` are all its virtual ones, none if it is headless or of type ExternalName."""

    namespace: str
    name: str
    uid: str
    type: str = "ClusterIP"
    headless: bool = False
    addresses: tuple[bytes, ...] = ()
    ports: tuple[ServicePort, ...] = ()
    affinity: str = "None"
    affinity_s: int | None = None
    internal_policy: str = "Cluster"
    external_policy: str = "Cluster"
    created_ns: int | None = None

    @property
    def key(self) -> Key:
        """Namespace and name."""
        return self.namespace, self.name


@dataclasses.dataclass(frozen=True, slots=True)
class SlicePort:
    """A port of all endpoints of a slice: already resolved by the control plane, whatever the service's targetPort."""

    name: str | None
    port: int
    protocol: int


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint of a slice; `pod`, `pod_namespace` and `uid` are those of a targetRef to a pod."""

    addresses: tuple[bytes, ...]
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node: str | None = None
    zone: str | None = None
    hint_zones: tuple[str, ...] = ()
    hint_nodes: tuple[str, ...] = ()
    pod_namespace: str | None = None
    pod: str | None = None
    uid: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """An EndpointSlice; `service` is the name of its service, in its own namespace; None: it belongs to none."""

    namespace: str
    name: str
    uid: str
    service: str | None = None
    address_type: str = "IPv4"
    ports: tuple[SlicePort, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()

    @property
    def key(self) -> Key:
        """Namespace and name."""
        return self.namespace, self.name


@dataclasses.dataclass(frozen=True, slots=True)
class Pod:
    """A pod; `workload` is its controller as kubectl writes it; `static_uid` is how the kubelet's cgroups name it
    where it comes from a file (the API server's mirror of it has another uid)."""

    namespace: str
    name: str
    uid: str
    addresses: tuple[bytes, ...] = ()
    host_network: bool = False
    node: str | None = None
    phase: str = "Unknown"
    started_ns: int | None = None
    created_ns: int | None = None
    deleted_ns: int | None = None
    workload: str | None = None
    containers: tuple[str, ...] = ()
    static_uid: str | None = None

    @property
    def key(self) -> Key:
        """Namespace and name."""
        return self.namespace, self.name

    @property
    def finished(self) -> bool:
        """Whether its phase is a last one: it has no address any more."""
        return self.phase in ("Succeeded", "Failed")


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A node; `addresses` are its internal and external ones."""

    name: str
    uid: str
    addresses: tuple[bytes, ...] = ()
    zone: str | None = None
    created_ns: int | None = None
    namespace: str = ""

    @property
    def key(self) -> Key:
        """Namespace (nodes have none: empty) and name."""
        return self.namespace, self.name


Object = Service | Slice | Pod | Node


def read(kind: str, raw: object) -> Object | None:
    """What is kept of one object of `KINDS`, given as parsed JSON.

    Returns None if it is malformed: not an object with a name (and a namespace, which a node has not). Never raises
    for any JSON; raises KeyError for an unknown kind.
    """
    reader = _READERS[kind]
    top = fields.mapping(raw)
    metadata = fields.mapping(top.get("metadata"))
    name, namespace = fields.text(metadata.get("name")), fields.shared(metadata.get("namespace"))
    if name is None or (namespace is None and kind != "nodes"):
        return None
    return reader(top, metadata, namespace or "", name)


def _service(top: Mapping[str, Any], metadata: Mapping[str, Any], namespace: str, name: str) -> Service:
    spec, status = fields.mapping(top.get("spec")), fields.mapping(top.get("status"))
    cluster_ips = [spec.get("clusterIP"), *fields.items(spec.get("clusterIPs"))]
    headless = "None" in cluster_ips
    kind = fields.shared(spec.get("type")) or "ClusterIP"
    ingress = [
        fields.mapping(item).get("ip")
        for item in fields.items(fields.mapping(status.get("loadBalancer")).get("ingress"))
    ]
    # kube-proxy leaves headless and ExternalName services alone, external addresses and all (ShouldSkipService).
    proxied = not headless and kind != "ExternalName"
    affinity = fields.shared(spec.get("sessionAffinity")) or "None"
    timeout = fields.mapping(fields.mapping(spec.get("sessionAffinityConfig")).get("clientIP")).get("timeoutSeconds")
    return Service(
        namespace,
        name,
        fields.uid(metadata, namespace, name),
        kind,
        headless,
        fields.addresses([*cluster_ips, *fields.items(spec.get("externalIPs")), *ingress]) if proxied else (),
        tuple(
            port
            for item in fields.items(spec.get("ports"))
            if (port := _service_port(fields.mapping(item))) is not None
        ),
        affinity,
        fields.number(timeout, 0xFFFFFFFF, DEFAULT_AFFINITY_S) if affinity == "ClientIP" else None,
        fields.shared(spec.get("internalTrafficPolicy")) or "Cluster",
        fields.shared(spec.get("externalTrafficPolicy")) or "Cluster",
        fields.time_ns(metadata.get("creationTimestamp")),
    )


def _service_port(item: Mapping[str, Any]) -> ServicePort | None:
    port, protocol = fields.number(item.get("port"), 0xFFFF, 0), fields.protocol(item)
    if not port or not protocol:
        return None
    return ServicePort(fields.shared(item.get("name")), port, protocol, fields.number(item.get("nodePort"), 0xFFFF, 0))


def _slice(top: Mapping[str, Any], metadata: Mapping[str, Any], namespace: str, name: str) -> Slice:
    ports = [
        (item, fields.number(item.get("port"), 0xFFFF, 0), fields.protocol(item))
        for item in map(fields.mapping, fields.items(top.get("ports")))
    ]
    return Slice(
        namespace,
        name,
        fields.uid(metadata, namespace, name),
        fields.shared(fields.mapping(metadata.get("labels")).get("kubernetes.io/service-name")),
        fields.shared(top.get("addressType")) or "IPv4",
        # A port without a number means all ports, and is no port that a service could send to.
        tuple(
            SlicePort(fields.shared(item.get("name")), port, protocol)
            for item, port, protocol in ports
            if port and protocol
        ),
        tuple(
            e
            for item in fields.items(top.get("endpoints"))
            if (e := _endpoint(fields.mapping(item), namespace)) is not None
        ),
    )


def _endpoint(item: Mapping[str, Any], namespace: str) -> Endpoint | None:
    addresses = fields.addresses(fields.items(item.get("addresses")))
    if not addresses:
        return None
    conditions, hints, target = (
        fields.mapping(item.get("conditions")),
        item.get("hints"),
        fields.mapping(item.get("targetRef")),
    )
    # EndpointConditions of discovery/v1: ready unknown is true, serving unknown is ready, terminating unknown is false.
    ready = fields.flag(conditions.get("ready"), True)
    pod = fields.text(target.get("name")) if target.get("kind") == "Pod" else None
    return Endpoint(
        addresses,
        ready,
        fields.flag(conditions.get("serving"), ready),
        fields.flag(conditions.get("terminating"), False),
        fields.shared(item.get("nodeName")),
        fields.shared(item.get("zone")),
        _hints(hints, "forZones") if hints else (),
        _hints(hints, "forNodes") if hints else (),
        (fields.shared(target.get("namespace")) or namespace) if pod else None,
        pod,
        fields.text(target.get("uid")) if pod else None,
    )


def _hints(hints: object, name: str) -> tuple[str, ...]:
    found = {fields.shared(fields.mapping(item).get("name")) for item in fields.items(fields.mapping(hints).get(name))}
    return tuple(sorted(text for text in found if text is not None))


def _pod(top: Mapping[str, Any], metadata: Mapping[str, Any], namespace: str, name: str) -> Pod:
    spec, status = fields.mapping(top.get("spec")), fields.mapping(top.get("status"))
    statuses = ("containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses")
    ids = [
        fields.text(fields.mapping(item).get("containerID"))
        for field in statuses
        for item in fields.items(status.get(field))
    ]
    annotations = fields.mapping(metadata.get("annotations"))
    return Pod(
        namespace,
        name,
        fields.uid(metadata, namespace, name),
        fields.addresses(
            [status.get("podIP"), *(fields.mapping(item).get("ip") for item in fields.items(status.get("podIPs")))]
        ),
        spec.get("hostNetwork") is True,
        fields.shared(spec.get("nodeName")),
        fields.shared(status.get("phase")) or "Unknown",
        fields.time_ns(status.get("startTime")),
        fields.time_ns(metadata.get("creationTimestamp")),
        fields.time_ns(metadata.get("deletionTimestamp")),
        _workload(metadata),
        tuple(sorted({text.rpartition("/")[2] for text in ids if text})),
        fields.text(annotations.get("kubernetes.io/config.mirror"))
        or fields.text(annotations.get("kubernetes.io/config.hash")),
    )


def _workload(metadata: Mapping[str, Any]) -> str | None:
    """The pod's controller, "kind/name" in kubectl's lower case; a Deployment's ReplicaSet counts as the Deployment.

    A Deployment names its ReplicaSets after itself and the label pod-template-hash that it gives their pods
    (https://kubernetes.io/docs/concepts/workloads/controllers/deployment/#pod-template-hash-label).
    """
    owner = next(
        (o for o in map(fields.mapping, fields.items(metadata.get("ownerReferences"))) if o.get("controller") is True),
        fields.NOTHING,
    )
    kind, name = fields.text(owner.get("kind")), fields.text(owner.get("name"))
    if kind is None or name is None:
        return None
    template = fields.text(fields.mapping(metadata.get("labels")).get("pod-template-hash"))
    if kind == "ReplicaSet" and template and name.endswith(f"-{template}") and len(name) > len(template) + 1:
        return sys.intern(f"deployment/{name[: -len(template) - 1]}")
    return sys.intern(f"{kind.lower()}/{name}")


def _node(top: Mapping[str, Any], metadata: Mapping[str, Any], namespace: str, name: str) -> Node:
    listed = [fields.mapping(item) for item in fields.items(fields.mapping(top.get("status")).get("addresses"))]
    own = [item.get("address") for item in listed if item.get("type") in ("InternalIP", "ExternalIP")]
    zone = fields.shared(fields.mapping(metadata.get("labels")).get("topology.kubernetes.io/zone"))
    created = fields.time_ns(metadata.get("creationTimestamp"))
    return Node(sys.intern(name), fields.uid(metadata, namespace, name), fields.addresses(own), zone, created)


_READERS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any], str, str], Object]] = {
    "services": _service,
    "endpointslices": _slice,
    "pods": _pod,
    "nodes": _node,
}
