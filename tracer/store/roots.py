"""Where a dataset lies: a local directory, or a place that one of pyarrow's file systems reaches (s3, gs, abfs)."""

import dataclasses
from pathlib import Path, PurePosixPath
from typing import Any

from tracer.errors import NoDataError, TracerError, UsageError


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file of a file system of pyarrow's. Can be sent to another process."""

    filesystem: Any
    path: PurePosixPath

    @property
    def name(self) -> str:
        """The path's last part."""
        return self.path.name

    @property
    def parts(self) -> tuple[str, ...]:
        """The path's parts."""
        return self.path.parts

    def __str__(self) -> str:
        return f"{self.filesystem.type_name}:{self.path}"


@dataclasses.dataclass(frozen=True)
class Remote:
    """A dataset's root in a file system of pyarrow's; `uri` is what it was called, without secrets."""

    filesystem: Any
    base: PurePosixPath
    uri: str

    def __str__(self) -> str:
        return self.uri

    def listed(self, below: str, recursive: bool) -> list[PurePosixPath]:
        """What is below a directory of it, by path; nothing if it is not there. Raises TracerError."""
        from pyarrow import fs

        selector = fs.FileSelector(str(self.base / below), recursive=recursive, allow_not_found=True)
        try:
            found = self.filesystem.get_file_info(selector)
        except OSError as error:
            raise TracerError(
                f"cannot list {self.uri}: {error}; check the address, the credentials and the network"
            ) from error
        return [PurePosixPath(each.path) for each in found]


Root = Path | Remote
File = Path | RemoteFile


def root_of(place: str | Path) -> Root:
    """The root that a path or an address (``s3://bucket/prefix``, ``file:///directory``) means.

    Raises:
        UsageError: no file system is known for such an address.
        NoDataError: there is no such local directory.
    """
    if isinstance(place, Path) or "://" not in place:
        local = Path(place)
        if not local.is_dir():
            raise NoDataError(f"there is no directory {local}; check the path")
        return local
    from pyarrow import ArrowException, fs

    try:
        filesystem, base = fs.FileSystem.from_uri(place)
    except (ArrowException, OSError, ValueError) as error:
        why = str(error).replace(place, _shown(place))
        raise UsageError(
            f"{_shown(place)} cannot be opened ({why}): give a directory, or an address such as s3://bucket/prefix"
        ) from error
    return Remote(filesystem, PurePosixPath(base), _shown(place))


def _shown(place: str) -> str:
    """The address without what follows ``?``, and without a key and its secret, for messages and pages."""
    scheme, _, rest = place.partition("?")[0].partition("://")
    where, slash, path = rest.partition("/")
    return f"{scheme}://{where.rpartition('@')[2]}{slash}{path}"


def source(file: File) -> dict[str, Any]:
    """How pyarrow.parquet is told of a file: its keyword arguments."""
    if isinstance(file, RemoteFile):
        return {"source": str(file.path), "filesystem": file.filesystem}
    return {"source": file}
