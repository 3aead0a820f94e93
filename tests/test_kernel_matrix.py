"""What the kernel matrix keeps, and what it calls known; guests are not booted here (`make test-kernels`)."""

import json
from pathlib import Path

import pytest

from tests.vm import depends, matrix

FILES = {
    "bpf/tracer.c": "int i;",
    "tests/conftest.py": "",
    "tests/world.py": "import tracer.record\n",
    "tests/scenarios/test_one.py": "from world import agent\nfrom scenarios.truth import lives\n",
    "tests/scenarios/truth.py": "",
    "tests/other.py": "",
    "tracer/__init__.py": "def open():\n    from tracer.analysis import report\n",
    "tracer/agent.py": "from tracer.kernel import ring\n",
    "tracer/record.py": "",
    "tracer/cli/agent.py": "",
    "tracer/analysis/__init__.py": "",
    "tracer/analysis/report.py": "",
    "tracer/kernel/__init__.py": "",
    "tracer/kernel/ring.py": "def read():\n    from tracer import clock\n",
    "tracer/kernel/loader.py": "",
    "tracer/clock.py": "",
    "tracer/lab/cluster.py": "",
}
TEST = "tests/scenarios/test_one.py"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def changed(root: Path, name: str, change: str = "j = 1;") -> bool:
    """Whether the digest is another after such a line was added to that file."""
    before = depends.digest(TEST, root)
    with open(root / name, "a", encoding="utf-8") as file:
        file.write(f"{change}\n")
    return depends.digest(TEST, root) != before


@pytest.mark.parametrize("name", [
    TEST, "bpf/tracer.c", "tests/conftest.py", "tests/world.py", "tests/scenarios/truth.py", "tracer/record.py",
    "tracer/agent.py", "tracer/kernel/ring.py", "tracer/clock.py", "tracer/kernel/loader.py", "tracer/lab/cluster.py",
])  # fmt: skip
def test_a_result_depends_on_what_the_test_runs(root: Path, name: str) -> None:
    assert changed(root, name)


@pytest.mark.parametrize("name", ["tests/other.py", "tracer/analysis/report.py", "tracer/__init__.py"])
def test_a_result_does_not_depend_on_the_rest(root: Path, name: str) -> None:
    assert not changed(root, name)


def test_a_result_does_not_depend_on_comments_and_docstrings(root: Path) -> None:
    assert not changed(root, "tests/world.py", "# a comment\n\n")
    assert changed(root, "tests/world.py", "def world() -> int:\n    return 1")
    assert not changed(root, "tests/world.py", "# and")
    (root / "tracer/clock.py").write_text('"""Said."""\ndef now():\n    "Of the day."\n    return 1\n')
    before = depends.digest(TEST, root)
    (root / "tracer/clock.py").write_text('"""Said otherwise."""\n\n\ndef now():\n    return 1\n')
    assert depends.digest(TEST, root) == before


def test_real_scenarios_need_no_report_but_those_that_report() -> None:
    for test in sorted((depends.ROOT / "tests/scenarios").glob("test_*.py")):
        found = depends.files(f"tests/scenarios/{test.name}")
        assert {"bpf/tracer.c", "tests/agent_world.py", "tracer/kernel/flows.py", "tracer/lab/rules.py"} <= set(found)
        reports = any(name.startswith("tracer/analysis/") for name in found)
        assert reports == (test.name == "test_verdicts.py"), test.name


def test_what_passed_is_known_and_what_failed_or_broke_off_is_not(root: Path) -> None:
    (root / "kernels" / "suite").mkdir(parents=True)
    (root / "kernels" / "suite" / "version").write_text("5.10.0-x\n")
    names = [f"{TEST}::test_{name}" for name in ("a", "b[1]", "b[2]", "c", "d")]
    store = matrix._store(root, "5.10.0-x", root, TEST)
    store.parent.mkdir(parents=True)
    lines = [
        {"name": names[0], "outcome": "failed", "said": "why"}, {"name": names[0], "outcome": "passed"},
        {"name": names[1], "outcome": "passed"}, {"name": names[2], "outcome": "failed", "said": "because"},
        {"name": names[3], "outcome": "skipped: mptcp: none here"}, {"name": "another", "outcome": "failed"},
    ]  # fmt: skip
    store.write_text("\n".join(map(json.dumps, lines)) + '\n{"name": "tests/scen')
    kernel = matrix.known(root, root, "suite", names)
    assert list(kernel.outcomes.values()) == ["passed", "passed", "failed", "skipped: mptcp: none here", "not run"]
    assert kernel.failed == [names[2], names[4]]
    assert kernel.said[names[2]] == "because"
    assert matrix.table([kernel]).splitlines() == [
        "| scenario | 5.10.0-x |",
        "|---|---|",
        "| one: a | 1 passed |",
        "| one: b | 1 passed, **1 failed** |",
        "| one: c | not possible (mptcp: none here) |",
        "| one: d | **1 not run** |",
    ]
    # another program, and nothing is known
    assert changed(root, "bpf/tracer.c")
    assert matrix.known(root, root, "suite", names).failed == names


def test_the_page_keeps_what_is_around_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{matrix._BEGIN}\nold\n{matrix._END}\nafter\n")
    matrix.write_page([matrix.Kernel("suite", "1.0", {"tests/test_x.py::test_it_works": "passed"})], page)
    assert page.read_text() == (
        f"before\n{matrix._BEGIN}\n| scenario | 1.0 |\n|---|---|\n| x: it works | 1 passed |\n{matrix._END}\nafter\n"
    )
