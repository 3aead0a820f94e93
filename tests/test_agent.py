"""The main job, on real connections: every one a row, with its right backend, every loss counted."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from agent_world import agent, coverage, file_metadata, losses, losses_in_metadata, published, rows, scaled, until

from tracer.kernel import btf, libbpf
from tracer.lab.cluster import Cluster
from tracer.lab.traffic import Ledger, addresses

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")

SENDS, RECEIVES = 100, 300


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(backends=3, clients=2) as made:
        yield made


def accepted(cluster: Cluster) -> dict[tuple[str, int], tuple[str, int]]:
    """The servers' own account: client's address and port → the backend that accepted it."""
    log = {}
    for server in cluster.servers:
        ledger = server.ledger()
        for peer, peer_port, local, local_port in zip(
            addresses(ledger["peer"]),
            ledger["peer_port"],
            addresses(ledger["local"]),
            ledger["local_port"],
            strict=True,
        ):
            log[peer, int(peer_port)] = (local, int(local_port))
    return log


def translated(cluster: Cluster) -> dict[int, str]:
    """conntrack's account: client's port → the backend."""
    found = {}
    for line in cluster.node.run(["conntrack", "-L", "-p", "tcp", "--dport", "80"]).splitlines():
        values = [part.split("=", 1) for part in line.split() if "=" in part]
        sources = [value for key, value in values if key == "src"]
        ports = [int(value) for key, value in values if key == "sport"]
        found[ports[0]] = sources[1]
    return found


def check_against(table: pd.DataFrame, ledger: Ledger, cluster: Cluster) -> None:
    """Exactly the ledger's connections, each with the backend that accepted it and the client's own counts."""
    assert len(table) == len(ledger)
    log = accepted(cluster)
    by_port = table.set_index("src_port")
    assert by_port.index.is_unique
    assert set(by_port.index) == {int(port) for port in ledger["local_port"]}
    backends = zip(by_port.backend_ip, by_port.backend_port, strict=True)
    right = [log[source, port] for source, port in zip(by_port.src_ip, by_port.index, strict=True)]
    assert list(backends) == right
    assert table.bytes_sent.sum() == ledger["sent"].sum()
    assert table.bytes_received.sum() == ledger["received"].sum()


def test_twenty_thousand_connections_are_twenty_thousand_rows(tmp_path: Path) -> None:
    with Cluster(backends=6, clients=1) as cluster:
        with agent(cluster, tmp_path / "data"):
            ledger = cluster.clients[0].connect_many(scaled(20_000), cluster.vip(), SENDS, RECEIVES)
            cluster.settle()
            table_of_kernel = translated(cluster)
        table = rows(tmp_path / "data")
        check_against(table, ledger, cluster)
        assert dict(zip(table.src_port, table.backend_ip, strict=True)) == table_of_kernel
        assert (table.nat == "dnat").all()
        assert (table.result == "ok").all()
        assert table.opened.all()
        assert table.closed.all()
        assert table.conn_id.is_unique
        report = coverage(tmp_path / "data")
        assert report.opened.sum() == report.closed.sum() == report.written.sum() == scaled(20_000)
        assert losses(tmp_path / "data") == 0
        assert report.unresolved.sum() == 0


@pytest.mark.parametrize("family", [4, pytest.param(6, marks=pytest.mark.needs("ipv6"))])
def test_a_row_says_what_the_client_knows(tmp_path: Path, family: int) -> None:
    with Cluster(backends=3, clients=1, families="dual") as cluster:
        with agent(cluster, tmp_path / "data"):
            ledger = cluster.clients[0].connect_many(23, cluster.vip(family=family), SENDS, RECEIVES)
            cluster.settle()
        table = rows(tmp_path / "data")
        check_against(table, ledger, cluster)
        pod = cluster.client_pods[0]
        constant = {
            "node": "node-1", "role": "client", "protocol": "tcp", "nat": "dnat", "nat_source": "conntrack",
            "src_ip": pod.ips[family], "dst_ip": cluster.vip(family=family)[0], "dst_port": 80, "backend_port": 8080,
            "pid": cluster.clients[0].pid, "comm": "lab-client", "netns": pod.netns.inode, "result": "ok",
            "bytes_sent": SENDS, "bytes_received": RECEIVES, "ct_zone": 0,
        }  # fmt: skip
        for column, value in constant.items():
            assert set(table[column]) == {value}, column
        assert table.retransmits.max() <= 1  # a busy machine may be late with an answer
        assert ip_address(table.backend_ip[0]).version == family
        assert table.snat_ip.isna().all()
        started = table.set_index("src_port").started.astype("int64")
        boot_to_wall = np.array([started[int(row["local_port"])] - int(row["started"]) for row in ledger])
        # the client stamps its own clock just before connect(), and may be kept from going on until it is connected
        ns = (ledger["established"] - ledger["started"]).astype(np.int64)
        assert (boot_to_wall - boot_to_wall.min() < 5e6 + ns).all()
        assert (table.connect_latency_us <= table.duration_us).all()
        taken = dict(zip(ledger["local_port"].tolist(), ns / 1000, strict=True))
        assert all(0 < row.connect_latency_us <= taken[row.src_port] for row in table.itertuples())


def test_a_refused_connection_has_its_backend(cluster: Cluster, tmp_path: Path) -> None:
    for server in cluster.servers:
        server.stop_listening()
    with agent(cluster, tmp_path / "data"):
        ledger = cluster.clients[0].connect_many(10, cluster.vip(), SENDS, RECEIVES)
    table = rows(tmp_path / "data")
    assert len(table) == len(ledger) == 10
    assert set(table.result) == {"refused"}
    assert set(table.nat) == {"dnat"}
    assert set(table.backend_ip) <= {pod.ips[4] for pod in cluster.backend_pods}
    assert table.connect_latency_us.isna().all()
    assert (table.bytes_sent + table.bytes_received == 0).all()


def test_a_connection_that_hangs_says_whom_it_waits_for(cluster: Cluster, tmp_path: Path) -> None:
    for pod in cluster.backend_pods:
        pod.netns.run(["iptables", "-A", "INPUT", "-p", "tcp", "--dport", "8080", "-j", "DROP"])
    with agent(cluster, tmp_path / "data", "--interval", "500ms"):
        for client in cluster.clients:
            client.begin_connects(1, cluster.vip(), SENDS, RECEIVES, timeout=6)
        ledgers = [client.finish_connects() for client in cluster.clients]
    table = rows(tmp_path / "data").sort_values("ts")
    assert sum(map(len, ledgers)) == table.conn_id.nunique() == 2
    for _, life in table.groupby("conn_id"):
        assert len(life) >= 2
        assert life.src_port.nunique() == 1
        assert life.src_port.iloc[0] > 0
        assert set(life.nat) == {"dnat"}
        assert life.backend_ip.nunique() == 1
        assert list(life.result)[-1] == "aborted"
        assert life.result.isna().sum() == len(life) - 1


def test_a_long_connection_has_a_row_per_interval_and_counts_nothing_twice(cluster: Cluster, tmp_path: Path) -> None:
    client, data = cluster.clients[0], tmp_path / "data"
    with agent(cluster, data, "--interval", "500ms", "--rotate", "500ms"):
        ledger = client.hold(3, cluster.vip())
        held, ports = ledger["number"], ledger["local_port"].tolist()

        def each_has_two() -> bool:
            interim = rows(data) if published(data) else pd.DataFrame(columns=["src_port", "closed", "conn_id"])
            return (interim[interim.src_port.isin(ports) & ~interim.closed].groupby("conn_id").size() > 1).sum() == 3

        for _ in range(60):  # about three seconds: each exchange follows a short connection of its own
            client.exchange(held, SENDS, RECEIVES)
            client.connect_many(5, cluster.vip(), 0, 0, rate=100)
        until(each_has_two, "interim rows")  # an agent that is kept from running has fewer by then
        ledger = client.release(held)
        cluster.settle()
    table = rows(data)
    long = table[table.src_port.isin(ports)].sort_values("ts")
    assert long.conn_id.nunique() == 3
    assert long.groupby("conn_id").opened.sum().eq(1).all()
    assert long.groupby("conn_id").closed.sum().eq(1).all()
    assert long.bytes_sent.sum() == ledger["sent"].sum() == 60 * 3 * SENDS
    assert long.bytes_received.sum() == ledger["received"].sum()
    for _, life in long.groupby("conn_id"):
        assert len(life) >= 3
        ends = life.ts.astype("int64").to_numpy() // 1000
        gaps = ends[1:] - life.duration_us.to_numpy()[1:].astype("int64") - ends[:-1]
        assert (abs(gaps) <= 1).all(), "the intervals leave gaps or overlap"
        assert life.started.nunique() == 1
        assert life.result.isna().sum() == len(life) - 1
        assert (life.duration_us.to_numpy()[:-1] >= 500_000).all()
    # the short ones have one row each, unless a slow machine kept one for an interval
    short = table[~table.src_port.isin(ports)]
    assert short.closed.sum() == short.conn_id.nunique() == 300
    assert (short[~short.closed].duration_us >= 500_000).all()


def test_what_was_there_before_the_start_is_found_and_counted_from_then(cluster: Cluster, tmp_path: Path) -> None:
    client = cluster.clients[0]
    held = client.hold(5, cluster.vip())["number"]
    client.exchange(held, 5000, 5000)
    with agent(cluster, tmp_path / "data") as running:
        client.exchange(held, SENDS, RECEIVES)
        client.release(held[:4])
        cluster.settle()
        running.stop()
    table = rows(tmp_path / "data")
    assert len(table) == 5, "the servers' ends of the same connections are not dialled, and not reported"
    assert not table.opened.any()
    assert table.closed.sum() == 4
    assert table.started.isna().all()
    assert table.pid.isna().all()
    assert set(table.nat_source) == {"dump"}
    assert (table.bytes_sent == SENDS).all()
    assert (table.bytes_received == RECEIVES).all()
    log = accepted(cluster)
    for row in table.itertuples():
        assert log[row.src_ip, row.src_port][0] == row.backend_ip
    assert coverage(tmp_path / "data").adopted.sum() == 5


def test_a_restart_counts_nothing_twice(cluster: Cluster, tmp_path: Path) -> None:
    client = cluster.clients[0]
    with agent(cluster, tmp_path / "data"):
        held = client.hold(4, cluster.vip())["number"]
        client.exchange(held, SENDS, RECEIVES)
    client.exchange(held, 7777, 7777)  # nobody looks
    with agent(cluster, tmp_path / "data"):
        client.exchange(held, SENDS, RECEIVES)
        client.release(held)
        cluster.settle()
    table = rows(tmp_path / "data")
    assert len(table) == 8
    assert table.opened.sum() == table.closed.sum() == 4
    assert table.bytes_sent.sum() == 2 * 4 * SENDS
    assert table.bytes_received.sum() == 2 * 4 * RECEIVES
    assert table.conn_id.is_unique, "a connection has another id in another run"
    report = coverage(tmp_path / "data")
    assert report["first"].sum() == report["last"].sum() == 2
    assert report.run_id.nunique() == 2


def test_a_full_ring_loses_rows_by_count(cluster: Cluster, tmp_path: Path) -> None:
    with agent(cluster, tmp_path / "data", "--ring-bytes", "4096"):
        cluster.clients[0].connect_many(3000, cluster.vip(), SENDS, RECEIVES)
        cluster.settle()
    table, report = rows(tmp_path / "data"), coverage(tmp_path / "data")
    assert report.lost_ring.sum() > 0
    assert len(table) + report.lost_ring.sum() == 3000
    assert report.written.sum() == len(table)
    assert losses(tmp_path / "data") == losses_in_metadata(tmp_path / "data") == report.lost_ring.sum()


def test_a_full_connection_map_loses_connections_by_count(cluster: Cluster, tmp_path: Path) -> None:
    client = cluster.clients[0]
    with agent(cluster, tmp_path / "data", "--max-connections", "64"):
        held = client.hold(100, cluster.vip())["number"]
        client.release(held)
        cluster.settle()
    table, report = rows(tmp_path / "data"), coverage(tmp_path / "data")
    assert len(table) == 64
    assert report.lost_connection_map.sum() == 36
    assert report.opened.sum() == 100


def test_a_full_translation_map_makes_unknown_rows_by_count(cluster: Cluster, tmp_path: Path) -> None:
    with agent(cluster, tmp_path / "data", "--max-translations", "16"):
        cluster.clients[0].connect_many(50, cluster.vip(), SENDS, RECEIVES)
        cluster.settle()
    table, report = rows(tmp_path / "data"), coverage(tmp_path / "data")
    assert len(table) == 50
    assert report.lost_translation_map.sum() == 34
    unknown = table[table.nat == "unknown"]
    assert len(unknown) == report.unresolved.sum() == 34
    assert unknown.backend_ip.isna().all()
    assert unknown.nat_source.isna().all()


def test_more_open_connections_than_the_ring_holds_all_get_their_interim_rows(cluster: Cluster, tmp_path: Path) -> None:
    client, data = cluster.clients[0], tmp_path / "data"
    short = 0
    with agent(cluster, data, "--interval", "500ms", "--ring-bytes", "4096", "--rotate", "1s"):
        held = client.hold(200, cluster.vip())["number"]
        client.exchange(held, SENDS, RECEIVES)

        def all_were_shown_while_open() -> bool:
            nonlocal short
            client.connect_many(100, cluster.vip(), 0, 0, rate=50)  # two seconds in which their rows are not alone
            short += 100
            if not published(data):
                return False
            table = rows(data)
            return table[~table.closed].conn_id.nunique() == 200

        until(all_were_shown_while_open, "an interim row of every connection", 60)
    table, report = rows(data), coverage(data)
    long = table[table.bytes_sent == SENDS]
    assert long.conn_id.nunique() == 200
    lives = table[table.conn_id.isin(long.conn_id)]
    assert lives.bytes_sent.sum() == 200 * SENDS
    assert report.lost_ring.sum() + (table.groupby("conn_id").closed.sum() == 1).sum() == short


def _steer_packets_between_cpus(cluster: Cluster) -> None:
    """Receive packet steering on every interface: softirqs then interrupt programs, as under real traffic.

    To two CPUs, or to the one that there is.
    """
    mask = 3 if (os.cpu_count() or 1) > 1 else 1
    script = f"mount -t sysfs sysfs /sys && for f in /sys/class/net/*/queues/rx-*/rps_cpus; do echo {mask} > $f; done"
    for netns in (cluster.node, *(pod.netns for pod in (*cluster.client_pods, *cluster.backend_pods))):
        netns.run(["unshare", "--mount", "--propagation", "private", "sh", "-c", script])


def test_state_changes_that_the_kernel_does_not_show_are_made_up_for_or_counted(tmp_path: Path) -> None:
    with Cluster(backends=6, clients=2) as cluster:
        _steer_packets_between_cpus(cluster)
        with agent(cluster, tmp_path / "data"):
            for client in cluster.clients:
                client.begin_connects(scaled(5000), cluster.vip(), SENDS, RECEIVES)
            ledgers = [client.finish_connects() for client in cluster.clients]
            cluster.settle()
        table, report = rows(tmp_path / "data"), coverage(tmp_path / "data")
        clients = table[table.role == "client"]
        assert len(clients) + losses(tmp_path / "data") == scaled(10_000)
        # Of those that were lost altogether, conntrack may tell.
        assert len(table) - len(clients) <= report.lost_end.sum()
        assert report.opened.sum() + report.late_begin.sum() == scaled(10_000)
        assert set(table.nat) == {"dnat"}
        log = accepted(cluster)
        assert all(log[row.src_ip, row.src_port][0] == row.backend_ip for row in table.itertuples())
        dialled = {(peer, int(row["local_port"])) for ledger in ledgers for peer, row in
                   zip(addresses(ledger["local"]), ledger, strict=True)}  # fmt: skip
        assert {(row.src_ip, row.src_port) for row in table.itertuples()} <= dialled
        assert clients.bytes_sent.sum() == len(clients) * SENDS


def test_ctrl_c_flushes_and_the_files_carry_their_own_account(cluster: Cluster, tmp_path: Path) -> None:
    with agent(cluster, tmp_path / "data") as running:
        cluster.clients[0].connect_many(40, cluster.vip(), SENDS, RECEIVES)
        cluster.settle()
        running.stop(signal.SIGINT)
    assert len(rows(tmp_path / "data")) == 40
    (metadata,) = file_metadata(tmp_path / "data")
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert (metadata["schema_version"], metadata["node"], metadata["boot_id"]) == ("1", "node-1", boot_id)
    assert int(metadata["rows"]) == 40
    assert "40 rows written, nothing lost" in running.said


def _programs_of(pid: int) -> set[int]:
    """Ids of the BPF programs that a process holds, directly or by a link."""
    found = set()
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found |= {int(line.split()[1]) for line in entry.read_text().splitlines() if line.startswith("prog_id:")}
    return found


def _loaded() -> set[int]:
    """Ids of all programs that are loaded on this machine."""
    found, current, following = set(), 0, ctypes.c_uint32()
    while libbpf.library().bpf_prog_get_next_id(ctypes.c_uint32(current), ctypes.byref(following)) == 0:
        current = following.value
        found.add(current)
    return found


def test_kill_leaves_nothing_in_the_kernel_and_no_half_file(cluster: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "data"
    with agent(cluster, output, "--rotate", "200ms") as running:
        programs = _programs_of(running.process.pid)
        assert len(programs) == 8 + btf.are_tracepoints_preemptible()
        assert programs <= _loaded()
        while not published(output):
            cluster.clients[0].connect_many(50, cluster.vip(), SENDS, RECEIVES)
        running.process.kill()
        running.process.wait()
    until(lambda: not programs & _loaded(), "the kernel to free the programs")
    before = rows(output)
    assert (before.nat == "dnat").all()
    (output / "connections/v1").mkdir(parents=True, exist_ok=True)
    with agent(cluster, output):
        pass
    assert not [path for path in output.rglob(".*") if path.is_file() and "lock" not in path.name], (
        "stale files are removed"
    )
    assert len(rows(output)) >= len(before)
