"""Servers that speak S3, Google's and Azure's protocols, and a proxy before them that fails as networks do."""

import contextlib
import dataclasses
import http.server
import random
import select
import shutil
import socket
import subprocess
import threading
import types
import unittest.mock
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pyarrow import fs

from tracer.lab.netns import wait_until

ROOT = Path(__file__).resolve().parents[1]
#: Where `make azurite` puts it.
AZURITE = ROOT / ".venv" / "azurite" / "node_modules" / ".bin" / "azurite-blob"
#: Azurite's own account, which is the same everywhere and no secret.
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
#: Another account's, so to say.
WRONG_KEY = "d3Jvbmc" * 12 + "d3I="
BUCKET = "metrics"
#: A network that fails drops a connection on which nothing comes for so long.
SILENT_S = 1.0


@dataclasses.dataclass(frozen=True)
class Server:
    """A server with an empty bucket `BUCKET`; `address` makes the address of a place in it, by way of a port.

    `refusing` makes the address of a place by which it lets nobody in, for as long as that is entered; None: it cannot.
    `reads_within`: it serves reads that begin in the middle of an object, which Google's emulator does not. `faults`:
    the share of connections that a network may fail, and how many at the most: clients of Google's and Azure's try
    again by themselves, some seconds apart, and Arrow has no option for that.
    """

    port: int
    address: Callable[[str, int], str]
    filesystem: Any
    refusing: Callable[[str], contextlib.AbstractContextManager[str]] | None = None
    reads_within: bool = True
    faults: tuple[float, int] = (0.25, 100)

    def place(self, where: str, port: int | None = None) -> str:
        return self.address(where, port or self.port)

    def files(self, prefix: str) -> dict[str, int]:
        """Names below a prefix, with sizes."""
        selector = fs.FileSelector(prefix, recursive=True, allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        return {each.path.removeprefix(f"{prefix}/"): each.size for each in found if each.type == fs.FileType.File}

    def read(self, path: str) -> bytes:
        with self.filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())


@contextlib.contextmanager
def s3() -> Iterator[Server]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    try:
        client = fs.S3FileSystem(
            access_key="key", secret_key="secret-of-mine", endpoint_override=f"http://127.0.0.1:{port}",
            region="us-east-1", allow_bucket_creation=True,
        )  # fmt: skip
        client.create_dir(BUCKET)
        yield Server(port, _s3_address, client, lambda where: _s3_refusing(where, port))
    finally:
        server.stop()


def _s3_address(where: str, port: int) -> str:
    endpoint = quote(f"http://127.0.0.1:{port}", safe="")
    return f"s3://key:secret-of-mine@{where}?endpoint_override={endpoint}&region=us-east-1"


@contextlib.contextmanager
def _s3_refusing(where: str, port: int) -> Iterator[str]:
    """moto looks at keys when it is told to, and then knows none."""

    def look_after(actions: str) -> None:
        address = f"http://127.0.0.1:{port}/moto-api/reset-auth"
        asked = urllib.request.Request(address, actions.encode(), {"Content-Type": "text/plain"}, method="POST")
        urllib.request.urlopen(asked).close()

    look_after("0")
    try:
        yield _s3_address(where, port)
    finally:
        look_after("inf")


@contextlib.contextmanager
def gcs() -> Iterator[Server]:
    from gcp_storage_emulator import server as emulator

    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    # By itself it serves one connection at a time, and Arrow holds several.
    threaded = types.SimpleNamespace(HTTPServer=http.server.ThreadingHTTPServer)
    with unittest.mock.patch.object(emulator, "server", threaded):
        server.start()
        wait_until(lambda: server._api._httpd is not None, "the emulator to listen")
    port = server._api._httpd.server_address[1]
    try:
        client, _ = fs.FileSystem.from_uri(_gcs_address(BUCKET, port))
        yield Server(port, _gcs_address, client, reads_within=False, faults=(1.0, 3))
    finally:
        server.stop()


def _gcs_address(where: str, port: int) -> str:
    endpoint = quote(f"127.0.0.1:{port}", safe="")
    return f"gs://anonymous@{where}?endpoint_override={endpoint}&scheme=http&retry_limit_seconds=0.5"


@contextlib.contextmanager
def azure(directory: Path) -> Iterator[Server]:
    with _azurite(directory) as port:
        own = f"127.0.0.1:{port}"
        client = fs.AzureFileSystem(
            AZURE_ACCOUNT, account_key=AZURE_KEY, blob_storage_authority=own, dfs_storage_authority=own,
            blob_storage_scheme="http", dfs_storage_scheme="http",
        )  # fmt: skip
        client.create_dir(BUCKET)
        yield Server(
            port,
            _azure_address,
            client,
            lambda where: contextlib.nullcontext(_azure_address(where, port, WRONG_KEY)),
            faults=(0.25, 3),
        )


@contextlib.contextmanager
def _azurite(directory: Path) -> Iterator[int]:
    """Azurite, and its port: one that is free, but which somebody else may take in the seconds until it listens."""
    said = directory / "azurite.log"
    for _ in range(5):
        port = free_port()
        command = [AZURITE, "--skipApiVersionCheck", "--inMemoryPersistence", "--blobHost", "127.0.0.1", "--blobPort",
                   str(port), "--disableProductStyleUrl", "--disableTelemetry"]  # fmt: skip
        with said.open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd=directory) as process:
            ended = process.poll
            try:
                wait_until(lambda: "listens" in said.read_text() or ended() is not None, "Azurite to listen", 90)  # noqa: B023
                if ended() is None:
                    yield port
                    return
            finally:
                process.kill()
    raise AssertionError(f"Azurite does not start: {said.read_text()}")


def _azure_address(where: str, port: int, key: str = AZURE_KEY) -> str:
    own = f"127.0.0.1:{port}"
    container, slash, path = where.partition("/")
    return (
        f"abfs://{AZURE_ACCOUNT}:{quote(key, safe='')}@{container}{slash}{path}"
        f"?blob_storage_authority={own}&dfs_storage_authority={own}&enable_tls=false"
    )


def azurite_lacks() -> str:
    """Why there is no Azurite; empty if there is."""
    if not shutil.which("node"):
        return "node is not installed"
    return "" if AZURITE.exists() else "Azurite is not installed: run `make azurite`"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Faults:
    """A proxy that cuts connections after some bytes, or answers them with 500, until it did so `most` times.

    `share` of the connections soon, the others after 120 KB. It cuts what is silent for a second, too, as Azure's
    client is when it was cut within an upload on a connection that it had used before: it sends only the rest again.
    """

    def __init__(self, target: int, share: float, most: int, seed: int = 7) -> None:
        self._target, self._random = target, random.Random(seed)
        self._share, self._most = share, most
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port, self.did = int(self._listener.getsockname()[1]), 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Faults":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.settimeout(SILENT_S)
                fault = self._random.random() < self._share
                kind = self._random.choice((self._refuse, self._pass)) if fault else self._pass
                limit = self._random.randrange(1, 20_000) if fault else 120_000
                threading.Thread(target=self._serve, args=(client, kind, limit), daemon=True).start()

    def _serve(self, client: socket.socket, kind: Callable[[socket.socket, int], None], limit: int) -> None:
        with contextlib.suppress(OSError), client:
            kind(client, limit)

    def _fails(self) -> bool:
        fails = self.did < self._most
        self.did += fails
        return fails

    def _refuse(self, client: socket.socket, limit: int) -> None:
        if self._fails():
            client.recv(65_536)
            client.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        else:
            self._pass(client, limit)

    def _pass(self, client: socket.socket, limit: int) -> None:
        with socket.create_connection(("127.0.0.1", self._target), timeout=SILENT_S) as server:
            other = {client: server, server: client}
            while ready := select.select(other, (), (), SILENT_S)[0]:
                for source in ready:
                    if not (data := source.recv(4096)):
                        return
                    other[source].sendall(data)
                    limit -= len(data)
                if limit <= 0 and self._fails():
                    return
