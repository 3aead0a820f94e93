"""One list and one watch per kind, whatever the server does in between; nothing missed, nothing asked too often."""

import contextlib
import json
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kube_api import KubeApi, body, lines, refuse, serving
from naming_world import SAMPLES, sample

from tracer.errors import UsageError
from tracer.naming import api as requests
from tracer.naming import watch as watching
from tracer.naming.api import ApiError
from tracer.naming.book import Book
from tracer.naming.objects import KINDS
from tracer.naming.watch import Watches


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of tests are short."""
    monkeypatch.setattr(watching, "FIRST_PAUSE_S", 0.02)


@pytest.fixture
def server() -> Iterator[KubeApi]:
    with serving() as api:
        for kind in KINDS:
            api.set(kind, *sample(kind))
        yield api


class Heard:
    """Watches, and a book that hears them."""

    def __init__(self, config: Path | None, node: str | None = None) -> None:
        self.watches, self.book = Watches(config, node), Book()
        self.watches.start()

    def until(self, condition: Callable[[], Any], seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while True:
            self.book.apply(self.watches.changes())
            if condition():
                return
            assert time.monotonic() < end, self.watches.state()
            time.sleep(0.01)

    def synced(self) -> None:
        self.until(lambda: len(self.book.synced) == len(KINDS))


@pytest.fixture
def hear(tmp_path: Path) -> Iterator[Callable[..., Heard]]:
    started = []

    def start(server: KubeApi, node: str | None = None, **user: Any) -> Heard:
        started.append(Heard(server.kubeconfig(tmp_path / "kubeconfig", **user), node))
        return started[-1]

    yield start
    for heard in started:
        heard.watches.stop()
        for follower in heard.watches._followers.values():
            follower.join(20)  # `stop` leaves those that take longer to end by themselves
        assert not [follower for follower in heard.watches._followers.values() if follower.is_alive()]


def names(heard: Heard, kind: str) -> set[tuple[str, str]]:
    return set(heard.book.living(kind))


def truth(server: KubeApi, kind: str) -> set[tuple[str, str]]:
    return set(server.objects[kind])


def new(kind: str, name: str) -> dict[str, Any]:
    """Another object like the first of its kind."""
    made = dict(sample(kind)[0])
    made["metadata"] = dict(made["metadata"]) | {"name": name, "uid": f"uid-{name}"}
    return made


def test_one_list_and_one_watch_for_each_kind(server, hear) -> None:
    heard = hear(server)
    heard.synced()
    heard.until(lambda: all(server.asked(kind, "watch") for kind in KINDS))
    server.set("services", new("services", "added"))
    heard.until(lambda: "added" in {name for _, name in heard.book.services})
    namespace = sample("services")[0]["metadata"]["namespace"]
    server.delete("services", namespace, "added")
    heard.until(lambda: names(heard, "services") == truth(server, "services"))
    time.sleep(3 * server.bookmark_s)
    for kind in KINDS:
        assert names(heard, kind) == truth(server, kind)
        [listed] = server.asked(kind, "list")
        [watched] = server.asked(kind, "watch")
        assert listed["resourceVersion"] == "0"
        assert (watched["allowWatchBookmarks"], watched["resourceVersion"]) == ("true", str(server.version - 2))
        state = heard.watches.state()[kind]
        assert (state.synced, state.disconnected_ns, state.lists, state.errors) == (True, None, 1, 0)


def test_pods_of_the_node_only(server, hear) -> None:
    nodes = {item["spec"]["nodeName"] for item in sample("pods")}
    one = sorted(nodes)[0]
    assert len(nodes) > 1
    heard = hear(server, one)
    heard.synced()
    assert {pod.node for pod in heard.book.pods.values()} == {one}
    assert [asked["fieldSelector"] for asked in server.asked("pods", "list")] == [f"spec.nodeName={one}"]
    assert "fieldSelector" not in server.asked("services", "list")[0]


def test_a_watch_that_the_server_ends_goes_on_where_it_was(server, hear) -> None:
    heard = hear(server)
    heard.synced()
    heard.until(lambda: len(server.asked("nodes", "watch")) == 1)
    time.sleep(2 * server.bookmark_s)  # a bookmark told the newest version
    server.cut()
    server.set("services", new("services", "meanwhile"))
    heard.until(lambda: names(heard, "services") == truth(server, "services"))
    assert len(server.asked("services", "list")) == 1
    assert int(server.asked("services", "watch")[-1]["resourceVersion"]) >= server.version - 1
    assert heard.watches.state()["services"].disconnected_ns is None


@pytest.mark.parametrize("how", ["event", "status"])
def test_a_version_that_is_gone_is_listed_anew(server, hear, how) -> None:
    server.bookmark_s = 60  # none tells the version that `compact` makes
    heard = hear(server)
    heard.synced()
    heard.until(lambda: server.asked("services", "watch"))
    if how == "status":
        server.faults["services", "watch"].append(refuse(410))
    server.compact()
    namespace, name = next(iter(server.objects["services"]))
    del server.objects["services"][namespace, name]  # no event will ever tell
    server.cut()
    heard.until(lambda: names(heard, "services") == truth(server, "services"))
    state = heard.watches.state()["services"]
    assert state.expired >= 1
    assert "resourceVersion" not in server.asked("services", "list")[-1]  # not from a cache that may lag


@pytest.mark.parametrize(("code", "verb"), [(429, "list"), (503, "list"), (429, "watch")])
def test_a_busy_server_is_left_alone_for_as_long_as_it_says(server, hear, code, verb) -> None:
    server.faults["services", verb].append(refuse(code, Retry_After="1"))
    began = time.monotonic()
    heard = hear(server)
    heard.until(lambda: len(server.asked("services", verb)) == 2)
    assert time.monotonic() - began >= 1.0
    heard.synced()


def test_retry_after_is_a_number_or_a_date_and_bounded() -> None:
    when = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 27 < (requests._retry_after(when) or 0) <= 30
    said = [requests._retry_after(text) for text in ("7", "-3", "999999", "soon", "", None, "9" * 400)]
    assert said[:6] == [7, 0, requests.MAX_RETRY_AFTER_S, None, None, None]


@pytest.mark.parametrize(
    "garbage",
    [
        b'{"type":"ADDED","obj\x00\xff\n',
        b"[" * 100_000 + b"\n",
        b"null\n",
        b'{"type":"ADDED","object":7}\n',
        b"\xff\xfe\n",
    ],
    ids=["cut", "deep", "null", "number", "bytes"],
)
def test_garbage_in_a_watch_is_counted_and_the_watch_goes_on(server, hear, garbage) -> None:
    event = b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"%d"}}}\n' % server.version
    server.faults["services", "watch"].append(lines(event, garbage))
    heard = hear(server)
    heard.synced()
    server.set("services", new("services", "later"))
    heard.until(lambda: names(heard, "services") == truth(server, "services"))
    state = heard.watches.state()["services"]
    assert (state.malformed, state.lists) == (1, 1)


def test_garbage_again_and_again_leads_to_a_new_list(server, hear) -> None:
    server.faults["services", "watch"].extend([lines(b"x\n")] * 2)
    heard = hear(server)
    heard.until(lambda: heard.watches.state()["services"].lists == 3)
    server.set("services", new("services", "later"))
    heard.until(lambda: names(heard, "services") == truth(server, "services"))


#: JSON of any kind, and such as nearly is an event.
_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_OBJECT = st.fixed_dictionaries(
    {},
    optional={
        "metadata": st.fixed_dictionaries(
            {}, optional={"name": _ANY | st.just("a"), "namespace": _ANY, "resourceVersion": _ANY, "uid": _ANY}
        )
        | _ANY,
        "spec": _ANY,
        "status": _ANY,
        "code": _ANY,
        "endpoints": _ANY,
    },
)
_EVENT = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from([*watching._WHAT, "BOOKMARK", "X"]) | _ANY, "object": _OBJECT | _ANY}
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.binary(max_size=60) | (_EVENT | _ANY).map(json.dumps).map(str.encode), max_size=5),
)
def test_any_line_is_an_event_or_counted(kind, texts) -> None:
    """Straight to the one who reads lines: what is no event ends the watch with a sentence, and nothing else does."""
    heard: queue.Queue = queue.Queue()
    follower = watching._Follower(kind, None, heard, threading.Event(), {})
    for text in texts:
        with contextlib.suppress(ApiError):
            follower._line(text)
    state = follower.state
    assert state.malformed + state.events <= len(texts)
    assert heard.qsize() == state.events
    book = Book()
    book.apply([heard.get_nowait() for _ in range(heard.qsize())])


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=80)
    | _ANY.map(json.dumps).map(str.encode)
    | st.fixed_dictionaries({"items": _ANY, "metadata": _ANY}).map(json.dumps).map(str.encode)
)
def test_any_body_is_a_page_or_an_error(raw) -> None:
    try:
        page = msgspec.json.decode(raw, type=requests.Page)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return
    assert page.items is None or all(isinstance(item, msgspec.Raw) for item in page.items)


def test_a_line_in_pieces_and_one_that_breaks_off(server, hear) -> None:
    added = b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"%d"}}}\n' % server.version
    server.faults["pods", "watch"].append(lines(added[:20], added[20:], added[:30], cut=True))
    heard = hear(server)
    heard.until(lambda: len(server.asked("pods", "watch")) == 2)
    server.set("pods", new("pods", "later"))
    heard.until(lambda: names(heard, "pods") == truth(server, "pods"))
    state = heard.watches.state()["pods"]
    assert (state.lists, state.malformed) == (1, 0)


def test_a_line_without_end_is_not_swallowed(server, hear, monkeypatch) -> None:
    monkeypatch.setattr(requests, "MAX_LINE", 1000)
    server.faults["pods", "watch"].append(lines(*[b"x" * 600] * 3))
    heard = hear(server)
    heard.until(lambda: len(server.asked("pods", "watch")) == 2)
    assert "longer than" in (heard.watches.state()["pods"].last_error or "")


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"items":7}', b'{"items":[' + b"[" * 100_000, b"\xff"])
def test_a_list_that_is_none_is_asked_for_again(server, hear, raw) -> None:
    server.faults["nodes", "list"].append(body(raw))
    heard = hear(server)
    heard.synced()
    assert heard.watches.state()["nodes"].errors == 1


def test_objects_that_are_none_are_counted(server, hear) -> None:
    raw = b'{"metadata":{"resourceVersion":"%d"},"items":[7,null,{},{"metadata":{"name":["x"]}}]}' % server.version
    server.faults["services", "list"].append(body(raw))
    heard = hear(server)
    heard.synced()
    assert heard.watches.state()["services"].malformed == 4
    assert not heard.book.services


def test_pages_of_a_list_and_one_that_expires_on_the_way(server, hear) -> None:
    server.page = 2
    heard = hear(server)
    heard.synced()
    heard.until(lambda: server.asked("services", "watch"))
    server.faults["services", "watch"].append(refuse(410))
    server.faults["services", "list"].extend([lambda _: True, refuse(410)])
    server.cut()
    heard.until(lambda: len(server.asked("services", "list")) >= 4)
    server.set("services", new("services", "later"))
    heard.until(lambda: names(heard, "services") == truth(server, "services"))
    first, page, expired, whole = server.asked("services", "list")
    assert first["resourceVersion"] == "0"
    assert "limit" in page
    assert "continue" in expired
    assert "limit" not in whole


def test_a_slow_answer_holds_nobody_else_up(server, hear) -> None:
    go_on = threading.Event()
    server.faults["pods", "list"].append(lambda _: go_on.wait(20))
    heard = hear(server)
    heard.until(lambda: heard.book.synced == set(KINDS) - {"pods"})
    go_on.set()
    heard.synced()
    assert heard.watches.state()["pods"].lists == 1


def test_without_a_server_it_is_tried_again_and_said(tmp_path, hear, caplog) -> None:
    with serving() as server:
        config = server.kubeconfig(tmp_path / "other")
    heard = Heard(config)
    try:
        heard.until(lambda: all(state.errors > 2 for state in heard.watches.state().values()))
        for state in heard.watches.state().values():
            assert not state.synced
            assert state.disconnected_ns is not None
            assert "does not answer" in (state.last_error or "")
        assert len([record for record in caplog.records if "Names of services" in record.message]) == 1
    finally:
        heard.watches.stop()


def test_a_refused_kind_does_not_stop_the_others(server, hear) -> None:
    server.faults["pods", "list"].extend([refuse(403)] * 1000)
    heard = hear(server)
    heard.until(lambda: heard.book.synced == set(KINDS) - {"pods"})
    heard.until(lambda: heard.watches.state()["pods"].errors)
    assert "give this account list and watch on pods" in (heard.watches.state()["pods"].last_error or "")


def test_threads_wait_while_nobody_takes_what_they_heard(server, hear, monkeypatch) -> None:
    monkeypatch.setattr(watching, "MAX_WAITING", 4)
    heard = hear(server)
    heard.synced()
    for number in range(30):
        server.set("services", new("services", f"one-{number}"))
    end = time.monotonic() + 20
    while heard.watches._heard.qsize() < 4 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)  # in which a queue without a bound would go on growing
    assert heard.watches._heard.qsize() == 4
    heard.until(lambda: names(heard, "services") == truth(server, "services"))


def test_stop_does_not_wait_for_a_silent_watch(server, hear) -> None:
    server.bookmark_s = 60
    heard = hear(server)
    heard.synced()
    heard.until(lambda: all(server.asked(kind, "watch") for kind in KINDS))
    heard.watches.stop()
    for follower in heard.watches._followers.values():
        follower.join(20)
        assert not follower.is_alive(), "it waits for the server"


def stop_while_asked(server: KubeApi, hear: Callable[..., Heard], monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    """Stops while every kind waits for the answer to such a request, which comes afterwards."""
    monkeypatch.setattr(watching, "STOP_S", 0.0)
    stopped = threading.Event()
    for kind in KINDS:
        server.faults[kind, verb].append(lambda _: stopped.wait(20))
    heard = hear(server)
    heard.until(lambda: all(server.asked(kind, verb) for kind in KINDS))
    heard.watches.stop()
    stopped.set()
    for follower in heard.watches._followers.values():
        follower.join(20)
        assert not follower.is_alive(), "it waits for a server that has nothing to say"


def test_stop_while_the_watch_is_being_asked_for(server, hear, monkeypatch) -> None:
    server.bookmark_s = 60
    stop_while_asked(server, hear, monkeypatch, "watch")


def test_stop_during_the_list_asks_for_no_watch(server, hear, monkeypatch) -> None:
    stop_while_asked(server, hear, monkeypatch, "list")
    assert not [kind for kind in KINDS if server.asked(kind, "watch")]


def test_a_watch_may_be_silent_but_must_begin(server, hear, monkeypatch) -> None:
    monkeypatch.setattr(requests, "READ_S", 2.0)
    server.bookmark_s, over = 6.0, threading.Event()
    server.faults["pods", "watch"].append(lambda _: over.wait(20))
    heard = hear(server)
    heard.until(lambda: heard.watches.state()["pods"].errors)
    over.set()
    heard.until(lambda: heard.watches.state()["pods"].watches >= 2)
    time.sleep(1.0)
    state = heard.watches.state()["services"]
    assert (state.watches, state.errors) == (1, 0)


def test_what_a_socket_says_that_is_shut_down_under_a_reader_is_no_defect(server, hear, monkeypatch, caplog) -> None:
    stopped = threading.Event()

    def aborted(self: requests.Watch) -> Iterator[bytes]:
        assert stopped.wait(20)
        raise ValueError("Read on closed or unwrapped SSL socket.")

    monkeypatch.setattr(requests.Watch, "lines", aborted)
    heard = hear(server)
    heard.until(lambda: all(server.asked(kind, "watch") for kind in KINDS))
    heard.watches._stopped.set()
    stopped.set()
    heard.watches.stop()
    for follower in heard.watches._followers.values():
        follower.join(20)
    assert "failed and begins anew" not in caplog.text


def test_token_and_tls(tmp_path, hear) -> None:
    openssl = shutil.which("openssl")
    assert openssl, "install openssl"
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=api",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    with serving(token="s3cret", tls=(certificate, key)) as server:
        server.set("services", *sample("services"))
        for ca, token, synced in (
            (certificate, "s3cret", True),
            (certificate, "wrong", False),
            (None, "s3cret", False),
        ):
            heard = Heard(server.kubeconfig(tmp_path / "kubeconfig", ca, token=token))
            try:
                if synced:
                    heard.synced()
                    assert names(heard, "services") == truth(server, "services")
                else:
                    heard.until(lambda heard=heard: heard.watches.state()["services"].errors)
                    said = heard.watches.state()["services"].last_error or ""
                    assert "401" in said or "certificate" in said.lower()
            finally:
                heard.watches.stop()


def test_a_token_file_that_rotates(server, tmp_path, hear) -> None:
    token = tmp_path / "token"
    token.write_text("one")
    server.token = "one"
    heard = hear(server, tokenFile=str(token))
    heard.synced()
    token.write_text("two")
    server.token = "two"
    server.compact()
    server.cut()
    server.set("services", new("services", "later"))
    heard.until(lambda: names(heard, "services") == truth(server, "services"))


@pytest.mark.parametrize(
    "content",
    ["", "{", "7", "[]", "apiVersion: v1", "current-context: a\nclusters: []\ncontexts: []\nusers: []", "\x00",
     '{"current-context":"a","clusters":[],"contexts":[{"name":"a","context":{"cluster":"a"}}]}',
     '{"current-context":"a","clusters":[{"name":"a","cluster":{"server":7}}],"contexts":[]}'],
)  # fmt: skip
def test_a_kubeconfig_that_is_none_is_a_sentence(tmp_path, content) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"^The kubeconfig .* give a file with --kubeconfig that kubectl takes\.$"):
        Watches(path, None)


def test_outside_a_cluster_there_is_no_service_account(monkeypatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(UsageError, match="service account"):
        Watches(None, "node-1")


def test_samples_are_there() -> None:
    assert SAMPLES.is_dir()
