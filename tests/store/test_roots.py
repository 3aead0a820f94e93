"""Datasets in an object store: a server that speaks S3, and addresses that carry secrets."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from command_world import dataset, rows
from moto.server import ThreadedMotoServer
from pyarrow import fs

from tracer.errors import NoDataError, TracerError, UsageError
from tracer.store import reader
from tracer.store.roots import Remote, root_of


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def address(endpoint: str, place: str) -> str:
    return f"s3://key:secret@{place}?endpoint_override={quote(endpoint, safe='')}&region=us-east-1"


def test_a_bucket_is_read_like_a_directory(endpoint: str, tmp_path: Path) -> None:
    dataset(tmp_path, rows(30), rows(20))
    s3 = fs.S3FileSystem(
        access_key="key", secret_key="secret", endpoint_override=endpoint, region="us-east-1",
        allow_bucket_creation=True,
    )  # fmt: skip
    s3.create_dir("metrics")
    fs.copy_files(str(tmp_path), "metrics/nodes", source_filesystem=fs.LocalFileSystem(), destination_filesystem=s3)
    for hidden in ("connections/v1/date=2026-07-31/hour=11/.x.parquet", "connections/v1/notes.parquet"):
        with s3.open_output_stream(f"metrics/nodes/{hidden}") as file:
            file.write(b"nonsense")
    root = root_of(address(endpoint, "metrics/nodes"))
    assert isinstance(root, Remote)
    here, there = reader.files(tmp_path), reader.files(root)
    assert [path.name for path in there] == [path.name for path in here]
    assert reader.span(root) == reader.span(tmp_path)
    for one, other in zip(here, there, strict=True):
        assert list(reader.tables(one)) == list(reader.tables(other))
        assert reader.metadata(one) == reader.metadata(other)
    with pytest.raises(NoDataError, match="no connections in s3://metrics/elsewhere; check the address"):
        reader.files(root_of(address(endpoint, "metrics/elsewhere")))
    with pytest.raises(NoDataError, match="no connections in s3://nobucket/nodes"):
        reader.files(root_of(address(endpoint, "nobucket/nodes")))


def test_secrets_are_in_no_message(endpoint: str) -> None:
    root = root_of(address("http://127.0.0.1:1", "metrics/nodes"))
    assert str(root) == "s3://metrics/nodes"
    with pytest.raises(TracerError, match="cannot list s3://metrics/nodes: ") as caught:
        reader.files(root)
    assert "secret" not in str(caught.value)
    with pytest.raises(UsageError, match="cannot be opened") as refused:
        root_of("nonsense://key:secret@metrics/nodes")
    assert "secret" not in str(refused.value)
    with pytest.raises(UsageError) as refused:
        root_of("s3://key:secret@metrics/nodes?nonsense=secret")
    assert "secret" not in str(refused.value)
