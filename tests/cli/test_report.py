"""`vip-tracer report`: the answer first, then the proof; in each format, of hostile and of broken datasets."""

import csv
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from analysis import agents, cases, habits, troubles
from command_world import HOSTILE, dataset, named, rows, run, sentence
from datasets import publish


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in which a backend of shop/web joined late."""
    root = tmp_path_factory.mktemp("late")
    publish(root, cases.troubled(troubles.late_joiner, "late-backend", "strong", 3).tables)
    return root


def test_the_answer_comes_first(late: Path) -> None:
    done = run("report", late)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[2].startswith("shop/web:80/tcp is uneven: web-")
    assert " times its even share of the " in lines[2]
    assert ". Cause: late-backend. " in lines[2]
    table = [line.split()[:2] for line in lines if line.startswith("shop/") and "/tcp  " in line]
    assert table == [["shop/web:80/tcp", "uneven"], ["shop/neighbour:80/tcp", "balanced"]]
    assert "Nothing is wrong with the balancing" in done.stdout
    assert "rows: dst_namespace == shop and dst_service == web and backend_ip in" in done.stdout


def test_one_service_in_depth(late: Path) -> None:
    done = run("report", late, "--service", "shop/neighbour")
    assert "shop/neighbour:80/tcp: balanced" in done.stdout
    assert "shop/web" not in done.stdout
    assert done.stdout.count("neighbour-") == 4  # its backends
    said = sentence(run("report", late, "--service", "shop/nobody"), 3)
    assert "shop/nobody" in said


def test_json_has_everything_and_csv_a_row_per_backend(late: Path) -> None:
    found = json.loads(run("report", late, "-o", "json").stdout)
    web = found["services"][0]
    assert (web["service"], web["verdict"], web["causes"][0]["name"]) == ("shop/web:80/tcp", "uneven", "late-backend")
    assert sum(each["connections_share"] for each in web["backends"]) == pytest.approx(1)
    table = list(csv.DictReader(io.StringIO(run("report", late, "-o", "csv").stdout)))
    assert len(table) == sum(len(each["backends"]) for each in found["services"])
    assert {row["cause"] for row in table if row["service"] == "shop/web:80/tcp"} == {"late-backend"}


def test_a_range_without_rows_is_exit_code_3(late: Path) -> None:
    assert "widen the range" in sentence(run("report", late, "--from", "2001-01-01", "--to", "2001-01-02"), 3)
    assert "no time" in sentence(run("report", late, "--from", "yesterday"), 2)
    assert "--since" in sentence(run("report", late, "--since", "1h", "--from", "2026-07-31"), 2)


def test_a_part_of_the_range(late: Path) -> None:
    whole, part = (json.loads(run("report", late, "-o", "json", *more).stdout) for more in ([], ["--since", "10m"]))
    assert part["end"] == whole["end"]
    assert part["rows"] < whole["rows"] / 4
    begin = run("report", late, "-o", "json", "--from", part["begin"], "--to", part["end"])
    assert json.loads(begin.stdout)["rows"] == part["rows"]


def test_a_corrupt_file_is_left_out_and_said_or_an_error(tmp_path: Path) -> None:
    paths = publish(tmp_path, cases.troubled(habits.heavy_client, "few-clients", "strong", 2).tables)
    bad = next(path for path in paths if "connections" in path.parts)
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-8])
    done = run("report", tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Left out: cannot read {bad}" in done.stderr
    assert "shop/web:80/tcp" in done.stdout
    assert str(bad) in sentence(run("report", tmp_path, "--strict"), 1)


def test_without_names_endpoints_and_coverage(tmp_path: Path) -> None:
    case = agents.tables(_skewed(), named=False)
    publish(tmp_path, {"connections": case["connections"]})
    done = run("report", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no endpoints table" in done.stderr
    assert "no coverage table" in done.stderr
    assert "10.96.0.1:80/tcp is uneven" in done.stdout or "10.96.0.2:80/tcp is uneven" in done.stdout


def _skewed() -> cases.World:
    world = cases.World(4)
    cases.balanced(world, "even", 3000, "requests", 5)
    habits.heavy_client(world, 1.0)
    return world


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_hostile_names_drive_no_terminal(form: str, tmp_path: Path) -> None:
    texts = dict.fromkeys(("src_pod", "dst_service", "backend_pod", "dst_namespace"), HOSTILE)
    dataset(tmp_path, named(rows(400), **texts))
    done = run("report", tmp_path, "-o", form)
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("\n", "").isprintable()


def test_a_newer_minor_schema_and_a_lacking_column(tmp_path: Path) -> None:
    content = rows(300)
    newer = content.append_column("from_the_future", pa.array(range(300)))
    older = content.drop_columns(["backend_pod", "rtt_us", "connect_latency_us"])
    dataset(tmp_path, newer, older)
    done = run("report", tmp_path, "-o", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 600


def test_an_empty_directory_is_exit_code_3(tmp_path: Path) -> None:
    assert "no connections" in sentence(run("report", tmp_path), 3)


def test_the_page_is_written_whole_or_not_at_all(late: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    done = run("report", late, "--html", target)
    assert done.returncode == 0, done.stderr
    assert target.read_text().startswith("<!doctype html>")
    assert target.read_text().rstrip().endswith("</html>")
    assert list(tmp_path.iterdir()) == [target]
    assert "cannot write" in sentence(run("report", late, "--html", tmp_path / "missing" / "report.html"), 1)


def test_a_place_that_is_none(tmp_path: Path) -> None:
    assert "no directory" in sentence(run("report", tmp_path / "missing"), 2)
    assert "cannot be opened" in sentence(run("report", "nonsense://bucket"), 2)
    assert "no directory /missing" in sentence(run("report", "file:///missing"), 2)


def test_an_address_is_read_like_a_directory(late: Path) -> None:
    here, there = (run("report", place, "-o", "json").stdout for place in (late, late.as_uri()))
    assert json.loads(here)["services"] == json.loads(there)["services"]


def test_engines_go_with_their_options(late: Path) -> None:
    assert "--scheduler" in sentence(run("report", late, "--engine", "dask"), 2)
    assert "--scheduler" in sentence(run("report", late, "--engine", "local", "--scheduler", "tcp://127.0.0.1:1"), 2)


def test_a_page_goes_where_a_link_leads_and_into_a_pipe(late: Path, tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.touch()
    link.symlink_to(target)
    os.mkfifo(pipe)
    run("report", late, "--html", link)
    assert link.is_symlink()
    assert target.read_text().startswith("<!doctype html>")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        assert run("report", late, "--html", pipe).returncode == 0
        assert read.result(30) == target.read_text()
    assert pipe.is_fifo()


def test_rows_without_a_virtual_address_are_no_balance(tmp_path: Path) -> None:
    content = rows(300)
    unknown = pa.array([None] * 300, pa.string()).cast(content.schema.field("backend_ip").type)
    for name, column in (("nat", pa.array(["unknown"] * 300)), ("backend_ip", unknown)):
        at = content.schema.get_field_index(name)
        content = content.set_column(at, content.schema.field(at), column.cast(content.schema.field(at).type))
    dataset(tmp_path, content)
    done = run("report", tmp_path)
    assert "No service is judged" in done.stdout
    assert "balanced" not in done.stdout


def test_a_zone_that_nobody_knows_is_unknown(tmp_path: Path) -> None:
    world = cases.World(4)
    habits.heavy_client(world, 1.0)
    publish(tmp_path, agents.tables(world, named=False))
    words = run("report", tmp_path, "-o", "wide").stdout.split()
    assert "unknown" in words
    assert "nan" not in words


def test_a_table_is_no_dataset_and_a_range_has_an_end(late: Path) -> None:
    assert f"give the directory above it, {late}" in sentence(run("report", late / "connections"), 3)
    given = run("report", late, "--from", "2030-01-01", "--to", "2029-01-01")
    assert "not before its end" in sentence(given, 2)


def test_evidence_is_of_the_service(late: Path) -> None:
    done = run("report", late, "-o", "json")
    causes = [cause for service in json.loads(done.stdout)["services"] for cause in service["causes"] if cause["rows"]]
    assert causes
    assert all(["dst_service", "==", "web"] in cause["rows"] for cause in causes)
