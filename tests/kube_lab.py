"""The lab's cluster as the API server would tell of it: nodes, pods, services and endpoint slices, as raw objects."""

import time
import uuid
from datetime import UTC, datetime
from typing import Any

from tracer.lab.cluster import Cluster, LabService
from tracer.lab.topology import Node, Pod

Raw = dict[str, Any]
HASH = "7d9f8c6b5"


def stamp(at: float | None = None) -> str:
    """A moment (now), as the API writes it: to the second."""
    return datetime.fromtimestamp(time.time() if at is None else at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def uid(*parts: object) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "/".join(map(str, parts))))


def node(made: Node, zone: str = "zone-a") -> Raw:
    addresses = [{"type": "InternalIP", "address": ip} for ip in made.addresses.values()]
    labels = {"topology.kubernetes.io/zone": zone}
    meta = {"name": made.name, "uid": uid(made.name), "labels": labels, "creationTimestamp": stamp(time.time() - 3600)}
    return {"kind": "Node", "metadata": meta, "status": {"addresses": addresses}}


def pod(made: Pod, name: str, owner: str = "StatefulSet/web", **status: Any) -> Raw:
    """A running pod at this one's addresses."""
    return pod_at(name, made.node.name, *made.addresses, owner=owner, **status)


def pod_at(
    name: str, on: str, *ips: str, owner: str = "StatefulSet/web", host_network: bool = False, **status: Any
) -> Raw:
    """A running pod of the namespace shop; a Deployment's belongs to its ReplicaSet, and says the template's hash."""
    kind, _, owned_by = owner.partition("/")
    labels = {}
    if kind == "Deployment":
        kind, owned_by, labels = "ReplicaSet", f"{owned_by}-{HASH}", {"pod-template-hash": HASH}
    references = [{"apiVersion": "apps/v1", "kind": kind, "name": owned_by, "controller": True, "uid": uid(owner)}]
    meta = {"namespace": "shop", "name": name, "uid": uid("pod", name), "labels": labels, "ownerReferences": references}
    meta |= {"creationTimestamp": stamp()}
    known = {"phase": "Running", "podIPs": [{"ip": ip} for ip in ips], "startTime": stamp(time.time() - 60)}
    spec = {"nodeName": on} | ({"hostNetwork": True} if host_network else {})
    return {"kind": "Pod", "metadata": meta, "spec": spec, "status": known | status}


def service(made: LabService, family: int = 4) -> Raw:
    port = {"name": made.port_name, "port": made.port, "protocol": made.protocol.upper()}
    port |= {"targetPort": made.target_port} | ({"nodePort": made.node_port} if made.node_port else {})
    spec = {"clusterIP": made.ips[family], "clusterIPs": list(made.ips.values()), "ports": [port]}
    spec |= {"type": "NodePort" if made.node_port else "ClusterIP", "sessionAffinity": "None"}
    if made.affinity_seconds:
        config = {"clientIP": {"timeoutSeconds": made.affinity_seconds}}
        spec |= {"sessionAffinity": "ClientIP", "sessionAffinityConfig": config}
    meta = {"namespace": made.namespace, "name": made.name, "uid": uid("service", made.name)}
    return {"kind": "Service", "metadata": meta | {"creationTimestamp": stamp(time.time() - 600)}, "spec": spec}


def slice_(made: LabService, *endpoints: tuple[str, Raw], zone: str = "zone-a", family: int = 4) -> Raw:
    """The service's slice: (address, pod) each."""
    told = [
        {
            "addresses": [ip],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "nodeName": pod["spec"]["nodeName"],
            "zone": zone,
            "targetRef": {"kind": "Pod", **{key: pod["metadata"][key] for key in ("namespace", "name", "uid")}},
        }
        for ip, pod in endpoints
    ]
    labels = {"kubernetes.io/service-name": made.name}
    meta = {"namespace": made.namespace, "name": f"{made.name}-x{family}", "uid": uid("slice", made.name, family)}
    ports = [{"name": made.port_name, "port": made.target_port, "protocol": made.protocol.upper()}]
    meta |= {"labels": labels, "creationTimestamp": stamp(time.time() - 600)}
    return {
        "kind": "EndpointSlice", "addressType": f"IPv{family}", "metadata": meta, "ports": ports, "endpoints": told,
    }  # fmt: skip


def objects(cluster: Cluster) -> dict[str, list[Raw]]:
    """All of a cluster by kind: pods are called as in the lab, clients belong to a Deployment "cart"."""
    backends = [pod(made, made.name) for made in cluster.backend_pods]
    slices = [
        slice_(made, *((cluster.backend_pods[i].ips[family], backends[i]) for i in made.backends), family=family)
        for made in cluster.services.values()
        for family in cluster.families
    ]
    return {
        "nodes": [node(made) for made in cluster.nodes],
        "pods": backends + [pod(made, made.name, "Deployment/cart") for made in cluster.client_pods],
        "services": [service(made, cluster.families[0]) for made in cluster.services.values()],
        "endpointslices": slices,
    }
