"""The schema is the contract, the page is the schema, and every column says what it is."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from tracer import schema

DICT, TIME = pa.dictionary(pa.int32(), pa.string()), pa.timestamp("ns", tz="UTC")
U16, U32, U64 = pa.uint16(), pa.uint32(), pa.uint64()

# Written down a second time on purpose: stored data depends on it. (name, type, nullable)
VERSION_1 = [
    ("node", DICT, False), ("ts", TIME, False), ("conn_id", U64, False), ("opened", pa.bool_(), False),
    ("closed", pa.bool_(), False), ("started", TIME, True), ("role", DICT, False), ("protocol", DICT, False),
    ("src_ip", DICT, False), ("src_port", U16, False), ("dst_ip", DICT, False), ("dst_port", U16, False),
    ("backend_ip", DICT, True), ("backend_port", U16, True), ("snat_ip", DICT, True), ("snat_port", U16, True),
    ("nat", DICT, False), ("nat_source", DICT, True), ("src_namespace", DICT, True), ("src_pod", DICT, True),
    ("src_workload", DICT, True), ("dst_namespace", DICT, True), ("dst_service", DICT, True),
    ("dst_service_port", DICT, True), ("backend_pod", DICT, True), ("backend_workload", DICT, True),
    ("backend_node", DICT, True), ("backend_zone", DICT, True), ("pid", U32, True), ("comm", DICT, True),
    ("cgroup_id", U64, True), ("netns", U32, True), ("result", DICT, True), ("connect_latency_us", U32, True),
    ("duration_us", U64, False), ("bytes_sent", U64, True), ("bytes_received", U64, True),
    ("packets_sent", U64, True), ("packets_received", U64, True), ("retransmits", U32, True), ("rtt_us", U32, True),
    ("ct_zone", U16, True), ("ct_id", U32, True),
]  # fmt: skip


def test_connections_are_those_of_version_1() -> None:
    assert schema.SCHEMA_VERSION == 1
    fields = [(f.name, f.type, f.nullable) for f in schema.arrow("connections")]
    assert fields[: len(VERSION_1)] == VERSION_1
    assert fields[len(VERSION_1) :] == [("ip_bytes_sent", pa.uint64(), True), ("ip_bytes_received", pa.uint64(), True)]


@pytest.mark.parametrize("table", schema.TABLES)
def test_every_column_is_described_once(table: str) -> None:
    fields = list(schema.arrow(table))
    assert len({field.name for field in fields}) == len(fields)
    for field in fields:
        assert field.metadata[b"description"]
        assert set(field.metadata) <= {b"description", b"unit", b"ecs", b"otel", b"ipfix"}


def test_names_in_other_standards() -> None:
    metadata = schema.arrow("connections").field("backend_ip").metadata
    assert metadata[b"ecs"] == b"destination.nat.ip"
    assert metadata[b"ipfix"] == b"postNATDestinationIPv4Address/postNATDestinationIPv6Address"
    assert b"otel" not in metadata


def test_every_measure_has_a_unit() -> None:
    for column in schema.CONNECTIONS:
        measure = column.name.startswith(("bytes_", "ip_bytes_", "packets_")) or column.name.endswith("_us")
        assert (column.unit is not None) == (measure or column.name in {"ts", "started", "retransmits"}), column.name


def test_page_is_generated() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "schema.md"
    assert page.read_text(encoding="utf-8") == schema.as_markdown(), (
        "docs/schema.md is stale: python -c 'from tracer import schema; print(schema.as_markdown(), end=\"\")'"
    )


def test_json_and_text_show_every_column() -> None:
    document = json.loads(schema.as_json())
    assert document["schema_version"] == 1
    for table, columns in schema.TABLES.items():
        names = [column.name for column in columns]
        assert [column["name"] for column in document["tables"][table]] == names
        assert [line.split()[0] for line in schema.as_table(table).splitlines()[1:]] == names
