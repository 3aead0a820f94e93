"""The agent beside an API server, on real connections: every row has the names that were true when it began."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import kube_lab
import pandas as pd
import pytest
from agent_world import Agent, agent, coverage, losses, published, rows, until
from command_world import command, environment, namespaces
from kube_api import KubeApi, refuse, serving

from tracer.lab.cluster import Cluster
from tracer.lab.topology import Pod
from tracer.lab.traffic import addresses

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")

QUICK = ("--name-wait", "0.5s")
#: Longer than a change takes from the server to the agent's book.
HEARD_S = 1.3
#: Runs the command that follows it with names that are stale after three seconds, not 15, and shorter pauses. As the
#: agent does by itself, it holds the signal before NumPy starts threads that would not.
IMPATIENT = (
    "import signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}); "
    "from tracer.naming import live, watch; from tracer.cli import main; "
    "live.STALE_NS, watch.LONGEST_PAUSE_S = 3 * 10**9, 1.0; del sys.argv[1:4]; main()"
)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Three backends, of which the service web has two; a client."""
    with Cluster(backends=3, clients=1, hosts=1) as made:
        made.set_backends("web", (0, 1))
        yield made


@pytest.fixture
def server(cluster: Cluster) -> Iterator[KubeApi]:
    with serving() as api:
        for kind, objects in kube_lab.objects(cluster).items():
            api.set(kind, *objects)
        yield api


@pytest.fixture
def traced(cluster: Cluster, server: KubeApi, tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Starts the agent beside the server."""
    with ExitStack() as stack:

        def start(*options: str, prefix: Sequence[str] = ()) -> Agent:
            named = "--kubeconfig", str(server.kubeconfig(tmp_path / "kubeconfig")), *QUICK
            return stack.enter_context(agent(cluster, tmp_path / "data", *named, *options, prefix=prefix))

        yield start


def backends_of(cluster: Cluster) -> dict[tuple[str, int], int]:
    """The servers' own account: the client's address and port → the number of the server that accepted it."""
    return {
        (ip, int(port)): number
        for number, made in enumerate(cluster.servers)
        for ledger in [made.ledger()]
        for ip, port in zip(addresses(ledger["peer"]), ledger["peer_port"], strict=True)
    }


def states(output: Path) -> list[str | None]:
    return [None if pd.isna(value) else str(value) for value in coverage(output).naming]


def test_rows_have_the_names_of_their_pods_and_services(
    cluster: Cluster, traced: Callable[..., Agent], server: KubeApi
) -> None:
    running = traced()
    cluster.clients[0].connect_many(200, cluster.vip(), 100, 100)
    cluster.clients[0].connect_many(3, (cluster.backend_pods[2].ips[4], 8080), 10, 10)
    cluster.settle()
    right = backends_of(cluster)
    running.stop()
    assert "HTTP Request" not in running.said
    table = rows(running.output)
    assert len(table) == 203
    assert losses(running.output) == 0
    assert (table.src_namespace == "shop").all()
    assert (table.src_pod == "client-0").all()
    assert (table.src_workload == "deployment/cart").all()
    through = table[table.dst_port == 80]
    assert len(through) == 200
    assert set(zip(through.dst_namespace, through.dst_service, through.dst_service_port, strict=True)) == {
        ("shop", "web", "http")
    }
    assert all(
        (row.backend_pod, row.backend_workload, row.backend_node, row.backend_zone)
        == (f"web-{right[row.src_ip, row.src_port]}", "statefulset/web", "node-1", "zone-a")
        for row in table.itertuples()
    )
    direct = table[table.dst_port == 8080]
    assert direct.dst_service.isna().all()
    known = pd.read_parquet(running.output / "endpoints")
    known = known[known.dst_service == "web"]
    assert set(known.backend_pod) == {"web-0", "web-1"}
    assert set(known.virtual_ips) == {cluster.vip()[0]}
    assert known.ready.all()
    assert states(running.output)[-1] == "current"
    assert coverage(running.output).unnamed.sum() == 0
    assert {(kind, verb): len(server.asked(kind, verb)) for kind in server.objects for verb in ("list", "watch")} == {
        (kind, verb): 1 for kind in server.objects for verb in ("list", "watch")
    }
    assert server.asked("pods", "list")[0]["fieldSelector"] == "spec.nodeName=node-1"


def test_an_address_moves_to_another_pod_while_connections_are_open(
    cluster: Cluster, traced: Callable[..., Agent], server: KubeApi
) -> None:
    """As a kubelet, a network plugin and a control plane do it, one after the other; a client connects all the while.

    A held connection keeps its old name in all its rows, also in those after the move.
    """
    old, new = cluster.backend_pods[0], cluster.backend_pods[2]
    before = {item["metadata"]["name"]: item for item in kube_lab.objects(cluster)["pods"]}
    moved = kube_lab.pod_at("web-new", "node-1", old.ips[4], owner="Deployment/web")
    plain = cluster.services["web"]
    other = cluster.backend_pods[1].ips[4], before["web-1"]
    running = traced("--interval", "1s")
    client, busy = cluster.clients[0], cluster.client_in(cluster.client_pods[0])
    held = client.hold(40, cluster.vip())  # so that some are the old pod's
    busy.begin_connects(300, cluster.vip(), 10, 10, rate=60.0)
    time.sleep(1.0)

    dying = kube_lab.pod(old, old.name)
    dying["metadata"]["deletionTimestamp"] = kube_lab.stamp()
    server.set("pods", dying)
    server.set("endpointslices", kube_lab.slice_(plain, other))
    cluster.set_backends("web", (1,))
    time.sleep(0.3)
    device = _take(old, old.ips[4])
    server.delete("pods", "shop", old.name)
    time.sleep(HEARD_S)

    _give(new, old.ips[4], device, cluster, 2)
    moved["status"]["startTime"] = kube_lab.stamp()
    server.set("pods", moved)
    time.sleep(HEARD_S)
    server.set("endpointslices", kube_lab.slice_(plain, other, (old.ips[4], moved)))
    cluster.set_backends("web", (0, 1))
    busy.finish_connects()
    busy.connect_many(60, cluster.vip(), 10, 10)  # where the move took longer than those
    right = backends_of(cluster)
    time.sleep(1.5)
    client.release(held["number"])
    running.stop()

    table = rows(running.output)
    assert losses(running.output) == 0
    name_of = {0: "web-0", 1: "web-1", 2: "web-new"}
    workload_of = {0: "statefulset/web", 1: "statefulset/web", 2: "deployment/web"}
    truth = [right[row.src_ip, row.src_port] for row in table.itertuples()]
    assert set(truth) == {0, 1, 2}
    wrong = [
        (row.started, row.backend_pod, name_of[number])
        for row, number in zip(table.itertuples(), truth, strict=True)
        if (row.backend_pod, row.backend_workload) != (name_of[number], workload_of[number])
    ]
    assert wrong == []
    ports = {int(row["local_port"]) for row in held}
    pinned = table[table.src_port.isin(ports) & (table.backend_ip == old.ips[4])]
    assert set(pinned.backend_pod) == {"web-0"}
    assert pinned.ts.max() > table[table.backend_pod == "web-new"].ts.min()
    history = pd.read_parquet(running.output / "endpoints").query("backend_ip == @old.ips[4]")
    assert set(history.backend_pod) == {"web-0", "web-new"}


def test_an_address_moves_between_pods_of_another_node(tmp_path: Path) -> None:
    """Only slices tell of those pods: a row may be without a name about the moment of the change, never with the wrong
    one."""
    with Cluster(backends=4, clients=1, nodes=2) as cluster, serving() as server:
        old, new = cluster.backend_pods[1], cluster.backend_pods[3]  # of node-2
        cluster.set_backends("web", (0, 1))
        told = kube_lab.objects(cluster)
        for kind, objects in told.items():
            server.set(kind, *objects)
        first = next(item for item in told["pods"] if item["metadata"]["name"] == cluster.backend_pods[0].name)
        here = cluster.backend_pods[0].ips[4], first
        moved = kube_lab.pod_at("web-new", "node-2", old.ips[4])
        config, often = server.kubeconfig(tmp_path / "kubeconfig"), ("--interval", "1s", "--rotate", "500ms")
        with agent(cluster, tmp_path / "data", "--kubeconfig", str(config), *often, *QUICK) as running:
            held = cluster.clients[0].hold(8, cluster.vip())
            busy = cluster.client_in(cluster.client_pods[0])
            busy.begin_connects(360, cluster.vip(), 10, 10, rate=60.0)
            time.sleep(2.0)
            before = pd.Timestamp.now("UTC")
            server.set("endpointslices", kube_lab.slice_(cluster.services["web"], here))
            cluster.set_backends("web", (0,))
            time.sleep(0.3)
            device = _take(old, old.ips[4])
            _give(new, old.ips[4], device, cluster, 3)
            server.set("endpointslices", kube_lab.slice_(cluster.services["web"], here, (old.ips[4], moved)))
            cluster.set_backends("web", (0, 1))

            def heard_of() -> bool:
                cluster.clients[0].connect_many(2, cluster.vip(), 10, 10)  # also where those of `busy` are over
                return "web-new" in _backends(tmp_path / "data")

            until(heard_of, "the moved address to have its new name")
            heard = pd.Timestamp.now("UTC")
            busy.finish_connects()
            busy.connect_many(60, cluster.vip(), 10, 10)  # where all this took longer than those
            right = backends_of(cluster)
            time.sleep(1.5)
            cluster.clients[0].release(held["number"])
            running.stop()
    table = rows(tmp_path / "data")
    name_of = {0: cluster.backend_pods[0].name, 1: old.name, 3: "web-new"}
    truth = [name_of[right[row.src_ip, row.src_port]] for row in table.itertuples()]
    assert set(truth) == set(name_of.values())
    wrong = [
        (row.started, row.backend_pod, name)
        for row, name in zip(table.itertuples(), truth, strict=True)
        if row.backend_pod != name and not pd.isna(row.backend_pod)
    ]
    assert wrong == []
    unnamed = table[table.backend_pod.isna()]
    assert coverage(tmp_path / "data").unnamed.sum() == len(unnamed)
    # a second before the one change is heard, and up to the other; before and after, all three are named
    assert unnamed.started.between(before - pd.Timedelta(1, "s"), heard).all()
    assert set(table.backend_pod.dropna()) == set(name_of.values())


def _backends(output: Path) -> set[str]:
    """Names of backends that published rows have."""
    return set(rows(output).backend_pod.dropna()) if published(output) else set()


def test_rows_wait_for_a_server_that_is_late(cluster: Cluster, traced: Callable[..., Agent], server: KubeApi) -> None:
    for kind in server.objects:
        server.faults[kind, "list"].extend(refuse(503) for _ in range(4))
    running = traced("--rotate", "2s")
    cluster.clients[0].connect_many(20, cluster.vip(), 10, 10)
    until(lambda: "current" in _states(running.output), "the names to be there", 60)
    cluster.clients[0].connect_many(20, cluster.vip(), 10, 10)
    cluster.settle()
    running.stop()
    table = rows(running.output)
    assert len(table) == 40
    assert (table.dst_service == "web").all()
    assert table.backend_pod.notna().all()


def test_a_server_that_goes_away_leaves_the_last_names_and_is_caught_up_with(
    cluster: Cluster, traced: Callable[..., Agent], server: KubeApi, tmp_path: Path
) -> None:
    running = traced("--rotate", "1s", prefix=(sys.executable, "-c", IMPATIENT))
    cluster.clients[0].connect_many(5, cluster.vip(), 10, 10)
    until(lambda: "current" in _states(running.output), "the names to be there")
    for kind in server.objects:
        for verb in ("list", "watch"):
            server.faults[kind, verb].extend(refuse(503) for _ in range(1000))
    server.cut()
    server.set("pods", kube_lab.pod_at("late", "node-1", "10.244.1.77"))
    cluster.clients[0].connect_many(5, cluster.vip(), 10, 10)
    until(lambda: "stale" in _states(running.output), "coverage to say so", 60)
    assert coverage(running.output).names_age_s.max() >= 3
    for queue in server.faults.values():
        queue.clear()
    until(lambda: _states(running.output)[-1] == "current", "the watches to be there again", 60)
    cluster.clients[0].connect_many(5, cluster.vip(), 10, 10)
    cluster.settle()
    running.stop()
    table = rows(running.output)
    assert len(table) == 15
    assert (table.dst_service == "web").all()
    assert table.backend_pod.notna().all()
    assert "is heard again" in running.said


def test_with_no_server_at_all_it_traces(cluster: Cluster, server: KubeApi, tmp_path: Path) -> None:
    config = server.kubeconfig(tmp_path / "kubeconfig")
    server.stop()
    with agent(cluster, tmp_path / "data", "--kubeconfig", str(config), *QUICK) as running:
        cluster.clients[0].connect_many(20, cluster.vip(), 10, 10)
        cluster.settle()
        running.stop()
        assert "does not answer" in running.said
    table = rows(tmp_path / "data")
    assert len(table) == 20
    assert (table.nat == "dnat").all()
    assert table.src_pod.isna().all()
    assert table.dst_service.isna().all()
    assert states(tmp_path / "data") == ["starting"]
    assert losses(tmp_path / "data") == 0


def test_observe_says_it_in_the_operators_words(cluster: Cluster, server: KubeApi, tmp_path: Path) -> None:
    cluster.add_service("redis", [1], port=6379, target_port=6379, port_name="redis")
    client, backend = cluster.client_pods[0], cluster.backend_pods[1]
    cart = kube_lab.pod(client, f"cart-{kube_lab.HASH}-x2x4z", "Deployment/cart")
    redis = kube_lab.pod(backend, "redis-0", "StatefulSet/redis")
    server.set("services", kube_lab.service(cluster.services["redis"]))
    server.set("endpointslices", kube_lab.slice_(cluster.services["redis"], (backend.ips[4], redis)))
    server.delete("endpointslices", "shop", "web-x4")
    for made in (client, backend):
        server.delete("pods", "shop", made.name)
    server.set("pods", cart, redis)
    config = server.kubeconfig(tmp_path / "kubeconfig")
    watching = subprocess.Popen(
        command("observe", "--node", "node-1", "--kubeconfig", config, *QUICK, "-n", "1", *namespaces(cluster)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        encoding="utf-8",
    )
    try:
        assert watching.stderr is not None
        assert "observing" in watching.stderr.readline()
        cluster.clients[0].connect_many(1, cluster.vip("redis"), 10, 10)
        said, errors = watching.communicate(timeout=30)
    finally:
        watching.kill()
        watching.wait()
    assert watching.returncode == 0, errors
    dialled, _ = cluster.vip("redis")
    assert (
        f"  shop/cart-{kube_lab.HASH}-x2x4z → shop/redis ({dialled}:6379) ⇒ shop/redis-0 {backend.ips[4]}  dnat  ok"
        in said
    )


def test_host_network_pods_are_told_apart_by_their_cgroups(
    cluster: Cluster, traced: Callable[..., Agent], server: KubeApi, pod_cgroup: Callable[[str], Path]
) -> None:
    address = cluster.nodes[0].addresses[4]
    one, two = (
        kube_lab.pod_at(name, "node-1", address, owner=f"DaemonSet/{name}", host_network=True)
        for name in ("proxy", "exporter")
    )
    server.set("pods", one, two)
    mine, other = cluster.host_clients[0], cluster.client_in(cluster.nodes[0])
    group = pod_cgroup(one["metadata"]["uid"])
    (group / "cgroup.procs").write_text(str(mine.pid))
    running = traced()
    for made in (mine, other):
        made.connect_many(10, cluster.vip(), 10, 10)
    cluster.settle()
    running.stop()
    table = rows(running.output)
    assert set(table[table.pid == mine.pid].src_pod) == {"proxy"}
    assert set(table[table.pid == mine.pid].src_workload) == {"daemonset/proxy"}
    assert table[table.pid == other.pid].src_pod.isna().all()  # in no pod's cgroup: a process of the node
    assert len(table) == 20


@pytest.fixture
def pod_cgroup(need: Callable[[str], None]) -> Iterator[Callable[[str], Path]]:
    """Makes the cgroup of a pod's container in the machine's v2 tree; processes in it are put back, and it is gone."""
    need("cgroup2")
    mounts = (line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines())
    root = next(Path(where) for _, where, kind, *_ in mounts if kind == "cgroup2")
    top = root / f"vip-tracer-test-names-{os.getpid()}"

    def make(uid: str) -> Path:
        group = top / "kubepods" / "burstable" / f"pod{uid}" / ("0123456789abcdef" * 4)
        group.mkdir(parents=True)
        return group

    yield make
    for below in sorted((path for path in (top, *top.rglob("*")) if path.is_dir()), reverse=True):
        for pid in (below / "cgroup.procs").read_text().split():
            (root / "cgroup.procs").write_text(pid)
        below.rmdir()


def _states(output: Path) -> list[str | None]:
    return states(output) if any((output / "coverage").rglob("[!.]*.parquet")) else [None]


def _take(pod: Pod, address: str) -> str:
    """Removes the address from the pod; returns its device."""
    device = pod.netns.run(["ip", "-o", "-4", "addr", "show", "scope", "global"]).split()[1]
    pod.netns.run(["ip", "addr", "del", f"{address}/24", "dev", device])
    return device


def _give(pod: Pod, address: str, device: str, cluster: Cluster, number: int) -> None:
    """Gives the address to the pod, whose server has this number."""
    pod.node.netns.run(["ip", "neigh", "flush", "to", address])
    pod.netns.run(["ip", "addr", "add", f"{address}/24", "dev", device])
    cluster.servers[number].listen([address], 8080)
