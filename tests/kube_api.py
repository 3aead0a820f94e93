"""A server that speaks the API's list and watch over real HTTP, from objects that tests change, with faults on order.

Keeps an event log with resource versions as the API server does: a list says which version it is of, a watch goes on
from one, versions before `compact` are gone. Every request is noted in `requests`.
"""

import contextlib
import json
import re
import socket
import ssl
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tracer.naming.api import PATHS

Raw = dict[str, Any]
#: What a fault does instead of the answer, or before it; it returns whether the answer is still to come.
Fault = Callable[["_Handler"], bool]


class KubeApi:
    """The server; `start` and `stop` it."""

    def __init__(
        self,
        token: str | None = None,
        tls: tuple[Path, Path] | None = None,
        bookmark_s: float = 0.2,
        rules: list[Raw] | None = None,
    ) -> None:
        self.token, self.bookmark_s = token, bookmark_s
        #: What everybody may do, as the rules of a ClusterRole; None: everything.
        self.rules = rules
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        #: Faults for the next requests, by kind and verb ("list", "watch").
        self.faults: dict[tuple[str, str], deque[Fault]] = defaultdict(deque)
        self.changed = threading.Condition()
        self.objects: dict[str, dict[tuple[str, str], Raw]] = {kind: {} for kind in PATHS}
        self.log: list[tuple[int, str, str, Raw]] = []
        self.version, self.compacted, self.stopping = 100, 0, False
        #: How many items a page has, whatever is asked for; a list of version 0 is whole, as from the watch cache.
        self.page: int | None = None
        self.connections: set[socket.socket] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads = True
        self._http.api = self  # type: ignore[attr-defined]
        self.scheme = "http"
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
            self.scheme = "https"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the server, with the connections that stand."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        self._http.shutdown()
        self.cut()
        self._http.server_close()

    def cut(self) -> None:
        """Breaks all connections."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def kubeconfig(self, path: Path, ca: Path | None = None, **user: Any) -> Path:
        """Writes a kubeconfig for it (JSON is YAML)."""
        cluster = {"server": f"{self.scheme}://127.0.0.1:{self.port}"}
        cluster |= {"certificate-authority": str(ca)} if ca else {}
        said = {"token": self.token} if self.token and not user else user
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "me", "user": said}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "me"}}],
        }
        path.write_text(json.dumps(content), encoding="ascii")
        return path

    def set(self, kind: str, *objects: Raw) -> None:
        """Adds or changes objects."""
        for item in objects:
            self._log(kind, "MODIFIED" if _key(item) in self.objects[kind] else "ADDED", item)

    def delete(self, kind: str, namespace: str, name: str) -> None:
        self._log(kind, "DELETED", self.objects[kind][namespace, name])

    def compact(self) -> None:
        """Forgets all versions so far: who goes on from one of them must list anew."""
        with self.changed:
            self.version += 1
            self.compacted = self.version

    def asked(self, kind: str, verb: str) -> list[dict[str, str]]:
        """The parameters of the requests so far."""
        return [parameters for k, v, parameters in self.requests if (k, v) == (kind, verb)]

    def _log(self, kind: str, event: str, item: Raw) -> None:
        with self.changed:
            self.version += 1
            stamped = json.loads(json.dumps(item))
            stamped["metadata"]["resourceVersion"] = str(self.version)
            if event == "DELETED":
                del self.objects[kind][_key(item)]
            else:
                self.objects[kind][_key(item)] = stamped
            self.log.append((self.version, kind, event, stamped))
            self.changed.notify_all()


def _key(item: Raw) -> tuple[str, str]:
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 60

    def setup(self) -> None:
        super().setup()
        self.api.connections.add(self.connection)

    def finish(self) -> None:
        self.api.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()

    @property
    def api(self) -> KubeApi:
        return self.server.api  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.parameters = {name: values[-1] for name, values in parse_qs(url.query).items()}
        kind = next((kind for kind, path in PATHS.items() if path == url.path), None)
        if kind is None:
            self.answer(404, {"kind": "Status", "code": 404})
            return
        self.kind = kind
        verb = "watch" if self.parameters.get("watch") == "true" else "list"
        # Taken before the request can be seen: a fault that is ordered afterwards is for the next one.
        faults = self.api.faults[kind, verb]
        fault = faults.popleft() if faults else None
        self.api.requests.append((kind, verb, self.parameters))
        if self.api.token and self.headers.get("Authorization") != f"Bearer {self.api.token}":
            self.answer(401, {"kind": "Status", "code": 401})
            return
        if not self._allowed(url.path, verb):
            self.answer(403, {"kind": "Status", "code": 403, "reason": "Forbidden"})
            return
        if fault is not None and not fault(self):
            return
        if verb == "list":
            self._list()
        else:
            self._watch()

    def _allowed(self, path: str, verb: str) -> bool:
        group = path.split("/")[2] if path.startswith("/apis/") else ""
        return self.api.rules is None or any(
            group in rule["apiGroups"] and self.kind in rule["resources"] and verb in rule["verbs"]
            for rule in self.api.rules
        )

    def answer(self, code: int, body: Any, **headers: str) -> None:
        """A whole answer: JSON, or bytes as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)

    def _wanted(self, item: Raw) -> bool:
        match = re.fullmatch(r"spec\.nodeName=(.+)", self.parameters.get("fieldSelector", ""))
        return match is None or item["spec"].get("nodeName") == match[1]

    def _list(self) -> None:
        api = self.api
        with api.changed:
            version, found = api.version, [item for item in api.objects[self.kind].values() if self._wanted(item)]
        first = 0
        if "continue" in self.parameters:
            first, version = map(int, self.parameters["continue"].split("@"))
            if version < api.compacted:
                self.answer(410, {"kind": "Status", "code": 410, "reason": "Expired"})
                return
        size = len(found)
        if self.parameters.get("resourceVersion") != "0" and "limit" in self.parameters:
            size = min(int(self.parameters["limit"]), api.page or size)
        metadata = {"resourceVersion": str(version)}
        if first + size < len(found):
            metadata["continue"] = f"{first + size}@{version}"
        self.answer(200, {"kind": "List", "metadata": metadata, "items": found[first : first + size]})

    def _watch(self) -> None:
        since = int(self.parameters["resourceVersion"])
        if since < self.api.compacted:
            self.begin()
            self.event("ERROR", {"kind": "Status", "code": 410, "metadata": {}})
            self.end()
            return
        self.begin()
        end = time.monotonic() + float(self.parameters["timeoutSeconds"])
        api = self.api
        while not api.stopping and time.monotonic() < end:
            with api.changed:
                new = [entry for entry in api.log if entry[0] > since]
                if not new:
                    api.changed.wait(api.bookmark_s)
                    new = [entry for entry in api.log if entry[0] > since]
                now = api.version
            for version, kind, event, item in new:
                if kind == self.kind and self._wanted(item):
                    self.event(event, item)
                since = version
            if not new:
                self.event("BOOKMARK", {"kind": "x", "metadata": {"resourceVersion": str(now)}})
        self.end()

    def begin(self) -> None:
        """The head of a watch's answer."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def event(self, kind: str, item: Raw) -> None:
        """A line of a watch."""
        self.chunk(json.dumps({"type": kind, "object": item}).encode() + b"\n")

    def chunk(self, raw: bytes) -> None:
        """Bytes of a watch."""
        self.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
        self.wfile.flush()

    def end(self) -> None:
        """The orderly end of a watch."""
        self.wfile.write(b"0\r\n\r\n")


def refuse(code: int, **headers: str) -> Fault:
    """An answer with this status."""

    def fault(handler: _Handler) -> bool:
        handler.answer(code, {"kind": "Status", "code": code}, **headers)
        return False

    return fault


def body(raw: bytes) -> Fault:
    """A good status, and these bytes."""

    def fault(handler: _Handler) -> bool:
        handler.answer(200, raw)
        return False

    return fault


def lines(*chunks: bytes, cut: bool = False) -> Fault:
    """A watch of these bytes, which then ends, or breaks off."""

    def fault(handler: _Handler) -> bool:
        handler.begin()
        for raw in chunks:
            handler.chunk(raw)
        if cut:
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            handler.end()
        return False

    return fault


def slow(seconds: float) -> Fault:
    """The answer, late."""

    def fault(_: _Handler) -> bool:
        time.sleep(seconds)
        return True

    return fault


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[KubeApi]:
    """A running server."""
    api = KubeApi(**options)
    api.start()
    try:
        yield api
    finally:
        api.stop()
