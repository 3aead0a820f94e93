"""The kinds of network: who reaches whom through which rewrite, by the ledgers and by each node's conntrack."""

import errno
from collections.abc import Iterator

import pytest
from test_cleanup import children
from witness import Entry, Where, accepted, entries

from tracer.errors import UsageError
from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack
from tracer.lab.traffic import Client

pytestmark = pytest.mark.needs("netns", "iptables", "nft", "conntrack")

OUTSIDE = {4: "172.30.0.100", 6: "fd00:172:30::100"}


def dial(cluster: Cluster, client: Client, where: Where, count: int = 5) -> list[tuple[Where, Where]]:
    """Dials; (peer, the server's own address) of each connection, as the server that accepted it has them."""
    servers = [*cluster.servers, *([cluster.outside_server] if hasattr(cluster, "outside") else [])]
    before = accepted(servers)
    made = client.connect_many(count, where)
    assert not made["errno"].any(), made["errno"]
    cluster.settle()
    new = accepted(servers) - before
    assert new.total() == count
    return list(new)


def of(found: list[Entry], dialled: Where) -> list[Entry]:
    return [entry for entry in found if entry.dialled == dialled]


def assert_the_witnesses_agree(found: list[Entry], arrived: list[tuple[Where, Where]]) -> None:
    """Whom the backends saw come is whom conntrack sends the answers to."""
    assert {(entry.source, entry.backend) for entry in found} == set(arrived)


@pytest.fixture(
    scope="module",
    params=["bridge-iptables", "bridge-nftables", "routed-iptables", "routed-nftables", "unfiltered-nftables"],
)
def single(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """One node of each kind; the service "own" leads to backend 0 alone."""
    network, proxy = request.param.split("-")
    with Cluster(backends=2, clients=1, families="dual", network=network, proxy=proxy, hosts=1) as cluster:
        cluster.add_service("own", [0], port=81)
        yield cluster


def kind(cluster: Cluster) -> str:
    """How the cluster's node joins its pods, read off its interfaces and settings."""
    if "cni0" not in cluster.node.run(["ip", "-o", "link"]):
        return "routed"
    filtered = cluster.node.run(["sysctl", "-n", "net.bridge.bridge-nf-call-iptables"]).strip()
    return "bridge" if filtered == "1" else "unfiltered"


@pytest.mark.parametrize("family", [4, 6])
def test_a_pod_reaches_the_service(single: Cluster, family: int) -> None:
    arrived = dial(single, single.clients[0], single.vip(family=family))
    found = of(entries(single.node, family), single.vip(family=family))
    assert_the_witnesses_agree(found, arrived)
    # where the bridge's frames pass no netfilter, the answer comes back through the node only if it seems to ask
    assert {entry.rewrites for entry in found} == {(True, kind(single) == "unfiltered")}
    assert {entry.client[0] for entry in found} == {single.client_pods[0].ips[family]}


@pytest.mark.parametrize("family", [4, 6])
def test_a_pod_reaches_another_directly(single: Cluster, family: int) -> None:
    where = (single.backend_pods[1].ips[family], 8080)
    arrived = dial(single, single.clients[0], where)
    assert {peer[0] for peer, _ in arrived} == {single.client_pods[0].ips[family]}
    found = of(entries(single.node, family), where)
    if kind(single) == "unfiltered":
        assert not found
    else:
        assert_the_witnesses_agree(found, arrived)
        assert {entry.rewrites for entry in found} == {(False, False)}


@pytest.mark.parametrize("family", [4, 6])
def test_a_pod_reaches_itself_through_its_service(single: Cluster, family: int) -> None:
    pod = single.backend_pods[0]
    arrived = dial(single, single.client_in(pod), single.vip("own", family))
    assert {local for _, local in arrived} == {(pod.ips[family], 8080)}
    assert pod.ips[family] not in {peer for (peer, _), _ in arrived}
    found = of(entries(single.node, family), single.vip("own", family))
    assert_the_witnesses_agree(found, arrived)
    assert {entry.client[0] for entry in found} == {pod.ips[family]}
    assert {entry.rewrites for entry in found} == {(True, True)}


@pytest.mark.parametrize("family", [4, 6])
def test_a_process_of_the_node_reaches_the_service(single: Cluster, family: int) -> None:
    arrived = dial(single, single.host_clients[0], single.vip(family=family))
    found = [e for e in of(entries(single.node, family), single.vip(family=family)) if (e.source, e.backend) in arrived]
    assert_the_witnesses_agree(found, arrived)
    own = {entry.client[0] for entry in found}
    assert own == {single.nodes[0].addresses[family]}


def test_nothing_reaches_outside_where_there_is_none(single: Cluster) -> None:
    made = single.clients[0].connect_many(1, (OUTSIDE[4], 80), timeout=0.3)
    assert made["errno"].all()


@pytest.fixture(scope="module", params=["bridge-iptables", "routed-nftables", "unfiltered-iptables"])
def world(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Two nodes, two backends and a client on each, and the outside; a service of each policy."""
    network, proxy = request.param.split("-")
    with Cluster(
        backends=4, clients=2, families="dual", network=network, proxy=proxy, nodes=2, outside=True, syn_retries=2
    ) as cluster:
        cluster.add_service("anywhere", port=81, node_port=30081, load_balancer=True)
        cluster.add_service("here", port=82, node_port=30082, load_balancer=True, external_policy="Local")
        cluster.add_service("beyond", [1, 3], port=83, load_balancer=True, external_policy="Local")
        cluster.outside_server.listen(list(OUTSIDE.values()), 443)
        yield cluster


def backends_of(cluster: Cluster, node: int, family: int) -> set[str]:
    return {pod.ips[family] for pod in cluster.backend_pods if pod.node is cluster.nodes[node]}


def test_pods_are_dealt_over_the_nodes(world: Cluster) -> None:
    assert [node.name for node in world.nodes] == ["node-1", "node-2"]
    assert world.node is world.nodes[0].netns
    assert [pod.node.number for pod in world.backend_pods] == [1, 2, 1, 2]
    assert [pod.node.number for pod in world.client_pods] == [1, 2]
    assert [pod.addresses for pod in world.nodes[1].pods] == [
        ["10.244.2.10", "fd00:10:244:2::10"],
        ["10.244.2.11", "fd00:10:244:2::11"],
        ["10.244.2.150", "fd00:10:244:2::150"],
    ]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("number", [0, 1])
def test_a_pod_reaches_the_backends_of_all_nodes(world: Cluster, family: int, number: int) -> None:
    client, vip = world.client_pods[number], world.vip(family=family)
    arrived = dial(world, world.clients[number], vip, 80)
    assert {local[0] for _, local in arrived} == backends_of(world, 0, family) | backends_of(world, 1, family)
    near, far = (entries(world.nodes[place].netns, family) for place in (number, 1 - number))
    translated = [entry for entry in of(near, vip) if entry.client[0] == client.ips[family]]
    assert_the_witnesses_agree(translated, arrived)
    # the other node sees the pod itself, and what was rewritten already
    crossed = {pair for pair in arrived if pair[1][0] in backends_of(world, 1 - number, family)}
    assert {peer[0] for peer, _ in crossed} == {client.ips[family]}
    assert crossed == {(entry.client, entry.dialled) for entry in far if entry.client[0] == client.ips[family]}
    assert not [entry for entry in of(far, vip) if entry.client[0] == client.ips[family]]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("number", [0, 1])
def test_a_node_port_leads_anywhere_and_is_masqueraded(world: Cluster, family: int, number: int) -> None:
    where = world.node_port("anywhere", number, family)
    assert where == (world.nodes[number].addresses[family], 30081)
    arrived = dial(world, world.outside_client, where, 80)
    assert {local[0] for _, local in arrived} == backends_of(world, 0, family) | backends_of(world, 1, family)
    assert OUTSIDE[family] not in {peer[0] for peer, _ in arrived}
    found = of(entries(world.nodes[number].netns, family), where)
    assert_the_witnesses_agree(found, arrived)
    assert {entry.client[0] for entry in found} == {OUTSIDE[family]}
    assert {entry.rewrites for entry in found} == {(True, True)}


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("number", [0, 1])
def test_a_local_node_port_stays_on_its_node_and_keeps_the_client(world: Cluster, family: int, number: int) -> None:
    where = world.node_port("here", number, family)
    arrived = dial(world, world.outside_client, where, 30)
    assert {local[0] for _, local in arrived} == backends_of(world, number, family)
    assert {peer[0] for peer, _ in arrived} == {OUTSIDE[family]}
    found = of(entries(world.nodes[number].netns, family), where)
    assert_the_witnesses_agree(found, arrived)
    assert {entry.rewrites for entry in found} == {(True, False)}


@pytest.mark.parametrize("family", [4, 6])
def test_a_load_balancers_address_leads_in_by_the_first_node(world: Cluster, family: int) -> None:
    assert world.load_balancer("anywhere") == ("172.31.0.11", 81)
    arrived = dial(world, world.outside_client, world.load_balancer("anywhere", family), 80)
    assert {local[0] for _, local in arrived} == backends_of(world, 0, family) | backends_of(world, 1, family)
    assert OUTSIDE[family] not in {peer[0] for peer, _ in arrived}
    assert_the_witnesses_agree(of(entries(world.node, family), world.load_balancer("anywhere", family)), arrived)
    arrived = dial(world, world.outside_client, world.load_balancer("here", family), 30)
    assert {local[0] for _, local in arrived} == backends_of(world, 0, family)
    assert {peer[0] for peer, _ in arrived} == {OUTSIDE[family]}


def test_a_local_service_without_a_backend_on_the_node_is_silent(world: Cluster) -> None:
    made = world.outside_client.connect_many(1, world.load_balancer("beyond"), timeout=0.3)
    assert set(made["errno"]) == {errno.ECANCELED}
    dial(world, world.clients[0], world.vip("beyond"))  # inside the cluster the policy says nothing


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("number", [0, 1])
def test_what_leaves_the_cluster_is_masqueraded(world: Cluster, family: int, number: int) -> None:
    where = (OUTSIDE[family], 443)
    arrived = dial(world, world.clients[number], where)
    node = world.nodes[number]
    assert {peer[0] for peer, _ in arrived} == {node.addresses[family]}
    found = of(entries(node.netns, family), where)
    assert_the_witnesses_agree(found, arrived)
    assert {entry.client[0] for entry in found} == {world.client_pods[number].ips[family]}
    assert {entry.rewrites for entry in found} == {(False, True)}


def test_outside_knows_neither_pods_nor_services(world: Cluster) -> None:
    for where in ((world.backend_pods[0].addresses[0], 8080), world.vip()):
        assert set(world.outside_client.connect_many(1, where)["errno"]) == {errno.ENETUNREACH}


def test_a_pod_reaches_itself_on_either_node(world: Cluster) -> None:
    for number in (0, 1):
        pod = world.backend_pods[number]
        world.set_backends("web", [number])
        arrived = dial(world, world.client_in(pod), world.vip())
        assert {local for _, local in arrived} == {(pod.addresses[0], 8080)}
        assert pod.addresses[0] not in {peer for (peer, _), _ in arrived}
    world.set_backends("web", range(4))


def test_a_process_of_either_node_reaches_the_backends_of_both(world: Cluster) -> None:
    for number, node in enumerate(world.nodes):
        arrived = dial(world, world.client_in(node), world.vip(), 80)
        assert {local[0] for _, local in arrived} == backends_of(world, 0, 4) | backends_of(world, 1, 4)
        # masqueraded, so the other node's pods answer to the node, not past it
        far = {peer[0] for peer, local in arrived if local[0] in backends_of(world, 1 - number, 4)}
        assert far == {node.addresses[4]}


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("proxy", ["iptables", "nftables"])
def test_session_affinity_keeps_each_client_with_one_backend(proxy: str, family: int) -> None:
    families = "ipv4" if family == 4 else "ipv6"
    with Cluster(backends=4, clients=6, families=families, proxy=proxy, nodes=2) as cluster:
        cluster.add_service("sticky", port=81, affinity_seconds=3600)
        for client, pod in zip(cluster.clients, cluster.client_pods, strict=True):
            arrived = dial(cluster, client, cluster.vip("sticky"), 20)
            assert {peer[0] for peer, _ in arrived} == {pod.ips[family]}
            assert len({local[0] for _, local in arrived}) == 1
        assert len({local[0] for _, local in dial(cluster, cluster.clients[0], cluster.vip(), 80)}) == 4


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("proxy", ["iptables", "nftables"])
def test_a_udp_service_leads_to_its_backends(proxy: str, family: int) -> None:
    families = "ipv4" if family == 4 else "ipv6"
    with Cluster(backends=2, clients=1, families=families, proxy=proxy, outside=True) as cluster:
        cluster.add_service("dns", port=53, target_port=5353, protocol="udp", port_name="dns", node_port=30053)
        for client, where, masqueraded in (
            (cluster.clients[0], cluster.vip("dns"), False),
            (cluster.outside_client, cluster.node_port("dns"), True),
        ):
            before = accepted(cluster.servers)
            assert not client.datagrams(40, where)["errno"].any()
            arrived = list(accepted(cluster.servers) - before)
            assert {local for _, local in arrived} == {(pod.ips[family], 5353) for pod in cluster.backend_pods}
            found = of(entries(cluster.node, family, "udp"), where)
            assert_the_witnesses_agree(found, arrived)
            assert {entry.rewrites for entry in found} == {(True, masqueraded)}


def test_legacy_iptables_and_the_masquerading_get_along() -> None:
    with Cluster(backends=2, clients=1, iptables="legacy", network="routed", outside=True) as cluster:
        cluster.add_service("anywhere", port=81, node_port=30081)
        cluster.outside_server.listen([OUTSIDE[4]], 443)
        for client, where in (
            (cluster.clients[0], (OUTSIDE[4], 443)),
            (cluster.outside_client, cluster.node_port("anywhere")),
        ):
            assert {peer[0] for peer, _ in dial(cluster, client, where)} == {"172.30.0.2"}


def test_the_largest_kind_of_cluster_leaves_no_process() -> None:
    before = children()
    with Cluster(backends=2, clients=2, nodes=2, outside=True, hosts=2) as cluster:
        cluster.client_in(cluster.backend_pods[0])
        assert [client.name for client in cluster.host_clients] == ["node-1", "node-2"]
        # 2 nodes, 4 pods, segment, outside; and in them 2 servers, 2 clients, 2 outside, 2 on the nodes, 1 in a pod
        assert len(children() - before) == 8 + 9
    assert children() == before


def test_conntrack_has_its_settings_on_every_node() -> None:
    conntrack = Conntrack(timeouts=Conntrack.SHORT | {"udp": 7, "udp_stream": 8, "close": 9}, events=1)
    with Cluster(backends=1, clients=0, nodes=2, conntrack=conntrack) as cluster:
        keys = ["acct", "events", "udp_timeout", "udp_timeout_stream", "tcp_timeout_close", "tcp_timeout_time_wait"]
        for node in cluster.nodes:
            values = node.netns.run(["sysctl", "-n", *(f"net.netfilter.nf_conntrack_{key}" for key in keys)]).split()
            assert values == ["1", "1", "7", "8", "9", "2"]


def test_a_syn_that_nobody_answers_is_repeated_as_often_as_asked() -> None:
    keys = ("net.ipv4.tcp_syn_retries", "net.ipv4.tcp_synack_retries")
    with Cluster(backends=1, clients=1, syn_retries=1, synack_retries=2) as cluster:
        for place in (cluster.node, cluster.backend_pods[0].netns, cluster.client_pods[0].netns):
            assert place.run(["sysctl", "-n", *keys]).split() == ["1", "2"]


def test_addresses_of_what_is_not_there_are_refused_with_a_word() -> None:
    for wrong in ({"network": "vxlan"}, {"proxy": "userspace"}, {"nodes": 0}, {"nodes": 100}):
        with pytest.raises(UsageError, match=r"choose|room for"):
            Cluster(**wrong)  # type: ignore[arg-type]
    with Cluster(backends=1, clients=0) as cluster:
        with pytest.raises(UsageError, match="no node port"):
            cluster.node_port("web")
        with pytest.raises(UsageError, match="no load balancer"):
            cluster.load_balancer("web")
        with pytest.raises(UsageError, match="choose among Cluster, Local"):
            cluster.add_service("local", external_policy="Near")
