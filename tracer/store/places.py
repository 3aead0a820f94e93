"""Where files are put: a directory, or an object store. A file appears there whole and verified, or not at all.

Everywhere the same way: it is written under a hidden name beside its own, read back and compared with its checksum,
and only then takes its name: by a rename, or by a copy within the store.
"""

import contextlib
import dataclasses
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

import pyarrow as pa

from tracer.errors import TracerError, UsageError
from tracer.store import layout, locks
from tracer.store.pace import Pace
from tracer.store.roots import Remote, identity, root_of, scrubbed

#: Errors of a local disk that trying again does not mend.
_LASTING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR})
#: What object stores say of refusals that trying again does not mend.
_REFUSALS = (
    "ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN_ID",
    "UNRECOGNIZED_CLIENT", "MISSING_AUTHENTICATION_TOKEN", "ExpiredToken", "InvalidAccessKeyId",
    "SignatureDoesNotMatch", "AccessDenied", "NoSuchBucket",
    "ContainerNotFound", "AuthorizationFailure", "AuthorizationPermissionMismatch", "AuthenticationFailed",
    "InvalidAuthenticationInfo", "PERMISSION_DENIED", "UNAUTHENTICATED", "NOT_FOUND: Permanent error",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """What a file holds: its size, and its SHA-256 in hexadecimal."""

    size: int
    digest: str


def content_of(file: IO[bytes] | Any, pace: Pace | None = None) -> Content:
    """The content of an open file, from where it stands to its end. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    while piece := file.read(pace.piece if pace else 1 << 20):
        if pace:
            pace.spend(len(piece))
        digest.update(piece)
        size += len(piece)
    return Content(size, digest.hexdigest())


class Place(Protocol):
    """Names are paths below it with slashes. Methods raise OSError; `lasting` tells which are not worth a retry."""

    def check(self) -> None:
        """Raises TracerError if it is not there, or not to be used."""

    def holds(self, name: str, content: Content, pace: Pace) -> bool:
        """Whether it has a file of this name and content."""

    def put(self, name: str, source: IO[bytes], content: Content, pace: Pace) -> bool:
        """Makes or replaces a file; False: it was merged there into another and must not appear again."""

    def lasting(self, error: OSError) -> bool:
        """Whether the next attempt would fail alike."""

    def said(self, error: OSError) -> str:
        """The error as part of a sentence, without secrets."""


def place_of(address: str) -> Place:
    """The place that a path or an address means. Raises UsageError."""
    if "://" not in address:
        return Directory(Path(address))
    if address.startswith("file://"):
        return Directory(Path(address.removeprefix("file://")))
    root = root_of(address)
    if not isinstance(root, Remote):
        raise UsageError(f"{root} is a directory: give it as a path")
    if not root.base.parts:
        raise UsageError(f"{root} names no bucket: give an address such as s3://bucket/prefix")
    return Store(root)


def reached(address: str, root: Path | None = None) -> Place:
    """The place, of which is known that it can be used, or else that it cannot be told yet.

    Raises TracerError; UsageError if no try will mend it, or if the place is the dataset at `root` or in it.
    """
    place = place_of(address)
    if root is not None and isinstance(place, Directory):
        place.refuse_within(root)
    place.check()
    return place


def identity_of(address: str) -> str:
    """What tells the place of an address from every other one, before it is reached."""
    if "://" in address and not address.startswith("file://"):
        return identity(address)
    return str(Path(address.removeprefix("file://")).absolute())


def _staged(name: str) -> str:
    """The hidden name beside a file's own."""
    path = PurePosixPath(name)
    return str(path.with_name(f".{path.name}.part"))


def _different(name: str) -> OSError:
    return OSError(errno.EIO, f"what was read back of {name} differs from what was written")


class Directory:
    """A directory of this machine, or one that is mounted here."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def refuse_within(self, root: Path) -> None:
        """Raises UsageError if what is put here were put into the dataset itself, and deleted there as exported."""
        mine = root.stat()
        whole = self.root.resolve()
        for path in (whole, *whole.parents):
            with contextlib.suppress(OSError):  # not made yet
                if os.path.samestat(path.stat(), mine):
                    raise UsageError(
                        f"{self.root} is the dataset {root} itself, or in it: choose a directory elsewhere, for what "
                        "is exported may be deleted here"
                    )

    def check(self) -> None:
        """Makes it if need be."""
        try:
            layout.make_directory(self.root)
        except OSError as error:
            raise TracerError(
                f"cannot make the directory {self.root}: {error.strerror}; choose one that this process may write to"
            ) from error
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise TracerError(f"cannot write to {self.root}: make it writable for this process, or choose another")

    def holds(self, name: str, content: Content, pace: Pace) -> bool:
        """Compares sizes, and then checksums."""
        try:
            with (self.root / name).open("rb") as file:
                return os.fstat(file.fileno()).st_size == content.size and content_of(file) == content
        except FileNotFoundError:
            return False

    def put(self, name: str, source: IO[bytes], content: Content, pace: Pace) -> bool:
        """By a rename, after fsync."""
        target, staged = self.root / name, self.root / _staged(name)
        with locks.publishing(target.parent):
            file = staged.open("w+b")
        try:
            with file:
                while piece := source.read(pace.piece):
                    pace.spend(len(piece))
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
                with contextlib.suppress(OSError):  # what is read back is then the disk's, not the cache's
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.seek(0)
                if content_of(file) != content:
                    raise _different(name)
            with locks.steady(target.parent):
                if target.name in merged_names(target.parent):
                    staged.unlink()
                    return False
                staged.replace(target)
                layout.sync_directory(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                staged.unlink()
            raise
        return True

    def lasting(self, error: OSError) -> bool:
        """A disk that is full, or not to be written."""
        return error.errno in _LASTING

    def said(self, error: OSError) -> str:
        """What the system says."""
        return error.strerror or scrubbed(str(error))


def merged_names(directory: Path) -> set[str]:
    """Names of the files that compaction made one of, in an hour's directory. Raises OSError."""
    found: set[str] = set()
    for path in directory.iterdir() if directory.is_dir() else ():
        if layout.is_merged(path.name):
            from tracer.store import merge  # not in a process that never meets one

            found |= merge.origins(path)
    return found


class Store:
    """A bucket's prefix, or a container's, that one of pyarrow's file systems reaches."""

    def __init__(self, root: Remote) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def check(self) -> None:
        """Asks for the bucket."""
        bucket = self.root.base.parts[0]
        from pyarrow import fs

        try:
            with _as_oserror():
                # First of something below it: asked for a container it may not see, Azure's library ends the process.
                self.root.filesystem.get_file_info(str(self.root.base / ".check"))
                kind = self.root.filesystem.get_file_info(bucket).type
        except OSError as error:
            if self.lasting(error):
                raise self.refusal(error) from error
            return  # the network, perhaps: the first file will tell
        if kind == fs.FileType.NotFound:
            raise TracerError(f"there is no bucket {bucket!r} for {self}; make it first, or check the address")

    def refusal(self, error: OSError) -> TracerError:
        """The sentence of a lasting error."""
        return TracerError(f"{self} refuses: {self.said(error)}; check the address, the credentials and their rights")

    def holds(self, name: str, content: Content, pace: Pace) -> bool:
        """Compares sizes, and then checksums, for which the object is read."""
        path = str(self.root.base / name)
        with _as_oserror():
            return bool(self._size(path) == content.size and self._content(path, pace) == content)

    def put(self, name: str, source: IO[bytes], content: Content, pace: Pace) -> bool:
        """By a copy within the store: some show an object empty while it is written, or cut short if that fails."""
        filesystem, base = self.root.filesystem, self.root.base
        target, staged = str(base / name), str(base / _staged(name))
        with _as_oserror():
            with filesystem.open_output_stream(staged) as stream:
                while piece := source.read(pace.piece):
                    pace.spend(len(piece))
                    stream.write(piece)
            if self._content(staged, pace) != content:
                raise _different(name)
            filesystem.copy_file(staged, target)
            if self._size(target) != content.size:
                raise _different(name)
            filesystem.delete_file(staged)
        return True

    def lasting(self, error: OSError) -> bool:
        """Refusals."""
        return any(word in str(error) for word in _REFUSALS)

    def said(self, error: OSError) -> str:
        """What the store says."""
        return self.root.said(error)

    def _size(self, path: str) -> int | None:
        size: int | None = self.root.filesystem.get_file_info(path).size
        return size

    def _content(self, path: str, pace: Pace) -> Content:
        with self.root.filesystem.open_input_stream(path) as stream:
            return content_of(stream, pace)


@contextlib.contextmanager
def _as_oserror() -> Iterator[None]:
    """Lets Arrow's own exceptions, which some file systems raise, be OSErrors as all others."""
    try:
        yield
    except pa.ArrowException as error:
        raise OSError(str(error)) from error
