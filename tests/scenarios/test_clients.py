"""TCP clients of every kind: in pods and on the host, over IPv6 and mapped; rewritten, not rewritten, rewritten twice.

Each row is compared with what both ends noted, and all that is there is compared: a row too many fails as well.
"""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from agent_world import agent, rows
from scenarios.truth import End, accepted, check, clean, ends, lives

from tracer.lab import topology
from tracer.lab.cluster import Cluster
from tracer.lab.netns import Namespace, wait_until
from tracer.lab.traffic import Client, Ledger, Server, socket_statistics

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables", "nft", "ipv6")

SENDS, RECEIVES = 100, 300


def dialled(table: pd.DataFrame, where: tuple[str, int], client: Client) -> pd.DataFrame:
    """The rows of that process's connections to that address."""
    return table[(table.dst_ip == where[0]) & (table.dst_port == where[1]) & (table.pid == client.pid)]


def assert_all_are(found: pd.DataFrame, **values: object) -> None:
    """Each of these columns has this value in every row; None is null."""
    for column, value in values.items():
        seen = set(found[column].astype(object).where(found[column].notna(), None))
        assert seen == {value}, column


def closed(where: Namespace) -> None:
    """Waits until no TCP socket there is open: the kernel closes later than the application, and than its peer."""
    wait_until(lambda: not socket_statistics(where), "the sockets to close")


def cgroup_of(process: int) -> int:
    """The id of a process's cgroup (v2), which is its directory's inode number."""
    path = Path(f"/proc/{process}/cgroup").read_text(encoding="ascii").split("0::/")[1].strip()
    root = next(line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if " cgroup2 " in line)
    return Path(root, path).stat().st_ino


class Made(NamedTuple):
    """What one client made to one address."""

    client: Client
    where: tuple[str, int]
    ledger: Ledger


class Record(NamedTuple):
    """One run of the agent: the cluster as it was, what was made in it, by its name, and the rows of it."""

    cluster: Cluster
    made: dict[str, list[Made]]
    table: pd.DataFrame
    counted: pd.Series

    def check(self, made: Made, **values: object) -> pd.DataFrame:
        """That these are exactly the rows of what was made, and that all of them have these values."""
        found = dialled(self.table, made.where, made.client)
        lives = check(found, made.ledger, [*self.cluster.servers, self.cluster.outside_server])
        assert_all_are(lives, **values)
        return lives


@pytest.fixture(scope="module", params=["bridge-iptables", "routed-nftables"])
def record(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Record]:
    """Two nodes, of which the first is traced, and the outside; everything that the tests below look at."""
    network, proxy = request.param.split("-")
    output = tmp_path_factory.mktemp("clients") / "data"
    with Cluster(
        backends=4, clients=2, families="dual", network=network, proxy=proxy, nodes=2, outside=True, hosts=1
    ) as cluster:
        # each kind of destination has a port of its own: two ways to one socket may clash, which has a test of its own
        cluster.add_service("api", port=81, target_port=8081, node_port=30081)
        cluster.add_service("one", [1], port=82, target_port=8082)
        for server, pod in zip(cluster.servers, cluster.backend_pods, strict=True):
            server.listen(pod.addresses, 9090)
        cluster.outside_server.listen(topology.outside_addresses((4, 6)).values(), 443)
        with agent(cluster, output, "--interval", "500ms"):
            made = make(cluster)
            cluster.settle()
        yield Record(cluster, made, rows(output), clean(output))


def make(cluster: Cluster) -> dict[str, list[Made]]:
    """All the connections of a record."""
    pod, node, far = cluster.client_pods[0], cluster.nodes[0], cluster.backend_pods[1]
    host, hostnetwork, client, same, mapped, long, clash = (
        *cluster.host_clients, cluster.client_in(node), cluster.clients[0], *(cluster.client_in(pod) for _ in range(4))
    )  # fmt: skip
    out = {family: (address, 443) for family, address in topology.outside_addresses((4, 6)).items()}

    def connected(who: Client, *where: tuple[str, int]) -> list[Made]:
        return [Made(who, to, who.connect_many(10, to, SENDS, RECEIVES)) for to in where]

    def bound(who: Client, port: int, *where: tuple[str, int]) -> list[Made]:
        """From the same ports to each of these, all open at once."""
        numbers = [who.hold(6, to, bind=(pod.ips[6 if ":" in to[0] else 4], port))["number"] for to in where]
        for held in numbers:
            who.exchange(held, SENDS, RECEIVES)
        return [Made(who, to, who.release(held)) for to, held in zip(where, numbers, strict=True)]

    found = {
        "host": connected(host, *(cluster.vip(family=family) for family in (4, 6))),
        "hostnetwork": connected(hostnetwork, *(cluster.vip(family=family) for family in (4, 6))),
        "own node port": connected(host, *(cluster.node_port("api", 0, family) for family in (4, 6))),
        "other node port": connected(host, *(cluster.node_port("api", 1, family) for family in (4, 6))),
        "far pod": connected(client, *((far.ips[family], 9090) for family in (4, 6))),
        "outside": connected(client, *out.values()),
        "outside from host": connected(host, *out.values()),
        "same ports": bound(same, 5_000, *(cluster.vip(family=family) for family in (4, 6))),
        "clash": bound(clash, 6_000, cluster.vip("one"), (far.ips[4], 8082)),
        "mapped": [Made(who, to, who.connect_as("mapped", 10, to, SENDS, RECEIVES))
                   for who, to in ((mapped, cluster.vip()), (mapped, (far.ips[4], 9090)), (mapped, out[4]))],
        "mapped from host": [Made(hostnetwork, cluster.vip("api"),
                                  hostnetwork.connect_as("mapped", 10, cluster.vip("api"), SENDS, RECEIVES))],
    }  # fmt: skip
    held = long.connect_as("mapped", 3, cluster.vip("api"), SENDS, RECEIVES, keep=True)["number"]
    beside = []
    for _ in range(8):  # about two seconds
        long.exchange(held, SENDS, RECEIVES)
        beside.append(host.connect_many(2, (far.ips[4], 9090), SENDS, RECEIVES, rate=4))
    found["far pod from host"] = [Made(host, (far.ips[4], 9090), np.concatenate(beside))]
    found["long"] = [Made(long, cluster.vip("api"), long.release(held))]
    # what comes from the other node is only passed on here: no row
    near = cluster.backend_pods[0]
    for family in (4, 6):
        assert not cluster.clients[1].connect_many(6, (near.ips[family], 9090))["errno"].any()
    return found


# -- on the host ---------------------------------------------------------------------------------------------------


def test_host_processes_dial_a_virtual_address(record: Record) -> None:
    """A daemon of the node, and a pod with hostNetwork: both are processes in the node's own namespace."""
    node = record.cluster.nodes[0]
    for made, family in zip(record.made["host"] + record.made["hostnetwork"], (4, 6, 4, 6), strict=True):
        # kube-proxy masquerades what does not come from the pods' network
        record.check(made, nat="dnat+snat", nat_source="conntrack", src_ip=node.addresses[family], backend_port=8080,
                     result="ok", comm="lab-client", netns=node.netns.inode, cgroup_id=cgroup_of(made.client.pid),
                     opened=True, closed=True)  # fmt: skip


def test_a_host_process_dials_node_ports(record: Record) -> None:
    """The own node's is rewritten here; the other node's is rewritten there, and here nothing is."""
    for made in record.made["own node port"]:
        record.check(made, nat="dnat+snat", nat_source="conntrack", backend_port=8081)
    for made in record.made["other node port"]:
        found = lives(dialled(record.table, made.where, made.client))
        assert sorted(found.src_port) == sorted(made.ledger["local_port"])
        assert_all_are(found, nat="none", nat_source="conntrack", backend_ip=made.where[0], backend_port=made.where[1],
                       snat_ip=None, result="ok", bytes_sent=SENDS, bytes_received=RECEIVES)  # fmt: skip


def test_a_host_process_with_an_address_of_the_pods_network_is_not_masqueraded(tmp_path: Path) -> None:
    """It is bound to the bridge's own address, which is one of the pods' network."""
    with Cluster(backends=3, clients=0, hosts=1) as cluster:
        client = cluster.host_clients[0]
        with agent(cluster, tmp_path / "data"):
            held = client.hold(6, cluster.vip(), bind=("10.244.1.1", 20_000))["number"]
            client.exchange(held, SENDS, RECEIVES)
            ledger = client.release(held)
            cluster.settle()
        found = check(rows(tmp_path / "data"), ledger, cluster.servers)
        assert_all_are(found, nat="dnat", snat_ip=None, snat_port=None, src_ip="10.244.1.1", pid=client.pid)
        assert clean(tmp_path / "data").opened == 6


def test_a_node_port_dialled_on_loopback(tmp_path: Path) -> None:
    """kube-proxy allows it in iptables mode, by route_localnet; other loopback connections stay left out."""
    with Cluster(backends=3, clients=0, hosts=1) as cluster, Server(cluster.node) as local:
        cluster.add_service("api", port=81, node_port=30081)
        cluster.node.sysctl({"net.ipv4.conf.all.route_localnet": 1})
        local.listen(["127.0.0.1"], 9000)
        client = cluster.host_clients[0]
        with agent(cluster, tmp_path / "data"):
            ledger = client.connect_many(10, ("127.0.0.1", 30081), SENDS, RECEIVES)
            client.connect_many(5, ("127.0.0.1", 9000), SENDS, RECEIVES)
            closed(cluster.node)
        found = check(rows(tmp_path / "data"), ledger, cluster.servers)
        assert_all_are(found, nat="dnat+snat", src_ip="127.0.0.1", dst_ip="127.0.0.1", dst_port=30081,
                       backend_port=8080, snat_ip="10.244.1.1", pid=client.pid, netns=cluster.node.inode)  # fmt: skip
        sums = clean(tmp_path / "data")
        assert (sums.opened, sums.excluded) == (15, 5)


# -- the families --------------------------------------------------------------------------------------------------


def test_a_cluster_with_ipv6_alone(tmp_path: Path) -> None:
    with Cluster(backends=3, clients=2, families="ipv6") as cluster:
        with agent(cluster, tmp_path / "data"):
            ledger = np.concatenate([client.connect_many(200, cluster.vip(), 1000, 5000) for client in cluster.clients])
            cluster.settle()
        table = rows(tmp_path / "data")
        # the two pods choose their ports independently
        for client, pod in zip(cluster.clients, cluster.client_pods, strict=True):
            found = check(dialled(table, cluster.vip(), client), ledger[ledger["pid"] == client.pid], cluster.servers)
            assert_all_are(found, nat="dnat", nat_source="conntrack", src_ip=pod.ips[6], dst_ip=cluster.vip()[0],
                           snat_ip=None, result="ok", netns=pod.netns.inode, ct_zone=0)  # fmt: skip
        assert len(table) == clean(tmp_path / "data").opened == 400


def test_both_families_from_the_same_ports(record: Record) -> None:
    """Only the addresses tell the two apart."""
    pod = record.cluster.client_pods[0]
    for made, family in zip(record.made["same ports"], (4, 6), strict=True):
        found = record.check(made, nat="dnat", snat_ip=None, src_ip=pod.ips[family])
        assert sorted(found.src_port) == list(range(5_000, 5_006))


def test_ipv4_by_an_ipv6_socket_is_shown_as_ipv4(record: Record) -> None:
    pod, node = record.cluster.client_pods[0], record.cluster.nodes[0]
    for made, nat in zip(record.made["mapped"], ("dnat", "none", "snat"), strict=True):
        record.check(made, nat=nat, nat_source="conntrack", src_ip=pod.ips[4], dst_ip=made.where[0])
    for made in record.made["mapped from host"]:
        record.check(made, nat="dnat+snat", src_ip=node.addresses[4])
    for made in record.made["long"]:
        assert (record.check(made, nat="dnat", src_ip=pod.ips[4]).rows > 1).all()


# -- not rewritten -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", topology.NETWORKS)
def test_what_nobody_rewrites_is_none(tmp_path: Path, network: str) -> None:
    """Pods dialled by their own address, as those of a headless service are, by a pod and the node; and the node."""
    with (
        Cluster(backends=3, clients=1, families="dual", network=network, hosts=1) as cluster,
        Server(cluster.node) as on_node,
    ):
        client, host = cluster.clients[0], cluster.host_clients[0]
        targets = [(pod.ips[family], 8080) for pod in cluster.backend_pods for family in (4, 6)]
        with agent(cluster, tmp_path / "data"):
            made = [(dialler, where, dialler.connect_many(4, where, SENDS, RECEIVES))
                    for dialler in (client, host) for where in targets]  # fmt: skip
            cluster.settle()
            for address in cluster.nodes[0].addresses.values():
                on_node.listen([address], 9000)
                made.append((client, (address, 9000), client.connect_many(4, (address, 9000), SENDS, RECEIVES)))
            wait_until(lambda: not on_node.totals()["open"], "the node's server to see every close")
        table = rows(tmp_path / "data")
        for dialler, where, ledger in made:
            found = check(dialled(table, where, dialler), ledger, [*cluster.servers, on_node])
            # two pods of a bridge without bridge netfilter reach each other past conntrack; the node never does
            tracked = network != "unfiltered" or dialler is host or where[1] == 9000
            assert_all_are(found, nat="none", nat_source="conntrack" if tracked else None, backend_ip=where[0],
                           backend_port=where[1], snat_ip=None, snat_port=None)  # fmt: skip
            assert set(found.ct_id.notna()) == {tracked}
        sums = clean(tmp_path / "data")
        assert len(table) == sums.opened == 56
        assert sums.unresolved == 0


def test_a_pod_of_another_node(record: Record) -> None:
    """No rewrite on the way."""
    for made in record.made["far pod"] + record.made["far pod from host"]:
        record.check(made, nat="none", nat_source="conntrack", backend_ip=made.where[0], snat_ip=None)


def test_what_leaves_the_cluster_is_masqueraded(record: Record) -> None:
    pod, node = record.cluster.client_pods[0], record.cluster.nodes[0]
    for made, family in zip(record.made["outside"], (4, 6), strict=True):
        record.check(made, nat="snat", nat_source="conntrack", src_ip=pod.ips[family], backend_ip=made.where[0],
                     backend_port=443, snat_ip=node.addresses[family])  # fmt: skip
    for made, family in zip(record.made["outside from host"], (4, 6), strict=True):
        record.check(made, nat="none", nat_source="conntrack", src_ip=node.addresses[family], snat_ip=None)


def test_a_source_port_that_is_taken_is_rewritten(record: Record) -> None:
    """Two connections from one port to one socket, by its service and directly: the answers must differ."""
    pod = record.cluster.client_pods[0]
    by_service, directly = record.made["clash"]
    record.check(by_service, nat="dnat", snat_ip=None)
    found = record.check(directly, nat="snat", snat_ip=pod.ips[4], backend_ip=directly.where[0], backend_port=8082)
    assert (found.src_port != found.snat_port).all()


def test_a_record_has_nothing_else(record: Record) -> None:
    """In particular none of what the other node's pods dialled."""
    made = sum(len(made.ledger) for several in record.made.values() for made in several)
    assert record.table.conn_id.nunique() == record.counted.opened == made
    assert record.counted.unresolved == record.counted.flows == 0


# -- rewritten in the pod ------------------------------------------------------------------------------------------

MARK, PORT = 1337, 15_001

#: A sidecar: takes what is redirected to it and dials, marked, where the application wanted to go (80 is
#: SO_ORIGINAL_DST), or a fixed address. It passes on what comes, and each end's end.
RELAY = """
import socket, struct, sys, threading
mark, port, fixed = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]

def copy(source, target):
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)

def relay(inner):
    _, to_port, to, _ = struct.unpack("!HH4s8s", inner.getsockopt(socket.SOL_IP, 80, 16))
    with inner, socket.socket() as outer:
        outer.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        outer.connect((fixed[0], int(fixed[1])) if fixed else (socket.inet_ntoa(to), to_port))
        back = threading.Thread(target=copy, args=(outer, inner))
        back.start()
        copy(inner, outer)
        back.join()

listener = socket.create_server(("0.0.0.0", port))
print("ready", flush=True)
while True:
    threading.Thread(target=relay, args=(listener.accept()[0],)).start()
"""


@contextmanager
def sidecar(pod: Namespace, *fixed: str) -> Iterator[int]:
    """A relay in the pod, to which all TCP that is not its own is redirected, as meshes do; yields its process id."""
    unmarked = ["OUTPUT", "-p", "tcp", "-m", "mark", "!", "--mark", str(MARK)]
    pod.run(["iptables", "-t", "nat", "-A", *unmarked, "-j", "REDIRECT", "--to-ports", str(PORT)])
    command = [sys.executable, "-I", "-S", "-c", RELAY, str(MARK), str(PORT), *fixed]
    with pod.popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


def assert_untold(found: pd.DataFrame, made: Iterable[tuple[End, End]]) -> None:
    """Exactly these connections (source, destination), of which nobody outside the pod knows where they went."""
    assert sorted(zip(zip(found.src_ip, found.src_port, strict=True), zip(found.dst_ip, found.dst_port, strict=True),
                      strict=True)) == sorted(made)  # fmt: skip
    assert_all_are(found, nat="unknown", nat_source=None, backend_ip=None, backend_port=None, snat_ip=None, ct_id=None,
                   role="client", result="ok", bytes_sent=SENDS, bytes_received=RECEIVES)  # fmt: skip


@pytest.mark.parametrize(
    ("network", "relayed_to"), [("bridge", "service"), ("routed", "pod"), ("unfiltered", "service")]
)
def test_a_redirect_inside_the_pod_is_not_taken_for_the_nodes(tmp_path: Path, network: str, relayed_to: str) -> None:
    """The sidecar's connection has the node's rewrite, the application's has none that the node could know."""
    with Cluster(backends=3, clients=1, network=network) as cluster:
        client, pod, vip = cluster.clients[0], cluster.client_pods[0], cluster.vip()
        target = (cluster.backend_pods[2].ips[4], 8080)
        with sidecar(pod.netns, *map(str, target) if relayed_to == "pod" else ()) as relay:
            with agent(cluster, tmp_path / "data"):
                ledger = client.connect_many(25, vip, SENDS, RECEIVES)
                closed(pod.netns)
            assert not ledger["errno"].any()
        table = lives(rows(tmp_path / "data"))
        assert_untold(table[table.pid == client.pid], ends(ledger))
        outer = table[table.pid == relay]
        assert len(table) == len(ledger) + len(outer)
        assert_all_are(outer, role="client", src_ip=pod.ips[4], result="ok", bytes_sent=SENDS, bytes_received=RECEIVES)
        backends = zip(outer.backend_ip, outer.backend_port, strict=True)
        masqueraded = network == "unfiltered"
        sources = outer[["snat_ip", "snat_port"] if masqueraded else ["src_ip", "src_port"]].itertuples(index=False)
        log = accepted(cluster.servers)
        assert len(outer) == len(log) == 25
        assert {("tcp", tuple(source), backend) for source, backend in zip(sources, backends, strict=True)} == log
        if relayed_to == "service":
            assert_all_are(outer, nat="dnat+snat" if masqueraded else "dnat", dst_ip=vip[0], dst_port=vip[1])
        else:
            assert_all_are(outer, nat="none", dst_ip=target[0], dst_port=target[1])
        sums = clean(tmp_path / "data")
        assert (sums.opened, sums.unresolved) == (50, 25)


def test_a_redirect_inside_the_pod_is_not_taken_for_no_rewrite(tmp_path: Path) -> None:
    """Between neighbours on a bridge without bridge netfilter no hook of the node is on the path; one of the pod is.

    So the sidecar's own connections, which nobody rewrote, cannot be told from those that were redirected.
    """
    with Cluster(backends=1, clients=1, network="unfiltered") as cluster:
        client, pod = cluster.clients[0], cluster.client_pods[0]
        with sidecar(pod.netns) as relay, agent(cluster, tmp_path / "data"):
            ledger = client.connect_many(5, (cluster.backend_pods[0].ips[4], 8080), SENDS, RECEIVES)
            closed(pod.netns)
        table = lives(rows(tmp_path / "data"))
        assert_untold(table[table.pid == client.pid], ends(ledger))
        assert_untold(table[table.pid == relay], [(peer, own) for _, peer, own in accepted(cluster.servers)])
        assert len(table) == clean(tmp_path / "data").unresolved == 10


def test_a_redirect_inside_the_pod_takes_no_older_translation(tmp_path: Path) -> None:
    """The node still has an entry of the same tuple, of a connection before the redirect; this one never got out."""
    with Cluster(backends=3, clients=1) as cluster:
        client, pod = cluster.clients[0], cluster.client_pods[0]

        def dial(reset: bool) -> Ledger:
            held = client.hold(5, cluster.vip(), bind=(pod.ips[4], 40_000))["number"]
            client.exchange(held, SENDS, RECEIVES)
            return client.release(held, reset=reset)

        with agent(cluster, tmp_path / "data"):
            before = dial(reset=True)  # which frees the ports at once
            with sidecar(pod.netns) as relay:
                redirected = dial(reset=False)
                closed(pod.netns)
        table = lives(rows(tmp_path / "data"))
        own = table[table.pid == client.pid].sort_values("started")
        check(own.iloc[:5].drop(columns="rows"), before, cluster.servers)
        assert_untold(own.iloc[5:], ends(redirected))
        assert (table.pid == relay).sum() == 5
