"""`vip-tracer top`: of a dataset, live, on a terminal and off it."""

import contextlib
import os
import pty
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from analysis import agents, cases, habits, traffic
from click.testing import CliRunner
from command_world import HOSTILE, Talk, command, dataset, environment, named, namespaces, rows, run, sentence
from datasets import publish

from tracer.cli import main
from tracer.errors import TracerError
from tracer.lab.cluster import Cluster
from tracer.store import reader
from tracer.store.compact import Chosen, compact


def test_the_newest_part_of_a_dataset(tmp_path: Path) -> None:
    publish(tmp_path, cases.troubled(habits.affinity, "session-affinity", "strong", 3).tables)
    done = run("top", tmp_path, "-n", "1")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "300 s up to 2026-07-31T13:00:00Z" in lines[0]
    assert [line.split()[0] for line in lines if "/tcp" in line] == ["shop/web:80/tcp", "shop/neighbour:80/tcp"]
    assert lines[1].split() == ["SERVICE", "/", "BACKEND", "NEW/S", "SHARE", "FAIR", "OPEN", "BYTES/S", "FAILED/S",
                                "CONNECT"]  # fmt: skip
    first = next(line.split() for line in lines if line.startswith("   web-"))
    assert first[3] == "12.5%"  # of eight endpoints, three of which got nothing in these five minutes
    only = run("top", tmp_path, "-n", "2", "--refresh", "100ms", "--service", "shop/neigh").stdout
    assert only.count("shop/neighbour") == 2
    assert "shop/web" not in only


def test_rates_are_over_what_was_watched(tmp_path: Path) -> None:
    world = cases.World(1, range_s=60)
    service = world.service("web", world.pods("web", 2))
    world.dial(service, world.pods("client", 2), traffic.requests(world.rng, 3000, traffic.shares(2, 0.0), (0.0, 60.0)))
    publish(tmp_path, agents.tables(world))
    lines = run("top", tmp_path, "-n", "1").stdout.splitlines()
    assert " 60 s up to " in lines[0]
    assert 40 < float(next(line for line in lines if "shop/web" in line).split()[1]) < 60


def test_hostile_names_drive_no_terminal(tmp_path: Path) -> None:
    texts = dict.fromkeys(("src_pod", "dst_service", "backend_pod", "dst_namespace"), f"[red]{HOSTILE}[/]")
    dataset(tmp_path, named(rows(400), **texts))
    done = run("top", tmp_path, "-n", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("\n", "").isprintable()
    assert "[red]" in done.stdout


def test_a_file_that_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    good, bad = dataset(tmp_path, rows(400), rows(400))
    bad.write_bytes(bad.read_bytes()[:-7])
    done = run("top", tmp_path, "-n", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Left out: cannot read {bad}" in done.stdout.replace("\n", "")
    assert "10.244.1.11" in done.stdout
    only_good = [line for line in done.stdout.splitlines() if "/tcp" in line or "10.244" in line]
    bad.unlink()
    alone = run("top", tmp_path, "-n", "1").stdout.splitlines()
    assert [line for line in alone if "/tcp" in line or "10.244" in line] == only_good
    good.write_bytes(b"")
    assert f"cannot read {good}" in sentence(run("top", tmp_path, "-n", "1"), 1)


def test_a_file_that_is_damaged_further_on_counts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, bad = dataset(tmp_path, rows(400), rows(400))
    tables = reader.tables

    def damaged(path: Path, *asked: Any, **more: Any) -> Iterator[pa.Table]:
        yield from tables(path, *asked, **more)
        if path == bad:
            raise TracerError(f"cannot read {bad}: its second half")

    monkeypatch.setattr(reader, "tables", damaged)
    text = CliRunner().invoke(main, ["top", str(tmp_path), "-n", "1"]).stdout
    assert "its second half" in text
    bad.unlink()
    alone = CliRunner().invoke(main, ["top", str(tmp_path), "-n", "1"]).stdout
    assert [line for line in text.splitlines() if "10.244" in line] == alone.splitlines()[2:]


def test_files_that_are_compacted_since_they_were_listed_are_listed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(tmp_path, rows(400), rows(400))
    tables, exchanged = reader.tables, list[int]()

    def meanwhile(path: Path, *asked: Any, **more: Any) -> Iterator[pa.Table]:
        if not exchanged:
            exchanged.extend(each.files for each in compact(tmp_path, Chosen(), pytest.fail))
        return tables(path, *asked, **more)

    monkeypatch.setattr(reader, "tables", meanwhile)
    done = CliRunner().invoke(main, ["top", str(tmp_path), "-n", "1"])
    assert exchanged == [2]
    assert done.exit_code == 0, done.output
    assert "10.244.1.11" in done.stdout
    assert "Left out" not in done.stdout


@pytest.mark.parametrize("table", ["coverage", "endpoints"])
def test_damaged_files_beside_the_rows_are_named(tmp_path: Path, table: str) -> None:
    publish(tmp_path, cases.troubled(habits.affinity, "session-affinity", "strong", 3).tables)
    bad = max((tmp_path / table).rglob("*.parquet"))
    bad.write_bytes(b"")
    done = run("top", tmp_path, "-n", "1")
    assert done.returncode == 0, done.stderr
    assert f"cannot read {bad}" in done.stdout.replace("\n", "")
    assert "shop/web:80/tcp" in done.stdout
    report = run("report", tmp_path, "--since", "10m")
    assert report.returncode == 0, report.stderr
    assert f"Left out: cannot read {bad}" in report.stderr
    assert run("report", tmp_path, "--since", "10m", "--strict").returncode == 1


def test_nothing_to_show_and_nonsense(tmp_path: Path) -> None:
    assert "no connections" in sentence(run("top", tmp_path, "-n", "1"), 3)
    assert "--window" in sentence(run("top", tmp_path, "--window", "1s", "--refresh", "5s"), 2)


def test_a_terminal_keeps_the_last_of_so_many_tables(tmp_path: Path) -> None:
    dataset(tmp_path, rows(400))
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command("top", tmp_path, "-n", "1"), stdout=theirs, stdin=theirs, env=environment(TERM="xterm-256color")
    ) as process:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while more := os.read(ours, 65536):
                seen += more
        assert process.wait(30) == 0
    os.close(ours)
    assert b"10.244.1.11" in seen
    assert b"\x1b[?1049h" not in seen


def test_a_terminal_gets_its_screen_back(tmp_path: Path) -> None:
    dataset(tmp_path, rows(400))
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command("top", tmp_path, "--refresh", "100ms"), stdout=theirs, stderr=subprocess.PIPE, stdin=theirs,
        env=environment(TERM="xterm-256color"),
    ) as process:  # fmt: skip
        os.close(theirs)
        seen = b""
        while seen.count(b"10.244.1.11") < 2:
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        while True:
            try:
                more = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            seen += more
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
    os.close(ours)
    assert seen.index(b"\x1b[?1049h") < seen.rindex(b"\x1b[?1049l")
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")


@pytest.mark.needs("bpf", "netns", "iptables")
def test_live_it_shows_what_happens(tmp_path: Path) -> None:
    with Cluster(backends=2, clients=1) as cluster:
        talk = Talk(tmp_path / "stderr")
        with talk.path.open("w") as stderr, subprocess.Popen(
            command("top", "--refresh", "500ms", "--window", "30s", *namespaces(cluster)),
            stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment(),
        ) as process:  # fmt: skip
            assert process.stdout is not None
            talk.wait("watching this node", process)
            cluster.clients[0].connect_many(40, cluster.vip())
            deadline = time.monotonic() + 30
            shown = ""
            while "10.96.0.10:80/tcp" not in shown or _rates(shown) < 40 / 30 - 0.1:
                assert time.monotonic() < deadline, shown
                shown = process.stdout.readline() if "SERVICE" in shown[-200:] else shown + process.stdout.readline()
            process.send_signal(signal.SIGTERM)
            process.stdout.read()
            assert process.wait(30) == 0, talk.path.read_text()
        assert "Traceback" not in talk


def _rates(shown: str) -> float:
    """New connections a second of the service in the newest table."""
    lines = [line.split() for line in shown.splitlines() if line.strip().startswith("10.96.0.10:80/tcp")]
    return float(lines[-1][1]) if lines else 0.0
