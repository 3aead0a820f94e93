"""`vip-tracer observe`: rows of a dataset, and live ones, until enough is seen."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from command_world import HOSTILE, Talk, command, dataset, environment, named, namespaces, rows, run, sentence

from tracer.cli import main
from tracer.lab.cluster import Cluster
from tracer.lab.netns import wait_until
from tracer.store import reader
from tracer.store.compact import Chosen, compact

live = pytest.mark.needs("bpf", "netns", "iptables")


def show(*arguments: str | Path) -> str:
    done = CliRunner().invoke(main, ["observe", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    return done.stdout


def test_a_directory_without_data_is_exit_code_3(tmp_path: Path) -> None:
    said = sentence(run("observe", tmp_path), 3)
    assert f"no connections in {tmp_path}" in said


def test_a_corrupt_file_among_good_ones_is_named_and_left_out(tmp_path: Path) -> None:
    _, bad, _ = dataset(tmp_path, rows(2), rows(2), rows(2))
    whole = bad.read_bytes()
    for broken in (b"", b"PAR1", whole[:-7], b"PAR1" + os.urandom(200) + b"PAR1", whole[:40] + bytes(60) + whole[100:]):
        bad.write_bytes(broken)
        done = CliRunner().invoke(main, ["observe", str(tmp_path), "-o", "csv"])
        assert done.exit_code == 1, done.stderr
        assert done.stderr.startswith(f"Left out: cannot read {bad}: ")
        assert "move the file out of the dataset" in done.stderr
        assert f"vip-tracer: not all rows of {tmp_path} were shown: 1 of its files" in done.stderr
        assert len(done.stdout.splitlines()) == 5  # a header, and the good ones' rows

    limited = CliRunner().invoke(main, ["observe", str(tmp_path), "-n", "3"])
    assert (limited.exit_code, len(limited.stdout.splitlines())) == (1, 3)


def test_files_that_are_compacted_away_meanwhile_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = dataset(tmp_path, *(rows(1) for _ in range(5)))
    files = reader.files

    def listed(*asked: Any) -> list[Path]:
        found = files(*asked)
        for path in paths[1:]:
            path.unlink()
        return found

    monkeypatch.setattr(reader, "files", listed)
    done = CliRunner().invoke(main, ["observe", str(tmp_path)])
    assert (done.exit_code, len(done.stdout.splitlines())) == (1, 1)
    assert done.stderr.startswith(f"vip-tracer: 4 files of {tmp_path} are gone since they were listed")
    assert len(done.stderr.splitlines()) == 1


def test_the_limit_counts_rows_across_files_and_batches(tmp_path: Path) -> None:
    dataset(tmp_path, rows(1500), rows(10))
    for limit in (1, 3, 1024, 1025, 1505, 1510, 9999):
        lines = show(tmp_path, "-n", str(limit), "-o", "json").splitlines()
        assert len(lines) == min(limit, 1510)
    assert len(show(tmp_path, "-n", "3").splitlines()) == 3
    assert len(show(tmp_path, "-n", "3", "-o", "csv").splitlines()) == 4


@pytest.mark.parametrize("form", ["table", "wide", "json", "csv"])
def test_every_format_and_nothing_hostile(form: str, tmp_path: Path) -> None:
    texts = dict.fromkeys(("comm", "src_pod", "dst_service", "backend_pod", "dst_namespace"), HOSTILE)
    dataset(tmp_path, named(rows(4), **texts), rows(1))
    text = show(tmp_path, "-o", form)
    assert text.replace("\n", "").isprintable()
    if form == "csv":
        found = list(csv.DictReader(io.StringIO(text)))
        assert text.count("node,ts,conn_id") == 1
    else:
        found = [json.loads(line) for line in text.splitlines()] if form == "json" else text.splitlines()
    assert len(found) == 5
    if form in ("csv", "json"):
        assert [int(row["conn_id"]) for row in found] == [1, 2, 3, 4, 1]
        assert found[-1]["comm"] == "curl"


def test_a_locale_without_arrows_is_no_traceback(tmp_path: Path) -> None:
    dataset(tmp_path, rows(1))
    done = run("observe", tmp_path, env={"PYTHONIOENCODING": "latin-1"}, encoding="latin-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u21d2 10.244.1.11:8080" in done.stdout


def test_head_is_enough(tmp_path: Path) -> None:
    dataset(tmp_path, rows(20_000))
    with subprocess.Popen(
        command("observe", tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0


@contextmanager
def started(tmp_path: Path, *arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], Talk]]:
    talk = Talk(tmp_path / "stderr")
    with (
        talk.path.open("w") as stderr,
        subprocess.Popen(
            command("observe", *arguments), stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment()
        ) as process,
    ):
        try:
            yield process, talk
        finally:
            process.kill()


def finish(process: subprocess.Popen[str], talk: Talk) -> list[str]:
    """The rest of its output, when it has ended well."""
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 0, talk.path.read_text()
    assert "Traceback" not in talk
    return text.splitlines()


def test_following_a_dataset_shows_what_is_published_meanwhile(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    with started(tmp_path, root, "-f", "-o", "json") as (process, talk):
        assert process.stdout is not None
        dataset(root, rows(2))
        first = [process.stdout.readline() for _ in range(2)]
        dataset(root, rows(2), rows(1))
        first.append(process.stdout.readline())
        assert [json.loads(line)["conn_id"] for line in first] == [1, 2, 1]
        process.send_signal(signal.SIGINT)
        assert finish(process, talk) == []
        assert talk.path.read_text() == ""


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Following, it looks again at once."""
    monkeypatch.setattr(sys.modules["tracer.cli.observe"].time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("restless")
def test_following_shows_no_row_twice_and_says_what_it_cannot_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are merged that were shown; then together with one that was not."""
    root, files, turn = tmp_path / "data", reader.files, iter(range(9))
    root.mkdir()

    def merge_all() -> None:
        assert list(compact(root, Chosen(), pytest.fail))

    def listed(*asked: Any) -> list[Path]:
        number = next(turn)
        if number == 0:
            dataset(root, rows(2), rows(2))
        if number == 1:
            merge_all()  # which were shown
        if number == 2:
            _late(root, 3)
        found = files(*asked)
        if number == 3:
            found = []
            _late(root, 4)
            merge_all()  # the merged file before, the late one that was shown, and one that was not
        if number == 5:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(reader, "files", listed)
    done = CliRunner().invoke(main, ["observe", "-f", "-o", "json", str(root)])
    assert [json.loads(line)["conn_id"] for line in done.stdout.splitlines()] == [1, 2, 1, 2, 3]
    assert "had been shown before" in done.stderr
    assert done.exit_code == 1


@pytest.mark.usefixtures("restless")
def test_following_shows_a_file_that_was_merged_before_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, files, turn = tmp_path / "data", reader.files, iter(range(9))
    dataset(root, rows(2), rows(2))

    def listed(*asked: Any) -> list[Path]:
        number, found = next(turn), files(*asked)
        if number == 0:
            assert list(compact(root, Chosen(), pytest.fail))
        if number == 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(reader, "files", listed)
    done = CliRunner().invoke(main, ["observe", "-f", "-o", "json", str(root)])
    assert (done.exit_code, done.stderr) == (0, "")
    assert sorted(json.loads(line)["conn_id"] for line in done.stdout.splitlines()) == [1, 1, 2, 2]


def _late(root: Path, conn_id: int) -> None:
    """Another file of the same hour, with a row of this id."""
    (path,) = dataset(root / "late", rows(1, lambda records: records.__setitem__("conn_id", conn_id)))
    path.rename(
        root / path.relative_to(root / "late").with_name(path.name.replace("-0123456789ab", f"-{conn_id:012x}"))
    )


def test_following_ends_by_duration_limit_or_when_nobody_reads(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    assert show(root, "-f", "--duration", "100ms") == ""
    dataset(root, rows(2))
    assert len(show(root, "-f", "-n", "1").splitlines()) == 1
    with started(tmp_path, root, "-f") as (process, _):
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 0


@live
def test_live_rows_have_the_backend_that_accepted(cluster: Cluster, tmp_path: Path) -> None:
    with started(tmp_path, *namespaces(cluster), "-o", "json") as (process, talk):
        assert process.stdout is not None
        talk.wait("observing", process)
        before = {pod.ips[4]: len(s.ledger()) for pod, s in zip(cluster.backend_pods, cluster.servers, strict=True)}
        ledger = cluster.clients[0].connect_many(5, cluster.vip(), 300, 700)
        cluster.settle()
        accepted = {
            address: [int(port) for port in server.ledger()["peer_port"]][before[address] :]
            for address, server in zip(before, cluster.servers, strict=True)
        }
        found = [json.loads(process.stdout.readline()) for _ in range(5)]
        (open_one,) = cluster.clients[0].hold(1, cluster.vip())
        process.send_signal(signal.SIGINT)
        rest = [json.loads(line) for line in finish(process, talk)]
    cluster.clients[0].release([open_one["number"]])
    truth = {port: address for address, ports in accepted.items() for port in ports}
    assert {row["src_port"]: row["backend_ip"] for row in found} == truth
    assert sorted(truth) == sorted(int(port) for port in ledger["local_port"])
    for row in found:
        assert (row["nat"], row["bytes_sent"], row["bytes_received"], row["comm"]) == ("dnat", 300, 700, "lab-client")
        assert (row["opened"], row["closed"], row["backend_port"]) == (True, True, 8080)
    (last,) = rest  # the connection that is still open has its row at the end
    assert last["src_port"] == open_one["local_port"]
    assert (last["opened"], last["closed"], last["nat"]) == (True, False, "dnat")
    assert "lost" not in talk


@live
def test_live_stops_by_itself_at_the_limit(cluster: Cluster, tmp_path: Path) -> None:
    with started(tmp_path, *namespaces(cluster), "-n", "2") as (process, talk):
        talk.wait("observing", process)
        (held,) = cluster.clients[0].hold(1, cluster.vip())  # its last row is one too many
        cluster.clients[0].connect_many(3, cluster.vip())
        lines = finish(process, talk)
    cluster.clients[0].release([held["number"]])
    assert len(lines) == 2
    assert all(" ⇒ 10.244.1.1" in line for line in lines)


@live
def test_live_ends_when_nobody_reads_although_nothing_happens(cluster: Cluster, tmp_path: Path) -> None:
    with started(tmp_path, *namespaces(cluster)) as (process, talk):
        assert process.stdout is not None
        talk.wait("observing", process)
        process.stdout.close()
        assert process.wait(30) == 0
        assert "Traceback" not in talk


@live
def test_live_ends_when_nobody_reads_in_the_middle_of_traffic(cluster: Cluster, tmp_path: Path) -> None:
    with started(tmp_path, *namespaces(cluster)) as (process, talk):
        assert process.stdout is not None
        talk.wait("observing", process)
        cluster.clients[0].connect_many(1, cluster.vip())
        assert process.stdout.readline()
        cluster.clients[0].begin_connects(200, cluster.vip(), rate=1000)
        process.stdout.close()
        wait_until(lambda: process.poll() is not None, "observe to end")
        cluster.clients[0].finish_connects()
        assert process.returncode == 0
        assert "Traceback" not in talk


@live
def test_a_namespace_that_is_not_there_is_a_sentence() -> None:
    for option in ("--netns", "--only-netns", "--ignore-netns"):
        said = sentence(run("observe", option, "/nonexistent/ns"), 1)
        assert "The network namespace /nonexistent/ns cannot be" in said
        assert "check the path" in said
