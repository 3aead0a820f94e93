"""What is published is found in the order of time; what is broken or foreign is named."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_world import EPOCH, RUN, make_records

from tracer import schema
from tracer.clock import WallClock
from tracer.errors import NoDataError, TracerError
from tracer.store import merge, reader, renamed, retention
from tracer.store.dataset import Dataset
from tracer.store.inventory import entry_of

HOUR = 3600 * 10**9


@pytest.fixture
def root(tmp_path, wall):
    """Two nodes; hours 11, 12 and 13; one file is still being written."""
    for node, first, at_s in (("b", 1, 0), ("a", 11, 10), ("b", 21, 3600), ("a", 31, 7200)):
        run = RUN.__class__(node, f"{first:012x}", "boot", "6.18")
        dataset = Dataset(tmp_path, run, wall, wall_ns=lambda: EPOCH)
        dataset.write(make_records(10, first=first, at_s=at_s))
        dataset.publish({})
    dataset.write(make_records(10, first=99))
    return tmp_path


def ids(batches) -> list[int]:
    return [i for batch in batches for i in batch["conn_id"].to_pylist()]


def test_rows_come_in_the_order_of_time(root) -> None:
    assert ids(reader.rows(root)) == [*range(1, 21), *range(21, 31), *range(31, 41)]
    assert len(list(reader.rows(root, "coverage"))) == 4


def test_hidden_and_foreign_names_are_not_seen(root) -> None:
    known = reader.files(root)
    for name in (".x.parquet", "_metadata.parquet", "notes.txt"):
        (known[0].parent / name).write_text("not a row")
    assert reader.files(root) == known


def test_what_cannot_be_listed_is_said_if_it_was_asked_for(root) -> None:
    known = reader.files(root)
    hour, date = known[-1].parent.with_name("hour=20"), known[-1].parents[1].with_name("date=2020-01-01")
    hour.symlink_to(hour)  # of itself
    assert len(reader.files(root, end_ns=EPOCH + HOUR)) < len(known)
    with pytest.raises(TracerError, match=f"cannot list {hour}: Too many levels.*; rows would be missing: try again"):
        reader.files(root)
    hour.unlink()
    date.symlink_to(date)
    with pytest.raises(TracerError, match=f"cannot list {date}: "):
        reader.files(root)
    date.unlink()
    date.symlink_to("nowhere")
    known[-1].parent.with_name("hour=21").write_text("no directory")
    assert reader.files(root) == known


def test_a_directory_that_is_exchanged_for_ever_is_not_waited_for(root, monkeypatch) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda one, other: False)
    with pytest.raises(TracerError, match="exchanged faster than it can be listed"):
        reader.files(root)


def test_hours_can_be_chosen(root) -> None:
    hours = [path.parts[-2] for path in reader.files(root, start_ns=EPOCH + HOUR, end_ns=EPOCH + HOUR + 1)]
    assert hours == ["hour=12"]
    assert [p.parts[-2] for p in reader.files(root, start_ns=EPOCH + HOUR)] == ["hour=12", "hour=13"]
    assert len(reader.files(root, end_ns=EPOCH // HOUR * HOUR + HOUR)) == 2


def test_only_the_columns_asked_for(root) -> None:
    [batch] = reader.batches(reader.files(root)[0], columns=["nat", "conn_id"])
    assert batch.schema.names == ["conn_id", "nat"]


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(NoDataError, match=r"no connections in .*missing; check the directory, or wait"):
        reader.files(tmp_path / "missing")


@pytest.mark.parametrize("keep", [0, 3, 2000])
def test_a_corrupt_file_is_named(root, keep: int) -> None:
    path = reader.files(root)[1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TracerError, match=f"cannot read {path}: .*; move the file out"):
        ids(reader.rows(root))
    with pytest.raises(TracerError, match=f"cannot read {path}"):
        reader.metadata(path)


def test_a_file_of_a_newer_version_is_read_by_name(root, wall: WallClock) -> None:
    old = pq.read_table(reader.files(root)[0])
    new = old.drop_columns(["ct_id", "backend_zone"]).append_column("new", pa.array(["x"] * 10))
    path = root / "connections/v2/date=2026-07-31/hour=14/c.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(new.select(sorted(new.column_names)).replace_schema_metadata(None), path, store_schema=False)
    assert reader.files(root)[-1] == path
    [batch] = reader.batches(path)
    assert batch.schema.equals(schema.arrow("connections"))
    assert ids([batch]) == list(range(1, 11))
    assert batch["ct_id"].null_count == batch["backend_zone"].null_count == 10
    assert batch["nat"].to_pylist() == ["none"] * 10


def test_a_file_without_a_necessary_column_is_named(root) -> None:
    path = reader.files(root)[0]
    pq.write_table(pa.table({"conn_id": [1]}), path)
    with pytest.raises(TracerError, match=f"{path} lacks the columns node, ts, "):
        ids(reader.batches(path))


def test_metadata(root) -> None:
    assert reader.metadata(reader.files(root)[0])["rows"] == "10"


def test_a_row_without_what_is_never_null_is_named(root) -> None:
    path = reader.files(root)[0]
    made = pq.read_table(path)
    place = made.schema.get_field_index("role")
    lacking = pa.array([None] * len(made), schema.DICT)
    pq.write_table(made.set_column(place, pa.field("role", schema.DICT), lacking), path)
    for read in (reader.batches, reader.tables):
        with pytest.raises(TracerError, match=f"{path} has rows without role; another program wrote it: move it out"):
            list(read(path))


def test_metadata_of_another_program_may_be_no_text(root) -> None:
    path = reader.files(root)[0]
    pq.write_table(pq.read_table(path).replace_schema_metadata({b"\xff": b"\xfe", b"node": b"n"}), path)
    assert reader.metadata(path)["node"] == "n"


def test_a_file_that_is_replaced_between_its_footer_and_its_rows_is_read_as_it_was(root, monkeypatch) -> None:
    """As `name` replaces files, by a rename."""
    path = reader.files(root)[0]
    expected = ids(reader.batches(path))
    read_metadata = pq.read_metadata

    def and_replace(*arguments: object, **options: object) -> pq.FileMetaData:
        found = read_metadata(*arguments, **options)
        new = path.with_name("new")
        table = pq.read_table(path)
        pq.write_table(pa.concat_tables([table] * 20), new, compression="none")
        new.rename(path)
        return found

    monkeypatch.setattr(pq, "read_metadata", and_replace)
    assert ids(reader.batches(path)) == expected
    monkeypatch.undo()
    assert len(ids(reader.batches(path))) == 20 * len(expected)


def test_metadata_that_is_no_text_or_says_nonsense(root, tmp_path) -> None:
    path = reader.files(root)[0]
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"node": b"n\xff", b"merged_from": b"?"}), path)
    entry = entry_of(path)
    assert entry is not None
    rows, about = retention.rows_of(entry)
    assert (rows, about["node"]) == (10, "n\ufffd")
    with pytest.raises(TracerError, match="does not tell what it was merged of"):
        merge.origins(path)
    fields = [field.with_metadata({b"ecs": b"\xff"}) for field in table.schema]
    pq.write_table(table.cast(pa.schema(fields)), path)
    with pytest.raises(TracerError, match="cannot read"):
        renamed.write(path, tmp_path / "renamed", "ecs")
