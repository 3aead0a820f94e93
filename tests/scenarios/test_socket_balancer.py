"""Load balancing at the socket, as Cilium does it: what was dialled, where it went, and never "none" for "not seen".

A program on connect() changes the address before the kernel's own code sees it, so conntrack has nothing to tell.
Also what else only the connect probe can see: connects that fail before the first SYN.
"""

import errno
import ipaddress
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from agent_world import agent, coverage, rows, until
from scenarios.truth import account, check, lives

from tracer.kernel import compiler, libbpf
from tracer.kernel.capture import Capture, Options
from tracer.lab.cluster import Cluster
from tracer.lab.topology import Conntrack
from tracer.lab.traffic import Client
from tracer.record import Nat, NatSource

pytestmark = pytest.mark.needs("bpf", "bcc", "netns", "conntrack", "iptables", "nft", "ipv6")

End = tuple[str, int]

#: Nobody but the balancer knows these.
VIRTUAL = {4: ("10.97.0.1", 80), 6: ("fd00:10:97::1", 80)}
FORBIDDEN = ("10.97.0.2", 80)
TO_SERVICE = ("10.97.0.3", 80)
TO_OUTSIDE = ("10.97.0.4", 80)
TCP, UDP = 6, 17
SENDS, RECEIVES = 100, 300

_SOURCE = """
struct endpoint {
	__u32 ip[4]; /* IPv4 v4-mapped */
	__u32 port;  /* network order */
	__u32 protocol;
};
struct service {
	__u32 next;
	__u32 count; /* 0: nobody may connect */
	struct endpoint backends[4];
};
BPF_HASH(services, struct endpoint, struct service, 16);
BPF_HASH(origins, struct endpoint, struct endpoint, 16);

static inline int choose(struct endpoint *to)
{
	struct service *service = services.lookup(to);
	__u32 number;

	if (!service)
		return 1;
	if (!service->count)
		return 0;
	number = service->next++ % service->count;
	*to = service->backends[number & 3];
	return 1;
}

static inline void answer(struct endpoint *from)
{
	struct endpoint *origin = origins.lookup(from);

	if (origin)
		*from = *origin;
}

#define READ4(ctx) {{0, 0, bpf_htonl(0xffff), ctx->user_ip4}, ctx->user_port, ctx->protocol}
#define READ6(ctx) {{ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]}, \\
	ctx->user_port, ctx->protocol}
#define WRITE4(ctx, end) ctx->user_ip4 = end.ip[3]; ctx->user_port = end.port
#define WRITE6(ctx, end) ctx->user_ip6[0] = end.ip[0]; ctx->user_ip6[1] = end.ip[1]; \\
	ctx->user_ip6[2] = end.ip[2]; ctx->user_ip6[3] = end.ip[3]; ctx->user_port = end.port

int connect4(struct bpf_sock_addr *ctx)
{
	struct endpoint end = READ4(ctx);
	int allowed = choose(&end);

	WRITE4(ctx, end);
	return allowed;
}

int connect6(struct bpf_sock_addr *ctx)
{
	struct endpoint end = READ6(ctx);
	int allowed = choose(&end);

	WRITE6(ctx, end);
	return allowed;
}

/* recvfrom() names whom was asked, not who answered. */
int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct endpoint end = READ4(ctx);

	answer(&end);
	WRITE4(ctx, end);
	return 1;
}
"""
# enum bpf_prog_type and enum bpf_attach_type (include/uapi/linux/bpf.h)
_CGROUP_SOCK_ADDR = 18
_ATTACH = {"connect4": libbpf.ATTACH_CONNECT4, "connect6": libbpf.ATTACH_CONNECT6, "recvmsg4": 19}


def _cgroup_root() -> Path:
    """Where cgroup v2 is mounted; /proc/self/mountinfo, see proc_pid_mountinfo(5)."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] == "cgroup2":
            return Path(before.split()[4])
    pytest.fail("cgroup v2 is not mounted on this machine: mount it at /sys/fs/cgroup/unified")


def _endpoint(end: End, protocol: int) -> bytes:
    address = ipaddress.ip_address(end[0])
    raw = address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed
    return raw + struct.pack("!HH", end[1], 0) + struct.pack("=I", protocol)


class Balancer:
    """A cgroup in which connect() leads from virtual addresses to backends, in turn; a context manager."""

    def __init__(self) -> None:
        import bcc

        with patch.dict(os.environ, BCC_KERNEL_SOURCE=str(compiler.source_directory())):
            flags = ["-DCONFIG_BPF_SYSCALL=1", "-DPAGE_SIZE=4096", "-Wno-everything"]
            self._module: Any = bcc.BPF(text=_SOURCE.encode(), cflags=flags)
        self._links: list[int] = []
        self.cgroup: Path

    def __enter__(self) -> Self:
        self.cgroup = Path(tempfile.mkdtemp(prefix="socket-balancer-", dir=_cgroup_root()))
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()
        self._module.cleanup()
        for process in (self.cgroup / "cgroup.procs").read_text().split():
            (self.cgroup.parent / "cgroup.procs").write_text(process)
        self.cgroup.rmdir()

    def attach(self) -> None:
        """From now on the cgroup's processes are balanced."""
        directory = os.open(self.cgroup, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name, where in _ATTACH.items():
                program = libbpf.load_program(_CGROUP_SOCK_ADDR, name, self._module.dump_func(name.encode()), where)
                self._links.append(libbpf.attach_cgroup(program, directory, where))
                os.close(program)
        finally:
            os.close(directory)

    def detach(self) -> None:
        for link in self._links:
            os.close(link)
        self._links.clear()

    def move(self, client: Client) -> None:
        """Puts a client's process under the balancer."""
        (self.cgroup / "cgroup.procs").write_text(str(client.pid))

    def serve(self, virtual: End, backends: list[End], protocol: int = TCP) -> None:
        """Leads from a virtual address to up to four backends; without one, connect() fails with EPERM."""
        ends = b"".join(_endpoint(end, protocol) for end in backends)
        value = struct.pack("=II", 0, len(backends)) + ends.ljust(4 * 24, b"\0")
        self._update("services", _endpoint(virtual, protocol), value)
        for end in backends:
            self._update("origins", _endpoint(end, protocol), _endpoint(virtual, protocol))

    def _update(self, name: str, key: bytes, value: bytes) -> None:
        assert libbpf.map_update(self._module[name.encode()].map_fd, key, value) == 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three backends, two clients, IPv4 and IPv6, and a host outside."""
    tracking = Conntrack(timeouts={"udp": 1, "udp_stream": 1})
    with Cluster(backends=3, clients=2, families="dual", outside=True, conntrack=tracking) as made:
        made.outside_server.listen(["172.30.0.100"], 8080)
        for server, pod in zip(made.servers, made.backend_pods, strict=True):
            server.listen([pod.ips[4]], 8080, "udp")
        yield made


@pytest.fixture(scope="module")
def prepared(cluster: Cluster) -> Iterator[Balancer]:
    """A balancer that knows its services and the first client, and is not attached."""
    with Balancer() as made:
        for family in (4, 6):
            made.serve(VIRTUAL[family], backends(cluster, family))
        made.serve(VIRTUAL[4], backends(cluster), UDP)
        made.serve(FORBIDDEN, [])
        made.serve(TO_SERVICE, [cluster.vip()])
        made.serve(TO_OUTSIDE, [("172.30.0.100", 8080)])
        made.move(cluster.clients[0])
        yield made


@pytest.fixture
def balancer(cluster: Cluster, prepared: Balancer) -> Iterator[Balancer]:
    """The same, attached; conntrack has forgotten what was before."""
    cluster.node.run(["conntrack", "-F"])
    prepared.attach()
    try:
        yield prepared
    finally:
        prepared.detach()


def backends(cluster: Cluster, family: int = 4) -> list[End]:
    return [(pod.ips[family], 8080) for pod in cluster.backend_pods]


def servers(cluster: Cluster) -> list[Any]:
    return [*cluster.servers, cluster.outside_server]


def split(table: pd.DataFrame) -> dict[str, int]:
    return dict(table.backend_ip.value_counts())


def programs(output: Path) -> set[str]:
    return set(coverage(output).programs.iloc[-1].split(","))


PROBE = {"tracepoint/sys_enter_connect", "tracepoint/sys_exit_connect"}


@pytest.mark.parametrize("probe", ["auto", "on"])
def test_rows_say_what_was_dialled_and_where_it_went(
    cluster: Cluster, balancer: Balancer, tmp_path: Path, probe: str
) -> None:
    client, plain = cluster.clients
    with agent(cluster, tmp_path / "data", "--connect-probe", probe):
        ledgers = [client.connect_many(9, VIRTUAL[family], SENDS, RECEIVES) for family in (4, 6)]
        ledgers.append(client.connect_as("nonblocking", 3, VIRTUAL[4], SENDS, RECEIVES))
        ledgers.append(client.connect_as("mapped", 3, VIRTUAL[4], SENDS, RECEIVES))
        other = plain.connect_many(6, cluster.vip(), SENDS, RECEIVES)
        cluster.settle()
    assert programs(tmp_path / "data") >= PROBE
    table = rows(tmp_path / "data")
    balanced = table[table.src_ip.isin(cluster.client_pods[0].addresses)]
    assert len(balanced) == 24
    check(balanced, np.concatenate(ledgers), cluster.servers)
    for column, value in {
        "nat": "dnat", "nat_source": "socket", "pid": client.pid, "comm": "lab-client", "result": "ok",
        "cgroup_id": balancer.cgroup.stat().st_ino, "opened": True, "closed": True,
    }.items():  # fmt: skip
        assert set(balanced[column]) == {value}, column
    assert balanced.retransmits.max() <= 1  # a busy machine may be late with an answer
    assert balanced.snat_ip.isna().all()
    assert split(balanced[balanced.dst_ip == VIRTUAL[4][0]]) == dict.fromkeys((ip for ip, _ in backends(cluster)), 5)
    assert split(balanced[balanced.dst_ip == VIRTUAL[6][0]]) == dict.fromkeys((ip for ip, _ in backends(cluster, 6)), 3)
    assert (balanced.connect_latency_us > 0).all()
    unbalanced = check(table[table.src_ip == cluster.client_pods[1].ips[4]], other, cluster.servers)
    assert len(unbalanced) == len(table) - 24 == 6
    assert (set(unbalanced.nat), set(unbalanced.nat_source)) == ({"dnat"}, {"conntrack"})
    sums = account(tmp_path / "data")
    assert (sums["undialled"], sums["unresolved"]) == (0, 0)


def test_what_conntrack_rewrites_as_well_is_joined(cluster: Cluster, balancer: Balancer, tmp_path: Path) -> None:
    client = cluster.clients[0]
    with agent(cluster, tmp_path / "data"):
        twice = client.connect_many(6, TO_SERVICE, SENDS, RECEIVES)
        outward = client.connect_many(4, TO_OUTSIDE, SENDS, RECEIVES)
        untouched = client.connect_many(3, cluster.vip(), SENDS, RECEIVES)
        direct = client.connect_many(2, backends(cluster)[0], SENDS, RECEIVES)
        cluster.settle()
    found = check(rows(tmp_path / "data"), np.concatenate((twice, outward, untouched, direct)), servers(cluster))
    kinds = found.groupby(["dst_ip", "nat", found.nat_source.fillna("")]).size().to_dict()
    assert kinds == {
        (TO_SERVICE[0], "dnat", "socket"): 6,
        (TO_OUTSIDE[0], "dnat+snat", "socket"): 4,
        (cluster.vip()[0], "dnat", "conntrack"): 3,
        (backends(cluster)[0][0], "none", "conntrack"): 2,
    }
    masqueraded = found[found.dst_ip == TO_OUTSIDE[0]]
    assert set(masqueraded.snat_ip) == {cluster.nodes[0].addresses[4]}
    assert account(tmp_path / "data")["unresolved"] == 0


def expire(cluster: Cluster, protocol: str = "udp") -> None:
    """Waits until conntrack has dropped its entries; a listing removes what has expired."""
    until(lambda: not cluster.node.run(["conntrack", "-L", "-p", protocol]), "conntrack to drop its entries")


def test_datagrams(cluster: Cluster, balancer: Balancer, tmp_path: Path) -> None:
    client = cluster.clients[0]
    with agent(cluster, tmp_path / "data"):
        ledger = client.datagrams(9, VIRTUAL[4], SENDS, RECEIVES, times=2)
        expire(cluster)
    assert not ledger["errno"].any()
    found = check(rows(tmp_path / "data"), ledger, cluster.servers)
    assert (set(found.nat), set(found.nat_source), set(found.pid)) == ({"dnat"}, {"socket"}, {client.pid})
    assert split(found) == dict.fromkeys((ip for ip, _ in backends(cluster)), 3)
    assert (found.bytes_sent.sum(), found.bytes_received.sum()) == (18 * SENDS, 18 * RECEIVES)
    sums = account(tmp_path / "data")
    assert (sums["flows"], sums["undialled"]) == (9, 0)


def test_datagrams_of_sockets_that_stay_open(cluster: Cluster, balancer: Balancer, tmp_path: Path) -> None:
    client = cluster.clients[0]
    with agent(cluster, tmp_path / "data"):
        held = client.datagrams(3, VIRTUAL[4], SENDS, RECEIVES, keep=True)
        expire(cluster)
    client.release(held["number"])
    found = check(rows(tmp_path / "data"), held, cluster.servers)
    assert (set(found.nat), set(found.nat_source), set(found.pid)) == ({"dnat"}, {"socket"}, {client.pid})
    assert (found.bytes_sent.sum(), found.bytes_received.sum()) == (3 * SENDS, 3 * RECEIVES)
    assert account(tmp_path / "data")["flows"] == 3


def test_datagrams_of_which_conntrack_has_not_told_the_end(
    cluster: Cluster, balancer: Balancer, tmp_path: Path
) -> None:
    client = cluster.clients[0]
    with agent(cluster, tmp_path / "data"):
        ledger = client.datagrams(6, VIRTUAL[4], SENDS, RECEIVES, times=2)
        held = client.datagrams(3, VIRTUAL[4], SENDS, RECEIVES, keep=True)
    client.release(held["number"])
    found = check(rows(tmp_path / "data"), np.concatenate((ledger, held)), cluster.servers)
    assert (set(found.nat), set(found.nat_source), set(found.pid)) == ({"dnat"}, {"socket"}, {client.pid})
    assert (found.bytes_sent.sum(), found.bytes_received.sum()) == (15 * SENDS, 15 * RECEIVES)
    account(tmp_path / "data")


def test_with_the_probe_off_what_was_dialled_is_unknown_unless_conntrack_tells(
    cluster: Cluster, balancer: Balancer, tmp_path: Path
) -> None:
    client = cluster.clients[0]
    with agent(cluster, tmp_path / "data", "--connect-probe", "off") as running:
        balanced = client.connect_many(6, VIRTUAL[4], SENDS, RECEIVES)
        told = client.connect_many(6, cluster.vip(), SENDS, RECEIVES)
        datagrams = client.datagrams(3, VIRTUAL[4], SENDS, RECEIVES)
        cluster.settle()
        expire(cluster)
    assert "what was dialled is unknown" in running.said
    assert not programs(tmp_path / "data") & PROBE
    table = rows(tmp_path / "data")
    assert len(table) == 15
    found = check(table[table.dst_ip == cluster.vip()[0]], told, cluster.servers)
    assert (len(found), set(found.nat), set(found.nat_source)) == (6, {"dnat"}, {"conntrack"})
    vague = table[table.dst_ip != cluster.vip()[0]]
    assert sorted(vague.src_port) == sorted([*balanced["local_port"], *datagrams["local_port"]])
    assert set(vague.nat) == {"unknown"}
    assert vague.backend_ip.isna().all()
    assert set(vague.dst_ip) == {ip for ip, _ in backends(cluster)}, "all that the socket knew"
    sums = account(tmp_path / "data")
    assert (sums["undialled"], sums["unresolved"]) == (12, 6)


def test_connections_left_out_are_not_counted_as_not_dialled(
    cluster: Cluster, balancer: Balancer, tmp_path: Path
) -> None:
    client = cluster.clients[0]
    with agent(cluster, tmp_path / "data", "--connect-probe", "off", "--exclude-cidr", f"{cluster.vip()[0]}/32"):
        client.connect_many(6, cluster.vip(), SENDS, RECEIVES)
        client.connect_many(3, VIRTUAL[4], SENDS, RECEIVES)
        cluster.settle()
    sums = account(tmp_path / "data")
    assert (sums["opened"], sums["undialled"]) == (3, 3)


def test_io_uring_connects_past_the_probe(cluster: Cluster, balancer: Balancer, tmp_path: Path) -> None:
    client = cluster.clients[0]
    with agent(cluster, tmp_path / "data", "--connect-probe", "on"):
        balanced, told = (
            np.concatenate(
                [client.connect_as("io_uring", 3, where, SENDS, RECEIVES, in_worker=each) for each in (False, True)]
            )
            for where in (VIRTUAL[4], cluster.vip())
        )
        cluster.settle()
    table = rows(tmp_path / "data")
    assert len(table) == 12
    assert set(table.pid) == {client.pid}
    found = check(table[table.dst_ip == cluster.vip()[0]], told, cluster.servers)
    assert set(found.nat) == {"dnat"}
    vague = table[table.dst_ip != cluster.vip()[0]]
    assert sorted(vague.src_port) == sorted(balanced["local_port"])
    assert set(vague.nat) == {"unknown"}
    assert vague.backend_ip.isna().all()
    assert (vague.bytes_sent.sum(), vague.bytes_received.sum()) == (6 * SENDS, 6 * RECEIVES)
    sums = account(tmp_path / "data")
    assert (sums["undialled"], sums["unresolved"]) == (12, 6)


def test_connections_from_before_the_agent_are_unknown(cluster: Cluster, balancer: Balancer, tmp_path: Path) -> None:
    client = cluster.clients[0]
    held = client.hold(3, VIRTUAL[4])
    told = client.hold(2, cluster.vip())
    with agent(cluster, tmp_path / "data"):
        client.release(np.concatenate((held, told))["number"])
        cluster.settle()
    table = rows(tmp_path / "data").set_index("src_port")
    assert sorted(table.index) == sorted([*held["local_port"], *told["local_port"]])
    assert set(table.loc[held["local_port"].astype(int)].nat) == {"unknown"}
    assert set(table.loc[told["local_port"].astype(int)].nat) == {"dnat"}
    assert account(tmp_path / "data")["adopted"] == 5


def test_a_balancer_that_comes_later_is_found(cluster: Cluster, prepared: Balancer) -> None:
    """The agent looks every minute; before, a connection is taken at its peer's word."""
    cluster.node.run(["conntrack", "-F"])
    client, plain = cluster.clients
    scope = (cluster.node.path, *(pod.netns.path for pod in (*cluster.client_pods, *cluster.backend_pods)))
    with Capture(Options(node_netns=cluster.node.path, only_netns=scope)) as capture, ExitStack() as undo:
        taken: list[np.ndarray] = []

        def drained(count: int) -> np.ndarray:
            until(lambda: taken.append(capture.drain()) or sum(map(len, taken)) >= count, "the records")
            records = np.concatenate(taken)
            taken.clear()
            return records

        capture.watch_balancers()
        assert "tracepoint/sys_enter_connect" not in capture.programs
        plain.connect_many(3, backends(cluster)[0], SENDS, RECEIVES)
        assert set(drained(3)["nat"]) == {Nat.NONE}

        undo.callback(prepared.detach)
        prepared.attach()
        before = client.connect_many(3, VIRTUAL[4], SENDS, RECEIVES)
        early = drained(3)
        assert early["tuple"]["dst_port"].tolist() == [8080] * 3
        assert len(before) == 3

        capture.watch_balancers()
        assert "tracepoint/sys_enter_connect" in capture.programs
        after = client.connect_many(3, VIRTUAL[4], SENDS, RECEIVES)
        records = drained(3)
        assert sorted(records["tuple"]["src_port"]) == sorted(after["local_port"])
        assert set(records["nat"]) == {Nat.DNAT}
        assert set(records["nat_source"]) == {NatSource.SOCKET}
        assert set(records["tuple"]["dst_port"]) == {80}

        prepared.detach()
        capture.watch_balancers()
        plain.connect_many(3, cluster.vip(), SENDS, RECEIVES)
        assert set(drained(3)["nat"]) == {Nat.DNAT}
        assert capture.counters()["undialled"] == 0


UNREACHABLE, PROHIBITED, NOWHERE = ("10.98.0.1", 80), ("10.98.0.2", 80), ("10.98.0.3", 80)
UNREACHABLE6 = ("fd00:10:98::1", 80)


@pytest.fixture
def no_routes(cluster: Cluster, prepared: Balancer) -> Iterator[None]:
    """The first client's pod has no way to some addresses, nor the balancer."""
    pod = cluster.client_pods[0].netns
    routes = [
        ["unreachable", UNREACHABLE[0]],
        ["prohibit", PROHIBITED[0]],
        ["throw", NOWHERE[0]],
        ["unreachable", UNREACHABLE6[0]],
    ]
    for route in routes:
        pod.run(["ip", "route", "add", *route])
    prepared.serve(("10.97.0.5", 80), [UNREACHABLE])
    yield
    for route in routes:
        pod.run(["ip", "route", "del", *route])


@pytest.mark.usefixtures("no_routes")
def test_connects_that_fail_before_the_first_syn_have_a_row_with_the_probe(
    cluster: Cluster, balancer: Balancer, tmp_path: Path
) -> None:
    client = cluster.clients[0]
    expected = [
        (UNREACHABLE, errno.EHOSTUNREACH, "unreachable"),
        (UNREACHABLE6, errno.EHOSTUNREACH, "unreachable"),
        (NOWHERE, errno.ENETUNREACH, "unreachable"),
        (PROHIBITED, errno.EACCES, "EACCES"),
        (FORBIDDEN, errno.EPERM, "EPERM"),
        (("10.97.0.5", 80), errno.EHOSTUNREACH, "unreachable"),
    ]
    with agent(cluster, tmp_path / "data", "--connect-probe", "on"):
        for where, code, _ in expected:
            assert client.connect_many(2, where)["errno"].tolist() == [code] * 2
            assert client.connect_as("nonblocking", 1, where)["errno"].tolist() == [code]
        ledger = client.connect_many(2, VIRTUAL[4], SENDS, RECEIVES)
        cluster.settle()
    table = rows(tmp_path / "data")
    check(table[table.result == "ok"], ledger, cluster.servers)
    failed = table[table.result != "ok"]
    assert failed.groupby(["dst_ip", "dst_port", "result"]).size().to_dict() == {
        (*where, word): 3 for where, _, word in expected
    }
    assert len(table) == len(failed) + 2
    for column, value in {
        "nat": "unknown", "role": "client", "protocol": "tcp", "pid": client.pid, "comm": "lab-client",
        "netns": cluster.client_pods[0].netns.inode, "opened": True, "closed": True, "src_port": 0,
        "bytes_sent": 0, "bytes_received": 0, "packets_sent": 0,
    }.items():  # fmt: skip
        assert set(failed[column]) == {value}, column
    assert failed.backend_ip.isna().all()
    assert failed.connect_latency_us.isna().all()
    assert failed.started.notna().all()
    assert failed.conn_id.is_unique
    assert account(tmp_path / "data")["failed"] == 18


@pytest.mark.usefixtures("no_routes")
def test_without_the_probe_they_have_none(cluster: Cluster, tmp_path: Path) -> None:
    client = cluster.clients[0]
    cluster.node.run(["conntrack", "-F"])
    with agent(cluster, tmp_path / "data", "--connect-probe", "off"):
        for where in (UNREACHABLE, UNREACHABLE6, NOWHERE, PROHIBITED):
            assert client.connect_many(2, where)["errno"].all()
        ledger = client.connect_many(3, cluster.vip(), SENDS, RECEIVES)
        cluster.settle()
    assert len(lives(rows(tmp_path / "data"))) == 3
    check(rows(tmp_path / "data"), ledger, cluster.servers)
    sums = account(tmp_path / "data")
    assert (sums["failed"], sums["opened"]) == (0, 3)


def test_nothing_is_left_behind() -> None:
    """The cgroup goes with its balancer, and its programs too."""
    with Balancer() as made:
        made.attach()
        root = os.open(made.cgroup, os.O_RDONLY)
        assert libbpf.attached_to_cgroup(root, libbpf.ATTACH_CONNECT4) == 1
        made.detach()
        assert libbpf.attached_to_cgroup(root, libbpf.ATTACH_CONNECT4) == 0
        os.close(root)
    assert not made.cgroup.exists()
