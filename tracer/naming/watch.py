"""Lists and watches of the cluster's objects: a thread for each kind, and what they heard, in order.

One list and one watch per kind: services, endpoint slices and nodes of the cluster, pods of one node. A watch that ends
goes on where it ended; only where the server no longer knows that state is everything listed anew. Without a server
the threads keep trying, ever more seldom. They reduce raw objects at once, and wait when nobody takes what they heard.
"""

import dataclasses
import logging
import queue
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tracer.naming.api import Api, ApiError, Event, ExpiredError, Watch
from tracer.naming.objects import KINDS, read

_log = logging.getLogger(__name__)

#: Objects of a page. The first list is answered from the server's cache, which may give all at once.
PAGE = 500
#: Changes that wait to be taken, of all kinds together; threads wait when there are more.
MAX_WAITING = 16_384
#: Seconds to the next attempt after a failure: doubled each time, and spread so that nodes do not come together.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
#: Seconds that `stop` waits for the threads: they are daemons, and a name server may hold one for longer.
STOP_S = 1.0

_WHAT = {"ADDED": "set", "MODIFIED": "set", "DELETED": "delete"}


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One thing heard, as `tracer.naming.book.Change` describes it."""

    kind: str
    what: str
    object: Any
    at_ns: int


@dataclasses.dataclass(slots=True)
class KindState:
    """How it stands with one kind; times in ns of the wall clock, counts since the start."""

    synced: bool = False
    disconnected_ns: int | None = None
    heard_ns: int | None = None
    malformed: int = 0
    lists: int = 0
    watches: int = 0
    events: int = 0
    expired: int = 0
    errors: int = 0
    last_error: str | None = None


class _Metadata(msgspec.Struct):
    resource_version: str | None = msgspec.field(default=None, name="resourceVersion")


class _Versioned(msgspec.Struct):
    """What of an event's object the watch itself needs; of a Status, its code."""

    metadata: _Metadata = msgspec.field(default_factory=_Metadata)
    code: int | None = None


class Watches:
    """What the API server of a kubeconfig (None: of this container's cluster) says, as changes.

    `node`: whose pods are wanted; None: those of all nodes.
    """

    def __init__(self, kubeconfig: Path | None, node: str | None) -> None:
        """Asks nothing yet. Raises UsageError if the configuration cannot be used."""
        self._api = Api(kubeconfig)
        self._stopped = threading.Event()
        self._heard: queue.Queue[Change] = queue.Queue(MAX_WAITING)
        self._followers = {
            kind: _Follower(kind, self._api, self._heard, self._stopped, _selector(kind, node)) for kind in KINDS
        }

    def start(self) -> None:
        """Begins to ask, in threads."""
        for follower in self._followers.values():
            follower.start()

    def stop(self) -> None:
        """Ends the threads, or leaves them to end by themselves after `STOP_S`."""
        self._stopped.set()
        for follower in self._followers.values():
            follower.abort()
        deadline = time.monotonic() + STOP_S
        for follower in self._followers.values():
            if follower.is_alive():
                follower.join(max(0.0, deadline - time.monotonic()))
        if not any(follower.is_alive() for follower in self._followers.values()):
            self._api.close()

    def changes(self) -> Sequence[Change]:
        """What was heard since the last call, in order; does not wait."""
        found = []
        for _ in range(self._heard.qsize()):
            try:
                found.append(self._heard.get_nowait())
            except queue.Empty:  # another reader was quicker
                break
        return found

    def state(self) -> dict[str, KindState]:
        """How it stands now, by kind."""
        return {kind: dataclasses.replace(follower.state) for kind, follower in self._followers.items()}


def _selector(kind: str, node: str | None) -> dict[str, str | int]:
    return {"fieldSelector": f"spec.nodeName={node}"} if kind == "pods" and node is not None else {}


class _Follower(threading.Thread):
    """Follows one kind."""

    def __init__(
        self,
        kind: str,
        api: Api,
        heard: "queue.Queue[Change]",
        stopped: threading.Event,
        selector: dict[str, str | int],
    ) -> None:
        super().__init__(name=f"vip-tracer-{kind}", daemon=True)
        self.state = KindState(disconnected_ns=time.time_ns())
        self._kind, self._api, self._heard, self._stopped, self._selector = kind, api, heard, stopped, selector
        # The state of the cluster that was heard of; None: list. "0" is the server's cache, "" the newest there is.
        self._version: str | None = None
        self._list_from = "0"
        self._watch: Watch | None = None
        # Whether the next list is to be asked for without pages.
        self._whole = False
        # Whether the watch brought anything since it was resumed, and failures since something last went well.
        self._progress = False
        self._failures = 0

    def run(self) -> None:
        """Lists and watches until it is stopped."""
        while not self._stopped.is_set():
            pause = 0.0
            try:
                if self._version is None:
                    self._list()
                self._follow()
            except ExpiredError as error:
                self.state.expired += 1
                pause = self._failed(error)
                self._version, self._list_from = None, ""
            except ApiError as error:
                pause = self._failed(error)
            except Exception as error:  # noqa: BLE001  a defect must not end the names of this kind for good, in silence
                if self._stopped.is_set():  # what a connection says whose socket was shut down under it
                    return
                _log.exception("the watch of %s failed and begins anew", self._kind)
                pause = self._failed(ApiError(f"The watch of {self._kind} failed: {error!r}"[:300]))
                self._version = None
            self._stopped.wait(pause)

    def abort(self) -> None:
        """Wakes the thread from a watch."""
        watch = self._watch
        if watch is not None:
            watch.abort()

    def _list(self) -> None:
        """Everything there is: one change."""
        self.state.lists += 1
        objects: list[Any] = []
        limit: dict[str, str | int] = {} if self._whole else {"limit": PAGE}
        parameters = self._selector | limit
        if self._list_from:
            parameters["resourceVersion"] = self._list_from
        while True:
            # Where the pages of one list expire before the last is there, all is asked for at once, as kubectl does.
            self._whole = "continue" in parameters
            page = self._api.page(self._kind, parameters)
            self._whole = False
            self._heard_now()
            for item in page.items or ():
                found = self._read(item)
                if found is not None:
                    objects.append(found)
            if not page.metadata.next or self._stopped.is_set():
                break
            parameters = self._selector | limit | {"continue": page.metadata.next}
        self._version = page.metadata.resource_version or ""
        self._put(Change(self._kind, "all", objects, time.time_ns()))
        self.state.synced = True
        self._went_well()

    def _follow(self) -> None:
        """What changes, until the watch ends: without an error, to be resumed at once."""
        if self._stopped.is_set():  # since the list
            return
        assert self._version is not None
        self.state.watches += 1
        self._progress = False
        began = time.monotonic()
        with self._api.watch(self._kind, self._selector | {"resourceVersion": self._version}) as watch:
            self._watch = watch
            self._heard_now()
            try:
                if self._stopped.is_set():  # while this was asked for: `abort` found no watch to wake the thread from
                    return
                for line in watch.lines():
                    if self._stopped.is_set():
                        return
                    self._line(line)
            finally:
                self._watch = None
        if not self._progress and time.monotonic() - began < 1.0:
            # A server that ends every watch at once would otherwise be asked without end.
            raise ApiError(f"The API server ends the watch of {self._kind} at once.")

    def _line(self, line: bytes) -> None:
        try:
            event = msgspec.json.decode(line, type=Event)
            about = msgspec.json.decode(event.object, type=_Versioned)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            self.state.malformed += 1
            if not self._progress:  # resumed, and again at once: that state cannot be followed
                self._version, self._list_from = None, ""
            raise ApiError(f"The API server's watch of {self._kind} has a line that is no event.") from error
        self._heard_now()
        if event.type == "ERROR":
            if about.code == 410:
                raise ExpiredError(f"The API server no longer has the state of {self._kind} that was watched (410).")
            raise ApiError(f"The API server ended the watch of {self._kind} with an error ({about.code}).")
        what = _WHAT.get(event.type)
        found = self._read(event.object) if what is not None else None
        if what is not None and found is not None:
            self.state.events += 1
            self._put(Change(self._kind, what, found, time.time_ns()))
        elif what is None and event.type != "BOOKMARK":
            self.state.malformed += 1
        if about.metadata.resource_version:
            self._version = about.metadata.resource_version
        self._went_well()
        self._progress = True

    def _read(self, item: msgspec.Raw) -> Any:
        """The reduced object; None, and counted, if it is none."""
        try:
            found = read(self._kind, msgspec.json.decode(item))
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            found = None
        self.state.malformed += found is None
        return found

    def _put(self, change: Change) -> None:
        while not self._stopped.is_set():
            try:
                self._heard.put(change, timeout=0.5)
            except queue.Full:
                continue
            return

    def _heard_now(self) -> None:
        self.state.heard_ns = time.time_ns()
        self.state.disconnected_ns = None

    def _went_well(self) -> None:
        if self._failures:
            _log.info("the API server is heard again for %s", self._kind)
        self._failures = 0

    def _failed(self, error: ApiError) -> float:
        """Takes note; returns how long to wait before the next attempt."""
        if self._stopped.is_set():
            return 0.0
        state, self._failures = self.state, self._failures + 1
        state.errors += 1
        state.last_error = str(error)
        if state.disconnected_ns is None:
            state.disconnected_ns = time.time_ns()
        if self._failures == 2:  # a single one is usual: servers restart, watches break
            _log.warning("%s Names of %s stay as they were; it is tried again.", error, self._kind)
        if error.retry_after_s is not None:
            return error.retry_after_s
        if self._failures == 1 and isinstance(error, ExpiredError):
            return 0.0
        pause = min(FIRST_PAUSE_S * 2.0 ** min(self._failures - 1, 16), LONGEST_PAUSE_S)
        return pause * random.uniform(0.5, 1.0)
