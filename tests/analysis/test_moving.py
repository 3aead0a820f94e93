"""The moving window: what is in it, what has left it, and shares against endpoints."""

import pyarrow as pa
from analysis.test_endpoint_table import told
from command_world import rows

from tracer.analysis.moving import Window

S = 10**9


def at(table: pa.Table, ts_ns: int, backend: str) -> pa.Table:
    """The rows ending at one moment, at one backend, having lasted a second."""
    n = len(table)
    changed = {"ts": pa.array([ts_ns] * n), "backend_ip": pa.array([backend] * n).dictionary_encode(),
               "duration_us": pa.array([1_000_000] * n), "bytes_sent": pa.array([100] * n),
               "bytes_received": pa.array([0] * n)}  # fmt: skip
    for name, values in changed.items():
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, values.cast(field.type))
    return table


def test_rates_over_the_window_and_what_has_left_it() -> None:
    window = Window(10.0)
    window.add(at(rows(30), 5 * S, "10.0.0.1"))
    window.add(at(rows(50), 12 * S, "10.0.0.1"))
    window.add(at(rows(10), 13 * S, "10.0.0.2"))
    window.add(rows(0))
    (load,) = window.loads(14 * S)
    assert (load.connections_s, load.bytes_s, load.failures_s, load.open) == (9.0, 900.0, 0.0, 9.0)
    assert load.backends["backend"].tolist() == ["10.0.0.1:8080", "10.0.0.2:8080"]
    assert load.backends["connections_s"].tolist() == [8.0, 1.0]
    assert not load.fair
    (load,) = window.loads(16 * S)  # (6, 16]
    assert load.connections_s == 6.0
    assert window.loads(23 * S) == []
    assert window.loads(99 * S) == []


def test_fair_shares_are_of_endpoints_where_they_are_known() -> None:
    window = Window(10.0)
    table = at(rows(40), 12 * S, "10.0.0.1")
    window.add(table)
    where = {"virtual_ips": table["dst_ip"][0].as_py(), "dst_port": table["dst_port"][0].as_py()}
    ends = told(*({"started": 0, "ts": 20 * S, "backend_ip": ip} | where for ip in ("10.0.0.1", "10.0.0.9")))
    (load,) = window.loads(14 * S, [ends])
    assert load.service == f"shop/web:{where['dst_port']}/tcp"
    assert load.fair
    assert dict(zip(load.backends["ip"], load.backends["fair_share"], strict=True)) == {
        "10.0.0.1": 0.5,
        "10.0.0.9": 0.5,
    }
