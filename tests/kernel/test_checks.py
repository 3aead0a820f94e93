"""What a node must be able to do: each answer made to go wrong, and what a user then reads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from older_kernel import Command, lacks
from privilege import nobody

from tracer.errors import TracerError
from tracer.kernel import checks
from tracer.kernel.capture import Options
from tracer.kernel.checks import MISSING, NOTE, OK, Check
from tracer.lab.netns import Namespace

NAMES = [
    "privilege",
    "bcc",
    "kernel types (BTF)",
    "BPF ring buffer",
    "conntrack",
    "conntrack events",
    "conntrack accounting",
    "tracefs",
]


def by_name(options: Options | None = None) -> dict[str, Check]:
    found = checks.preconditions(options or Options())
    assert len({check.name for check in found}) == len(found)
    return {check.name: check for check in found}


@pytest.mark.needs("bpf", "conntrack")
def test_a_node_that_can_be_traced() -> None:
    found = by_name()
    assert list(found) == NAMES
    assert not checks.missing(list(found.values()))
    assert [check.name for check in checks.demand(Options())] == NAMES


@pytest.mark.needs("bpf", "conntrack")
def test_the_trial_loads_everything_and_leaves_nothing() -> None:
    before = set(os.listdir("/proc/self/fd"))
    kernel, *others, trial = checks.examine(Options())
    assert (kernel.name, kernel.state, trial.name) == ("kernel", OK, "programs")
    assert (trial.state, trial.remedy) == (OK, "")
    assert [check.name for check in others] == NAMES
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.needs("bpf", "netns", "conntrack")
def test_the_nodes_own_settings_count_and_not_ours() -> None:
    ours = by_name()
    with Namespace("node") as node:
        node.sysctl({"net.netfilter.nf_conntrack_events": 0, "net.netfilter.nf_conntrack_acct": 1})
        options = Options(node_netns=node.path)
        theirs = by_name(options)
        assert theirs["conntrack events"] == Check(
            "conntrack events",
            MISSING,
            "net.netfilter.nf_conntrack_events = 0: no translation would be seen",
            "Turn them on: sysctl -w net.netfilter.nf_conntrack_events=1 (2 since Linux 5.19: while somebody listens).",
        )
        assert theirs["conntrack accounting"].state == OK
        assert [check.name for check in checks.missing(list(theirs.values()))] == ["conntrack events"]
        # Nothing is loaded where something is missing.
        assert [check.name for check in checks.examine(options)] == ["kernel", *NAMES]
        with pytest.raises(TracerError, match=r"^This node cannot be traced:\n  conntrack events: .*=1 \(2 since"):
            checks.demand(options)
        node.sysctl({"net.netfilter.nf_conntrack_acct": 0})
        assert by_name(options)["conntrack accounting"].state == NOTE
    assert by_name() == ours


@pytest.mark.needs("bpf")
def test_a_namespace_that_is_not_there_is_missing_once() -> None:
    options = Options(node_netns="/proc/1/ns/nothing")
    found = by_name(options)
    (lacking,) = checks.missing(list(found.values()))
    assert lacking.name == "network namespace"
    assert "/proc/1/ns/nothing cannot be opened (No such file or directory): check the path." in lacking.remedy
    assert [name for name in NAMES if name not in found] == []
    assert {found[name].state for name in NAMES if name.startswith("conntrack")} == {NOTE}
    with pytest.raises(TracerError) as caught:
        checks.demand(options)
    said = str(caught.value)
    assert said.count("/proc/1/ns/nothing cannot be opened") == 1
    assert ".." not in said


@pytest.mark.needs("bpf")
def test_a_kernel_without_conntrack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_SYSCTL", tmp_path)
    found = by_name()
    assert (found["conntrack"].state, found["conntrack events"].state) == (MISSING, MISSING)
    assert "modprobe nf_conntrack nf_conntrack_netlink" in found["conntrack"].remedy
    assert "CONFIG_NF_CONNTRACK_EVENTS=y" in found["conntrack events"].remedy
    assert found["conntrack accounting"].state == NOTE  # a limit, no obstacle
    with pytest.raises(TracerError, match=r"\n  conntrack: not in this kernel, .*\n  conntrack events: "):
        checks.demand(Options())


def test_no_kernel_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> dict[str, int]:
        raise TracerError("No types here: get some.")

    monkeypatch.setattr(checks.btf, "defines", refuse)
    assert by_name()["kernel types (BTF)"] == Check(
        "kernel types (BTF)", MISSING, "not usable", "No types here: get some."
    )


def test_no_libbpf(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise TracerError("libbpf was not found: install it.")

    monkeypatch.setattr(checks.libbpf, "map_create", refuse)
    found = by_name()["BPF ring buffer"]
    assert (found.state, found.found, found.remedy) == (
        MISSING,
        "libbpf not found",
        "libbpf was not found: install it.",
    )


# -- another Python, another user: in a child ----------------------------------------------------------------------

_BCC_ONLY = """
import sys
sys.path[:] = [path for path in sys.path if "dist-packages" not in path]
sys.path[:0] = sys.argv[1:]
from tracer.kernel import checks
check = checks._bcc()
print(check.state, check.found, check.remedy, sep="|")
assert "bcc" not in sys.modules
"""


def bcc_check(*first: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _BCC_ONLY, *map(str, first)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return done.stdout.strip().split("|")


def test_no_bcc() -> None:
    state, found, remedy = bcc_check()
    assert (state, found) == (MISSING, "Python module not found")
    assert remedy.startswith("Install it: apt-get install python3-bpfcc")


@pytest.mark.parametrize("content", ["", "raise SystemExit('imported')"])
def test_another_package_called_bcc(content: str, tmp_path: Path) -> None:
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc" / "__init__.py").write_text(content)
    state, found, remedy = bcc_check(tmp_path)
    assert state == MISSING
    assert found == f"{tmp_path}/bcc/__init__.py is another package of that name"
    assert remedy.startswith("pip uninstall bcc. Install it: apt-get")


def test_a_directory_that_happens_to_be_called_bcc(tmp_path: Path) -> None:
    (tmp_path / "bcc").mkdir()
    assert bcc_check(tmp_path)[:2] == [MISSING, "Python module not found"]


def as_nobody(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tracer", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=nobody,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return done


@pytest.mark.needs("bpf", "conntrack")
def test_doctor_without_privilege_asks_everything_all_the_same() -> None:
    done = as_nobody("doctor")
    states = {
        line[9:].split("  ")[0].strip(): line[:7].strip() for line in done.stdout.splitlines() if line[:1].strip()
    }
    assert list(states) == ["kernel", *NAMES]
    assert states["privilege"] == states["BPF ring buffer"] == "MISSING"
    assert states["bcc"] == states["kernel types (BTF)"] == states["conntrack"] == states["conntrack events"] == "ok"
    assert "running as user 65534\n" in done.stdout
    assert "→ Run as root (sudo), or in a privileged pod." in done.stdout
    assert done.stderr.startswith("vip-tracer: This node cannot be traced: privilege, BPF ring buffer missing")


@pytest.mark.needs("bpf", "netns", "conntrack")
def test_doctor_without_privilege_and_another_namespace() -> None:
    with Namespace("node") as node:
        done = as_nobody("doctor", "--netns", node.path)
    assert done.stdout.count("MISSING") == 3
    assert done.stdout.count(f"{node.path} cannot be opened (Permission denied): run as root.") == 1


@pytest.mark.needs("bpf", "conntrack")
def test_agent_without_privilege_says_so_in_sentences(tmp_path: Path) -> None:
    done = as_nobody("agent", "--output", str(tmp_path / "none"), "--node", "node-1", "--log-format", "text")
    assert done.stdout == ""
    assert "This node cannot be traced:\n  privilege: running as user 65534. Run as root (sudo)" in done.stderr
    assert "\n  BPF ring buffer: Operation not permitted" in done.stderr
    assert ".." not in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.needs("bpf")
def test_root_without_a_capability() -> None:
    """As in a container that is not privileged."""
    code = "from tracer.kernel import checks; print(checks._privilege())"
    drop = ["setpriv", "--bounding-set=-sys_ptrace,-net_admin", "--inh-caps=-all", sys.executable, "-c", code]
    said = subprocess.check_output(drop, cwd=Path(__file__).parents[2], text=True)
    assert "state='missing', found='running as root without CAP_NET_ADMIN, CAP_SYS_PTRACE'" in said
    assert "deploy/least-privilege" in said


# -- a kernel below the floor ----------------------------------------------------------------------------------------


def on_older_kernel(command: Command, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tracer", *arguments], capture_output=True, text=True, timeout=120, check=False,
        preexec_fn=lambda: lacks(command),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return done


@pytest.mark.needs("bpf", "conntrack")
def test_a_kernel_without_the_ring_buffer_is_refused_in_a_sentence(tmp_path: Path) -> None:
    doctor = on_older_kernel(Command.MAP_CREATE, "doctor")
    assert "BPF ring buffer" in doctor.stdout
    assert "Run as root on Linux 5.8 or newer" in doctor.stdout
    assert doctor.stderr.startswith("vip-tracer: This node cannot be traced: BPF ring buffer missing")
    arguments = ("--output", str(tmp_path / "none"), "--node", "node-1", "--log-format", "text")
    agent = on_older_kernel(Command.MAP_CREATE, "agent", *arguments)
    assert "This node cannot be traced:\n  BPF ring buffer: Invalid argument when making the BPF map" in agent.stderr
    assert "Run as root on Linux 5.8 or newer (a newer kernel has it)." in agent.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.needs("bpf", "conntrack")
@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (
            Command.LINK_CREATE,
            "Invalid argument when attaching the iterator over tcp sockets: this kernel has no iterators.",
        ),
        (Command.RAW_TRACEPOINT_OPEN, "The kernel refused: Invalid argument when attaching to a tracepoint."),
    ],
    ids=["iterators", "tracepoints"],
)
def test_what_only_a_trial_shows_is_refused_in_a_sentence(command: Command, sentence: str) -> None:
    doctor = on_older_kernel(command, "doctor")
    assert doctor.stderr.startswith("vip-tracer: This node cannot be traced: programs missing")
    assert sentence in doctor.stdout
