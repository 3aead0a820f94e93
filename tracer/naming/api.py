"""Requests to the API server: a page of a list, and a watch as lines. Raw JSON, bounded, with errors as sentences.

Configuration, credentials (tokens that rotate, client certificates, exec plugins) and TLS are lightkube's, HTTP is
httpx's; lightkube's own objects are not used: they cover all of Kubernetes, and cost several times what `objects` does.
Knows paths, status codes and how answers are framed; when to ask is `watch`'s.
"""

import contextlib
import email.utils
import logging
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2 as httpx
import msgspec
from lightkube.config.client_adapter import user_auth, verify_cluster
from lightkube.config.kubeconfig import KubeConfig, SingleConfig
from lightkube.core.exceptions import ConfigError

from tracer.errors import TracerError, UsageError
from tracer.version import __version__

# The library says every request at the level at which the tracer says what operators want to read.
for _name in ("httpx2", "httpcore2", "httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.WARNING)

#: Where each kind of `objects.KINDS` is.
PATHS = {
    "services": "/api/v1/services",
    "endpointslices": "/apis/discovery.k8s.io/v1/endpointslices",
    "pods": "/api/v1/pods",
    "nodes": "/api/v1/nodes",
}
#: The largest answer taken: all slices of 250,000 endpoints at once are some 100 MB.
MAX_BODY = 1 << 29
#: The longest line of a watch taken: an object in etcd has 1.5 MiB by default, as JSON some more.
MAX_LINE = 16 << 20
#: The longest that a server may ask us to stay away.
MAX_RETRY_AFTER_S = 120.0
#: Seconds for a connection, and for the next bytes of an answer.
CONNECT_S, READ_S = 10.0, 60.0
#: How long a watch is asked to last (seconds), and how much longer one without a sign is waited for.
WATCH_S, GRACE_S = 300, 30
#: A peer that vanished is noticed after 20 + 3 * 10 s: a watch may be silent for long.
KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class ApiError(TracerError):
    """A request failed. `retry_after_s`: for so long the server does not want to be asked again."""

    def __init__(self, sentence: str, retry_after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class ExpiredError(ApiError):
    """The resourceVersion, or the list's continuation, is too old for the server: list anew (410 Gone)."""


class _Meta(msgspec.Struct):
    resource_version: str | None = msgspec.field(default=None, name="resourceVersion")
    next: str | None = msgspec.field(default=None, name="continue")


class Page(msgspec.Struct):
    """A page of a list; `items` are JSON texts, which are views of the one answer."""

    metadata: _Meta = msgspec.field(default_factory=_Meta)
    items: list[msgspec.Raw] | None = None


class Event(msgspec.Struct):
    """A line of a watch."""

    type: str
    object: msgspec.Raw


class Api:
    """The API server of a kubeconfig's current context, or of the cluster this container runs in. Safe for threads."""

    def __init__(self, kubeconfig: Path | None) -> None:
        """Reads the configuration; asks nothing. Raises UsageError if it does not say where the server is."""
        where = f"The kubeconfig {kubeconfig}" if kubeconfig else "The service account of this container"
        try:
            config = KubeConfig.from_file(kubeconfig) if kubeconfig else KubeConfig.from_service_account()
            single = config.get()
            self._client = _client(single)
        except (ConfigError, OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            why = str(error)[:200] or type(error).__name__
            raise UsageError(
                f"{where} cannot be used ({why}); give a file with --kubeconfig that kubectl takes."
            ) from error
        except Exception as error:  # yaml and msgspec have roots of their own
            if type(error).__module__.partition(".")[0] not in ("yaml", "msgspec", "httpx2"):
                raise
            raise UsageError(
                f"{where} cannot be read ({_text(error)}); give a file with --kubeconfig that kubectl takes."
            ) from error

    def close(self) -> None:
        """Closes all connections that are not in use."""
        self._client.close()

    def page(self, kind: str, parameters: Mapping[str, str | int]) -> Page:
        """One answer to a list. Raises ApiError, or ExpiredError."""
        with self._asked(kind, parameters) as answer:
            body = bytearray()
            try:
                for chunk in answer.iter_bytes():
                    body += chunk
                    if len(body) > MAX_BODY:
                        raise ApiError(f"The API server's list of {kind} is longer than {MAX_BODY >> 20} MiB.")
            except httpx.HTTPError as error:
                raise ApiError(f"The API server broke off its list of {kind} ({_text(error)}).") from error
        try:
            return msgspec.json.decode(bytes(body), type=Page)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise ApiError(f"The API server's list of {kind} cannot be read ({_text(error)}).") from error

    @contextlib.contextmanager
    def watch(self, kind: str, parameters: Mapping[str, str | int]) -> Iterator["Watch"]:
        """A watch that lasts while the server wants, at most `WATCH_S`. Raises ApiError, or ExpiredError."""
        asked: dict[str, str | int] = {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": WATCH_S}
        asked |= parameters
        with self._asked(kind, asked) as answer:
            # It has begun, and may be silent now. (The transport looks here when the body begins.)
            answer.request.extensions["timeout"]["read"] = WATCH_S + GRACE_S
            yield Watch(kind, answer)

    @contextlib.contextmanager
    def _asked(self, kind: str, parameters: Mapping[str, str | int]) -> Iterator[httpx.Response]:
        timeout = httpx.Timeout(CONNECT_S, read=READ_S)
        request = self._client.build_request("GET", PATHS[kind], params=dict(parameters), timeout=timeout)
        try:
            answer = self._client.send(request, stream=True)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ConfigError, ValueError) as error:
            raise ApiError(f"The API server {request.url.host} does not answer for {kind} ({_text(error)}).") from error
        try:
            if answer.status_code != httpx.codes.OK:
                raise _refusal(kind, answer)
            yield answer
        finally:
            answer.close()


class Watch:
    """The lines of a watch."""

    def __init__(self, kind: str, answer: httpx.Response) -> None:
        self._kind, self._answer = kind, answer

    def lines(self) -> Iterator[bytes]:
        """Lines without their end, until the server ends the watch. Raises ApiError."""
        rest = bytearray()
        try:
            for chunk in self._answer.iter_bytes():
                *lines, tail = chunk.split(b"\n")
                for line in lines:
                    rest += line
                    if rest:
                        yield bytes(rest)
                    rest.clear()
                rest += tail
                if len(rest) > MAX_LINE:
                    raise ApiError(
                        f"The API server's watch of {self._kind} has a line longer than {MAX_LINE >> 20} MiB."
                    )
        except (httpx.HTTPError, OSError) as error:
            raise ApiError(f"The API server's watch of {self._kind} broke off ({_text(error)}).") from error

    def abort(self) -> None:
        """Wakes whoever waits for the next line; from any thread."""
        stream = self._answer.extensions.get("network_stream")
        connection = stream.get_extra_info("socket") if stream is not None else None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _client(config: SingleConfig | None) -> httpx.Client:
    if config is None or not config.cluster.server:
        raise ConfigError("it names no server")
    verify: Any = True
    if config.cluster.server.startswith("https"):
        verify = verify_cluster(config.cluster, config.user or _nobody(), config.abs_file)
    transport = httpx.HTTPTransport(verify=verify, socket_options=KEEPALIVE)
    return httpx.Client(
        base_url=config.cluster.server,
        auth=user_auth(config.user),
        transport=transport,
        headers={"User-Agent": f"vip-tracer/{__version__}", "Accept": "application/json"},
    )


def _nobody() -> Any:
    from lightkube.config.models import User

    return User()


def _refusal(kind: str, answer: httpx.Response) -> ApiError:
    code = answer.status_code
    if code == httpx.codes.GONE:
        return ExpiredError(f"The API server no longer has the state of {kind} that was asked for (410).")
    if code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return ApiError(
            f"The API server refuses {kind} ({code}): give this account list and watch on {kind}, or another "
            "account with --kubeconfig."
        )
    return ApiError(f"The API server answers {code} for {kind}.", _retry_after(answer.headers.get("Retry-After")))


def _retry_after(said: str | None) -> float | None:
    """Seconds of a Retry-After header, a number or a date (RFC 9110, 10.2.3), bounded; None if there is none."""
    if said is None:
        return None
    try:
        seconds: float = min(int(said), 10**6)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
