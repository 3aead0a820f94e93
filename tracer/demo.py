"""The demonstration: a miniature cluster, traffic with one hidden cause of imbalance, the real agent, and what it saw.

Knows how to play the pieces together (`tracer.lab` makes the cluster and its traffic, ``vip-tracer agent`` traces it
as its own process) and how to show each backend's share. Says what the rows say; finding the cause is left to the
reader and to `report`.
"""

import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tracer.errors import TracerError
from tracer.lab import scenario
from tracer.lab.cluster import Cluster
from tracer.store import reader

#: Reporting interval of the demo's agent: short, so that long connections show in a demo of seconds.
INTERVAL_S = 1.0
_READY_S, _STOP_S = 30.0, 30.0
_COLUMNS = (
    "ts",
    "conn_id",
    "opened",
    "dst_ip",
    "dst_port",
    "backend_ip",
    "bytes_sent",
    "bytes_received",
    "duration_us",
    "result",
)

Progress = Callable[[str], None]


@dataclass
class Share:
    """What went to one backend, through all virtual addresses."""

    pod: str
    address: str
    connections: int = 0
    bytes: int = 0
    long_bytes: int = 0  # of those, the bytes of connections that outlived a reporting interval
    other_bytes: int = 0  # of those, the bytes that came through another virtual address than the first
    counted: int = 0  # what the backend itself counted


@dataclass
class Result:
    """The demo's outcome."""

    output: Path
    dialled: str
    seconds: float
    cause: str
    rows: int = 0
    shares: list[Share] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether the rows' bytes are those that the backends counted themselves, to the byte."""
        return all(share.bytes == share.counted for share in self.shares)


@contextmanager
def progress_line() -> Iterator[Progress]:
    """A line on stderr that is written over, if that is a terminal; otherwise a line per message."""
    terminal = sys.stderr.isatty()

    def show(message: str) -> None:
        sys.stderr.write(f"\r\033[K{message}" if terminal else f"{message}\n")
        sys.stderr.flush()

    try:
        yield show
    finally:
        if terminal:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


@contextmanager
def _agent(cluster: Cluster, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The real agent on the cluster's node, ready; stopped in good order at the end, killed if that fails."""
    ready = output / ".demo-ready"
    ready.unlink(missing_ok=True)
    pods = [*cluster.client_pods, *cluster.backend_pods]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tracer", "agent", "--output", str(output), "--node", cluster.node.name),
            *("--netns", cluster.node.path, "--only-netns", cluster.node.path),
            *(part for pod in pods for part in ("--only-netns", pod.netns.path)),
            *("--interval", f"{INTERVAL_S}s", "--ready-file", str(ready)),
        ],
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parent.parent)])},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + _READY_S
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                talk = process.communicate()[1].decode(errors="replace").strip()
                raise TracerError(f"The agent did not become ready. It said:\n{talk}")
            time.sleep(0.02)
        yield process
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=_STOP_S)
        if process.returncode != 0:
            raise TracerError(
                f"The agent ended with exit code {process.returncode}:\n{said.decode(errors='replace').strip()}"
            )
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
        ready.unlink(missing_ok=True)


def play(output: Path, *, seconds: float, cause: str, seed: int | None, progress: Progress) -> Result:
    """Builds the cluster, makes the traffic, traces it, and reads the dataset.

    Args:
        output: the dataset's directory; made if it is not there, added to if it is.
        seconds: how long the traffic lasts.
        cause: one of `scenario.CAUSES`, or random.
        seed: of the random choices; None for another one each time.
        progress: is told what happens.

    Raises:
        TracerError: what could not be done, and what to do.
    """
    from tracer.kernel import checks
    from tracer.kernel.capture import Options

    checks.demand(Options())
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TracerError(
            f"The directory {output} cannot be made ({error.strerror}): choose another with --output."
        ) from error
    began = time.time_ns()
    progress("building a cluster: a node, six backend pods, three clients")
    with Cluster(backends=6, clients=3) as cluster:
        progress("starting the agent")
        with _agent(cluster, output):
            truth = scenario.run(
                cluster,
                seconds,
                progress=lambda share, what: progress(f"tracing: {share:4.0%}, {what}"),
                cause=cause,
                seed=seed,
            )
            progress("stopping the agent")
        address, port = cluster.vip()
    result = Result(output, f"{address}:{port}", truth.seconds, truth.cause)
    result.shares = [
        Share(name, ip, counted=counted) for name, ip, counted in zip(truth.names, truth.ips, truth.bytes, strict=True)
    ]
    _read(result, began, address)
    return result


def _read(result: Result, began_ns: int, address: str) -> None:
    """Adds this run's rows to the shares."""
    shares = {share.address: share for share in result.shares}
    lives: defaultdict[int, int] = defaultdict(int)
    rows = [
        row
        for path in reader.files(result.output, start_ns=began_ns)
        for batch in reader.batches(path, columns=_COLUMNS)
        for row in batch.to_pylist()
        if row["ts"].timestamp() * 1e9 >= began_ns
    ]
    for row in rows:
        lives[row["conn_id"]] += 1
    for row in rows:
        share = shares.get(row["backend_ip"])
        if share is None:
            continue
        result.rows += 1
        count = (row["bytes_sent"] or 0) + (row["bytes_received"] or 0)
        share.connections += row["opened"]
        share.bytes += count
        share.long_bytes += count if lives[row["conn_id"]] > 1 else 0
        share.other_bytes += count if row["dst_ip"] != address else 0


def render(result: Result) -> str:
    """The result as text: each backend's share, what stands out, and where the rows are."""
    connections = sum(share.connections for share in result.shares)
    total = sum(share.bytes for share in result.shares)
    lines = [
        f"Connections to {result.dialled} and where they really went, in {result.seconds:.0f} s ({result.rows} rows):",
        "",
        f"{'pod':8} {'backend':14} {'connections':>11} {'share':>6}   {'bytes':>11} {'share':>6}   {'long-lived':>11}",
    ]
    for share in result.shares:
        lines.append(
            f"{share.pod:8} {share.address:14} {share.connections:11,} {_part(share.connections, connections):>6}   "
            f"{share.bytes:11,} {_part(share.bytes, total):>6}   {share.long_bytes:11,}"
        )
    busiest = max(result.shares, key=lambda share: share.bytes)
    others = [share for share in result.shares if share is not busiest]
    lines += [
        "",
        f"{busiest.pod} got {_ratio(busiest.bytes, [share.bytes for share in others])} times its peers' bytes, "
        f"and {_ratio(busiest.connections, [share.connections for share in others])} times their connections; "
        f"{_part(busiest.long_bytes, busiest.bytes)} of its bytes came over connections older than {INTERVAL_S:.0f} s, "
        f"{_part(busiest.other_bytes, busiest.bytes)} through another virtual address.",
        f"What was arranged: {_CAUSES[result.cause]}",
        "The backends counted the same bytes themselves: " + ("yes, to the byte." if result.agrees else "NO."),
        "",
        f"The rows are in {result.output}/connections, for example:",
        f"  vip-tracer observe {result.output} -n 5",
        f"""  python -c "import pandas; print(pandas.read_parquet('{result.output}/connections')"""
        """.groupby(['dst_ip','backend_ip'], observed=True).bytes_sent.sum())\"""",
    ]
    return "\n".join(lines)


_CAUSES = {
    "long-lived": "a client opened its pool of connections while the service had one backend, and kept it.",
    "second-service": "a second service leads to one of the pods as well.",
    "flapping": "all pods but one were unready for a moment, again and again, and whoever dialled then got that one.",
    "none": "nothing; this is how even chance is.",
}


def _part(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _ratio(value: int, others: list[int]) -> str:
    mean = sum(others) / max(len(others), 1)
    return f"{value / mean:.1f}" if mean else "∞"
