"""Where a dataset lies: a local directory, or a place that one of pyarrow's file systems reaches (s3, gs, abfs)."""

import dataclasses
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from tracer.errors import TracerError, UsageError


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

    def exists(self) -> bool:
        """Whether it is there. Raises OSError."""
        from pyarrow import fs

        return bool(self.filesystem.get_file_info(str(self.path)).type == fs.FileType.File)

    def __str__(self) -> str:
        return f"{self.filesystem.type_name}:{self.path}"


@dataclasses.dataclass(frozen=True)
class Remote:
    """A dataset's root in a file system of pyarrow's; `uri` is what it was called, without secrets.

    `secrets` are what no message may quote.
    """

    filesystem: Any
    base: PurePosixPath
    uri: str
    secrets: tuple[str, ...] = dataclasses.field(default=(), repr=False)

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
                f"cannot list {self.uri}: {self.said(error)}; check the address, the credentials and the network"
            ) from error
        return [PurePosixPath(each.path) for each in found]

    def said(self, error: Exception) -> str:
        """What a library's error says, in one line without secrets."""
        return scrubbed(str(error), self.secrets)

    def below(self, name: str) -> "Remote":
        """The root in a directory of this one."""
        return dataclasses.replace(self, base=self.base / name, uri=f"{self.uri.rstrip('/')}/{name}")


Root = Path | Remote
File = Path | RemoteFile


def root_of(place: str | Path) -> Root:
    """The root that a path or an address (``s3://bucket/prefix``, ``file:///directory``) means.

    Raises:
        UsageError: there is no such local directory, or no file system is known for such an address.
        TracerError: it cannot be reached.
    """
    if isinstance(place, Path) or "://" not in place:
        local = Path(place)
        if not local.is_dir():
            raise UsageError(f"there is no directory {local}; check the path")
        return local
    from pyarrow import ArrowException, fs

    try:
        filesystem, base = _azure(place) or fs.FileSystem.from_uri(_bounded(place))
    except (ArrowException, OSError, ValueError) as error:
        why = scrubbed(str(error).replace(_bounded(place), _shown(place)), _secrets(place))
        if isinstance(error, OSError):  # it asked somebody: Amazon, of which region a bucket is
            raise TracerError(f"cannot reach {_shown(place)}: {why}; check the network, and the address") from error
        raise UsageError(
            f"{_shown(place)} cannot be opened ({why}): give a directory, or an address such as s3://bucket/prefix"
        ) from error
    if filesystem.type_name == "local":
        return root_of(Path(base))
    return Remote(filesystem, PurePosixPath(base), _shown(place), _secrets(place))


_AUTHORITIES = ("blob_storage_authority", "dfs_storage_authority")


def _azure(place: str) -> tuple[Any, str] | None:
    """The file system and path of ``abfs://account@container/prefix``; None of any other address.

    For an address Arrow takes nothing but Azure's default credentials. Here it is, in this order, the key of the
    address, AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN, and then those.
    """
    parts = urlsplit(place)
    if parts.scheme not in ("abfs", "abfss") or not parts.hostname or "." in parts.hostname or not parts.username:
        return None
    from pyarrow import fs

    asked = dict(parse_qsl(parts.query))
    key = unquote(parts.password or "") or os.environ.get("AZURE_STORAGE_KEY")
    known: dict[str, str] = {name: asked[name] for name in _AUTHORITIES if name in asked}
    if asked.get("enable_tls") == "false":
        known |= {"blob_storage_scheme": "http", "dfs_storage_scheme": "http"}
    token = None if key else os.environ.get("AZURE_STORAGE_SAS_TOKEN")
    filesystem = fs.AzureFileSystem(unquote(parts.username), account_key=key, sas_token=token, **known)
    return filesystem, f"{parts.hostname}{parts.path}".rstrip("/")


#: What of an address says where it is, rather than how one is let in.
_WHERE = frozenset({"endpoint_override", "scheme", "region", *_AUTHORITIES})
#: How long Google's library tries before it gives up, unless the address says so: by itself 15 minutes.
_GS_RETRIES_S = 30


def _bounded(place: str) -> str:
    if not place.startswith(("gs://", "gcs://")) or "retry_limit_seconds=" in place:
        return place
    return f"{place}{'&' if '?' in place else '?'}retry_limit_seconds={_GS_RETRIES_S}"


def identity(place: str) -> str:
    """What tells an address from the same name on another server: no secret is part of it."""
    where = sorted(pair for pair in parse_qsl(place.partition("?")[2]) if pair[0] in _WHERE)
    return f"{_shown(place)}?{urlencode(where)}" if where else _shown(place)


def _secrets(place: str) -> tuple[str, ...]:
    address, _, query = place.partition("?")
    user = address.partition("://")[2].partition("/")[0].rpartition("@")[0]
    given = [os.environ.get(name, "") for name in ("AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN")]
    found = [*given, *user.split(":")[1:], *(value for name, value in parse_qsl(query) if name not in _WHERE)]
    spelled = {each for text in found for each in (text, unquote(text), quote(text, safe="")) if len(each) > 3}
    return tuple(sorted(spelled, key=len, reverse=True))


def scrubbed(text: str, secrets: tuple[str, ...] = ()) -> str:
    """The text's first lines as one, of bounded length, without these secrets and without signatures."""
    for secret in secrets:
        text = text.replace(secret, "***")
    text = re.sub(r"(?i)\b(sig|signature|x-amz-signature|x-amz-credential|token|key)=[^&\s'\"]+", r"\1=***", text)
    line = " ".join(text.split("\nRequestId")[0].split())
    return line if len(line) <= 400 else f"{line[:400]}..."


def _shown(place: str) -> str:
    """The address without what follows ``?``, and without a key and its secret, for messages and pages."""
    scheme, _, rest = place.partition("?")[0].partition("://")
    where, slash, path = rest.partition("/")
    return f"{scheme}://{where.rpartition('@')[2]}{slash}{path}"
