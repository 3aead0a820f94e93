"""The demo as a user runs it: the right numbers, and nothing left behind however it ends."""

import ctypes
import errno
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas
import pytest

from tracer import demo
from tracer.errors import TracerError
from tracer.kernel import libbpf
from tracer.lab.netns import wait_until
from tracer.store import reader

ROOT = Path(__file__).resolve().parents[1]
run_for_real = pytest.mark.needs("bpf", "netns", "iptables")
STAGES = ["building", "starting", "tracing", "stopping"]


def environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("VIP_TRACER_")}
    return own | {"PYTHONPATH": str(ROOT), "VIP_TRACER_AGENT_IGNORE_NETNS": "/nonexistent"}  # which is not the demo's


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "tracer", "demo", *map(str, arguments)]


def stages(stderr: str) -> list[str]:
    return [line.partition(":")[0] for line in stderr.splitlines()]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run's directory, with a module in it that is not ours; what it said on stdout and on stderr."""
    where = tmp_path_factory.mktemp("demo with a space")
    (where / "data").mkdir()
    (where / "tracer.py").write_text("raise SystemExit('not ours')\n")
    done = subprocess.run(
        [Path(sys.executable).parent / "vip-tracer", "demo", "--duration", "3s", "--output", "data",
         "--cause", "long-lived", "--seed", "1"],
        env=environment(), cwd=where, capture_output=True, text=True, check=False, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return where, done.stdout, done.stderr


def table(stdout: str) -> dict[str, tuple[int, int, int]]:
    """Backend address → connections, bytes, bytes of long-lived connections, as printed."""
    found = re.findall(r"^web-\d +([\d.]+) +([\d,]+) +[\d.]+% +([\d,]+) +[\d.]+% +([\d,]+)$", stdout, re.MULTILINE)
    return {ip: tuple(int(number.replace(",", "")) for number in rest) for ip, *rest in found}  # type: ignore[misc]


@run_for_real
def test_it_shows_the_shares_and_they_are_true_to_the_byte(played: tuple[Path, str, str]) -> None:
    _, stdout, _ = played
    shares = table(stdout)
    assert list(shares) == [f"10.244.1.{10 + number}" for number in range(6)]
    assert "The backends counted the same bytes themselves: yes, to the byte." in stdout
    assert "What was arranged: a client opened its pool" in stdout
    assert "is uneven: 10.244.1." in " ".join(stdout.split())
    assert "Cause: long-lived-connections." in " ".join(stdout.split())
    # also one of the short ones is long-lived where a slow machine kept it for an interval
    busy = [ip for ip, (_, count, long) in shares.items() if long > count / 10]
    assert busy == [max(shares, key=lambda ip: shares[ip][1])]  # one pod, and it is the busiest
    for connections, count, long in shares.values():
        assert (count - long) % 8500 == 0
        assert connections >= (count - long) // 8500
    assert max(map(len, stdout.split("\n\nThe rows are in")[0].splitlines())) <= 80


@run_for_real
def test_off_a_terminal_it_says_each_stage_once(played: tuple[Path, str, str]) -> None:
    assert stages(played[2]) == STAGES


@run_for_real
def test_the_commands_it_prints_work_verbatim(played: tuple[Path, str, str]) -> None:
    where, stdout, _ = played
    report, observe, python = (line.strip() for line in stdout.splitlines()[-3:])
    subprocess.run(report, shell=True, cwd=where, capture_output=True, text=True, check=True)
    assert (where / "report.html").read_text().startswith("<!doctype html>")
    assert shlex.split(observe)[-4:] == ["observe", "data", "-n", "5"]
    seen = subprocess.run(observe, shell=True, cwd=where, capture_output=True, text=True, check=True)
    assert len(seen.stdout.splitlines()) == 5
    done = subprocess.run(python, shell=True, cwd=where, capture_output=True, text=True, check=True)
    printed = re.findall(r"([\d.]+) +(\d+) +(\d+)$", done.stdout, re.MULTILINE)
    assert {ip: int(sent) + int(received) for ip, sent, received in printed} == {
        ip: count for ip, (_, count, _) in table(stdout).items()
    }
    assert all(int(received) == 16 * int(sent) for _, sent, received in printed)


@run_for_real
def test_the_dataset_is_readable_and_clean(played: tuple[Path, str, str]) -> None:
    where, stdout, _ = played
    rows = pandas.read_parquet(where / "data/connections")
    assert f"({len(rows):,} rows in" in stdout
    assert set(rows.nat) == {"dnat"}
    assert set(rows.comm) == {"lab-client"}
    assert int(rows.opened.sum()) == sum(connections for connections, _, _ in table(stdout).values())
    assert int(rows.closed.sum()) == int(rows.opened.sum()) == rows.conn_id.nunique()
    left = [path for path in (where / "data").rglob(".*") if path.name != ".lock-node-1"]
    assert left == []
    coverage = pandas.read_parquet(where / "data/coverage")
    assert not coverage.filter(like="lost_").sum().any()


def runs(output: Path) -> set[str]:
    """The runs that files are of: one has two files where it goes over an hour's end."""
    return {reader.metadata(path)["run_id"] for path in reader.files(output)}


@run_for_real
@pytest.mark.parametrize("cause", ["second-service", "none"])
def test_other_causes_and_a_directory_that_has_rows(cause: str, played: tuple[Path, str, str]) -> None:
    output = played[0] / "data"
    before = runs(output)
    told: list[str] = []
    result = demo.play(output, seconds=2.0, cause=cause, seed=2, progress=lambda stage, _: told.append(stage))
    assert list(dict.fromkeys(told)) == STAGES
    assert result.agrees
    # a row each, and another where a slow machine kept one for an interval
    assert 0 <= result.rows - sum(share.connections for share in result.shares) < 10
    assert len(runs(output) - before) == 1
    text = demo.render(result)
    busiest = max(result.shares, key=lambda share: share.bytes)
    others = {share.pod for share in result.shares if share.other_bytes}
    assert others == ({busiest.pod} if cause == "second-service" else set())
    assert f"10.244.1.1{busiest.pod[-1]}:8080 gets " in " ".join(text.split()) or cause == "none"


@dataclass
class Left:
    """What a running demo has, so that one can look for it afterwards. Numbers of programs and maps are not reused."""

    processes: dict[int, str] = field(default_factory=dict)  # pid → when it started
    namespaces: dict[int, str] = field(default_factory=dict)  # the same, of those in other network namespaces than ours
    programs: set[int] = field(default_factory=set)
    maps: set[int] = field(default_factory=set)

    def look(self, pid: int) -> None:
        """Adds all descendants of a process, and what they hold."""
        for process in descendants(pid):
            try:
                if not (when := started(process)):
                    continue  # it has ended
                self.processes[process] = when
                if os.stat(f"/proc/{process}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino:
                    self.namespaces[process] = when
                for descriptor in Path(f"/proc/{process}/fdinfo").iterdir():
                    text = descriptor.read_text()
                    self.programs |= {int(number) for number in re.findall(r"^prog_id:\s*(\d+)", text, re.MULTILINE)}
                    self.maps |= {int(number) for number in re.findall(r"^map_id:\s*(\d+)", text, re.MULTILINE)}
            except OSError:
                continue  # it has ended

    def alive(self) -> list[str]:
        """What is still there of it."""
        held = [f"process {pid}" for pid, when in self.processes.items() if started(pid) == when]
        held += [f"BPF program {number}" for number in self.programs if exists("bpf_prog_get_fd_by_id", number)]
        return held + [f"BPF map {number}" for number in self.maps if exists("bpf_map_get_fd_by_id", number)]


def started(pid: int) -> str:
    """When a process began (in ticks); empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def descendants(pid: int) -> set[int]:
    """Processes below one, however deep."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, below = set(), {pid}
    while below:
        below = {child for child, parent in parents.items() if parent in below}
        found |= below
    return found


def dialled(pid: int) -> int:
    """How many connections were begun in the network namespaces of the descendants of a process, ours left out."""
    most = 0
    for process in descendants(pid):
        try:
            if os.stat(f"/proc/{process}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino:
                names, values = (
                    line.split()
                    for line in Path(f"/proc/{process}/net/snmp").read_text().splitlines()
                    if line[:4] == "Tcp:"
                )
                most = max(most, int(values[names.index("ActiveOpens")]))
        except (OSError, ValueError):
            continue  # it has ended
    return most


def exists(call: str, number: int) -> bool:
    """Whether the kernel still has this BPF program or map."""
    descriptor = int(getattr(libbpf.library(), call)(ctypes.c_uint32(number)))
    if descriptor < 0:
        assert ctypes.get_errno() == errno.ENOENT
        return False
    os.close(descriptor)
    return True


def interfaces() -> list[str]:
    return sorted(os.listdir("/sys/class/net"))


def interrupt(
    tmp_path: Path, stage: str, end: Callable[[int], None], cause: str = "long-lived"
) -> tuple[int, str, str]:
    """Ends a demo at a stage and looks for what it left; its exit code, stdout and stderr."""
    links, left = interfaces(), Left()
    errors = tmp_path / "stderr"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            command("--output", tmp_path / "data", "--duration", "60s", "--cause", cause, "--seed", "1"),
            stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment(), start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            wait_until(lambda: f"{stage}:" in errors.read_text() or process.poll() is not None, f"stage {stage}")
            wait_until(lambda: len(descendants(process.pid)) >= 3 or process.poll() is not None, "children")
            if stage == "tracing":  # in the middle of it
                wait_until(lambda: dialled(process.pid) > 100 or process.poll() is not None, "connections")
            assert process.poll() is None, errors.read_text()
            left.look(process.pid)
            end(process.pid)
            stdout, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert len(left.processes) >= 3
    if stage == "tracing":
        assert len(left.namespaces) >= 10 + 9  # ten namespaces' holders, nine workers
        assert len(left.programs) >= 3
        assert len(left.maps) >= 9
    wait_until(lambda: not left.alive(), "everything to be gone")
    assert interfaces() == links
    return process.returncode, stdout, errors.read_text()


@run_for_real
@pytest.mark.parametrize("stage", ["building", "starting", "tracing"])
@pytest.mark.parametrize("whom", ["the process", "its group"])
def test_ctrl_c_ends_it_with_a_sentence_and_leaves_nothing(stage: str, whom: str, tmp_path: Path) -> None:
    kill = os.kill if whom == "the process" else os.killpg
    code, stdout, stderr = interrupt(tmp_path, stage, lambda pid: kill(pid, signal.SIGINT))
    assert (code, stdout) == (130, "")
    *said, last = stderr.splitlines()
    assert last == "vip-tracer: Interrupted."
    assert stages("\n".join(said)) == STAGES[: STAGES.index(stage) + 1]
    if stage == "tracing":  # the agent published what it had seen
        assert sum(len(batch) for path in reader.files(tmp_path / "data") for batch in reader.batches(path)) > 50
    assert not list((tmp_path / "data").rglob(".*.tmp"))
    assert not (tmp_path / "data/.demo-ready").exists()


@run_for_real
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_demo(how: signal.Signals, tmp_path: Path) -> None:
    code, stdout, _ = interrupt(tmp_path, "tracing", lambda pid: os.kill(pid, how))
    assert (code, stdout) == (-how, "")


@run_for_real
def test_an_agent_that_dies_is_a_sentence(tmp_path: Path) -> None:
    def kill_the_agent(told: str, _: str) -> None:
        if told == "stopping":
            (agent,) = [
                process
                for process in descendants(os.getpid())
                if str(tmp_path).encode() in Path(f"/proc/{process}/cmdline").read_bytes()
            ]
            os.kill(agent, signal.SIGKILL)

    with pytest.raises(TracerError, match=r"The agent ended with exit code -9. It said:\n.*ready after"):
        demo.play(tmp_path, seconds=0.5, cause="none", seed=1, progress=kill_the_agent)


@run_for_real
def test_an_agent_that_cannot_start_is_a_sentence_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(TracerError, match=r"The agent did not become ready. It said:\n.*cannot write to /proc"):
        demo.play(Path("/proc"), seconds=1, cause="none", seed=1, progress=lambda *_: None)


def test_on_a_terminal_one_line_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with demo.progress_line() as progress:
            progress("building", "x" * 200)
            progress("tracing", "50%")
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert "\n" not in shown
    first, second, last = (part for part in shown.split("\r\x1b[K")[1:])
    assert (len(first), second, last) == (79, "tracing: 50%", "")


def result(**change: int) -> demo.Result:
    shares = [
        demo.Share(f"web-{n}", f"10.244.1.1{n}", 99_999_999, 99_999_999_999, counted=99_999_999_999) for n in (0, 1)
    ]
    for name, value in change.items():
        setattr(shares[0], name, value)
    return demo.Result(Path("data"), "10.96.0.10:80", 3.2, "none", 12_345_678, shares)


def test_large_numbers_fit_and_a_difference_is_said() -> None:
    text = demo.render(result())
    assert "yes, to the byte" in text
    assert max(map(len, text.split("\n\nThe rows")[0].splitlines())) <= 80
    assert "themselves: NO." in demo.render(result(counted=1))


def test_nothing_at_all_is_no_traceback() -> None:
    empty = demo.Result(Path("data"), "10.96.0.10:80", 0.0, "none", 0, [demo.Share("web-0", "10.244.1.10")])
    assert "-" in demo.render(empty)


def test_commands_are_written_so_that_they_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "venv/bin"
    home.mkdir(parents=True)
    for name in ("python", "vip-tracer"):
        (home / name).touch(0o755)
    monkeypatch.setattr(sys, "executable", str(home / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert demo._typed("python") == ["venv/bin/python"]
    monkeypatch.chdir("/")
    assert demo._typed("vip-tracer") == [str(home / "vip-tracer")]
    monkeypatch.setenv("PATH", str(home))
    assert demo._typed("python") == ["python"]
    (home / "python").unlink()
    monkeypatch.setattr(sys, "executable", str(home / "python3"))
    assert demo._typed("python") == [str(home / "python3")]
