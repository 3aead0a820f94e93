"""What each byte of a record becomes, and when it becomes null."""

import ipaddress

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer import schema
from tracer.clock import WallClock
from tracer.record import RECORD, RESULT_OPEN, Flag, Nat, NatSource, Role
from tracer.store.columns import address_text, comm_text, table

EPOCH = 1_700_000_000 * 10**9
CLOCK = WallClock(0, EPOCH)


def v6(text: str) -> bytes:
    return ipaddress.IPv6Address(text).packed


def record(**values: object) -> np.ndarray:
    """One record of a client connection that was rewritten; `values` replace fields, also those of the tuple."""
    row = np.zeros(1, dtype=RECORD)
    defaults = {
        "src": v6("::ffff:10.0.0.7"), "dst": v6("::ffff:10.96.0.1"), "src_port": 40001, "dst_port": 443,
        "protocol": 6, "backend": v6("::ffff:10.0.1.9"), "backend_port": 8443, "conn_id": 11, "ts": 5_000_000_999,
        "started": 4_000_000_001, "duration_ns": 1_000_000_998, "bytes_sent": 10, "bytes_received": 20,
        "packets_sent": 3, "packets_received": 4, "cgroup_id": 77, "comm": b"curl", "retransmits": 1,
        "connect_latency_us": 250, "rtt_us": 90, "pid": 1234, "netns": 4026531840, "ct_id": 99, "ct_zone": 0,
        "nat": Nat.DNAT, "nat_source": NatSource.CONNTRACK, "flags": sum(Flag), "result": 0,
    }  # fmt: skip
    for name, value in (defaults | values).items():
        (row["tuple"] if name in RECORD["tuple"].names else row)[name] = value
    return row


def row_of(**values: object) -> dict[str, object]:
    made = table(record(**values), "node-1", CLOCK)
    made.validate(full=True)
    columns = {f.name: made[f.name].cast(pa.int64()) if f.type == schema.TIME else made[f.name] for f in made.schema}
    return {name: column[0].as_py() for name, column in columns.items()}


def test_a_whole_row() -> None:
    nothing = dict.fromkeys(
        ["src_namespace", "src_pod", "src_workload", "dst_namespace", "dst_service", "dst_service_port", "backend_pod",
         "backend_workload", "backend_node", "backend_zone", "snat_ip", "snat_port", "ip_bytes_sent",
         "ip_bytes_received"]
    )  # fmt: skip
    assert row_of() == nothing | {
        "node": "node-1", "ts": EPOCH + 5_000_000_999, "conn_id": 11, "opened": True, "closed": True,
        "started": EPOCH + 4_000_000_001, "role": "client", "protocol": "tcp", "src_ip": "10.0.0.7",
        "src_port": 40001, "dst_ip": "10.96.0.1", "dst_port": 443, "backend_ip": "10.0.1.9", "backend_port": 8443,
        "nat": "dnat", "nat_source": "conntrack", "pid": 1234, "comm": "curl", "cgroup_id": 77, "netns": 4026531840,
        "result": "ok", "connect_latency_us": 250, "duration_us": 1_000_000, "bytes_sent": 10, "bytes_received": 20,
        "packets_sent": 3, "packets_received": 4, "retransmits": 1, "rtt_us": 90, "ct_zone": 0, "ct_id": 99,
    }  # fmt: skip


def test_columns_are_in_the_order_of_the_schema() -> None:
    assert table(record(), "n", CLOCK).schema.equals(schema.arrow("connections"), check_metadata=True)


@pytest.mark.parametrize(
    ("change", "null"),
    [
        ({"started": 0}, {"started"}),
        ({"flags": sum(Flag) & ~Flag.LATENCY}, {"connect_latency_us"}),
        (
            {"flags": sum(Flag) & ~Flag.COUNTED},
            {"bytes_sent", "bytes_received", "packets_sent", "packets_received", "retransmits", "rtt_us"},
        ),
        ({"rtt_us": 0}, {"rtt_us"}),
        ({"flags": sum(Flag) & ~Flag.PROCESS}, {"pid", "comm", "cgroup_id"}),
        ({"netns": 0}, {"netns"}),
        ({"nat": Nat.UNKNOWN}, {"backend_ip", "backend_port", "ct_zone", "ct_id"}),
        ({"nat_source": NatSource.NULL}, {"nat_source", "ct_zone", "ct_id"}),
        ({"result": RESULT_OPEN}, {"result"}),
    ],
)
def test_null_where_it_is_not_known(change: dict[str, object], null: set[str]) -> None:
    usual, changed = row_of(), row_of(**change)
    assert {name for name in changed if changed[name] is None and usual[name] is not None} == null


@pytest.mark.parametrize(
    ("what", "sent"),
    [
        ({"protocol": 17}, 1000 - 10 * 28),
        ({"protocol": 17, "role": Role.FORWARDED}, 1000 - 10 * 28),
        ({"protocol": 17, "flags": sum(Flag) & ~Flag.IPV4}, 1000 - 10 * 48),
        ({"role": Role.FORWARDED}, None),
        ({"protocol": 132, "role": Role.FORWARDED}, None),
    ],
)
def test_what_conntrack_counted_has_headers(what: dict[str, int], sent: int | None) -> None:
    """A datagram has 20 (IPv6: 40) bytes of IP header and 8 of UDP; a TCP segment's options are not known."""
    row = row_of(bytes_sent=1000, packets_sent=10, **what)
    assert (row["bytes_sent"], row["ip_bytes_sent"], row["packets_sent"]) == (sent, 1000, 10)
    assert row["retransmits"] is None


def test_an_accepting_socket_is_where_the_connection_went() -> None:
    row = row_of(role=Role.SERVER, nat=Nat.UNKNOWN)
    assert (row["nat"], row["backend_ip"], row["backend_port"]) == ("unknown", "10.0.1.9", 8443)


def test_zero_is_not_null() -> None:
    assert row_of(bytes_sent=0, retransmits=0, connect_latency_us=0)["bytes_sent"] == 0
    assert row_of(connect_latency_us=0)["connect_latency_us"] == 0


@pytest.mark.parametrize(
    ("nat", "name", "has_snat"), [(1, "none", False), (4, "snat", True), (6, "dnat+snat", True), (3, "unknown", False)]
)
def test_nat(nat: int, name: str, has_snat: bool) -> None:
    row = row_of(nat=nat, snat=v6("::ffff:192.0.2.1"), snat_port=61000)
    assert row["nat"] == name
    assert (row["snat_ip"], row["snat_port"]) == (("192.0.2.1", 61000) if has_snat else (None, None))


def test_ipv6_and_ipv4_share_a_column() -> None:
    made = table(np.concatenate([record(dst=v6("2001:db8::5")), record()]), "n", CLOCK)
    assert made["dst_ip"].to_pylist() == ["2001:db8::5", "10.96.0.1"]


@given(st.binary(min_size=16, max_size=16))
def test_address_text(raw: bytes) -> None:
    address = ipaddress.IPv6Address(raw)
    assert ipaddress.ip_address(address_text(raw)) == (address.ipv4_mapped or address)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"nginx\0garbage", "nginx"),
        (b"a\x1b[31m\n", "a\\x1b[31m\\n"),
        ("r\u202egpj".encode(), "r\\u202egpj"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"", ""),
    ],
)
def test_comm_text(raw: bytes, text: str) -> None:
    assert comm_text(raw.ljust(16, b"\0")) == text


def test_comms_that_read_the_same_are_one_category() -> None:
    made = table(np.concatenate([record(comm=b"a\0x"), record(comm=b"a\0y"), record(comm=b"b")]), "n", CLOCK)
    column = made["comm"].combine_chunks()
    assert column.to_pylist() == ["a", "a", "b"]
    assert sorted(column.dictionary.to_pylist()) == ["a", "b"]


def test_dictionaries_hold_only_what_is_there() -> None:
    """A null row's address must not show up as a category."""
    made = table(np.concatenate([record(nat=0, backend=v6("2001:db8::bad")), record()]), "n", CLOCK)
    assert made["backend_ip"].combine_chunks().dictionary.to_pylist() == ["10.0.1.9"]


@given(st.lists(st.integers(0, 10**7), min_size=2, max_size=20), st.integers(0, 10**18))
def test_intervals_sum_without_drift(lengths: list[int], start: int) -> None:
    ends = start + np.cumsum(np.array(lengths, dtype=np.uint64))
    records = np.repeat(record(), len(lengths))
    records["ts"], records["duration_ns"] = ends, lengths
    total = sum(table(records, "n", CLOCK)["duration_us"].to_pylist())
    assert total == int(ends[-1]) // 1000 - start // 1000


def test_the_table_does_not_share_the_records_memory() -> None:
    records = record()
    made = table(records, "n", CLOCK)
    records[:] = np.zeros(1, dtype=RECORD)
    [row] = made.select(["conn_id", "src_port", "src_ip"]).to_pylist()
    assert row == {"conn_id": 11, "src_port": 40001, "src_ip": "10.0.0.7"}


def test_no_records() -> None:
    assert table(np.zeros(0, dtype=RECORD), "n", CLOCK).num_rows == 0


@given(st.binary(min_size=RECORD.itemsize, max_size=RECORD.itemsize * 12))
def test_any_bytes_make_a_valid_table(data: bytes) -> None:
    records = np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], dtype=RECORD)
    made = table(records, "n", CLOCK)
    made.validate(full=True)
    for field in made.schema:
        assert field.nullable or made[field.name].null_count == 0, field.name
    for raw, row in zip(records, made.drop_columns(["ts", "started"]).to_pylist(), strict=True):
        unknown = row["nat"] == "unknown"
        assert (row["backend_ip"] is None) == (row["backend_port"] is None) == (unknown and raw["role"] != Role.SERVER)
        assert (row["snat_ip"] is None) == (row["snat_port"] is None) == ("snat" not in row["nat"])
        counted, protocol = raw["flags"] & Flag.COUNTED, raw["tuple"]["protocol"]
        of_socket = raw["role"] != Role.FORWARDED and protocol == 6
        assert (row["bytes_sent"] is None) == (not counted or not (of_socket or protocol == 17))
        assert (row["ip_bytes_sent"] is None) == (not counted or of_socket)
        assert (row["packets_sent"] is None) == (not counted)
        assert (row["comm"] is None) == (row["pid"] is None) == (not raw["flags"] & Flag.PROCESS)
        assert (row["ct_id"] is None) == (unknown or raw["nat_source"] == NatSource.NULL or not raw["ct_id"])
