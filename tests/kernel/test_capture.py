"""The capture by itself: what user space keeps right in the kernel's maps."""

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from tracer.errors import TracerError
from tracer.kernel import libbpf, maps, netns
from tracer.kernel.capture import Capture, Options
from tracer.kernel.maps import CONNECTION, SOCKET_KEY, TRANSLATION, Sizes
from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack
from tracer.record import RESULT_OPEN, TUPLE, Flag, Nat, NatSource, Role

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(backends=2, clients=2, conntrack=Conntrack(timeouts=Conntrack.SHORT)) as made:
        yield made


def scope(cluster: Cluster) -> tuple[str, ...]:
    return (cluster.node.path, *(pod.netns.path for pod in (*cluster.client_pods, *cluster.backend_pods)))


def options(cluster: Cluster, **more: object) -> Options:
    return Options(**({"node_netns": cluster.node.path, "only_netns": scope(cluster)} | more))  # type: ignore[arg-type]


def until(condition: object, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def drained(capture: Capture, count: int) -> np.ndarray:
    """So many records at least: a connection ends a moment after its client has closed it."""
    taken = [capture.drain()]

    def enough() -> bool:
        taken.append(capture.drain())
        return sum(map(len, taken)) >= count

    until(enough)
    return np.concatenate(taken)


def translations(capture: Capture) -> np.ndarray:
    return libbpf.map_items(capture.maps.translations, TUPLE, TRANSLATION)[1]


def test_a_translation_stays_until_conntrack_destroys_its_entry(cluster: Cluster) -> None:
    with Capture(options(cluster)) as capture:
        cluster.clients[0].connect_many(20, cluster.vip(), 100, 100)
        assert len(drained(capture, 20)) == 20
        known = translations(capture)
        assert len(known) == 20
        assert set(known["source"]) == {NatSource.CONNTRACK}
        assert known["conn_id"].all(), "each is claimed by its connection"

        def destroyed() -> bool:
            cluster.node.run(["conntrack", "-L"])  # a listing removes what has expired
            return capture.counters()["conntrack_destroy"] == 20

        until(destroyed)
        assert len(translations(capture)) == 0
        assert capture.counters()["stale_destroy"] == 0


def test_entries_from_before_the_start_are_swept_although_they_send_no_destroy(cluster: Cluster) -> None:
    client = cluster.clients[0]
    # With 2, the default since 5.19, an entry can tell of its end only if it was born while somebody listened.
    setting = "net.netfilter.nf_conntrack_events"
    default = cluster.node.run(["sysctl", "-n", setting]).strip()
    cluster.node.sysctl({setting: 0})
    held = client.hold(4, cluster.vip())["number"]
    cluster.node.sysctl({setting: default})
    with Capture(options(cluster)) as capture:
        assert set(translations(capture)["source"]) == {NatSource.DUMP}
        assert capture.needs_reconciliation
        client.connect_many(3, cluster.vip(), 100, 100)
        cluster.node.run(["conntrack", "-D", "--src", cluster.client_pods[0].ips[4]])
        until(lambda: capture.counters()["conntrack_destroy"] == 3)
        assert len(translations(capture)) == 4, "only the entries born while we listened told of their end"
        capture.reconcile()
        assert len(translations(capture)) == 0
        assert not capture.needs_reconciliation
        # Another thread asks for the totals, and so for the socket's error, while the table is compared.
        events = iter([1])
        capture.reconcile(lambda: setattr(capture, "enobufs", capture.enobufs + next(events, 0)))
        assert capture.needs_reconciliation, "an event was lost after the table had been asked for"
        capture.reconcile()
        assert not capture.needs_reconciliation
        taken: list[np.ndarray] = []
        capture.stop(lambda: taken.append(capture.drain()))
        rows = np.concatenate(taken)
        assert len(rows) == 7
        assert (rows["nat"] == Nat.DNAT).all(), "found connections keep what they were told at the start"
        client.release(held)


def test_a_refusal_leaves_its_translation_for_the_socket_and_then_nothing(cluster: Cluster) -> None:
    for server in cluster.servers:
        server.stop_listening()
    with Capture(options(cluster)) as capture:
        cluster.clients[0].connect_many(10, cluster.vip(), 100, 100)
        rows = drained(capture, 10)
        assert (rows["nat"] == Nat.DNAT).all()
        assert capture.counters()["kept"] == 10
        assert len(translations(capture)) == 0


def test_a_refusal_whose_own_row_found_no_room_is_not_taken_for_anothers(cluster: Cluster) -> None:
    """The row that its entry's end makes, in case it is another node's, came first and found room."""
    cluster.add_service("refusing", port=86, target_port=9999, served=False)
    with Capture(options(cluster, sizes=Sizes(ring_bytes=4096))) as capture:  # of 19 records
        cluster.clients[0].connect_many(18, cluster.vip(), 100, 100)
        until(lambda: capture.counters()["closed"] == 18)
        cluster.clients[0].connect_many(1, cluster.vip("refusing"), 100, 100)
        until(lambda: capture.counters()["lost_ring"] == 1)
        assert capture.counters()["flows"] == 1
        rows = [capture.drain()]
        until(lambda: rows.append(capture.drain()) or capture.counters()["withdrawn"] + sum(map(len, rows)) > 18)
        assert capture.counters()["withdrawn"] == 1
        assert sum(map(len, rows)) == 18
        capture.reconcile()
        assert not (translations(capture)["ended"] > 0).any(), "nothing waits for a socket any more"


def test_a_connection_whose_end_nobody_saw_is_counted_as_lost_and_forgotten(cluster: Cluster) -> None:
    with Capture(options(cluster)) as capture:
        held = cluster.clients[0].hold(2, cluster.vip())["number"]
        ghost = np.zeros(1, CONNECTION)
        ghost["row"]["conn_id"], ghost["row"]["ts"] = 77, 1
        ghost["row"]["netns"] = cluster.client_pods[0].netns.inode
        key = (0xDEAD0000).to_bytes(8, "little")
        assert libbpf.map_update(capture.maps.connections, key, ghost.tobytes()) == 0
        before = capture.totals()
        assert (before["open_connections"], before["lost_end"]) == (3, 0)
        capture.sweep()
        after = capture.totals()
        assert (after["open_connections"], after["lost_end"]) == (2, 1)
        cluster.clients[0].release(held)
        assert len(drained(capture, 2)) == 2


def test_connections_that_begin_while_it_stops_are_counted_and_open_ones_get_their_row(cluster: Cluster) -> None:
    with Capture(options(cluster)) as capture:
        held = cluster.clients[0].hold(3, cluster.vip())["number"]
        taken: list[np.ndarray] = []

        def hand_over() -> None:
            if not taken:
                cluster.clients[1].connect_many(5, cluster.vip(), 100, 100)
            taken.append(capture.drain())

        capture.stop(hand_over)
        rows = np.concatenate(taken)
        assert len(rows) == 3
        assert set(rows["result"]) == {RESULT_OPEN}
        assert not (rows["flags"] & Flag.CLOSED).any()
        assert capture.counters()["after_pause"] == 5
        cluster.clients[0].release(held)
        cluster.settle()
        assert len(capture.drain()) == 0, "it is detached: nothing goes into a ring that nobody empties"


def test_the_account_balances(cluster: Cluster) -> None:
    with Capture(options(cluster, sizes=Sizes(connections=32, ring_bytes=8192))) as capture:
        cluster.clients[0].hold(40, cluster.vip())
        cluster.clients[1].connect_many(200, cluster.vip(), 100, 100)
        cluster.settle()
        until(lambda: capture.totals()["open_connections"] == 32)
        totals = capture.totals()
        began = totals["opened"] + totals["adopted"] + totals["late_begin"]
        lost = totals["lost_ring"] + totals["lost_connection_map"] + totals["lost_end"]
        assert began == 240
        assert began == totals["closed"] + lost + totals["excluded"] + totals["open_connections"]
        assert len(capture.drain()) == totals["closed"] + totals["interim"]


@pytest.mark.parametrize("room", [1000, 20], ids=["room", "full"])
def test_a_second_look_counts_nothing_twice(cluster: Cluster, room: int) -> None:
    totals = []
    for again in (False, True):
        given = options(
            cluster, second_look=again, roles=("client", "forwarded", "server"), sizes=Sizes(connections=room)
        )
        with Capture(given) as capture:
            (client, other), records = cluster.clients, []
            held = client.hold(15, cluster.vip())["number"]
            client.connect_many(5, (cluster.client_pods[1].ips[4], 7), 0, 0)  # nobody listens
            other.connect_many(20, cluster.vip(), 100, 100, rate=100)
            client.release(held)
            cluster.settle()
            until(lambda: capture.totals()["open_connections"] == 0)
            capture.stop(lambda: records.append(capture.drain()))  # noqa: B023
            found = capture.totals()
            names = "opened", "accepted", "closed", "lost_connection_map", "lost_end", "late_begin", "unresolved"
            totals.append({name: found[name] for name in names})
            rows = np.concatenate([capture.drain(), *records])
            assert len(np.unique(rows["conn_id"])) == len(rows)
            assert np.count_nonzero(rows["role"] != Role.FORWARDED) == found["closed"]
    if room == 20:  # how many find room is up to chance
        lost = [each.pop("lost_connection_map") for each in totals]
        assert [each.pop("closed") + missing for each, missing in zip(totals, lost, strict=True)] == [75, 75]
        assert min(lost) > 0
    assert totals[1] == totals[0]
    assert totals[0]["opened"] == 40


def test_a_second_look_at_accepted_connections_without_room_counts_them_once(cluster: Cluster) -> None:
    with Capture(options(cluster, second_look=True, only_netns=(cluster.backend_pods[0].netns.path,),
                         roles=("server",), sizes=Sizes(connections=4))) as capture:  # fmt: skip
        held = cluster.clients[0].hold(20, (cluster.backend_pods[0].ips[4], 8080))["number"]
        until(lambda: capture.totals()["accepted"] == 20)  # the server's end is open a moment after the client's
        found = capture.totals()
        assert (found["accepted"], found["lost_connection_map"], found["open_connections"]) == (20, 16, 4)
        cluster.clients[0].release(held)


def test_a_second_look_sees_what_the_first_did_not(cluster: Cluster) -> None:
    with Capture(options(cluster, second_look=True)) as capture:
        assert "socket_state_again" in capture.program_descriptors()
        os.close(capture._descriptors.pop("socket_state"))
        cluster.clients[0].connect_many(20, cluster.vip(), 100, 100)
        rows = drained(capture, 20)
        assert len(rows) == capture.counters()["opened"] == 20
        process = Flag.OPENED | Flag.CLOSED | Flag.ESTABLISHED | Flag.LATENCY | Flag.PROCESS
        assert (rows["flags"] & process == process).all()
        assert (rows["nat"] == Nat.DNAT).all()


def test_a_second_look_sees_beginnings_also_after_the_map_was_full(cluster: Cluster) -> None:
    with Capture(options(cluster, second_look=True, sizes=Sizes(connections=4))) as capture:
        client = cluster.clients[0]
        client.release(client.hold(6, cluster.vip())["number"])
        until(lambda: capture.totals()["open_connections"] == 0)
        drained(capture, 4)
        assert capture.counters()["lost_connection_map"] == 2
        os.close(capture._descriptors.pop("socket_state"))
        client.connect_many(20, cluster.vip(), 100, 100)
        assert len(drained(capture, 20)) == 20
        assert capture.counters()["opened"] == 26
        # As where so many found no room at once that not all of them are known.
        capture.maps.set_control(maps.CONTROLS - 1, 2)
        client.connect_many(5, cluster.vip(), 100, 100)
        assert capture.counters()["opened"] == 26


def test_the_end_waits_for_a_record_that_is_being_written(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with Capture(options(cluster)) as capture:
        rows: list[np.ndarray] = []
        drain, empty, writing = capture._ring.drain, capture.drain(), iter([True] * 5)

        def stopped() -> np.ndarray:
            return empty if "socket_state" in capture._descriptors or next(writing, False) else drain()

        cluster.clients[0].connect_many(20, cluster.vip(), 100, 100)
        cluster.settle()
        monkeypatch.setattr(capture._ring, "drain", stopped)
        monkeypatch.setattr(capture, "_emit_all", lambda *_: None)
        capture.stop(lambda: rows.append(capture.drain()))
        assert sum(map(len, rows)) == 20


def test_namespaces_can_be_left_out(cluster: Cluster) -> None:
    left_out = (cluster.client_pods[1].netns.path,)
    with Capture(Options(node_netns=cluster.node.path, ignore_netns=left_out)) as capture:
        cluster.clients[1].connect_many(5, cluster.vip(), 100, 100)  # first: its rows would come first
        cluster.clients[0].connect_many(4, cluster.vip(), 100, 100)
        traced, ignored = (pod.netns.inode for pod in cluster.client_pods)
        found: list[int] = []

        def enough() -> bool:
            found.extend(capture.drain()["netns"].tolist())
            return found.count(traced) >= 4

        until(enough)  # among those of the whole machine
        assert (found.count(traced), found.count(ignored)) == (4, 0)


def test_a_process_is_told_whatever_the_length_of_its_name(cluster: Cluster) -> None:
    """It is read in words of eight bytes, and of an earlier, longer name nothing may be left."""
    names = ["fifteen-letters", "nine-of-9", "eight-of", "seven-7", "x"]
    script = """if True:
        import ctypes, os, socket, sys
        for name in sys.argv[3:]:
            ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)
            socket.create_connection((sys.argv[1], int(sys.argv[2]))).close()
        root = next(line.split()[1] for line in open("/proc/mounts") if " cgroup2 " in line)
        path = open("/proc/self/cgroup").read().partition("0::/")[2].split("\\n")[0]
        print(os.getpid(), os.stat(os.path.join(root, path)).st_ino)
    """
    with Capture(options(cluster)) as capture:
        where = map(str, cluster.vip())
        said = cluster.client_pods[0].netns.run(["/usr/bin/python3", "-c", script, *where, *names])
        rows = drained(capture, len(names))
    pid, cgroup = map(int, said.split())
    assert [bytes(row["comm"]).decode() for row in np.sort(rows, order="started")] == names
    assert all(rows["pid"] == pid)
    assert all(rows["cgroup_id"] == cgroup)


def test_only_and_ignore_together_make_no_sense() -> None:
    with pytest.raises(TracerError, match="not both"):
        Capture(Options(only_netns=("/proc/self/ns/net",), ignore_netns=("/proc/self/ns/net",)))


def test_loopback_is_left_out_unless_asked_for(cluster: Cluster) -> None:
    pod = cluster.backend_pods[0].netns
    script = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname());"
        "a, _ = s.accept(); c.close(); a.close()"
    )
    for loopback, expected in ((False, 0), (True, 1)):
        with Capture(options(cluster, loopback=loopback)) as capture:
            pod.run(["/usr/bin/python3", "-c", script])
            rows = drained(capture, expected)
            assert len(rows) == expected
            assert all(rows["nat"] == Nat.NONE), "a pod's loopback cannot have been tracked"


def age(capture: Capture, seconds: int, **of: int) -> None:
    """Lets the interval of open connections that look so have begun earlier."""

    def are_meant(row: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.logical_and.reduce([row[name] == value for name, value in of.items()])
        return found

    sockets, connections = libbpf.map_items(capture.maps.connections, SOCKET_KEY, CONNECTION)
    row, young = connections["row"], capture.maps.places["connection"]["row"]
    for place in np.flatnonzero(are_meant(row)):
        row["ts"][place] -= np.uint64(seconds * 10**9)
        assert libbpf.map_update(capture.maps.connections, sockets[place].tobytes(), connections[place].tobytes()) == 0
    young["ts"][are_meant(young)] -= np.uint64(seconds * 10**9)


def spilled(capture: Capture) -> np.ndarray:
    raw = libbpf.map_lookup(capture.maps.spilled, bytes(4), 4 * maps.SPOTS)
    assert raw
    return np.frombuffer(raw, "<u4")


@pytest.fixture(params=["with places", "without"])
def places(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether young connections have places of their own, which they have on x86 alone."""
    monkeypatch.setattr(maps, "_KEEPS_ORDER", request.param == "with places")
    return bool(request.param == "with places")


def test_young_connections_have_places_and_old_ones_leave_them(cluster: Cluster, places: bool) -> None:
    with Capture(options(cluster, interval_s=60)) as capture:
        held = cluster.clients[0].hold(300, cluster.vip())["number"]
        young = int(np.count_nonzero(capture.maps.places["socket"]))
        assert (100 < young < 256) if places else not young, "some find theirs taken"
        assert young + capture.maps.count("connections") == capture.totals()["open_connections"] == 300
        assert sum(len(sockets) for sockets, _ in capture.maps.open_connections()) == 300
        assert spilled(capture).sum() == 300 - young
        age(capture, 61, netns=cluster.client_pods[0].netns.inode)
        capture.interim(lambda: None)
        assert len(drained(capture, 300)) == 300
        assert capture.maps.count("connections") == 300, "they have had a row"
        assert not capture.maps.places["socket"].any()
        assert not len(capture.check().found)
        cluster.clients[1].connect_many(200, cluster.vip(), 100, 100)
        cluster.clients[0].release(held[:150])
        rows = drained(capture, 350)
        assert len(rows) == 350
        assert set(rows["nat"]) == {Nat.DNAT}
        until(lambda: capture.totals()["open_connections"] == 150)
        assert not capture.maps.places["socket"].any()
        assert capture.maps.places["tickets"].any() != places
        assert spilled(capture).sum() == 150
        more = cluster.clients[1].hold(50, cluster.vip())["number"]
        cluster.node.run(["conntrack", "-F"])
        until(lambda: capture.counters()["kept"] == 200)  # translations of open ones, wherever those are
        age(capture, 61, netns=cluster.client_pods[1].netns.inode)
        capture.interim(lambda: None)
        assert not capture.maps.places["socket"].any()
        cluster.clients[1].release(more, reset=True)
        assert len(drained(capture, 100)) == 100
        assert len(translations(capture)) == 150, "who kept it lets it go, although he has grown old meanwhile"
        counted = capture.counters()
        assert not any(counted[name] for name in ("lost_end", "late_end", "lost_connection_map", "unresolved"))


def test_places_that_many_want_at_once_are_all_free_afterwards(cluster: Cluster) -> None:
    with Capture(options(cluster, interval_s=60, sizes=Sizes(young=2))) as capture:
        for client in cluster.clients:
            client.begin_connects(1000, cluster.vip())
        rows = drained(capture, 2000)
        for client in cluster.clients:
            client.finish_connects()
        assert len(rows) == len(set(rows["conn_id"])) == 2000
        until(lambda: capture.totals()["open_connections"] == 0)
        assert not capture.maps.places["tickets"].any()
        assert not capture.maps.places["socket"].any()
        assert not spilled(capture).any()
        counted = capture.counters()
        assert not any(counted[name] for name in ("lost_end", "late_end", "lost_connection_map"))


@pytest.mark.parametrize("where", ["in its place", "in the map"])
def test_what_an_earlier_socket_left_at_its_address_is_a_lost_end(cluster: Cluster, where: str) -> None:
    """As one socket that dials twice is at the same address both times."""
    with Capture(options(cluster, interval_s=60)) as capture:
        with netns.entered(cluster.client_pods[0].netns.path):
            dialling = socket.socket()
        with dialling:
            dialling.connect(cluster.vip())
            places = capture.maps.places
            (place,) = np.flatnonzero(places["socket"])
            left = places[place].copy()
            unspecified = bytes(16)  # AF_UNSPEC: connect(2)
            assert ctypes.CDLL(None).connect(dialling.fileno(), unspecified, len(unspecified)) == 0
            until(lambda: capture.counters()["closed"] == 1)
            assert capture.totals()["open_connections"] == 0
            if where == "in its place":
                places[place] = left
            else:  # as when it had grown old
                key, counts = left["socket"].tobytes(), spilled(capture).copy()
                counts[left["connection"]["spot"] - 1] += 1
                assert not libbpf.map_update(capture.maps.connections, key, left["connection"].tobytes())
                assert not libbpf.map_update(capture.maps.spilled, bytes(4), counts.tobytes())
            dialling.connect(cluster.vip())
            assert capture.counters()["lost_end"] == 1
            assert capture.totals()["open_connections"] == 1
        rows = drained(capture, 2)
        assert len(set(rows["conn_id"])) == 2
        assert set(rows["nat"]) == {Nat.DNAT}
        assert capture.totals()["open_connections"] == 0
        assert capture.counters()["lost_end"] == 1


def test_a_refusal_that_nobody_claims_is_forgotten(cluster: Cluster, places: bool) -> None:
    cluster.add_service("refusing", port=86, target_port=9999, served=False)
    only = tuple(path for path in scope(cluster) if path != cluster.client_pods[0].netns.path)
    with Capture(options(cluster, only_netns=only, roles=("client",))) as capture:
        cluster.clients[0].connect_many(4, cluster.vip("refusing"), 100, 100)
        until(lambda: capture.counters()["conntrack_destroy"] == 4)
        assert translations(capture)["ended"].all()
        assert not len(capture.maps.find_connection(0))
        capture.reconcile()
        assert not len(translations(capture))


def test_a_place_whose_socket_is_gone_is_freed(cluster: Cluster) -> None:
    with Capture(options(cluster, interval_s=60)) as capture:
        held = cluster.clients[0].hold(3, cluster.vip())["number"]
        inode = cluster.client_pods[0].netns.inode
        age(capture, 100, netns=inode)
        (taken,) = np.nonzero(capture.maps.places["socket"])
        gone = capture.maps.places[taken[0]]
        gone["socket"] = 0xDEAD0000  # as if another had been there, whose end nobody saw
        capture.sweep(90)
        assert capture.counters()["lost_end"] == 1
        assert (gone["socket"], gone["tickets"]) == (0, 0)
        cluster.clients[0].release(held)


def test_only_namespaces_where_rows_wait_are_walked(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each walk goes through the sockets of all namespaces, which a busy node has by the hundred thousand."""
    walked: list[int] = []
    entered = netns.entered

    def noted(path: str, inode: int) -> AbstractContextManager[None]:
        walked.append(inode)
        return entered(path, inode)

    first, second = (pod.netns.inode for pod in cluster.client_pods[:2])
    with Capture(options(cluster, interval_s=60)) as capture:
        monkeypatch.setattr(netns, "entered", noted)
        held = cluster.clients[0].hold(3, cluster.vip())["number"]
        capture.interim(capture.drain)
        capture.sweep(60)
        assert walked == [], "nothing is due"
        age(capture, 61, netns=first)
        late = cluster.clients[0].hold(1, cluster.vip())["number"]
        other = cluster.clients[1].hold(1, cluster.vip())["number"]
        capture.interim(lambda: None)
        assert walked == [first]
        rows = drained(capture, 3)
        assert len(rows) == 3
        age(capture, 50, netns=first)
        age(capture, 11, netns=first, conn_id=int(rows["conn_id"][0]))
        capture.interim(lambda: None)
        assert walked == [first, first]
        assert len(drained(capture, 4)) == 4, "what is nearly due has its row with what is due"
        age(capture, 61, netns=second)
        capture.sweep(60)
        assert walked == [first, first, second]
        assert capture.totals()["open_connections"] == 5
        for client, numbers in ((cluster.clients[0], [*held, *late]), (cluster.clients[1], other)):
            client.release(numbers)


def test_an_interval_may_be_longer_than_the_machine_has_run(cluster: Cluster) -> None:
    with Capture(options(cluster, interval_s=10 * 365 * 86_400)) as capture:
        held = cluster.clients[0].hold(2, cluster.vip())["number"]
        capture.interim(capture.drain)
        capture.sweep(capture.options.interval_s)
        cluster.clients[0].release(held)
        cluster.settle()
        assert len(capture.drain()) == 2


def test_what_its_socket_may_be_about_to_claim_is_no_flow_yet(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a busy node would read all of conntrack's table for it, again and again."""
    cluster.add_service("dns", port=53, target_port=5353, protocol="udp")
    with Capture(options(cluster)) as capture:
        cluster.clients[0].datagrams(2, cluster.vip("dns"), 100, 100, connected=False)
        born = int(translations(capture)["created"].max())
        for age, flows in ((900_000_000, False), (1_100_000_000, True)):
            monkeypatch.setattr("tracer.kernel.capture._boot_ns", lambda age=age: born + age)
            assert capture.has_flows == flows
        monkeypatch.undo()


def test_listeners_that_find_no_room_are_no_lost_connections(cluster: Cluster) -> None:
    for server, pod in zip(cluster.servers, cluster.backend_pods, strict=True):
        for port in range(9000, 9010):
            server.listen(pod.addresses, port)
    with Capture(options(cluster, sizes=Sizes(listeners=4))) as capture:
        counters = capture.counters()
    assert counters["lost_listener_map"] == 2 * (10 + 1) - 4
    assert counters["lost_connection_map"] == 0


def test_a_path_that_leads_elsewhere_by_now_is_not_taken_for_the_namespace(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process ended between two lines of /proc, and another got its pid."""
    client, elsewhere = cluster.clients[0], cluster.client_pods[1].netns
    with Capture(options(cluster)) as capture:
        held = client.hold(3, cluster.vip())["number"]
        monkeypatch.setattr(netns, "visible", lambda: {cluster.client_pods[0].netns.inode: elsewhere.path})
        capture.sweep()
        totals = capture.totals()
        assert (totals["open_connections"], totals["lost_end"], totals["unentered_namespaces"]) == (3, 0, 1)
        monkeypatch.undo()
        capture.sweep()
        assert capture.totals()["unentered_namespaces"] == 0
        client.release(held)
        assert len(drained(capture, 3)) == 3


HIDDEN = """
import json, logging, subprocess, sys
import numpy as np
from tracer.kernel import libbpf, maps, netns
from tracer.kernel.capture import Capture, Options
from tracer.kernel.maps import CONNECTION
from tracer.lab.netns import Namespace
said = []
logging.getLogger().addHandler(type("Keep", (logging.Handler,), {"emit": lambda self, record: said.append(record)})())
where = sys.argv[1]
open(f"{where}/ns", "w").close()
with Namespace("hidden") as holder:
    subprocess.run(["mount", "--bind", holder.path, f"{where}/ns"], check=True)
with Namespace("node") as node, Capture(Options(node_netns=node.path, only_netns=(f"{where}/ns",))) as capture:
    unentered = [capture.totals()["unentered_namespaces"]]
    waits = np.zeros(1, CONNECTION)
    waits["row"]["ts"], waits["row"]["netns"] = 1, netns.inode(f"{where}/ns")
    assert libbpf.map_update(capture.maps.connections, bytes(8), waits.tobytes()) == 0
    subprocess.run(["mount", "-t", "tmpfs", "none", where], check=True)
    for _ in range(2):
        capture.interim(capture.drain)
        unentered.append(capture.totals()["unentered_namespaces"])
print(json.dumps([unentered, [record.getMessage() for record in said]]))
"""


def test_a_namespace_that_cannot_be_entered_is_counted_and_said_once(tmp_path: Path) -> None:
    """Only a mount refers to it, and something is mounted over that."""
    unshare = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", HIDDEN, str(tmp_path)]
    done = subprocess.run(unshare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    unentered, said = json.loads(done.stdout)
    assert unentered == [0, 1, 1]
    assert len(said) == 1
    assert f"{tmp_path}/ns cannot be opened" in said[0]
