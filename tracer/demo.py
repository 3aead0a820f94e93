"""The demonstration: a miniature cluster, traffic with one hidden cause of imbalance, the real agent, and what it saw.

Knows how to play the pieces together (`tracer.lab` makes the cluster and its traffic, ``vip-tracer agent`` traces it
as its own process) and how to show each backend's share. Says what the rows say, and what
`report` makes of them.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from tracer.errors import TracerError
from tracer.lab import child, scenario
from tracer.lab.cluster import Cluster
from tracer.store import reader
from tracer.words import printable

#: Reporting interval of the demo's agent: short, so that long connections show in a demo of seconds.
INTERVAL_S = 1.0
_READY_S, _STOP_S = 30.0, 30.0
#: What is shown fits a terminal of this many columns.
_WIDTH = 80
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

#: Is told the stage (building, starting, tracing, stopping) and, again and again, how far it is.
Progress = Callable[[str, str], None]


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
    answers: list[str] = field(default_factory=list)  # of `vip-tracer report`, on this run
    began_ns: int = 0  # since the epoch

    @property
    def agrees(self) -> bool:
        """Whether the rows' bytes are those that the backends counted themselves, to the byte."""
        return all(share.bytes == share.counted for share in self.shares)


@contextmanager
def progress_line() -> Iterator[Progress]:
    """On a terminal one line on stderr that is written over; otherwise a line per stage."""
    terminal = sys.stderr.isatty()
    said = ""

    def show(stage: str, detail: str) -> None:
        nonlocal said
        if terminal:
            sys.stderr.write("\r\033[K" + f"{stage}: {detail}"[: _WIDTH - 1])
        elif stage != said:
            sys.stderr.write(f"{stage}: {detail}\n")
        said = stage
        sys.stderr.flush()

    try:
        yield show
    finally:
        if terminal:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


@contextmanager
def _agent(cluster: Cluster, output: Path) -> Iterator[None]:
    """The real agent on the cluster's node, ready; stopped in good order at the end, killed if that fails.

    The kernel kills it should this process be killed. A session of its own keeps the terminal's Ctrl-C from it: it
    shall see the end of the connections that go down with the cluster, or at least publish what it has.
    """
    ready = output / ".demo-ready"
    ready.unlink(missing_ok=True)
    pods = [*cluster.client_pods, *cluster.backend_pods]
    root = str(Path(__file__).resolve().parent.parent)
    with tempfile.TemporaryFile() as said:  # a pipe that nobody reads would hold up an agent with much to say
        process = subprocess.Popen(
            child.command(
                *(os.getpid(), "/proc/self/ns/net"),
                *(sys.executable, "-m", "tracer", "agent", "--output", str(output), "--node", cluster.node.name),
                *("--netns", cluster.node.path, "--only-netns", cluster.node.path),
                *(part for pod in pods for part in ("--only-netns", pod.netns.path)),
                *("--interval", f"{INTERVAL_S}s", "--ready-file", str(ready), "--log-format", "text"),
            ),
            stderr=said,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            # No VIP_TRACER_* of the user's, but for programs compiled before; and never a module from the current
            # directory.
            env={
                **{
                    name: value
                    for name, value in os.environ.items()
                    if not name.startswith("VIP_TRACER_") or name == "VIP_TRACER_CACHE"
                },
                "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
                "PYTHONSAFEPATH": "1",
            },
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + _READY_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    process.wait()
                    raise TracerError(f"The agent did not become ready. It said:\n{_said(said)}")
                time.sleep(0.02)
            yield
            _stop(process)
            if process.returncode != 0:
                raise TracerError(f"The agent ended with exit code {process.returncode}. It said:\n{_said(said)}")
        finally:
            try:
                _stop(process)
            finally:
                process.kill()
                process.wait()
                ready.unlink(missing_ok=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Has the agent write what it knows, and end; if it runs."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired as error:
        raise TracerError(
            f"The agent did not end within {_STOP_S:.0f} s: is the machine busy? It was killed."
        ) from error


def _said(stderr: IO[bytes]) -> str:
    """What an ended agent said."""
    stderr.seek(0)
    return stderr.read().decode(errors="replace").strip()


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
    from tracer.analysis import diagnose
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
    progress("building", "a cluster of one node, six backend pods and three client pods")
    with Cluster(backends=6, clients=3) as cluster:
        progress("starting", "the agent")
        with _agent(cluster, output):
            truth = scenario.run(
                cluster,
                seconds,
                progress=lambda share, what: progress("tracing", f"{share:4.0%}, {what}" if share else "connections"),
                cause=cause,
                seed=seed,
            )
            progress("stopping", "the agent")
        address, port = cluster.vip()
    result = Result(output, f"{address}:{port}", truth.seconds, truth.cause, began_ns=began)
    result.shares = [
        Share(name, ip, counted=counted) for name, ip, counted in zip(truth.names, truth.ips, truth.bytes, strict=True)
    ]
    _read(result, began, address)
    result.answers = [finding.answer for finding in diagnose.diagnose(output, began).findings]
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
        f"Where connections to virtual addresses really went ({result.rows:,} rows in {result.seconds:.0f} s):",
        "",
        f"{'pod':8} {'backend':14} {'connections':>11} {'share':>6}   {'bytes':>11} {'share':>6}   {'long-lived':>11}",
    ]
    for share in result.shares:
        lines.append(
            f"{share.pod:8} {share.address:14} {share.connections:11,} {_part(share.connections, connections):>6}   "
            f"{share.bytes:11,} {_part(share.bytes, total):>6}   {share.long_bytes:11,}"
        )
    said = [
        *(f"vip-tracer report: {printable(answer)}" for answer in result.answers),
        f"What was arranged: {_CAUSES[result.cause]}",
        "The backends counted the same bytes themselves: " + ("yes, to the byte." if result.agrees else "NO."),
    ]
    for sentence in said:
        lines += ["", *textwrap.wrap(sentence, _WIDTH - 1, break_on_hyphens=False)]
    lines += ["", f"The rows are in {result.output}/connections. Go on with:", *(f"  {line}" for line in _next(result))]
    return "\n".join(lines)


def _next(result: Result) -> list[str]:
    """Commands that go on from here, as they can be typed in this directory."""
    rows = json.dumps(f"{result.output}/connections", ensure_ascii=False)
    script = (
        f'import pandas; print(pandas.read_parquet({rows}).groupby(["dst_ip", "backend_ip"], observed=True)'
        '[["bytes_sent", "bytes_received"]].sum())'
    )
    began = datetime.fromtimestamp(result.began_ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return [
        shlex.join([*_typed("vip-tracer"), "report", str(result.output), "--from", began, "--html", "report.html"]),
        shlex.join([*_typed("vip-tracer"), "observe", str(result.output), "-n", "5"]),
        shlex.join([*_typed("python"), "-c", script]),
    ]


def _typed(program: str) -> list[str]:
    """How a program of this very environment is called: by its name if PATH leads there, otherwise by its path."""
    home = Path(sys.executable).parent
    found = shutil.which(program)
    if found is not None and Path(found).parent == home:
        return [program]
    path, here = home / program, Path.cwd()
    if not path.exists():
        return [sys.executable] if program == "python" else [sys.executable, "-m", "tracer"]
    if here in path.parents and here != home and here != Path(here.anchor):
        return [str(path.relative_to(here))]
    return [str(path)]


_CAUSES = {
    "long-lived": "a client opened its pool of connections while the service had one backend, and kept it.",
    "second-service": "a second service leads to one of the pods as well.",
    "flapping": "all pods but one were unready for a moment, again and again, and whoever dialled then got that one. "
    "Who was ready when comes from the API server; this demonstration has none, so the report cannot name it.",
    "none": "nothing; this is how even chance is.",
}


def _part(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
