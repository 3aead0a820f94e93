"""The loader child: what it hands over, and what is left when it does not come to that."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tracer.errors import TracerError
from tracer.kernel import libbpf, loader
from tracer.kernel.capture import Capture, Options
from tracer.kernel.maps import Sizes
from tracer.lab.netns import Namespace, wait_until

SIZES = Sizes(connections=256, translations=256, ring_bytes=1 << 16, listeners=64, namespaces=64)


def open_descriptors() -> dict[str, str]:
    """Descriptor → what it is; the one with which this looks is left out."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
    return found


def program_exists(number: int) -> bool:
    fd = libbpf.library().bpf_prog_get_fd_by_id(number)
    if fd >= 0:
        os.close(fd)
    return bool(fd >= 0)


def as_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    """Has the loader run by a Python in which `before` ran first."""
    (tmp_path / "run.py").write_text(
        f"import os, runpy, signal, socket, sys\n{before}\n"
        "sys.argv = ['loader', sys.argv[-1]]\n"
        "runpy.run_module('tracer.kernel.loader', run_name='__main__')\n"
    )
    shim = tmp_path / "python"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/run.py" "$@"\n')
    shim.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(shim))


@pytest.mark.needs("bpf", "conntrack")
def test_what_is_handed_over_is_let_go_of() -> None:
    before = open_descriptors()
    with Capture(Options(sizes=SIZES)) as capture:
        numbers = [
            int(line.split()[1])
            for fd in capture.program_descriptors().values()
            for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
            if line.startswith("prog_id:")
        ]
        assert len(numbers) == len(capture.program_descriptors()) > 0
        assert all(map(program_exists, numbers))
        handed_over = set(open_descriptors()) - set(before)
        assert not any(os.get_inheritable(int(fd)) for fd in handed_over)
    assert open_descriptors() == before
    wait_until(lambda: not any(map(program_exists, numbers)), "the programs to go")


@pytest.mark.needs("bpf", "conntrack")
def test_a_child_that_is_killed_when_all_was_attached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst moment: everything runs, and nobody has the descriptors yet."""
    note = tmp_path / "programs"
    as_python(
        tmp_path,
        monkeypatch,
        f"""
def die(channel, data, descriptors):
    with open({str(note)!r}, "w") as note:
        for fd in descriptors:
            note.write("".join(line for line in open(f"/proc/self/fdinfo/{{fd}}") if line.startswith("prog_id:")))
    os.kill(os.getpid(), signal.SIGKILL)
socket.send_fds = die""",
    )
    before = open_descriptors()
    with pytest.raises(TracerError, match=r"The loader ended without an answer \(exit code -9\)"):
        Capture(Options(sizes=SIZES))
    assert open_descriptors() == before
    numbers = {int(line.split()[1]) for line in note.read_text().splitlines()}
    assert len(numbers) >= 3
    wait_until(lambda: not any(map(program_exists, numbers)), "the programs to go with their loader")


@pytest.mark.needs("bpf")
@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"without an answer \(exit code -9\)\.$"),
        (
            "print('what ails it', file=sys.stderr); os._exit(3)",
            r"\(exit code 3\)\.\nThe loader said:\n  what ails it$",
        ),
        ("raise RuntimeError('a defect')", r"(?s)\(exit code 1\).*RuntimeError: a defect$"),
    ],
)
def test_a_child_that_never_gets_to_work(
    before: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_python(tmp_path, monkeypatch, before)
    open_before = open_descriptors()
    with pytest.raises(TracerError, match=said):
        Capture(Options(sizes=SIZES))
    assert open_descriptors() == open_before


@pytest.mark.needs("bpf", "conntrack")
def test_a_child_that_says_more_than_a_pipe_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verifier's log easily does."""
    monkeypatch.setattr("tracer.kernel.handover.TIMEOUT_S", 60)
    as_python(tmp_path, monkeypatch, "os.write(2, b'x' * (1 << 20))")
    with Capture(Options(sizes=SIZES)):
        pass


@pytest.mark.needs("bpf")
def test_what_the_compiler_says_reaches_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()
    job = Capture._job
    broken: dict[str, Any] = {"NETNS_FILTER": 0, "ROLES": "no_such_name"}
    monkeypatch.setattr(Capture, "_job", lambda self: replace(job(self), switches=job(self).switches | broken))
    with pytest.raises(
        TracerError, match=r"(?s)^The BPF programs could not be compiled: .*'vip-tracer doctor'"
    ) as caught:
        Capture(Options(sizes=SIZES))
    assert "error: use of undeclared identifier 'no_such_name'" in str(caught.value)
    assert open_descriptors() == before


@pytest.mark.needs("bpf")
@pytest.mark.parametrize("content", ["", "raise ImportError('half installed')"])
def test_a_bcc_that_is_not_bpfs(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc" / "__init__.py").write_text(content)
    monkeypatch.delenv("VIP_TRACER_CACHE")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = open_descriptors()
    with pytest.raises(TracerError, match="apt-get install python3-bpfcc") as caught:
        Capture(Options(sizes=SIZES))
    assert "Traceback" not in str(caught.value)
    assert ("half installed" if content else "is not BPF's") in str(caught.value)
    assert open_descriptors() == before


@pytest.mark.needs("bpf", "netns")
def test_a_namespace_that_went_away() -> None:
    with Namespace("a") as namespace:
        path = namespace.path
    before = open_descriptors()
    with pytest.raises(TracerError, match=f"The network namespace {path} cannot be .*: check the path"):
        Capture(Options(sizes=SIZES, node_netns=path))
    assert open_descriptors() == before


def test_a_job_survives_the_socket() -> None:
    job = loader.Job(
        maps={"connections": 7}, switches={"ROLES": 3}, values={"RUN_ID": 1 << 15}, node_netns="/proc/1/ns/net",
        cgroups=None, cache="/var/cache/programs", second_look=None,
    )  # fmt: skip
    assert loader.Job.decode(job.encode()) == job
