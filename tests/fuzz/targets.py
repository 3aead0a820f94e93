"""What the tracer parses and did not write, each as one function of bytes: it may refuse in a sentence, and no more.

A target raises TracerError (or BadParameter) or nothing; anything else is a finding. `seeds` are samples of what
it is for; hypothesis damages them in `make test` (test_targets.py), atheris follows the branches in `make fuzz`
(__main__.py), and what either found stays in corpus/<target>/.
"""

import contextlib
import functools
import json
import os
import queue
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernel"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "naming"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "store"))

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner

from tracer import schema
from tracer.clock import WallClock
from tracer.errors import TracerError
from tracer.record import RECORD, TUPLE

CORPUS = Path(__file__).resolve().parent / "corpus"
REFUSALS = (TracerError, click.BadParameter)


@dataclass(frozen=True)
class Target:
    """`parse` takes any bytes; `slow`: some milliseconds each, so that it gets fewer examples in `make test`."""

    parse: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    slow: bool = False

    def __call__(self, data: bytes) -> None:
        """Parses, and lets no refusal out."""
        with contextlib.suppress(*REFUSALS):
            self.parse(data)


def kept(name: str) -> list[bytes]:
    """The corpus in the tree."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]


@functools.cache
def _scratch() -> Path:
    made = tempfile.TemporaryDirectory(prefix="vip-tracer-fuzz-")
    _scratch.kept = made  # type: ignore[attr-defined]  until the process ends
    return Path(made.name)


def _file(name: str, data: bytes) -> Path:
    path = _scratch() / f"{os.getpid()}-{name}"
    path.write_bytes(data)
    return path


# -- the kernel's answers ---------------------------------------------------------------------------------------------


def _btf(data: bytes) -> None:
    from tracer.kernel import btf

    btf.defines(_file("btf", data))


def _btf_seeds() -> list[bytes]:
    from test_btf import kernel

    return [kernel().bytes(), kernel(flag="SOCK_DEAD2").bytes()]


def _conntrack(data: bytes) -> None:
    from tracer.kernel import conntrack

    conntrack.decode(data, 1)
    conntrack._last(data)


def _conntrack_seeds() -> list[bytes]:
    import random

    from conntrack_messages import DONE, any_entry, encode

    chance = random.Random(1)
    entries = [any_entry(chance) for _ in range(8)]
    whole = [entry.message([encode(entry.nodes())]) for entry in entries]
    return [*whole[:4], b"".join(whole) + DONE]


def _sockets(data: bytes) -> None:
    from tracer.kernel import sockets

    sockets.decode(data)


def _sockets_seeds() -> list[bytes]:
    from test_sockets import DONE, message

    return [message() + message(10, extra=b"abcde") + DONE, message(99), DONE[:-4] + b"\xfe\xff\xff\xff"]


def _bridges(data: bytes) -> None:
    from tracer.kernel import bridges

    for _, _, _, body in bridges.messages(data):
        with contextlib.suppress(TracerError):
            bridges.bridge(body)
        with contextlib.suppress(TracerError):
            bridges.subnet(body, frozenset({1, 7}))


def _bridges_seeds() -> list[bytes]:
    from tracer.kernel import bridges

    address = bridges._ADDRESS.pack(2, 24, 0, 0, 7) + bridges._attribute(1, bytes([10, 0, 0, 1]))
    link = bridges._LINK.pack(0, 1, 7, 0, 0) + bridges._attribute(
        18, bridges._attribute(1, b"bridge\0") + bridges._attribute(2, bridges._attribute(36, b"\1"))
    )
    return [bridges._HEADER.pack(16 + len(body), 16, 0, 1, 0) + body for body in (address, link)]


# -- the ring ---------------------------------------------------------------------------------------------------------


def _ring(data: bytes) -> None:
    """The positions, and what lies between them."""
    from tracer.kernel.ring import Ring

    size = 4096
    head = data[:16].ljust(16, b"\0")
    consumer, producer = (np.array([position & ~7], np.uint64) for position in struct.unpack("<QQ", head))
    producer[0] = consumer[0] + producer[0] % (size + 8)
    area = np.frombuffer(data[16 : 16 + size].ljust(size, b"\0"), np.uint8)
    Ring.over(consumer, producer, np.concatenate((area, area)), RECORD, size).drain()


def _ring_seeds() -> list[bytes]:
    record = struct.pack("<II", RECORD.itemsize, 0) + np.ones(1, RECORD).tobytes()
    return [struct.pack("<QQ", 0, 3 * len(record)) + record * 3, struct.pack("<QQ", 4000, len(record)) + record * 20]


def _records(data: bytes) -> None:
    """Records of any content: made into flows, a table, and a row on the screen."""
    from tracer.cli import lines
    from tracer.kernel.flows import Flows
    from tracer.store.columns import table

    whole = data[: len(data) // RECORD.itemsize * RECORD.itemsize]
    flows = Flows(1, 10**9)
    records = flows.settle(np.frombuffer(whole, RECORD).copy())
    flows.release(1 << 62, lambda key, ct_id: True)
    made = table(records, "node-1", WallClock(0, 10**18))
    made.validate(full=True)
    for row in lines.rows_of(made.to_batches()[0]) if len(made) else []:
        assert lines.line(row, wide=True).isprintable()


def _records_seeds() -> list[bytes]:
    from store_world import make_records

    plain = make_records(2)
    flow = make_records(1)
    flow["role"], flow["tuple"]["protocol"], flow["flags"] = 1, 17, 0x8E
    return [plain.tobytes(), flow.tobytes()]


def _flows(data: bytes) -> None:
    """Dumped entries of any content, with any translations, looked at twice; then gone."""
    from tracer.kernel.conntrack import ENTRY
    from tracer.kernel.flows import Flows
    from tracer.kernel.maps import OWNER, TRANSLATION

    size = ENTRY.itemsize + TRANSLATION.itemsize + OWNER.itemsize
    count = min(len(data) // size, 16)
    entries = np.frombuffer(data[: count * ENTRY.itemsize], ENTRY).copy()
    rest = data[count * ENTRY.itemsize :]
    values = np.frombuffer(rest[: count * TRANSLATION.itemsize], TRANSLATION).copy()
    owners = np.frombuffer(rest[count * TRANSLATION.itemsize :][: count * OWNER.itemsize], OWNER).copy()
    flows = Flows(1, 10**9)
    for now in (10**12, 2 * 10**12):
        flows.look(entries, values, owners, now, flush=now > 10**12)
    flows.vanish(entries["key"], values, owners, 3 * 10**12)


def _flows_seeds() -> list[bytes]:
    from tracer.kernel.conntrack import ENTRY
    from tracer.kernel.maps import OWNER, TRANSLATION

    values = np.zeros(2, TRANSLATION)
    values["ct_id"] = (1, 2)
    return [np.zeros(2, ENTRY).tobytes() + values.tobytes() + np.zeros(2, OWNER).tobytes()]


def _ledger(data: bytes) -> None:
    """Both sides of the ledger, of any content."""
    from tracer.kernel import conntrack, ledger, sockets
    from tracer.kernel.maps import CONNECTION, TRANSLATION

    def some(kind: np.dtype) -> np.ndarray:  # type: ignore[type-arg]
        nonlocal data
        count = min(len(data) // kind.itemsize, 3)
        part, data = data[: count * kind.itemsize], data[count * kind.itemsize :]
        return np.frombuffer(part, kind).copy()

    connections, entries = some(CONNECTION), some(conntrack.ENTRY)
    listed, values, keys = some(sockets.SOCKET), some(TRANSLATION), some(TUPLE)
    count = min(len(keys), len(values))
    left_out = np.zeros(len(listed), np.bool_)
    view = ledger.View(entries, True, listed, left_out, frozenset({7}), keys[:count], values[:count], connections)
    look = ledger.compare(view, ledger.Traced(loopback=bool(len(data) % 2), servers=False))
    agreement = ledger.persisting(look, look)
    assert all(agreement.agreeing(account) >= 0 for account in ledger.Account), agreement


def _ledger_seeds() -> list[bytes]:
    from tracer.kernel.conntrack import ENTRY
    from tracer.kernel.maps import CONNECTION

    return [np.ones(3, CONNECTION).tobytes() + np.ones(3, ENTRY).tobytes() + bytes(900)]


# -- the cluster ------------------------------------------------------------------------------------------------------


def _objects(data: bytes) -> None:
    from tracer.naming.objects import KINDS, read

    with contextlib.suppress(ValueError, RecursionError):  # no JSON: the client's business
        item = json.loads(data)
        for kind in KINDS:
            read(kind, item)


def _objects_seeds() -> list[bytes]:
    from naming_world import sample

    kinds = ("services", "endpointslices", "nodes", "pods")
    return [json.dumps(item).encode() for kind in kinds for item in sample(kind)[:2]]


def _watch(data: bytes) -> None:
    """Lines of a watch, and what the book makes of them."""
    from tracer.naming import watch
    from tracer.naming.api import ApiError
    from tracer.naming.book import Book
    from tracer.naming.objects import KINDS

    for kind in KINDS:
        heard: queue.Queue[watch.Change] = queue.Queue()
        follower = watch._Follower(kind, None, heard, threading.Event(), {})  # type: ignore[arg-type]
        for line in data.split(b"\n"):
            with contextlib.suppress(ApiError):
                follower._line(line)
        book = Book()
        book.apply([heard.get_nowait() for _ in range(heard.qsize())])


def _watch_seeds() -> list[bytes]:
    return [b'{"type":"ADDED","object":%b}\n{"type":"DELETED","object":%b}' % (each, each) for each in _objects_seeds()]


def _snapshot(data: bytes) -> None:
    from tracer.naming import snapshot

    snapshot.load(_file("names.json", data))


def _snapshot_seeds() -> list[bytes]:
    from naming_world import NOON, book, nodes, service, slice_  # small, so that damage meets what matters

    from tracer.naming import snapshot

    known = book(nodes())
    from naming_world import Heard, endpoint

    known.apply([Heard("services", "all", [service("web", "10.96.0.9")]),
                 Heard("endpointslices", "all", [slice_("web-1", endpoint("10.244.2.1", "web-1"))])])  # fmt: skip
    path = _scratch() / "seed.json"
    snapshot.save(known, path, NOON)
    return [path.read_bytes()]


def _cgroups(data: bytes) -> None:
    from tracer.naming.cgroups import parse

    parse(data.decode(errors="surrogateescape"))


def _cgroups_seeds() -> list[bytes]:
    uid = "8a1f6a8e-6a5c-4b0e-9d3b-1d2c3e4f5a6b"
    return [
        f"/kubepods/burstable/pod{uid}/{'a' * 64}".encode(),
        f"/kubepods.slice/kubepods-pod{uid.replace('-', '_')}.slice/cri-containerd-{'b' * 64}.scope".encode(),
    ]


# -- datasets ---------------------------------------------------------------------------------------------------------


def _root(data: bytes, place: str = "connections") -> Path:
    from tracer.store import layout

    root = _scratch() / f"{os.getpid()}-dataset"
    where = layout.partition(root, place, 495_972)
    where.mkdir(parents=True, exist_ok=True)
    (where / "node-1-20260731T115900.000000Z-0123456789ab.1.parquet").write_bytes(data)
    return root


def _commands(root: Path) -> None:
    """Every command that reads a dataset says something sensible, or refuses in a sentence."""
    from tracer.cli import main

    names = _scratch() / "seed.json"
    if not names.exists():
        _snapshot_seeds()
    for arguments in (
        ["observe", str(root), "-n", "3"],
        ["report", str(root), "-o", "json"],
        ["name", str(root), "--snapshot", str(names)],
        ["top", str(root), "-n", "1", "--refresh", "100ms"],
    ):
        done = CliRunner().invoke(main, arguments)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code in (0, 1, 2, 3), (arguments, done.exit_code)


def _parquet(data: bytes) -> None:
    """A file of any bytes, in the place of each table."""
    from tracer.store import merge, reader, renamed, retention
    from tracer.store.inventory import Entry

    path = _file("any.parquet", data)
    with contextlib.suppress(TracerError):
        reader.metadata(path)
    with contextlib.suppress(TracerError):
        merge.origins(path)
    with contextlib.suppress(TracerError):
        renamed.write(path, path.with_name("renamed"), "ecs")
    retention.rows_of(Entry(0, "", "connections", path, "", 0, ""))
    with contextlib.suppress(TracerError):
        for table in schema.TABLES:
            for batch in reader.batches(path, table):
                batch.validate(full=True)


def _parquet_seeds() -> list[bytes]:
    from command_world import rows

    sink = pa.BufferOutputStream()
    pq.write_table(rows(2).select(["node", "ts", "conn_id", "backend_ip"]), sink, compression="none")
    return [sink.getvalue().to_pybytes()]


#: What another program may have made of a column.
_KINDS = (
    None, pa.int64(), pa.string(), pa.float64(), pa.bool_(), pa.binary(), pa.timestamp("s"), pa.list_(pa.int32()),
    pa.dictionary(pa.int8(), pa.string()), pa.null(), pa.decimal128(20, 2), pa.uint64(),
)  # fmt: skip


def _foreign(data: bytes) -> None:
    """A dataset of another program's: each byte changes one column of a real one, in type, in nulls, or away."""
    from command_world import rows

    made = rows(3)
    coverage = bool(data[:1] > b"\xf0")
    for place, choice in enumerate(data[1 : 1 + made.num_columns]):
        name = made.schema.names[place % made.num_columns]
        kind = _KINDS[choice % len(_KINDS)]
        if choice >= 3 * len(_KINDS):
            continue  # as it is
        column = made[name]
        if choice >= 2 * len(_KINDS):
            column = pa.chunked_array([pa.nulls(3, column.type)])
        elif kind is not None:
            with contextlib.suppress(pa.ArrowException):
                text = column.cast(pa.string()) if kind in (pa.string(), pa.binary()) else column
                column = text.cast(kind)
            if column.type != kind:
                column = pa.chunked_array([pa.nulls(3, kind)])
        made = made.set_column(made.schema.get_field_index(name), pa.field(name, column.type), column)
    about = {b"losses": data[-8:], b"node": data[-4:], data[-2:]: b"\xff"} if len(data) % 3 == 0 else None
    sink = pa.BufferOutputStream()
    with contextlib.suppress(pa.ArrowException):  # what Parquet cannot hold
        pq.write_table(made.replace_schema_metadata(about), sink)
        root = _root(sink.getvalue().to_pybytes())
        if coverage:
            _root(sink.getvalue().to_pybytes(), "coverage")
        else:
            for path in root.glob("coverage/**/*.parquet"):
                path.unlink()
        _commands(root)


def _foreign_seeds() -> list[bytes]:
    whole = b"\xff" * 46
    return [whole, b"\xff\xff\x02" + whole, whole[:20] + b"\x19" * 20, b"\xfa" + whole, b"\0" * 46]


# -- the command line -------------------------------------------------------------------------------------------------

_OPTIONS = (
    "interval", "netns", "only_netns", "ignore_netns", "roles", "exclude_cidr", "connect_probe", "max_connections",
    "max_translations", "ring_bytes", "node", "rotate", "rotate_bytes", "duration", "name_wait", "cache", "loopback",
)  # fmt: skip


def _options(data: bytes) -> None:
    """Every option and its variable, with any value: a value, or exit code 2 and a sentence."""
    from tracer.cli import main, options

    text = data[1:].decode(errors="surrogateescape").replace("\0", "")
    for kind in (options.duration, options.moment, options.size, options.ring_size, options.node_name, options.roles,
                 options.cidr):  # fmt: skip
        with contextlib.suppress(click.BadParameter):
            kind(text)
    option = _OPTIONS[(data[:1] or b"\0")[0] % len(_OPTIONS)]
    context = click.Context(main.commands["agent"], info_name="agent")
    flag = next((one for one in main.commands["agent"].params if one.name == option), None)
    if isinstance(flag, click.Option):
        with contextlib.suppress(click.UsageError):
            flag.type_cast_value(context, [text] if flag.multiple else text)
    if text.isascii():  # what an environment can hold; the namespace cannot be, so that nothing starts
        done = CliRunner().invoke(
            main,
            ["agent", "--output", "/dev/null/x", "--netns", "/dev/null"],
            env={f"VIP_TRACER_AGENT_{option.upper()}": text},
        )
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code in (1, 2), (option, text, done.output)


def _options_seeds() -> list[bytes]:
    texts = (
        "60s",
        "500ms",
        "64MiB",
        "client,server",
        "10.0.0.0/8",
        "fd00::/8",
        "2026-07-31T11:59:00Z",
        "node-1",
        "auto",
    )
    return [bytes([number]) + text.encode() for number, text in enumerate(texts)]


TARGETS: dict[str, Target] = {
    "btf": Target(_btf, _btf_seeds),
    "conntrack": Target(_conntrack, _conntrack_seeds),
    "sockets": Target(_sockets, _sockets_seeds),
    "bridges": Target(_bridges, _bridges_seeds),
    "ring": Target(_ring, _ring_seeds),
    "records": Target(_records, _records_seeds),
    "flows": Target(_flows, _flows_seeds),
    "ledger": Target(_ledger, _ledger_seeds),
    "objects": Target(_objects, _objects_seeds),
    "watch": Target(_watch, _watch_seeds),
    "snapshot": Target(_snapshot, _snapshot_seeds),
    "cgroups": Target(_cgroups, _cgroups_seeds),
    "parquet": Target(_parquet, _parquet_seeds),
    "foreign": Target(_foreign, _foreign_seeds, slow=True),
    "options": Target(_options, _options_seeds, slow=True),
}


def examples(name: str) -> Iterator[bytes]:
    """Seeds and corpus of a target."""
    yield from TARGETS[name].seeds()
    yield from kept(name)
