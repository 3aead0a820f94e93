"""The scenario suite on other kernels: boots each under qemu, runs the tests inside, prints a table.

    python -m tests.vm.matrix [TEST...] [--kernel SUITE]... [--short] [--guests N] [--dir DIR] [--page]

A kernel is what a Debian suite's cloud image leads to today. Nothing of the host is changed: packages are unpacked in
DIR, the guest writes to a file system in its memory. What passed is kept in DIR, test by test, by kernel and by what
the test depends on, and not run again: an interrupted run goes on where it was. The exit code is 1 if anything failed
or was not run. `--page` writes the table into docs/compatibility.md.
"""

import argparse
import compileall
import concurrent.futures
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from tests.vm import depends
from tests.vm.depends import ROOT

HERE = Path(__file__).resolve().parent
#: Debian 11, 12, 13, and the newest kernel of its backports.
SUITES = ("bullseye-security", "bookworm", "trixie", "trixie-backports")
#: What a guest needs of the tree.
NEEDED = ("bpf", "tracer", "tests", "pyproject.toml")
#: What nobody loads by itself when the lab needs it.
MODULES = "nf_conntrack nf_conntrack_netlink br_netfilter ip_vs ip_vs_rr"
WHOLE = ("tests/vm/inside", "tests/scenarios", "tests/test_agent.py", "tests/kernel/test_capture.py")
SHORT = (
    "tests/vm/inside",
    "tests/test_agent.py::test_a_row_says_what_the_client_knows",
    "tests/test_agent.py::test_a_refused_connection_has_its_backend",
    "tests/test_agent.py::test_what_was_there_before_the_start_is_found_and_counted_from_then",
    "tests/test_agent.py::test_a_full_ring_loses_rows_by_count",
    "tests/test_agent.py::test_kill_leaves_nothing_in_the_kernel_and_no_half_file",
    "tests/scenarios/test_dataplanes.py::test_what_comes_from_outside_is_a_row_with_its_backend",
)
#: What every kernel here has: a test may not call it lacking. What else is lacking makes a test impossible, loudly.
REQUIRED = "bpf,netns,conntrack,iptables,nft,ipvs,guest"
FAILED, NOT_RUN = "failed", "not run"
_BEGIN, _END = "<!-- made by tests/vm/matrix.py -->", "<!-- end -->"


@dataclasses.dataclass
class Kernel:
    """One kernel's results: outcome by test ("passed", "failed", "skipped: why", "not run")."""

    suite: str
    version: str
    outcomes: dict[str, str]
    said: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """Tests that failed or did not run."""
        return [name for name, outcome in self.outcomes.items() if outcome in (FAILED, NOT_RUN)]


def collect(tree: Path, tests: tuple[str, ...]) -> list[str]:
    """Every test by name, as pytest finds them on this machine; leaves them compiled, as pytest compiles tests."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *tests], cwd=tree,
        capture_output=True, text=True, check=False, env=env | {"PYTHONPATH": str(tree)},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return list(dict.fromkeys(line for line in done.stdout.splitlines() if "::" in line))


def snapshot(where: Path) -> Path:
    """A copy of the tree, which nobody edits under a running guest, compiled: a guest would need a minute for that."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "--", *NEEDED], cwd=ROOT, capture_output=True, text=True,
        check=True,
    ).stdout.split()  # fmt: skip
    (where / "trees").mkdir(parents=True, exist_ok=True)
    copy = Path(tempfile.mkdtemp(dir=where / "trees"))
    for name in filter(lambda name: (ROOT / name).is_file(), names):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    compileall.compile_dir(copy, quiet=2)
    return copy


def _store(where: Path, version: str, tree: Path, test: str) -> Path:
    """Where the outcomes of a test file are kept."""
    name = test.replace("/", ".").removesuffix(".py")
    return where / "results" / version / f"{name}-{depends.digest(test, tree)}.jsonl"


def _read(path: Path) -> list[dict[str, str]]:
    """A line may be torn: its guest died."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def known(where: Path, tree: Path, suite: str, tests: list[str]) -> Kernel:
    """What is known of these tests on that kernel."""
    version = (where / "kernels" / suite / "version").read_text().strip()
    kernel = Kernel(suite, version, dict.fromkeys(tests, NOT_RUN))
    for file in {test.partition("::")[0] for test in tests}:
        for line in _read(_store(where, version, tree, file)):
            if line["name"] in kernel.outcomes:
                kernel.outcomes[line["name"]] = line["outcome"]
                kernel.said[line["name"]] = line.get("said", "")
    return kernel


def run(where: Path, tree: Path, suite: str, tests: list[str]) -> Kernel:
    """Boots one kernel and runs in it those of the tests of which it is not known that they pass."""
    before = known(where, tree, suite, tests)
    if not before.failed:
        return before
    out = where / "results" / before.version
    (out / "programs").mkdir(parents=True, exist_ok=True)
    files = {test.partition("::")[0] for test in before.failed}
    stores = {file: str(_store(where, before.version, tree, file)) for file in files}
    (out / "told").write_text(json.dumps(stores))
    (out / "tests").write_text("\n".join(before.failed))
    # Programs compiled once are kept for all agents of this kernel: that takes a guest 20 s. Where a test makes
    # thousands of connections, it makes a tenth.
    command = (
        f"for module in {MODULES}; do modprobe $module; done; ulimit -n 65536; cd {tree}; "
        "echo +memory > /sys/fs/cgroup/cgroup.subtree_control; "
        f"export VIP_TRACER_CACHE=$VM_OUT/programs PYTHONPATH={tree} VM_TOLD=$VM_OUT/told; "
        f"export VIP_TRACER_REQUIRE={REQUIRED} VIP_TRACER_SCALE=10 VIP_TRACER_INTERLEAVINGS=2 PYTHONUNBUFFERED=1; "
        f"{ROOT / '.venv/bin/python'} -m pytest -v -p no:cacheprovider -p tests.vm.told -p tests.vm.forked "
        "--timeout 900 @$VM_OUT/tests"
    )
    begun = time.monotonic()
    with open(out / "said", "w", encoding="utf-8") as said:
        subprocess.run(
            [HERE / "boot", where, suite, command], cwd=ROOT, stdout=said, stderr=said, check=False,
            env=os.environ | {"VM_OUT": str(out), "VM_TIMEOUT": "21600"},
        )  # fmt: skip
    after = known(where, tree, suite, tests)
    count = f"{len(before.failed)} to run, {len(after.failed)} failed or not run, {time.monotonic() - begun:.0f} s"
    print(f"{after.version}: {count}", file=sys.stderr)
    if after.failed:
        print((out / "said").read_text(errors="replace")[-20_000:], file=sys.stderr)
    return after


def table(kernels: list[Kernel]) -> str:
    """Markdown: a row per scenario (a test, whatever its parameters), a column per kernel; how many passed."""
    scenarios: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for kernel in kernels:
        for name, outcome in kernel.outcomes.items():
            scenarios[re.sub(r"\[.*", "", name)].setdefault(kernel.version, []).append(outcome)
    versions = [kernel.version for kernel in kernels]
    lines = [f"| scenario | {' | '.join(versions)} |", "|---|" + "---|" * len(versions)]
    for scenario, by_version in sorted(scenarios.items()):
        file, _, test = scenario.partition("::")
        words = test.removeprefix("test_").replace("_", " ")
        cells = " | ".join(_cell(by_version.get(version, [])) for version in versions)
        lines.append(f"| {Path(file).stem.removeprefix('test_')}: {words} | {cells} |")
    return "\n".join(lines)


def _cell(outcomes: list[str]) -> str:
    passed = outcomes.count("passed")
    impossible = sorted({outcome for outcome in outcomes if outcome.startswith("skipped")})
    cell = [f"{passed} passed"] if passed else []
    cell += [f"**{outcomes.count(bad)} {bad}**" for bad in (FAILED, NOT_RUN) if bad in outcomes]
    cell += [f"not possible ({why.removeprefix('skipped: ').removeprefix('Skipped: ')})" for why in impossible]
    return ", ".join(cell)


def write_page(kernels: list[Kernel], page: Path) -> None:
    """Puts the table between its marks."""
    text = page.read_text()
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    page.write_text(f"{before}{_BEGIN}\n{table(kernels)}\n{_END}{after}")


def main() -> int:
    """Runs everything that is not known yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tests", nargs="*", help="files or tests; default: every scenario")
    parser.add_argument("--kernel", action="append", metavar="SUITE", help=f"default: {', '.join(SUITES)}")
    parser.add_argument("--short", action="store_true", help="a selection of some minutes")
    parser.add_argument("--guests", type=int, default=len(os.sched_getaffinity(0)), help="how many run at a time")
    parser.add_argument("--dir", type=Path, default=Path("/var/cache/vip-tracer-kernels"), help="packages and results")
    parser.add_argument("--page", action="store_true", help="write docs/compatibility.md")
    parser.add_argument("--known", action="store_true", help="boot nothing: what is known already")
    given = parser.parse_args()
    suites = tuple(given.kernel or SUITES)
    subprocess.run([HERE / "fetch", given.dir, *suites], check=True, stdout=sys.stderr)
    tree = snapshot(given.dir)
    try:
        tests = collect(tree, tuple(given.tests or (SHORT if given.short else WHOLE)))
        with concurrent.futures.ThreadPoolExecutor(given.guests) as pool:
            one = known if given.known else run
            kernels = list(pool.map(lambda suite: one(given.dir, tree, suite, tests), suites))
    finally:
        shutil.rmtree(tree)
    for kernel in kernels:
        for name in kernel.failed:
            print(f"{kernel.version}: {name}: {kernel.outcomes[name]}", file=sys.stderr)
    print(table(kernels))
    if given.page:
        write_page(kernels, ROOT / "docs" / "compatibility.md")
    return 1 if any(kernel.failed for kernel in kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
