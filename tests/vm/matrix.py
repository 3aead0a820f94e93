"""The scenario suite on other kernels: boots each under qemu, runs the tests inside, prints a table.

    python -m tests.vm.matrix [--kernel SUITE]... [--short] [--dir DIR] [--again] [--page]

A kernel is what a Debian suite's cloud image leads to today. Nothing of the host is changed: packages are unpacked in
DIR, the guest writes to a file system in its memory. Results are kept in DIR by kernel and by what is tested, and not
made again. The exit code is 1 if anything failed. `--page` writes the table into docs/compatibility.md.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
#: Debian 11, 12, 13, and the newest kernel of its backports.
SUITES = ("bullseye-security", "bookworm", "trixie", "trixie-backports")
#: What a result depends on.
TESTED = ("bpf", "tracer", "tests", "pyproject.toml")
#: What nobody loads by itself when the lab needs it.
MODULES = "nf_conntrack nf_conntrack_netlink br_netfilter ip_vs ip_vs_rr"
#: A guest is 10 to 20 times as slow where Python or a compiler works.
WHOLE = ("tests/scenarios", "tests/vm/inside", "tests/test_agent.py", "tests/kernel/test_capture.py")
SHORT = (
    "tests/vm/inside",
    "tests/test_agent.py::test_a_row_says_what_the_client_knows",
    "tests/test_agent.py::test_a_refused_connection_has_its_backend",
    "tests/test_agent.py::test_what_was_there_before_the_start_is_found_and_counted_from_then",
    "tests/test_agent.py::test_a_full_ring_loses_rows_by_count",
    "tests/test_agent.py::test_kill_leaves_nothing_in_the_kernel_and_no_half_file",
    "tests/scenarios/test_dataplanes.py::test_what_comes_from_outside_is_a_row_with_its_backend",
)
_BEGIN, _END = "<!-- made by tests/vm/matrix.py -->", "<!-- end -->"


@dataclasses.dataclass(frozen=True)
class Result:
    """One kernel's: version, outcome by test ("passed", "failed", "skipped: why"), seconds, the last that was said."""

    suite: str
    version: str
    outcomes: dict[str, str]
    seconds: float
    said: str

    @property
    def failed(self) -> list[str]:
        """Tests that did not pass, skips left out."""
        return [name for name, outcome in self.outcomes.items() if outcome == "failed"]


def snapshot(where: Path) -> tuple[str, Path]:
    """A copy of what is tested, which nobody edits under a running guest, and a digest of it."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "--", *TESTED], cwd=ROOT, capture_output=True, text=True,
        check=True,
    ).stdout.split()  # fmt: skip
    files = {name: (ROOT / name).read_bytes() for name in sorted(set(names)) if (ROOT / name).is_file()}
    whole = hashlib.sha256()
    for name, content in files.items():
        whole.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    digest = whole.hexdigest()[:16]
    copy = where / "trees" / digest
    for name, content in files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    return digest, copy


def run(where: Path, tree: tuple[str, Path], suite: str, tests: tuple[str, ...], again: bool) -> Result:
    """Boots one kernel and runs the tests in it, unless that was done before."""
    version = (where / "kernels" / suite / "version").read_text().strip()
    chosen = hashlib.sha256(" ".join(tests).encode()).hexdigest()[:8]
    known = where / "results" / f"{version}-{tree[0]}-{chosen}.json"
    if known.exists() and not again:
        return Result(**json.loads(known.read_text()))
    out = where / "out" / f"{suite}-{chosen}"
    out.mkdir(parents=True, exist_ok=True)
    report = out / "junit.xml"
    report.unlink(missing_ok=True)
    python = ROOT / ".venv/bin/python"
    # Programs compiled once are kept for all agents of this kernel: that takes a guest 20 s. One CPU for each guest:
    # an emulated second one costs more than it gives.
    command = (
        f"for module in {MODULES}; do modprobe $module; done; ulimit -n 65536; cd {tree[1]}; "
        f"export VIP_TRACER_CACHE=$VM_OUT/programs PYTHONPATH={tree[1]}; mkdir -p $VIP_TRACER_CACHE; "
        f"{python} -m pytest -q -p no:cacheprovider --timeout 900 --junitxml $VM_OUT/junit.xml {' '.join(tests)}"
    )
    begun = time.monotonic()
    done = subprocess.run(
        [HERE / "boot", where, suite, command], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"VM_OUT": str(out), "VM_CPUS": "1", "VM_TIMEOUT": "5400"},
    )  # fmt: skip
    said = (done.stdout + done.stderr)[-20_000:]
    outcomes = _outcomes(report) if report.exists() else {}
    if not outcomes:
        outcomes = {"the guest": "failed"}
    found = Result(suite, version, outcomes, time.monotonic() - begun, said)
    if report.exists():
        known.parent.mkdir(exist_ok=True)
        known.write_text(json.dumps(dataclasses.asdict(found)))
    return found


def _outcomes(report: Path) -> dict[str, str]:
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            found[name] = "failed"
        else:
            found[name] = "passed" if skipped is None else f"skipped: {skipped.get('message', '')}"
    return found


def table(results: list[Result]) -> str:
    """Markdown: a row per scenario (a test, whatever its parameters), a column per kernel; passed of run."""
    scenarios: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for result in results:
        for name, outcome in result.outcomes.items():
            scenario = re.sub(r"\[.*", "", name)
            scenarios[scenario].setdefault(result.version, []).append(outcome)
    versions = [result.version for result in results]
    lines = [f"| scenario | {' | '.join(versions)} |", "|---|" + "---|" * len(versions)]
    for scenario, by_version in sorted(scenarios.items()):
        cells = [_cell(by_version.get(version, [])) for version in versions]
        module, _, test = scenario.partition("::")
        lines.append(f"| {module.rpartition('.')[2].removeprefix('test_')}: {_words(test)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _words(test: str) -> str:
    return test.removeprefix("test_").replace("_", " ")


def _cell(outcomes: list[str]) -> str:
    passed = outcomes.count("passed")
    failed = outcomes.count("failed")
    if not outcomes:
        return ""
    if failed:
        return f"**{failed} of {passed + failed} failed**"
    if not passed:
        return "not possible"
    return f"{passed} passed" + (f", {len(outcomes) - passed} not possible" if len(outcomes) > passed else "")


def write_page(results: list[Result], page: Path) -> None:
    """Puts the table between its marks."""
    text = page.read_text()
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    page.write_text(f"{before}{_BEGIN}\n{table(results)}\n{_END}{after}")


def main() -> int:
    """Runs everything that is not known yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", action="append", metavar="SUITE", help=f"default: {', '.join(SUITES)}")
    parser.add_argument("--short", action="store_true", help="a selection of some minutes")
    parser.add_argument(
        "--dir", type=Path, default=Path("/var/cache/vip-tracer-kernels"), help="for packages and results"
    )
    parser.add_argument("--again", action="store_true", help="also what is known")
    parser.add_argument("--page", action="store_true", help="write docs/compatibility.md")
    given = parser.parse_args()
    suites, tests = tuple(given.kernel or SUITES), SHORT if given.short else WHOLE
    subprocess.run([HERE / "fetch", given.dir, *suites], check=True, stdout=sys.stderr)
    tree = snapshot(given.dir)
    results = []
    with concurrent.futures.ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        for found in pool.map(lambda suite: run(given.dir, tree, suite, tests, given.again), suites):
            results.append(found)
            said = f"{len(found.failed)} failed of {len(found.outcomes)}, {found.seconds:.0f} s"
            print(f"{found.version}: {said}", file=sys.stderr)
            if found.failed:
                print(found.said, file=sys.stderr)
    shutil.rmtree(tree[1])
    print(table(results))
    if given.page:
        write_page(results, ROOT / "docs" / "compatibility.md")
    return 1 if any(result.failed for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
