import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from naming_world import raw, sample

from tracer.naming import fields, objects
from tracer.naming.objects import KINDS, Endpoint, Node, Pod, Service, ServicePort, Slice, SlicePort, read

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def service(spec: dict[str, Any], **status: Any) -> Service:
    found = read("services", {"metadata": {"namespace": "shop", "name": "web"}, "spec": spec, "status": status})
    assert isinstance(found, Service)
    return found


def pod(metadata: dict[str, Any] | None = None, spec: Any = None, status: Any = None) -> Pod:
    found = read(
        "pods",
        {"metadata": {"namespace": "shop", "name": "p", "uid": "u"} | (metadata or {}), "spec": spec, "status": status},
    )
    assert isinstance(found, Pod)
    return found


def endpoints(*items: Any) -> tuple[Endpoint, ...]:
    found = read("endpointslices", {"metadata": {"namespace": "shop", "name": "s"}, "endpoints": list(items)})
    assert isinstance(found, Slice)
    return found.endpoints


def test_a_real_service() -> None:
    (found,) = [read("services", item) for item in sample("services") if item["metadata"]["name"] == "rweb-np"]
    assert isinstance(found, Service)
    assert (found.key, found.type, found.addresses) == (("shop", "rweb-np"), "NodePort", (raw("10.96.20.20"),))
    assert found.ports == (ServicePort("http", 80, 6, 30090),)
    assert (found.affinity, found.affinity_s, found.external_policy) == ("None", None, "Cluster")
    assert found.created_ns == 1795453155 * 10**9


def test_a_real_slice() -> None:
    (found,) = [read("endpointslices", i) for i in sample("endpointslices") if i["metadata"]["name"] == "rweb-d2gs7"]
    assert isinstance(found, Slice)
    assert (found.key, found.service) == (("shop", "rweb-d2gs7"), "rweb")
    assert found.ports == (SlicePort("dgram", 8081, 17), SlicePort("http", 8080, 6))
    first = found.endpoints[0]
    assert (first.addresses, first.node, first.pod) == ((raw("10.244.1.100"),), "node1", "rweb-64f565bf6d-sqpgc")
    assert (first.pod_namespace, first.uid) == ("shop", "203b8d5e-3c25-4d47-92bf-c691b78a1bd2")
    assert (first.ready, first.serving, first.terminating) == (True, True, False)


def test_a_real_pod_and_a_real_node() -> None:
    found = read("pods", sample("pods")[0])
    assert isinstance(found, Pod)
    assert (found.key, found.workload) == (("shop", "rcli-765dbccdc9-hpvt8"), "deployment/rcli")
    assert (found.addresses, found.node, found.host_network) == ((raw("10.244.1.102"),), "node1", False)
    assert found.containers == ("ac20414a5c7773711e48329c9c86f8175c444097205cacb89171cd85273091a1",)
    assert found.started_ns == 1795453155 * 10**9
    assert not found.finished
    host = read("nodes", sample("nodes")[0])
    assert isinstance(host, Node)
    assert (host.key, host.addresses, host.zone) == (("", "node1"), (raw("172.30.0.11"),), None)


def test_every_real_object_is_read() -> None:
    for kind in KINDS:
        assert all(read(kind, item) is not None for item in sample(kind))


def test_all_virtual_addresses_each_once() -> None:
    found = service(
        {
            "type": "LoadBalancer",
            "clusterIP": "10.96.0.1",
            "clusterIPs": ["10.96.0.1", "fd00::1"],
            "externalIPs": ["192.0.2.7"],
            "ports": [{"port": 80}, {"port": 53, "protocol": "UDP", "name": "dns", "nodePort": 30053}],
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
            "externalTrafficPolicy": "Local",
            "internalTrafficPolicy": "Local",
        },
        loadBalancer={"ingress": [{"ip": "198.51.100.1"}, {"hostname": "lb.example"}]},
    )
    assert found.addresses == tuple(map(raw, ("10.96.0.1", "fd00::1", "192.0.2.7", "198.51.100.1")))
    assert found.ports == (ServicePort(None, 80, 6), ServicePort("dns", 53, 17, 30053))
    assert (found.affinity, found.affinity_s) == ("ClientIP", 60)
    assert (found.internal_policy, found.external_policy) == ("Local", "Local")


@pytest.mark.parametrize(
    "spec",
    [
        {"clusterIP": "None", "clusterIPs": ["None"], "externalIPs": ["192.0.2.7"]},
        {"type": "ExternalName", "externalName": "example.org", "externalIPs": ["192.0.2.7"]},
        {"clusterIP": ""},
        {"clusterIP": "10.96.0"},
    ],
)
def test_services_without_a_virtual_address(spec: dict[str, Any]) -> None:
    assert service(spec).addresses == ()
    assert service(spec).headless == (spec.get("clusterIP") == "None")


def test_conditions_that_are_not_said_have_the_apis_defaults() -> None:
    def standing(conditions: Any) -> tuple[bool, bool, bool]:
        (found,) = endpoints({"addresses": ["10.0.0.1"], "conditions": conditions})
        return found.ready, found.serving, found.terminating

    assert standing(None) == (True, True, False)
    assert standing({"ready": None, "serving": None, "terminating": None}) == (True, True, False)
    assert standing({"ready": False}) == (False, False, False)
    assert standing({"ready": False, "serving": True, "terminating": True}) == (False, True, True)


def test_a_target_that_is_no_pod_is_none_and_a_pods_namespace_is_the_slices() -> None:
    other, mine = endpoints(
        {"addresses": ["10.0.0.1"], "targetRef": {"kind": "Node", "name": "n"}},
        {"addresses": ["10.0.0.2"], "targetRef": {"kind": "Pod", "name": "p"}, "hints": {"forZones": [{"name": "b"}]}},
    )
    assert (other.pod, other.pod_namespace) == (None, None)
    assert (mine.pod, mine.pod_namespace, mine.uid, mine.hint_zones) == ("p", "shop", None, ("b",))


def test_endpoints_with_names_for_addresses_are_left_out() -> None:
    assert endpoints({"addresses": ["web.example.org"]}, {"addresses": []}, None, 7) == ()


@pytest.mark.parametrize(
    ("kind", "name", "labels", "workload"),
    [
        ("ReplicaSet", "cart-7d9f", {"pod-template-hash": "7d9f"}, "deployment/cart"),
        ("ReplicaSet", "cart-7d9f", {}, "replicaset/cart-7d9f"),
        ("ReplicaSet", "cart", {"pod-template-hash": "7d9f"}, "replicaset/cart"),
        ("ReplicaSet", "-7d9f", {"pod-template-hash": "7d9f"}, "replicaset/-7d9f"),
        ("StatefulSet", "redis", {}, "statefulset/redis"),
        ("DaemonSet", "proxy", {"pod-template-hash": "x"}, "daemonset/proxy"),
        ("Job", "backup-2900", {}, "job/backup-2900"),
    ],
)
def test_workloads(kind: str, name: str, labels: dict[str, str], workload: str) -> None:
    owners = [{"kind": "Other", "name": "no"}, {"kind": kind, "name": name, "controller": True}]
    assert pod({"ownerReferences": owners, "labels": labels}).workload == workload
    assert pod({"ownerReferences": owners[:1], "labels": labels}).workload is None


def test_a_static_pods_mirror_tells_the_uid_its_cgroup_has() -> None:
    assert pod({"annotations": {"kubernetes.io/config.mirror": "0a" * 16}}).static_uid == "0a" * 16


def test_dual_stack_and_host_network_pods() -> None:
    found = pod(
        spec={"hostNetwork": True}, status={"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}
    )
    assert found.host_network
    assert found.addresses == (raw("10.0.0.1"), raw("fd00::1"))
    assert pod(status={"phase": "Succeeded"}).finished


@pytest.mark.parametrize(
    "when", ["", "yesterday", "0001-01-01T00:00:00+14:00", "9999-01-01T00:00:00Z", 7, None, "1" * 99]
)
def test_times_that_are_none(when: Any) -> None:
    assert pod(status={"startTime": when}).started_ns is None


def test_odd_names_are_escaped_and_long_ones_not_believed() -> None:
    found = read("services", {"metadata": {"namespace": "shop", "name": "a\x1b[31m\u202e\ud800"}})
    assert found is not None
    assert found.name == r"a\x1b[31m\u202e\ud800"
    assert read("services", {"metadata": {"namespace": "shop", "name": "x" * 254}}) is None
    assert pod(spec={"nodeName": "n" * 254}).node is None


def test_long_lists_are_cut() -> None:
    assert len(endpoints(*[{"addresses": ["10.0.0.1"]}] * 5000)) == fields.MAX_ITEMS


def test_equal_texts_are_kept_once() -> None:
    item = json.dumps(
        {"metadata": {"namespace": "shop", "name": "s"}, "endpoints": [{"addresses": ["::1"], "nodeName": "n1"}]}
    )
    first, second = (read("endpointslices", json.loads(item)) for _ in range(2))
    assert isinstance(first, Slice)
    assert isinstance(second, Slice)
    assert first.endpoints[0].node is second.endpoints[0].node


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("item", [None, [], 7, "x", {}, {"metadata": []}, {"metadata": {"name": 7, "namespace": "x"}}])
def test_what_has_no_name_is_malformed(kind: str, item: Any) -> None:
    assert read(kind, item) is None


@given(st.sampled_from(KINDS), st.data())
def test_no_json_makes_it_raise(kind: str, data: st.DataObject) -> None:
    """A real object, with any JSON put in at any place."""
    found = copy.deepcopy(data.draw(st.sampled_from(sample(kind))))
    place: Any = found
    for _ in range(data.draw(st.integers(1, 6))):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(JSON)
            break
        place = place[key]
    got = read(kind, found)
    assert got is None or json.dumps(got.key).isascii() or all(map(str.isprintable, got.key))
    assert got is None or all(len(each) == 16 for each in getattr(got, "addresses", ()))


@given(st.binary(min_size=16, max_size=16))
def test_addresses_read_back(address: bytes) -> None:
    assert fields.address_bytes(fields.address_text(address)) == address


def test_only_known_kinds_are_read() -> None:
    with pytest.raises(KeyError):
        objects.read("secrets", {})
