"""The HTTP server: its pages and nothing else, and no client that keeps the others out."""

import contextlib
import http.client
import resource
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from agent_world import until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tracer.errors import TracerError, UsageError
from tracer.operations import server as module
from tracer.operations.server import Page, Server, bind, parse_address, sentence

LARGE = b"x" * 3_000_000


def broken() -> Page:
    raise ValueError("a defect")


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:

        def start(address: str = "127.0.0.1", **more: Callable[[], Page]) -> Server:
            pages = {"/hello": lambda: sentence(200, "hello"), "/not": lambda: sentence(503, "not now"),
                     "/large": lambda: Page(200, LARGE), "/broken": broken, **more}  # fmt: skip
            made = Server(bind(address, 0), pages)
            stack.callback(made.close)
            return made

        yield start


def connect(server: Server) -> socket.socket:
    host, _, port = server.address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=20)


def talk(server: Server, request: bytes) -> bytes:
    """All that comes back for these bytes, until the server ends it."""
    with connect(server) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(1 << 20), b""))


def get(server: Server, path: str, method: str = "GET") -> tuple[int, bytes]:
    client = http.client.HTTPConnection(*server.address.rsplit(":", 1), timeout=20)
    with contextlib.closing(client):
        client.request(method, path)
        answer = client.getresponse()
        return answer.status, answer.read()


def test_pages(serve: Callable[..., Server]) -> None:
    server = serve()
    assert get(server, "/hello") == (200, b"hello\n")
    assert get(server, "/hello?x=1") == (200, b"hello\n")
    assert get(server, "/hello", "HEAD") == (200, b"")
    assert get(server, "/not") == (503, b"not now\n")
    assert get(server, "/large") == (200, LARGE)


@pytest.mark.parametrize("path", ["/", "/hello/", "/hello/..", "//hello", "/%68ello", "/<script>", "/metrics"])
def test_no_other_path_and_nothing_of_it_in_the_answer(path: str, serve: Callable[..., Server]) -> None:
    assert get(serve(), path) == (404, b"There is no such page.\n")


def test_other_methods(serve: Callable[..., Server]) -> None:
    server = serve()
    for method in ("POST", "DELETE", "OPTIONS"):
        assert get(server, "/hello", method) == (405, b"Only GET and HEAD.\n")


def test_a_page_that_fails_is_no_end(serve: Callable[..., Server], caplog: pytest.LogCaptureFixture) -> None:
    server = serve()
    status, body = get(server, "/broken")
    assert status == 500
    assert b"defect" not in body
    assert "a page could not be made" in caplog.text
    assert get(server, "/hello")[0] == 200


def test_an_answer_comes_through_although_the_client_sends_on(serve: Callable[..., Server]) -> None:
    server = serve()
    assert talk(server, b"GET /hello HTTP/1.1\r\n\r\n" + b"more" * 10_000).endswith(b"hello\n")
    assert talk(server, b"GET /hello HTTP/1.1\r\nX: " + b"x" * 50_000).startswith(b"HTTP/1.1 431 ")


def test_a_client_that_only_waits_is_cut_off(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS", 2.0)
    server = serve()
    with connect(server) as silent, connect(server) as slow:
        slow.sendall(b"GET /hello HTTP/1.1\r\n")
        assert silent.recv(1) == slow.recv(1) == b""


def test_a_client_that_does_not_read_is_cut_off(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS", 2.0)
    server = serve(**{"/huge": lambda: Page(200, LARGE * 10)})
    with connect(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(b"GET /huge HTTP/1.1\r\n\r\n")
        until(lambda: server._connections, "the connection")
        # Nothing of it was read, and it is more than the buffers of both ends hold: it ends before all was sent.
        until(lambda: not server._connections, "its end")


def test_many_that_hold_connections_keep_nobody_out(serve: Callable[..., Server]) -> None:
    """With more idle ones than there is room for, a request is answered all the same; and they are bounded."""
    server = serve()
    with contextlib.ExitStack() as stack:
        for _ in range(3 * module.MAX_CONNECTIONS):
            stack.enter_context(connect(server))
        assert get(server, "/hello") == (200, b"hello\n")
        assert len(server._connections) <= module.MAX_CONNECTIONS


def test_without_descriptors_it_waits_and_goes_on(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)
    server = serve()
    host, _, port = server.address.rpartition(":")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as client:
        client.settimeout(20)
        resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno(), before[1]))
        try:
            client.connect((host, int(port)))
            until(lambda: "cannot accept a connection" in caplog.text, "the refusal")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        client.sendall(b"GET /hello HTTP/1.1\r\n\r\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")


def test_closing_ends_its_thread_and_its_connections(serve: Callable[..., Server]) -> None:
    server = serve()
    with connect(server) as idle:
        assert get(server, "/hello")[0] == 200
        server.close()
        server.close()
        assert idle.recv(1) == b""
    assert not [thread for thread in threading.enumerate() if thread.name == "vip-tracer-http"]
    with pytest.raises(ConnectionRefusedError):
        connect(server)


@pytest.mark.needs("ipv6")
def test_ipv6(serve: Callable[..., Server]) -> None:
    server = serve("::1")
    assert server.address.startswith("[::1]:")
    assert talk(server, b"GET /hello HTTP/1.0\r\n\r\n").endswith(b"hello\n")


@pytest.fixture(scope="module")
def one() -> Iterator[Server]:
    made = Server(bind("127.0.0.1", 0), {"/hello": lambda: sentence(200, "hello")})
    yield made
    made.close()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=6000), st.builds(
    lambda method, path, version, rest: b" ".join((method, path, version)) + rest,
    st.sampled_from([b"GET", b"HEAD", b"get", b"GET\0", b""]), st.binary(max_size=40).map(lambda raw: b"/" + raw),
    st.sampled_from([b"HTTP/1.1", b"HTTP/2.0", b""]),
    st.sampled_from([b"\r\n\r\n", b"\n\n", b"\r\nA:b\r\n\r\n", b"\r\n"]),
)))  # fmt: skip
def test_whatever_is_sent_is_answered_or_ended(one: Server, request_: bytes) -> None:
    with connect(one) as client:
        client.sendall(request_)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert answer == b"" or answer.split(b" ")[1] in (b"200", b"400", b"404", b"405", b"431")
    assert talk(one, b"GET /hello HTTP/1.1\r\n\r\n").endswith(b"hello\n")


@pytest.mark.parametrize(
    ("text", "meant"),
    [("127.0.0.1:9464", ("127.0.0.1", 9464)), ("0.0.0.0:0", ("0.0.0.0", 0)), ("[::]:65535", ("::", 65535)),
     ("[::1]:80", ("::1", 80)), (" [FE80::1%lo]:80 ", ("fe80::1%lo", 80))],
)  # fmt: skip
def test_addresses(text: str, meant: tuple[str, int]) -> None:
    assert parse_address(text) == meant


@pytest.mark.parametrize(
    "text", ["", "9464", ":9464", "::1:9464", "[::1]", "[127.0.0.1]:80", "localhost:80", "1.2.3.4:65536", "1.2.3.4:-1",
             "1.2.3.4:", "1.2.3.999:80", "1.2.3.4:80/x", "[::1]:80]", "٣.2.3.4:80", "http://1.2.3.4:80"]
)  # fmt: skip
def test_what_is_no_address_is_a_sentence(text: str) -> None:
    with pytest.raises(UsageError, match="is no address to listen on: write it as"):
        parse_address(text)


def test_an_address_that_is_not_to_be_had_is_a_sentence() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(TracerError, match=r"Address already in use.*--listen"):
        bind(*taken.getsockname())
    with pytest.raises(TracerError, match=r"192\.0\.2\.1:80 \(Cannot assign requested address\)"):
        bind("192.0.2.1", 80)
