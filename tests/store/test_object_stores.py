"""Exporting to servers that speak the real protocols, past a network that cuts connections and answers with 500."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import object_stores
import pytest
from command_world import dataset, rows
from object_stores import BUCKET, Faults, Server

from tracer.errors import TracerError
from tracer.store import ledger, places, reader
from tracer.store.compact import Chosen, compact
from tracer.store.export import Exporter, Options, Passed, UnreachableError
from tracer.store.inventory import Inventory
from tracer.store.roots import root_of

HOUR = "connections/v1/date=2026-07-31/hour=11"

Export = Callable[..., Passed]


def _azure(directory: Path) -> AbstractContextManager[Server]:
    return object_stores.azure(directory)


MAKERS: dict[str, Callable[[Path], AbstractContextManager[Server]]] = {
    "s3": lambda _: object_stores.s3(),
    "gcs": lambda _: object_stores.gcs(),
    "azure": _azure,
}


AZURE = pytest.param("azure", marks=pytest.mark.needs("azurite"))
#: Google's emulator lets everybody in, and serves no reads from the middle of an object, such as a file's footer.
without_google = pytest.mark.parametrize("server", ["s3", AZURE], indirect=True)


@pytest.fixture(scope="module", params=["s3", "gcs", AZURE])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with MAKERS[request.param](tmp_path_factory.mktemp("server")) as made:
        yield made


def export(root: Path, address: str, waits_s: tuple[float, ...] = (0.0,) * 5) -> Passed:
    with ledger.opened(root, places.identity_of(address)) as entries:
        reach = partial(places.reached, address)
        return Exporter(root, reach, entries, Options(), waits_s=waits_s, sleep=lambda seconds: None).run()


def expected(root: Path) -> dict[str, str]:
    """Names and checksums of what is published."""
    entries = Inventory(root).entries()
    return {entry.name(root): hashlib.sha256(entry.path.read_bytes()).hexdigest() for entry in entries}


def there(server: Server, where: str) -> dict[str, str]:
    """The same of what is at the destination, markers left out."""
    names = [name for name in server.files(where) if "_SUCCESS" not in name]
    return {name: hashlib.sha256(server.read(f"{where}/{name}")).hexdigest() for name in names}


def test_every_file_is_there_once_with_its_marker(server: Server, tmp_path: Path) -> None:
    dataset(tmp_path, *(rows(10) for _ in range(4)))
    where = f"{BUCKET}/whole"
    done = export(tmp_path, server.place(where))
    assert (done.exported, done.found, done.failed, done.markers) == (4, 0, 0, 1)
    assert there(server, where) == expected(tmp_path)
    marker = json.loads(server.read(f"{where}/{HOUR}/_SUCCESS-node-1"))
    assert {f"{HOUR}/{name}": each["sha256"] for name, each in marker["files"].items()} == expected(tmp_path)
    assert export(tmp_path, server.place(where)) == Passed()


def test_a_lost_ledger_sends_nothing_twice(server: Server, tmp_path: Path) -> None:
    dataset(tmp_path, rows(10), rows(10))
    where = f"{BUCKET}/ledger"
    export(tmp_path, server.place(where))
    (tmp_path / ".export" / "ledger.db").write_bytes(b"garbage" * 1000)
    done = export(tmp_path, server.place(where))
    assert (done.exported, done.found) == (0, 2)
    assert there(server, where) == expected(tmp_path)


def test_a_network_that_fails_costs_time_and_nothing_else(server: Server, tmp_path: Path) -> None:
    dataset(tmp_path, *(rows(200) for _ in range(4)))
    where, said = f"{BUCKET}/faults", list[str]()
    with Faults(server.port, *server.faults) as faults:
        for _ in range(40):
            try:
                export(tmp_path, server.place(where, faults.port))
                break
            except UnreachableError as error:
                said.append(str(error))
        else:
            pytest.fail("it never came to an end")
        assert faults.did > 0
    assert not [each for each in said if "secret" in each or object_stores.AZURE_KEY in each]
    # By another port it is another place, of which the ledger knows nothing: all is compared, nothing sent.
    done = export(tmp_path, server.place(where))
    assert (done.exported, done.found) == (0, 4)
    assert there(server, where) == expected(tmp_path)


def test_a_bucket_that_is_not_there_is_a_sentence(server: Server, tmp_path: Path) -> None:
    dataset(tmp_path, rows(1))
    with pytest.raises(TracerError, match=r"bucket|address") as caught:
        export(tmp_path, server.place("nobucket/x"))
    assert "secret" not in str(caught.value)
    assert object_stores.AZURE_KEY not in str(caught.value)


@without_google
def test_wrong_credentials_are_a_sentence_and_right_ones_go_on(server: Server, tmp_path: Path) -> None:
    assert server.refusing is not None
    dataset(tmp_path, rows(1), rows(2))
    where = f"{BUCKET}/refused"
    with (
        server.refusing(where) as place,
        pytest.raises(TracerError, match="check the address, the credentials") as caught,
    ):
        export(tmp_path, place)
    assert "secret" not in str(caught.value)
    assert object_stores.WRONG_KEY not in str(caught.value)
    assert there(server, where) == {}
    assert export(tmp_path, server.place(where)).exported == 2
    assert there(server, where) == expected(tmp_path)


def test_what_is_exported_can_be_reported_on(server: Server, tmp_path: Path) -> None:
    dataset(tmp_path, rows(10), rows(20))
    where = f"{BUCKET}/read"
    export(tmp_path, server.place(where))
    root = root_of(server.place(where))
    found = reader.files(root)
    assert len(found) == 2
    if server.reads_within:
        assert sum(batch.num_rows for path in found for batch in reader.batches(path)) == 30


@without_google
def test_hours_are_compacted_beside_their_originals(server: Server, tmp_path: Path) -> None:
    here = tmp_path / "here"
    dataset(here, rows(10), rows(20))
    where = f"{BUCKET}/compacted-too"
    export(here, server.place(where))
    root = root_of(server.place(where))
    assert [(done.files, done.rows) for done in compact(root, Chosen(), pytest.fail)] == [(2, 30)]
    assert list(compact(root, Chosen(), pytest.fail)) == []
    (here / HOUR / "node-2-20260731T115900.000000Z-0123456789ab.1.parquet").write_bytes(
        (here / HOUR / "node-1-20260731T115900.000000Z-0123456789ab.0.parquet").read_bytes()
    )
    export(here, server.place(where))
    assert [(done.files, done.rows) for done in compact(root, Chosen(), pytest.fail)] == [(1, 40)]
    (merged,) = reader.files(root_of(server.place(f"{where}/compacted")))
    assert sum(batch.num_rows for batch in reader.batches(merged)) == 40
    assert len(reader.files(root)) == 3
