"""The ledger on real connections: it agrees where all is well, and shows what was broken, with the right figure."""

import os
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from kernel.test_capture import options, until

from tracer import agent
from tracer.clock import WallClock
from tracer.kernel import capture as captures
from tracer.kernel import conntrack, ledger, libbpf, netns, sockets, witness
from tracer.kernel.capture import Capture
from tracer.kernel.ledger import Account, Agreement, How
from tracer.kernel.maps import CONNECTION, TRANSLATION, Sizes
from tracer.lab.cluster import Cluster
from tracer.record import TUPLE

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")

SOCKET = np.dtype("<u8")


@pytest.fixture(autouse=True)
def all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check goes through all namespaces, however slow the machine is; what else would be compared in turns."""
    monkeypatch.setattr(captures, "_CHECK_WALKS_S", 60.0)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(backends=2, clients=2) as made:
        yield made


def disagreeing(agreement: Agreement) -> dict[str, int]:
    """What is not 0 among the figures, but for what was compared."""
    return {name: count for name, count in agreement.figures().items() if count and not name.startswith("checked_")}


def agreed(capture: Capture) -> Agreement:
    agreement = capture.check(capture.drain)
    assert disagreeing(agreement) == {}
    return agreement


def translations(capture: Capture) -> tuple[np.ndarray, np.ndarray]:
    return libbpf.map_items(capture.maps.translations, TUPLE, TRANSLATION)


def test_all_agrees_and_is_compared(cluster: Cluster) -> None:
    client = cluster.clients[0]
    client.hold(3, cluster.vip())  # from before
    with Capture(options(cluster)) as capture:
        held = client.hold(5, cluster.vip())["number"]
        cluster.clients[1].connect_many(20, cluster.vip(), 100, 100)
        direct = cluster.clients[1].hold(2, (cluster.backend_pods[0].ips[4], 8080))["number"]
        agreement = agreed(capture)
        assert agreement.compared[Account.CONNECTIONS] == 10
        assert agreement.compared[Account.BACKENDS] == 10
        assert agreement.compared[Account.TRANSLATIONS] == len(translations(capture)[0]) == 30
        client.release(held)
        cluster.clients[1].release(direct)
        until(lambda: capture.check(capture.drain).compared[Account.CONNECTIONS] == 3)
        totals = capture.totals()
        assert totals["checks"] >= 2
        assert totals["checked_connections"] >= 13
        assert totals["wrong_translations"] == totals["wrong_backends"] == 0


def test_all_agrees_under_load(cluster: Cluster) -> None:
    with Capture(options(cluster)) as capture:
        held = cluster.clients[0].hold(10, cluster.vip())["number"]
        compared = [agreed(capture).compared[Account.TRANSLATIONS]]
        busy = threading.Thread(target=cluster.clients[1].connect_many, args=(1500, cluster.vip(), 100, 100))
        busy.start()
        try:
            while busy.is_alive():
                compared.append(agreed(capture).compared[Account.TRANSLATIONS])
        finally:
            busy.join()
        assert compared[-1] > compared[0]
        cluster.clients[0].release(held)


@pytest.mark.parametrize("roles", [("client",), ("client", "forwarded", "server")])
def test_accepted_sockets_are_compared_if_they_are_traced(cluster: Cluster, roles: tuple[str, ...]) -> None:
    with Capture(options(cluster, roles=roles)) as capture:
        held = cluster.clients[0].hold(4, cluster.vip())["number"]
        if "server" in roles:  # a client may know it before its server does
            until(lambda: capture.totals()["accepted"] == 4)
        compared = agreed(capture).compared
        assert compared[Account.CONNECTIONS] == (8 if "server" in roles else 4)
        assert compared[Account.BACKENDS] == 4
        cluster.clients[0].release(held)


def test_what_an_option_leaves_out_is_not_missed(cluster: Cluster) -> None:
    held = cluster.clients[0].hold(4, cluster.vip())["number"]
    vip = cluster.vip()[0]
    with Capture(options(cluster, exclude_cidrs=(f"{vip}/32",))) as capture:
        more = cluster.clients[1].hold(4, cluster.vip())["number"]
        assert agreed(capture).compared[Account.CONNECTIONS] == 0
    other = [cluster.client_pods[0].netns.path]
    with Capture(replace(options(cluster), only_netns=(), ignore_netns=tuple(other))) as capture:
        found = capture.check(capture.drain)
        assert found.count(Account.CONNECTIONS, How.STALE) == 0
        tuples = found.found["tuple"][found.found["account"] == Account.CONNECTIONS]
        mine = {bytes(10) + b"\xff\xff" + bytes(map(int, pod.ips[4].split("."))) for pod in cluster.client_pods}
        assert not {bytes(address) for address in tuples["src"]} & mine
    cluster.clients[0].release(held)
    cluster.clients[1].release(more)


def test_what_is_broken_is_shown(cluster: Cluster) -> None:
    few = Sizes(connections=1024)  # so few that none are in places of young ones
    with Capture(replace(options(cluster), sizes=few)) as capture:
        held = cluster.clients[0].hold(9, cluster.vip())["number"]
        agreed(capture)
        keys, values = translations(capture)
        raw = [key.tobytes() for key in keys]
        # Two are gone from the map, of one the backend is another, and one is there that conntrack never had.
        for key in raw[:2]:
            assert libbpf.map_delete(capture.maps.translations, key)
        bent = values[2:3].copy()
        bent["backend_port"] = 9
        libbpf.map_update(capture.maps.translations, raw[2], bent.tobytes())
        ghost = keys[3:4].copy()
        ghost["src_port"] = 1
        libbpf.map_update(capture.maps.translations, ghost.tobytes(), values[3:4].tobytes())
        assert disagreeing(capture.check()) == {
            "missing_translations": 2, "wrong_translations": 1, "stale_translations": 1,
        }  # fmt: skip

        sockets_held, connections = libbpf.map_items(capture.maps.connections, SOCKET, CONNECTION)
        for number, change in enumerate(("backend_port", "nat", "gone")):
            key, entry = sockets_held[number].tobytes(), connections[number : number + 1].copy()
            if change == "gone":
                libbpf.map_delete(capture.maps.connections, key)
            else:
                entry["row"][change] = 0
                entry["row"]["ct_id"] = entry["row"]["ct_id"] if change == "backend_port" else 0
                libbpf.map_update(capture.maps.connections, key, entry.tobytes())
        lone = connections[3:4].copy()
        lone["row"]["tuple"]["src_port"], lone["row"]["conn_id"] = 1, 77
        libbpf.map_update(capture.maps.connections, (0xDEAD0000).to_bytes(8, "little"), lone.tobytes())
        agreement = capture.check()
        counts = disagreeing(agreement)
        assert (counts["missing_connections"], counts["stale_connections"], counts["wrong_backends"]) == (1, 1, 1)
        assert agreement.is_wrong
        assert capture.totals()["wrong_backends"] == 1

        capture.reconcile()
        assert disagreeing(capture.check()).keys() & {"missing_translations", "stale_translations"} == set()
        cluster.clients[0].release(held)


def test_what_is_broken_among_the_young_is_shown(cluster: Cluster) -> None:
    with Capture(options(cluster)) as capture:
        held = cluster.clients[0].hold(9, cluster.vip())["number"]
        agreed(capture)
        places = capture.maps.places
        bent, gone, another = np.flatnonzero(places["socket"])[:3]
        rows = places["connection"]["row"]
        rows["backend_port"][bent] = 0
        places["socket"][gone] = 0
        rows["tuple"]["src_port"][another] = 1
        counts = disagreeing(capture.check())
        assert (counts["missing_connections"], counts["stale_connections"], counts["wrong_backends"]) == (2, 1, 1)
        cluster.clients[0].release(held)


def test_conntrack_flushed_without_a_word(cluster: Cluster) -> None:
    with Capture(options(cluster)) as capture:
        held = cluster.clients[0].hold(5, cluster.vip())["number"]
        cluster.node.sysctl({"net.netfilter.nf_conntrack_events": 0})
        unheard = cluster.clients[1].hold(3, cluster.vip())["number"]
        found = capture.check(capture.drain)
        assert disagreeing(found) == {"missing_translations": 3}
        assert found.compared[Account.CONNECTIONS] == 8
        cluster.node.run(["conntrack", "-F"])
        # Entries tell of their end if they were born while events were on: those stay for their sockets, not stale.
        found = capture.check(capture.drain)
        assert disagreeing(found) == {}
        assert found.compared[Account.TRANSLATIONS] == found.compared[Account.BACKENDS] == 0
        cluster.node.sysctl({"net.netfilter.nf_conntrack_events": 2})
        cluster.clients[0].release(held)
        cluster.clients[1].release(unheard)


def test_a_full_map_is_missing_by_just_what_was_counted(cluster: Cluster) -> None:
    with Capture(options(cluster, sizes=Sizes(connections=6, translations=7))) as capture:
        held = cluster.clients[0].hold(10, cluster.vip())["number"]
        found = disagreeing(capture.check(capture.drain))
        totals = capture.totals()
        assert found["missing_connections"] == totals["lost_connection_map"] == 4
        assert found["missing_translations"] == totals["lost_translation_map"] == 3
        cluster.clients[0].release(held)


def test_a_running_capture_is_found_and_judged_by_its_maps_alone(cluster: Cluster) -> None:
    before = {one.ids["vt_connections"] for one in witness.running()}
    descriptors = len(os.listdir("/proc/self/fd"))
    with Capture(options(cluster, roles=("client", "server"), loopback=True)) as capture:
        (mine,) = [one for one in witness.running() if one.pid == os.getpid()]
        assert mine.ids["vt_connections"] not in before
        held = cluster.clients[0].hold(4, cluster.vip())["number"]
        during = len(os.listdir("/proc/self/fd"))
        with witness.opened(mine) as scope:
            assert scope.traced == ledger.Traced(loopback=True, servers=True)
            assert scope.node_netns == cluster.node.inode
            assert scope.listed == {netns.inode(path) for path in capture.options.only_netns}
            assert disagreeing(witness.check(scope)) == {}
        assert len(os.listdir("/proc/self/fd")) == during
        cluster.clients[0].release(held)
    assert os.getpid() not in {one.pid for one in witness.running()}
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_sockets_are_listed_a_namespace_after_the_other(cluster: Cluster) -> None:
    """Each list takes the kernel a walk through the sockets of all namespaces."""
    with Capture(options(cluster)) as capture:
        scope = witness.Scope.of(capture.maps.descriptors())
        turn = witness.Turn(0, 0.0)
        whose = [witness.look(scope, turn=turn).walked for _ in capture.options.only_netns]
        assert all(len(walked) == 1 for walked in whose)
        assert frozenset.union(*whose) == scope.listed
        assert witness.look(scope, turn=turn).walked == whose[0], "and again from the first"
        assert witness.look(scope, turn=witness.Turn(0, 60.0)).walked == scope.listed
        assert witness.look(scope, among=whose[1]).walked == whose[1]


def test_the_agent_compares_now_and_then(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "CHECK_S", 0.2)
    monkeypatch.setattr(agent, "CHECK_SHARE", 0.0)
    with Capture(options(cluster)) as capture:
        held = cluster.clients[0].hold(4, cluster.vip())["number"]
        agent.follow(capture, lambda _: None, WallClock(), finished=lambda: capture.counters().get("checks", 0) >= 2)
        totals = capture.counters()
        assert (totals["checked_connections"], totals["missing_connections"]) == (4 * totals["checks"], 0)
        cluster.clients[0].release(held)


def test_the_time_it_takes_is_bounded_by_arithmetic() -> None:
    assert agent.CHECK_SHARE >= 50
    assert agent.CHECK_S >= 60


# -- the comparison by itself ----------------------------------------------------------------------------------------


def view(**parts: object) -> ledger.View:
    nothing = {
        "entries": np.zeros(0, conntrack.ENTRY), "whole": True, "sockets": np.zeros(0, sockets.SOCKET),
        "left_out": np.zeros(0, np.bool_), "walked": frozenset({7}), "keys": np.zeros(0, TUPLE),
        "values": np.zeros(0, TRANSLATION), "connections": np.zeros(0, CONNECTION),
    }  # fmt: skip
    return ledger.View(**(nothing | parts))  # type: ignore[arg-type]


PLAIN = ledger.Traced(loopback=False, servers=False)


def test_nothing_agrees_with_nothing() -> None:
    look = ledger.compare(view(), PLAIN)
    assert (look.compared, len(look.found)) == ((0, 0, 0), 0)


def test_only_what_disagrees_twice_counts() -> None:
    entries = np.zeros(3, conntrack.ENTRY)
    entries["value"]["ct_id"] = [1, 2, 3]
    entries["key"]["src_port"] = [1, 2, 3]
    first = ledger.compare(view(entries=entries[:2]), PLAIN)
    second = ledger.compare(view(entries=entries[1:]), PLAIN)
    assert len(first.found) == len(second.found) == 2
    both = ledger.persisting(first, second)
    assert both.found["mark"].tolist() == [2]
    assert (both.compared[Account.TRANSLATIONS], both.agreeing(Account.TRANSLATIONS)) == (2, 1)


def test_a_table_that_was_not_understood_makes_nothing_stale() -> None:
    keys, values = np.zeros(1, TUPLE), np.zeros(1, TRANSLATION)
    assert len(ledger.compare(view(keys=keys, values=values), PLAIN).found) == 1
    assert len(ledger.compare(view(keys=keys, values=values, whole=False), PLAIN).found) == 0


def test_a_socket_of_which_nothing_says_who_dialled_is_not_missed() -> None:
    alone = np.zeros(2, sockets.SOCKET)
    alone["state"], alone["netns"] = (sockets.ESTABLISHED, sockets.LISTEN), 7
    alone["tuple"]["src_port"] = (80, 81)
    look = ledger.compare(view(sockets=alone, left_out=np.zeros(2, np.bool_)), PLAIN)
    agreement = ledger.persisting(look, look)
    assert (agreement.compared[Account.CONNECTIONS], agreement.undecided, len(agreement.found)) == (0, 1, 0)
    alone["tuple"]["src_port"] = 80  # a listener: it was accepted
    assert len(ledger.compare(view(sockets=alone, left_out=np.zeros(2, np.bool_)), PLAIN).found) == 0


def test_an_entry_that_was_made_anew_under_a_connection_is_no_fault() -> None:
    """It may lead elsewhere; one that is older than the connection may not."""
    connection, entries = np.zeros(1, CONNECTION), np.zeros(1, conntrack.ENTRY)
    row = connection["row"]
    row["flags"], row["netns"], row["nat"], row["ct_id"] = 4, 7, 2, 1
    row["tuple"]["src_port"], row["started"], row["connect_latency_us"] = 5, 10**12, 100
    entries["key"], entries["value"]["ct_id"], entries["value"]["backend_port"] = row["tuple"], 2, 9
    values = entries["value"].copy()
    values["source"] = 1
    for born, wrong in ((10**12 + 50_000, 1), (10**12 + 10**9, 0)):
        values["created"] = born
        look = ledger.compare(view(connections=connection, entries=entries, keys=entries["key"], values=values), PLAIN)
        assert int(np.count_nonzero(look.found["how"] == How.WRONG)) == wrong == look.compared[Account.BACKENDS]
