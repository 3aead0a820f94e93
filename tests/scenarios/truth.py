"""What the rows must say, from what the applications at both ends counted: nothing missing, extra or wrong."""

import functools
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd
from agent_world import coverage, losses, rows, until

from tracer.lab.cluster import Cluster
from tracer.lab.netns import Namespace
from tracer.lab.traffic import Ledger, Server, addresses

#: What one connection is, in all of its rows.
CONSTANT = ["role", "protocol", "src_ip", "src_port", "dst_ip", "dst_port", "backend_ip", "backend_port", "snat_ip",
            "snat_port", "nat"]  # fmt: skip
SUMMED = ["bytes_sent", "bytes_received", "packets_sent", "packets_received", "ip_bytes_sent", "ip_bytes_received",
          "retransmits", "duration_us"]  # fmt: skip
#: What `check` holds against the ledger.
CHECKED = [*CONSTANT, "result", "bytes_sent", "bytes_received"]
WORDS = {0: "ok", 104: "reset", 110: "timeout", 111: "refused", 113: "unreachable", 101: "unreachable", 125: "aborted"}

#: What conntrack counts.
COUNTERS = ["packets_sent", "ip_bytes_sent", "packets_received", "ip_bytes_received"]
#: The columns of `entries`.
ENTRY = ["protocol", "state", "src_ip", "src_port", "dst_ip", "dst_port", "packets_sent", "ip_bytes_sent", "backend_ip",
         "backend_port", "snat_ip", "snat_port", "packets_received", "ip_bytes_received"]  # fmt: skip

#: include/uapi/linux/netfilter/nfnetlink_conntrack.h, nfnetlink_compat.h
_CTA_PROTOINFO, _GROUP_DESTROY, _NETLINK_NETFILTER, _HEADS = 4, 1 << 2, 12, 16 + 4

End = tuple[str, int]


@functools.cache
def destroy_tells_the_end() -> bool:
    """Whether this kernel's DESTROY says in which state a TCP entry was, and how long it had left to wait.

    Asked of the kernel: an entry is made and deleted in a namespace of its own. Where it does not (before "ctnetlink:
    add timeout and protoinfo to destroy events", 5.11), rows that only conntrack told of have neither a result nor the
    exact time of the last packet, unless a dump saw the entry wait.
    """
    with Namespace("probe") as probe:
        listener = probe.call(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER))
        with listener:
            listener.bind((0, _GROUP_DESTROY))
            listener.settimeout(30)
            entry = ["-p", "tcp", "-s", "192.0.2.1", "-d", "192.0.2.2", "--sport", "1", "--dport", "2"]
            probe.run(["conntrack", "-I", *entry, "--state", "TIME_WAIT", "-u", "ASSURED", "-t", "100"])
            probe.run(["conntrack", "-D", *entry])
            return _CTA_PROTOINFO in _attributes(listener.recv(1 << 16)[_HEADS:])


def _attributes(message: bytes) -> Iterator[int]:
    """The types of a netlink message's attributes."""
    while len(message) >= 4:
        length, kind = struct.unpack_from("=HH", message)
        yield kind & 0x3FFF
        message = message[max(4, length + 3 & ~3) :]


def proven(result: str) -> set[str | None]:
    """What the row of an entry that ended so may say as its result: null where this kernel does not tell."""
    return {result} if destroy_tells_the_end() else {result, None}


def lives(table: pd.DataFrame) -> pd.DataFrame:
    """One row per connection, in the order of conn_id: its rows added up; checks that they fit together."""
    table = table.sort_values(["conn_id", "ts", "closed"])
    found = table.drop_duplicates("conn_id", keep="last").reset_index(drop=True).assign(rows=1)
    several = table[table.conn_id.duplicated(keep=False)]
    if several.empty:
        return found
    which = several.conn_id
    for name in CONSTANT:
        known = several[name].mask(several[name] == "unknown") if name == "nat" else several[name]
        kinds = known.groupby(which).nunique()
        assert (kinds <= 1).all(), f"{set(kinds.index[kinds > 1])} change their {name}"
    first, last = ~which.duplicated(), ~which.duplicated(keep="last")
    assert not (several.opened & ~first).any(), f"{set(which[several.opened & ~first])} begin twice"
    assert not (several.closed & ~last).any(), f"{set(which[several.closed & ~last])} go on after their end"
    told = several.ts.astype("int64") // 1000
    gaps = (told - several.duration_us.astype("int64") - told.groupby(which).shift())[~first]
    assert (gaps.abs() <= 1).all(), f"gaps or overlaps, in us: {dict(zip(which[~first], gaps, strict=True))}"
    by, unknown = several.groupby("conn_id"), several[SUMMED].isna().groupby(which).any()
    summed = by[SUMMED].sum().mask(unknown).assign(opened=by.opened.any(), rows=by.size())
    found = found.set_index("conn_id", drop=False).rename_axis(None)
    found.loc[summed.index, summed.columns] = summed
    return found.reset_index(drop=True)


def ends(ledger: Ledger) -> list[tuple[End, End]]:
    """(own address and port, peer's address and port) of each row of a ledger."""
    own, peers = addresses(ledger["local"]), addresses(ledger["peer"])
    return [
        ((local, int(row["local_port"])), (peer, int(row["peer_port"])))
        for local, peer, row in zip(own, peers, ledger, strict=True)
    ]


def accepted(servers: Iterable[Server]) -> set[tuple[str, End, End]]:
    """The servers' account: protocol, whom the server saw (the client, or as whom it was masqueraded), the backend.

    By both ends: masquerading gives one port out again, towards another backend.
    """
    log: set[tuple[str, End, End]] = set()
    for server in servers:
        ledger = server.ledger()
        for (own, peer), number in zip(ends(ledger), ledger["protocol"], strict=True):
            log.add(("udp" if number == 17 else "tcp", peer, own))
    return log


def _unspecified(address: str) -> str:
    """What getsockname() says instead, of a socket that failed to connect, or that sends datagrams unconnected."""
    return "::" if ":" in address else "0.0.0.0"


def check(table: pd.DataFrame, ledger: Ledger, servers: Iterable[Server], *, role: str = "client") -> pd.DataFrame:
    """Exactly the ledger's connections, each with the backend that accepted it, and the client's own counts.

    The ledger is the clients' (several concatenated), its pairs of ends different from each other. Returns `lives`.
    """
    found = lives(table)
    told = list(found[CHECKED].itertuples())
    log = accepted(servers)
    client_side = dict(zip(ends(ledger), ledger, strict=True))
    assert len(client_side) == len(ledger), "the ledger's ends repeat"
    keys = []
    for life in told:
        dialled = life.dst_ip, life.dst_port
        key = (life.src_ip, life.src_port), dialled
        keys.append(key if key in client_side else ((_unspecified(life.src_ip), life.src_port), dialled))
    assert sorted(keys) == sorted(client_side), "not the ledger's connections"
    for life, key in zip(told, keys, strict=True):
        row = client_side[key]
        assert life.role == role
        if life.protocol == "tcp" and role == "client":
            assert life.result == WORDS[int(row["errno"])]
            assert (life.bytes_sent, life.bytes_received) == (int(row["sent"]), int(row["received"]))
        if row["errno"] == 0 and row["established"]:
            seen_as = (life.snat_ip, int(life.snat_port)) if "snat" in life.nat else (life.src_ip, life.src_port)
            assert (life.protocol, seen_as, (life.backend_ip, int(life.backend_port))) in log
    return found


def account(output: Path) -> pd.Series:
    """Checks that nothing was lost and that coverage's account balances; the sums of its counters."""
    table = coverage(output)
    sums = table.sum(numeric_only=True)
    began = sums[["opened", "accepted", "adopted", "late_begin", "failed"]].sum()
    assert losses(output) == 0
    still_open = table.groupby("run_id", observed=True).open_connections.last().sum()
    assert began == sums["closed"] + sums["excluded"] + still_open
    assert sums["emitted"] == sums["written"]
    return sums


def clean(output: Path) -> pd.Series:
    """`account`; and the rows are those written, and nothing of conntrack was missed, misread or ended untold."""
    sums = account(output)
    assert sums["written"] == len(rows(output))
    assert not sums[["malformed_events", "enobufs", "untold", "ambiguous"]].any()
    return sums


def entries(node: Namespace, *which: str) -> pd.DataFrame:
    """conntrack's own list of a node's TCP and UDP entries: both tuples, what it counted, and the TCP state.

    Columns: protocol, state; src_ip, src_port, dst_ip, dst_port as dialled; backend_ip, backend_port, snat_ip,
    snat_port as answered; packets_sent, ip_bytes_sent, packets_received, ip_bytes_received (-1 without accounting).
    `which` narrows it, as `"-p", "udp"`. Listing drops what has expired.
    """
    found = []
    for line in node.run(["conntrack", "-L", *which]).splitlines():
        words = line.split()
        if words[0] not in ("tcp", "udp"):
            continue
        values: dict[str, list[str]] = {}
        for name, value in (word.split("=", 1) for word in words if "=" in word):
            values.setdefault(name, []).append(value)
        row: dict[str, object] = {"protocol": words[0], "state": words[3] if words[0] == "tcp" else ""}
        for turn, (source, destination, way) in enumerate((("src", "dst", "sent"), ("backend", "snat", "received"))):
            row |= {f"{source}_ip": values["src"][turn], f"{source}_port": int(values["sport"][turn])}
            row |= {f"{destination}_ip": values["dst"][turn], f"{destination}_port": int(values["dport"][turn])}
            row |= {f"packets_{way}": int(values.get("packets", [-1, -1])[turn])}
            row |= {f"ip_bytes_{way}": int(values.get("bytes", [-1, -1])[turn])}
        found.append(row)
    return pd.DataFrame(found, columns=ENTRY)


def settled(node: Namespace, *which: str) -> pd.DataFrame:
    """`entries` once they move no more: an acknowledgement may come up to 200 ms late (TCP_DELACK_MAX)."""
    seen = [entries(node, *which)]

    def quiet() -> bool:
        time.sleep(0.25)
        seen.append(entries(node, *which))
        return seen[-2].equals(seen[-1])

    until(quiet, "the traffic to come to rest")
    return seen[-1]


def at_rest(cluster: Cluster) -> pd.DataFrame:
    """The first node's `entries` when both ends have closed what was released, and nothing moves any more."""
    cluster.settle()
    return settled(cluster.node)
