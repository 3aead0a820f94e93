"""Files that the agent published, put elsewhere: each once, verified, under its own name; and what is deleted then.

What is put is what was published, file by file, so that whatever interrupts it and however often, the same names come
about. A file that is replaced here (`vip-tracer name`) replaces its own there.
"""

import dataclasses
import io
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import pyarrow as pa

from tracer.errors import TracerError, UsageError
from tracer.store import layout, ledger, retention
from tracer.store.inventory import Entry, Inventory, stamp_of
from tracer.store.pace import WAITS_S, Pace, retried
from tracer.store.places import Content, Place, content_of

_log = logging.getLogger(__name__)

#: What stands before a node's name in the name of the marker of its closed hour.
MARKER = "_SUCCESS-"
#: Strangers that are named one by one; of more it is only said that there are.
_NAMED = 20
#: How long a pass goes on before it is seen again to what must be deleted.
_LOOK_S = 900.0
_MAGIC = b"PAR1"


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How: `standard` of the column names, when an hour is closed, and what is deleted here."""

    standard: str | None = None
    close_after_s: float = 900.0
    keep_s: float | None = None
    disk_budget: int | None = None


@dataclasses.dataclass
class Passed:
    """What one pass did: files put, found there already, failed here, left when it was stopped; markers put."""

    exported: int = 0
    bytes: int = 0
    found: int = 0
    failed: int = 0
    left: int = 0
    markers: int = 0
    expired: retention.Expired = dataclasses.field(default_factory=retention.Expired)


class Exporter:
    """Exports one dataset to one place, pass by pass. Within `ledger.opened`.

    `reach` gives the place, checked, or raises TracerError; it is asked in every pass until it does.
    """

    def __init__(
        self,
        root: Path,
        reach: Callable[[], Place],
        entries: ledger.Ledger,
        options: Options,
        pace: Pace | None = None,
        *,
        stopped: Callable[[], bool] = lambda: False,
        waits_s: Sequence[float] = WAITS_S,
        sleep: Callable[[float], object] = time.sleep,
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._reach, self._ledger, self._options = root, reach, entries, options
        self._reached: Place | None = None
        self._pace = pace or Pace()
        self._stopped, self._waits_s, self._sleep = stopped, waits_s, sleep
        self._wall_ns, self._monotonic = wall_ns, monotonic
        self._said: set[Path] = set()
        self._scratch = root / ledger.DIRECTORY / "renamed"

    def run(self) -> Passed:
        """One pass over all that is published: puts what is new, and deletes what may go.

        What is exported may go before the place is asked for. What is not may for the disk budget's sake alone, and
        only when the place had its chance: at the end, however that comes, and now and then in a pass that takes long.

        Raises:
            TracerError: the place cannot be reached, or refuses: what was put until then is recorded.
            UsageError: there can be no such place; nothing is deleted for it.
        """
        inventory = Inventory(self._root)
        done = Passed()
        try:
            self._say_strangers(inventory)
            self._expire(inventory, done, unexported=False)
            try:
                self._pass(inventory, done)
            except UsageError:
                raise
            except BaseException:
                self._expire(inventory, done)
                raise
            self._expire(inventory, done)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise TracerError(
                f"cannot go through {self._root}: {error.strerror or error}{where}; let this process read it"
            ) from error
        return done

    @property
    def _place(self) -> Place:
        if self._reached is None:
            self._reached = self._reach()
        return self._reached

    def _pass(self, inventory: Inventory, done: Passed) -> None:
        looked = self._monotonic()
        _ = self._place
        for directory in inventory.directories():
            self._hour(inventory, directory, done)
            if self._monotonic() - looked >= _LOOK_S:
                self._expire(inventory, done)
                looked = self._monotonic()

    def _hour(self, inventory: Inventory, directory: Path, done: Passed) -> None:
        name = directory.relative_to(self._root).as_posix()
        stamps = self._ledger.stamps(name)
        failed: set[str] = set()
        for entry in inventory.within(directory):
            if stamps.get(entry.path.name) == entry.stamp:
                continue
            if self._stopped():
                done.left += 1
                failed.add(entry.node)
            elif not self._file(entry, done):
                done.failed += 1
                failed.add(entry.node)
        closes = (layout.hour_of((*directory.parts, "")) + 1) * layout.HOUR_NS + self._options.close_after_s * 1e9
        if closes <= self._wall_ns() and not self._stopped():
            self._mark(name, stamps, failed, done)

    def _file(self, entry: Entry, done: Passed) -> bool:
        """Puts one file; false if it cannot be read here, which is said."""
        try:
            with entry.path.open("rb") as source:
                # As it is opened now: it may have been replaced since it was listed.
                stamp = stamp_of(os.fstat(source.fileno()))
                if not _is_whole(source):
                    raise TracerError(f"{entry.path} is no Parquet file, or not whole; move it out of the dataset")
                with self._as_put(entry, source) as given:
                    content = content_of(given)
                    put = self._put(entry.name(self._root), given, content)
        except FileNotFoundError:
            return True  # expired since it was listed
        except TracerError as error:
            if isinstance(error, UnreachableError):
                raise
            if not entry.path.exists():
                return True  # expired meanwhile
            self._say(entry.path, f"not exported: {error}")
            return False
        except OSError as error:
            self._say(entry.path, f"not exported: cannot read {entry.path}: {error.strerror or error}")
            return False
        self._ledger.record(entry.name(self._root), stamp, content)
        done.exported += put
        done.bytes += content.size * put
        done.found += not put
        return True

    def _as_put(self, entry: Entry, source: IO[bytes]) -> IO[bytes]:
        """The file as it goes out: itself, or one with renamed columns."""
        if self._options.standard is None:
            return os.fdopen(os.dup(source.fileno()), "rb")
        from tracer.store import renamed

        try:
            renamed.write(entry.path, self._scratch, self._options.standard)
            return self._scratch.open("rb")
        except (OSError, pa.ArrowException) as error:
            raise TracerError(f"cannot rename its columns: {error}; leave {self._root} some room") from error
        finally:
            self._scratch.unlink(missing_ok=True)

    def _put(self, name: str, source: IO[bytes], content: Content) -> bool:
        """False: it was there already. Raises UnreachableError if that cannot be done."""

        def once() -> bool:
            if self._place.holds(name, content, self._pace):
                return False
            source.seek(0)
            if not self._place.put(name, source, content, self._pace):
                _log.info("%s was compacted at %s, and is not put there again", name, self._place)
                return False
            return True

        try:
            return retried(once, self._place.lasting, f"putting {name} to {self._place}", self._waits_s, self._sleep)
        except OSError as error:
            raise UnreachableError(
                f"cannot export to {self._place}: {self._place.said(error)}; check the address, the credentials and "
                "the network, or make room; nothing is lost: the next export goes on here"
            ) from error

    def _mark(self, directory: str, stamps: dict[str, str], failed: set[str], done: Passed) -> None:
        """Says of a closed hour which files each node had, where that is new."""
        held: dict[str, dict[str, object]] = {}
        for name, content in self._ledger.contents(directory).items():
            if node := layout.node_of(name):
                held.setdefault(node, {})[name] = {"bytes": content.size, "sha256": content.digest}
        for node, files in held.items():
            if node in failed:
                continue
            text = json.dumps({"node": node, "files": files}, indent=1, sort_keys=True).encode() + b"\n"
            source, name = io.BytesIO(text), f"{MARKER}{node}"
            content = content_of(source)
            if stamps.get(name) != content.digest:
                self._put(f"{directory}/{name}", source, content)
                self._ledger.record(f"{directory}/{name}", content.digest, content)
                done.markers += 1

    def _expire(self, inventory: Inventory, done: Passed, *, unexported: bool = True) -> None:
        """Deletes what may go; what is not exported only if `unexported`."""
        if self._options.keep_s is None and self._options.disk_budget is None:
            return
        known: dict[str, dict[str, str]] = {}

        def exported(entry: Entry) -> bool:
            directory, _, name = entry.name(self._root).rpartition("/")
            if directory not in known:
                known[directory] = self._ledger.stamps(directory)
            return known[directory].get(name) == entry.stamp

        entries, options = inventory.entries(), self._options
        expired = retention.expire(
            self._root, entries, exported, options.keep_s, options.disk_budget, self._wall_ns(), unexported=unexported
        )
        done.expired.add(expired)
        self._ledger.forget(self._root)

    def _say_strangers(self, inventory: Inventory) -> None:
        for path in inventory.strangers():
            self._say(path, f"{path} is not of the dataset: it is left alone, and not exported")

    def _say(self, path: Path, sentence: str) -> None:
        """Says it, unless something was said of this path before."""
        if path in self._said or len(self._said) > _NAMED:
            return
        self._said.add(path)
        _log.warning("%s", sentence if len(self._said) <= _NAMED else "there is more of that, which is not said")


class UnreachableError(TracerError):
    """The place cannot be reached, or refuses."""


def _is_whole(source: IO[bytes]) -> bool:
    """Whether it begins and ends as a Parquet file does."""
    size = os.fstat(source.fileno()).st_size
    if size < 12 or os.pread(source.fileno(), 4, 0) != _MAGIC:
        return False
    return os.pread(source.fileno(), 4, size - 4) == _MAGIC
