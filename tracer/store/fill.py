"""Names for rows that were written without: a published file is replaced by one in which nulls were filled.

Only what is null is filled, and never with a name that contradicts one that is there. The file is whole at every
moment: the new one takes its name by a rename.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tracer import schema
from tracer.errors import TracerError
from tracer.record import NAT_NAMES, PROTOCOL_NAMES, RECORD, ROLE_NAMES
from tracer.store import layout, reader
from tracer.store.inventory import stamp_of
from tracer.store.names import COLUMNS, Coded, column
from tracer.store.parquet import UnpublishedFile

#: Which columns are filled together, and by which of them it is told whether a name is there.
GROUPS = {
    "src_pod": ("src_namespace", "src_workload"),
    "dst_service": ("dst_namespace", "dst_service_port"),
    "backend_pod": ("backend_workload", "backend_node", "backend_zone"),
}

Namer = Callable[[np.ndarray, npt.NDArray[np.int64]], Mapping[str, Coded]]


@dataclasses.dataclass
class Filled:
    """What was done: rows, and of each name column how many had a value before and how many have one now."""

    rows: int = 0
    before: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(COLUMNS, 0))
    after: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(COLUMNS, 0))

    def add(self, other: "Filled") -> None:
        """Counts another file in."""
        self.rows += other.rows
        for name in COLUMNS:
            self.before[name] += other.before[name]
            self.after[name] += other.after[name]


def fill(path: Path, name: Namer, address_bytes: Callable[[str], bytes | None]) -> Filled:
    """Fills the names of one published connections file; a file that gains none is left as it is.

    `name` gives the name columns of records, each as of a time (ns since the epoch); `address_bytes` reads an address.
    Of a file that expires before it is replaced nothing is counted.

    Raises:
        TracerError: the file cannot be read, or its directory cannot be written; the file is as before.
    """
    try:
        stamp = stamp_of(path.lstat())
        return _fill(path, stamp, name, address_bytes)
    except (TracerError, FileNotFoundError):
        if path.exists():
            raise
        return Filled()


def _fill(path: Path, stamp: str, name: Namer, address_bytes: Callable[[str], bytes | None]) -> Filled:
    counts, tables = Filled(), []
    for batch in reader.batches(path):
        records = _records(batch, address_bytes)
        known = _starts(batch)
        names = {key: column(texts) for key, texts in name(records, known).items()}
        table = _merged(batch, names)
        counts.rows += batch.num_rows
        for each in COLUMNS:
            counts.before[each] += batch.num_rows - batch.column(each).null_count
            counts.after[each] += table.num_rows - table.column(each).null_count
        tables.append(table)
    if counts.after != counts.before:
        _replace(path, stamp, tables)
    return counts


def _replace(path: Path, stamp: str, tables: list[pa.Table]) -> None:
    def unchanged() -> None:
        if stamp_of(path.lstat()) != stamp:
            raise TracerError(f"{path} was replaced while its rows were named; name it again")

    metadata = reader.metadata(path)
    file = None
    try:
        file = UnpublishedFile(path.parent, layout.half_named(), tables[0].schema)
        for table in tables:
            file.write(table)
        file.publish(path.name, metadata, unchanged)
    except (OSError, pa.ArrowException, TracerError) as error:
        if file is not None:
            file.discard()
        if isinstance(error, TracerError):
            raise
        raise TracerError(f"cannot replace {path}: {error}; make its directory writable, and name it again") from error


def _records(batch: pa.RecordBatch, address_bytes: Callable[[str], bytes | None]) -> np.ndarray:
    """What naming wants to know of rows, as records: addresses, ports, protocol, translation and role."""
    records = np.zeros(batch.num_rows, dtype=RECORD)
    raw = records.view(np.uint8).reshape(batch.num_rows, RECORD.itemsize)
    tuple_at = RECORD.fields["tuple"][1]  # type: ignore[index]
    places = {"src_ip": tuple_at, "dst_ip": tuple_at + 16, "backend_ip": RECORD.fields["backend"][1]}  # type: ignore[index]
    for name, at in places.items():
        codes, texts = _codes(batch.column(name))
        table = np.zeros((len(texts) + 1, 16), dtype=np.uint8)
        for place, text in enumerate(texts):
            table[place] = np.frombuffer(address_bytes(text) or bytes(16), dtype=np.uint8)
        raw[:, at : at + 16] = table[codes]
    for name, values in (("protocol", PROTOCOL_NAMES), ("nat", NAT_NAMES), ("role", ROLE_NAMES)):
        codes, texts = _codes(batch.column(name))
        number_of = {text: number for number, text in values.items()}
        numbers = np.array([number_of.get(text, 0) for text in texts] + [0], dtype=np.uint8)
        target = records["tuple"] if name == "protocol" else records
        target[name] = numbers[codes]
    records["tuple"]["dst_port"] = batch.column("dst_port").to_numpy(zero_copy_only=False)
    records["backend_port"] = batch.column("backend_port").fill_null(0).to_numpy(zero_copy_only=False)
    return records


def _codes(values: pa.Array) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Codes and texts of a dictionary array; null is the code after the last text."""
    texts = values.dictionary.to_pylist()
    return values.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False), texts


def _starts(batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """When each connection began, or where that is not known its row, in ns since the epoch (n,)."""
    begun = pc.subtract(
        batch.column("ts").cast(pa.int64()), pc.multiply(batch.column("duration_us").cast(pa.int64()), 1000)
    )
    return np.asarray(pc.coalesce(batch.column("started").cast(pa.int64()), begun).to_numpy(zero_copy_only=False))


def _merged(batch: pa.RecordBatch, names: Mapping[str, pa.Array]) -> pa.Table:
    columns = {field.name: batch.column(field.name) for field in batch.schema}
    plain = {name: columns[name].cast(pa.string()) for name in COLUMNS}
    found = {name: names[name].cast(pa.string()) for name in COLUMNS}
    for key, others in GROUPS.items():
        agrees = pc.fill_null(pc.equal(plain[key], found[key]), False)
        # No key on either side: what is known beside it (a node without a pod) may still be filled.
        may = pc.or_(pc.is_null(plain[key]), agrees)
        for name in (key, *others):
            filled = pc.coalesce(plain[name], pc.if_else(may, found[name], pa.scalar(None, pa.string())))
            columns[name] = filled.dictionary_encode().cast(schema.DICT)
    return pa.Table.from_arrays([columns[field.name] for field in batch.schema], schema=batch.schema)
