"""What all commands have in common: help, exit codes, sentences instead of tracebacks, environment variables."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from command_world import HOSTILE, ROOT, dataset, environment, rows, run, sentence
from privilege import nobody

from tracer import schema
from tracer.cli import main
from tracer.cli.demo import CAUSES
from tracer.errors import NoDataError, TracerError, UsageError
from tracer.lab import scenario


@pytest.mark.parametrize("name", ["", *main.commands])
def test_help_is_there_and_loads_nothing_heavy(name: str) -> None:
    lines = f"""
import sys
from tracer.cli import main
try:
    main({[name, "--help"] if name else ["--help"]!r})
except SystemExit as end:
    code = end.code
heavy = sorted(set(sys.modules) & {{"numpy", "pyarrow", "pandas", "bcc", "tracer.kernel", "asyncio"}})
print(heavy, code, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", lines], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr == "[] 0\n"
    assert done.stdout.startswith("Usage: ")
    assert all(option in done.stdout for option in ("-h, --help", "Options:"))


def test_every_option_is_explained() -> None:
    for command in main.commands.values():
        assert command.help
        for option in command.params:
            if isinstance(option, click.Option) and option.name != "output_format":
                assert option.help, f"{command.name} {option.opts}"


def test_the_causes_are_the_laboratorys() -> None:
    assert set(CAUSES) == {"random", *scenario.CAUSES}


def test_version() -> None:
    done = CliRunner().invoke(main, ["--version"])
    assert done.stdout == f"vip-tracer, version {importlib.metadata.version('vip-tracer')}\n"


@pytest.mark.parametrize(
    ("error", "code"), [(TracerError("a b"), 1), (UsageError("a b"), 2), (NoDataError("a b"), 3),
                        (PermissionError(13, "a b", "c"), 1), (OSError("a b"), 1), (KeyboardInterrupt(), 130)],
)  # fmt: skip
def test_errors_are_sentences_with_exit_codes(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise error

    monkeypatch.setattr(schema, "as_json", fail)
    done = CliRunner().invoke(main, ["schema", "-o", "json"])
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.startswith("vip-tracer: Interrupted" if code == 130 else "vip-tracer: a b")


def test_a_sentence_leaves_the_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise TracerError(f"one {HOSTILE.replace(chr(10), '')}\ntwo")

    monkeypatch.setattr(schema, "as_json", fail)
    done = CliRunner().invoke(main, ["schema", "-o", "json"])
    first, second, rest = done.stderr.split("\n")
    assert first.isprintable()
    assert (second, rest) == ("two", "")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "as_json", lambda: 1 / 0)
    assert isinstance(CliRunner().invoke(main, ["schema", "-o", "json"]).exception, ZeroDivisionError)


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["--nonsense"], ["agent"], ["agent", "--nonsense"], ["observe", "/nonexistent"],
                  ["observe", "-f"], ["observe", "-n", "0"], ["observe", "-o", "xml"], ["schema", "extra"],
                  ["demo", "--cause", "gremlins"], ["demo", "--seed", "x"]],
)  # fmt: skip
def test_wrong_usage(arguments: list[str]) -> None:
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.strip()


def test_output_that_is_a_file_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("agent", "demo"):
        done = CliRunner().invoke(main, [name, "--output", str(tmp_path / "file")])
        assert (done.exit_code, done.stdout) == (2, "")
        assert "is a file" in done.stderr


@pytest.mark.needs("bpf")
@pytest.mark.parametrize("name", ["agent --output {}", "observe", "demo --output {}"])
def test_without_root_it_says_run_as_root(name: str, tmp_path: Path) -> None:
    said = sentence(run(*name.format(tmp_path / "out").split(), preexec_fn=nobody), 1)
    assert "Run as root" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.needs("bpf")
def test_doctor_without_root_says_what_is_missing() -> None:
    done = run("doctor", preexec_fn=nobody)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "MISSING  privilege" in done.stdout
    assert "cannot be traced" in done.stderr
    as_json = run("doctor", "-o", "json", preexec_fn=nobody)
    assert as_json.returncode == 1
    states = {check["name"]: check["state"] for check in json.loads(as_json.stdout)}
    assert states["privilege"] == "missing"


@pytest.mark.needs("bpf", "netns")
def test_doctor_with_root_finds_a_node_that_can_be_traced() -> None:
    done = run("doctor", "-o", "json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "This node can be traced.\n"
    found = {check["name"]: check["state"] for check in json.loads(done.stdout)}
    assert found["programs"] == "ok"
    assert "missing" not in found.values()


def test_schema_in_its_formats() -> None:
    page = CliRunner().invoke(main, ["schema", "-o", "markdown"])
    assert page.stdout == (ROOT / "docs/schema.md").read_text(encoding="utf-8")
    document = json.loads(CliRunner().invoke(main, ["schema", "-o", "json"]).stdout)
    assert [column["name"] for column in document["tables"]["connections"]][:3] == ["node", "ts", "conn_id"]
    for table, columns in schema.TABLES.items():
        done = CliRunner().invoke(main, ["schema", "--of", table])
        assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == [column.name for column in columns]


def test_options_are_environment_variables() -> None:
    done = CliRunner(env={"VIP_TRACER_SCHEMA_OF": "coverage"}).invoke(main, ["schema"])
    assert done.stdout == CliRunner().invoke(main, ["schema", "--of", "coverage"]).stdout
    done = CliRunner(env={"VIP_TRACER_AGENT_OUTPUT": "x", "VIP_TRACER_AGENT_RING_BYTES": "5000"}).invoke(
        main, ["agent"]
    )
    assert done.exit_code == 2
    assert "--ring-bytes" in done.stderr
    done = CliRunner(env={"VIP_TRACER_DOCTOR_ONLY_NETNS": "/a /b", "VIP_TRACER_DOCTOR_IGNORE_NETNS": "/c"}).invoke(
        main, ["doctor"]
    )
    assert "not both at once" in done.stderr


def test_a_deployments_own_variables_do_no_harm() -> None:
    # a chart's version, and what Kubernetes sets for a service called vip-tracer or vip-tracer-agent
    foreign = {
        "VIP_TRACER_VERSION": "1.2.3", "VIP_TRACER_PORT": "tcp://10.96.0.1:80", "VIP_TRACER_SERVICE_HOST": "10.96.0.1",
        "VIP_TRACER_AGENT_PORT": "tcp://10.96.0.1:80", "VIP_TRACER_SCHEMA_PORT_80_TCP": "tcp://10.96.0.1:80",
    }  # fmt: skip
    assert CliRunner(env=foreign).invoke(main, ["schema"]).exit_code == 0


def test_a_full_disk_behind_stdout_is_a_sentence() -> None:
    with open("/dev/full", "w", encoding="ascii") as full:
        done = run("schema", stdout=full)
    assert done.returncode == 1
    assert done.stderr == "vip-tracer: No space left on device: the command could not go on.\n"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as reader:
        reader.wait()
        done = run("schema", stdout=reader.stdin)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("lacking", ["pandas", "jinja2"])
def test_what_a_node_does_without_is_named(lacking: str, tmp_path: Path) -> None:
    """An installation without the extra "analysis": the agent's commands work, a report says what it needs."""

    def odd(records: np.ndarray) -> None:
        records["ts"] += 7  # nanoseconds, which datetime does not have

    dataset(tmp_path / "data", rows(3, odd))
    code = f"""
import sys
class Lacking:
    def find_spec(self, name, *_):
        if name == {lacking!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Lacking())
from tracer.cli import main
main()
"""
    report, observe = (
        subprocess.run(
            [sys.executable, "-c", code, name, str(tmp_path / "data"), *more],
            env=environment(), capture_output=True, text=True, check=False, timeout=60,
        )
        for name, more in (("report", ["--html", str(tmp_path / "page.html")]), ("observe", []))
    )  # fmt: skip
    assert "pip install 'vip-tracer[analysis]'" in sentence(report, 1)
    assert f"'vip-tracer report' needs {lacking}, which" in report.stderr
    assert observe.returncode == 0, observe.stderr
    assert len(observe.stdout.splitlines()) == 3


@pytest.mark.parametrize(
    "arguments",
    [["observe", ""], ["top", ""], ["name", ""], ["report", ""], ["compact", ""], ["export", "", "/x"],
     ["export", "/tmp", ""], ["agent", "--output", ""], ["demo", "--output", ""], ["report", "x", "--html", ""]],
)  # fmt: skip
def test_an_empty_path_is_not_the_current_directory(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "it is empty: is a variable not set?" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_address_where_a_path_is_wanted(tmp_path: Path) -> None:
    for name in ("observe", "top", "name"):
        done = CliRunner().invoke(main, [name, "s3://bucket/prefix"])
        assert done.exit_code == 2
        assert "s3://bucket/prefix is an address" in done.stderr


@pytest.mark.parametrize("name", ["observe", "top"])
@pytest.mark.parametrize(
    "given", [["--roles", "server"], ["--only-virtual"], ["--interval", "5s"], ["--netns", "x"], ["--node", "n"]]
)
def test_options_of_live_tracing_do_not_go_with_a_dataset(name: str, given: list[str], tmp_path: Path) -> None:
    dataset(tmp_path, rows(10))
    said = sentence(run(name, tmp_path, "-n", "1", *given), 2)
    assert f"{given[0]} is for live tracing and does nothing to {tmp_path}" in said


def test_compacting_nothing_says_so(tmp_path: Path) -> None:
    done = run("compact", tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert "nothing to merge" in done.stderr
