import contextlib
import ctypes
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.naming import cgroups
from tracer.naming.cgroups import Cgroups, Identity, parse

UID = "12345678-90ab-cdef-1234-567890abcdef"
UNDER = UID.replace("-", "_")
CID = "0123456789abcdef" * 4
STATIC = "0a1b2c3d4e5f60718293a4b5c6d7e8f9"


@pytest.mark.parametrize(
    "path",
    [
        f"/kubepods/burstable/pod{UID}/{CID}",
        f"/kubepods/besteffort/pod{UID}/{CID}",
        f"/kubepods/pod{UID}/{CID}",
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDER}.slice/cri-containerd-{CID}.scope",
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDER}.slice/crio-{CID}.scope",
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDER}.slice/crio-{CID}.scope/container",
        f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UNDER}.slice/crio-conmon-{CID}.scope",
        f"/kubepods.slice/kubepods-pod{UNDER}.slice/docker-{CID}.scope",
        f"/kubepods/burstable/pod{UID}/crio-{CID}",
        f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UNDER}.slice/cri-containerd-{CID}.scope",
        f"/kubelet/kubepods/besteffort/pod{UID}/{CID}",
        f"/docker/{'f' * 64}/kubelet/kubepods/besteffort/pod{UID}/{CID}",
        f"/kubepods/burstable/pod{UID}/{CID}/init.scope/below",
        f"/sys/fs/cgroup/unified/kubepods/burstable/pod{UID}/{CID}",
        f"/../../kubepods/burstable/pod{UID}/{CID}",
        f"/system.slice/containerd.service/kubepods-burstable-pod{UNDER}.slice:cri-containerd:{CID}",
        # What a container makes below its own cgroup says nothing.
        f"/kubepods/pod{UID}/{CID}/kubelet/kubepods/pod{UID[:-1]}0/{'e' * 64}",
    ],
)
def test_paths_of_pods(path: str) -> None:
    assert parse(path) == Identity(UID, CID)


@pytest.mark.parametrize(
    ("path", "identity"),
    [
        (f"/kubepods/burstable/pod{STATIC}/{CID}", Identity(STATIC, CID)),
        (f"/kubepods.slice/kubepods-burstable-pod{STATIC}.slice/crio-{CID}.scope", Identity(STATIC, CID)),
        (f"/kubepods/burstable/pod{UID}", Identity(UID, None)),
        (f"/kubepods.slice/kubepods-pod{UNDER}.slice", Identity(UID, None)),
        (f"/kubepods/burstable/pod{UID}/not-a-container", Identity(UID, None)),
        ("/", None),
        ("", None),
        ("/system.slice/kubelet.service", None),
        ("/kubepods/burstable", None),
        (f"/user.slice/pod{UID}/{CID}", None),
        (f"/kubepods/burstable/pod{UID}x/{CID}", None),
        ("/kubepods/burstable/podweb", None),
        ("/kubepods" + "/x" * 4000 + f"/pod{UID}", None),
    ],
)
def test_other_paths(path: str, identity: Identity | None) -> None:
    assert parse(path) == identity


@given(st.text(alphabet="/:.-_podkubeslc0af", max_size=300) | st.text())
def test_any_path_is_read_without_an_error(path: str) -> None:
    found = parse(path)
    assert found is None or len(found.uid) in (32, 36)


def _cgroup2() -> Path:
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise AssertionError("no cgroup v2 tree, which `need` should have found out")


@pytest.fixture
def tree(need: Callable[[str], None]) -> Iterator[Path]:
    """A cgroup of our own at the top of the machine's v2 tree; gone afterwards with all that is below it."""
    need("cgroup2")
    top = _cgroup2() / f"vip-tracer-test-{os.getpid()}"
    top.mkdir()
    yield top
    for below in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
        below.rmdir()
    top.rmdir()


@contextlib.contextmanager
def looking(root: Path, flags: int = 0, **options: object) -> Iterator[Cgroups]:
    descriptor = os.open(root, os.O_RDONLY | flags)
    found = Cgroups(descriptor, **options)  # type: ignore[arg-type]
    try:
        yield found
    finally:
        found.close()
        os.close(descriptor)


@pytest.mark.parametrize("flags", [0, os.O_PATH])
def test_a_real_cgroup_by_its_id(tree: Path, flags: int) -> None:
    pod = (
        tree / f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDER}.slice/cri-containerd-{CID}.scope"
    )
    pod.mkdir(parents=True)
    with looking(tree.parent, flags) as found:
        assert found.of_cgroup(pod.stat().st_ino) == Identity(UID, CID)
        assert found.of_cgroup(tree.stat().st_ino) is None
        assert (found.by_process(1), found.by_process(pod.stat().st_ino)) == (True, False)


def test_a_cgroup_seen_once_is_known_when_it_is_gone_and_one_never_seen_is_not(tree: Path) -> None:
    seen, unseen = (tree / f"kubepods/pod{uid}" for uid in (UID, STATIC))
    seen.mkdir(parents=True)
    unseen.mkdir()
    ids = seen.stat().st_ino, unseen.stat().st_ino
    with looking(tree.parent) as found:
        assert found.of_cgroup(ids[0]) == Identity(UID, None)
        seen.rmdir()
        unseen.rmdir()
        assert [found.of_cgroup(each) for each in ids] == [Identity(UID, None), None]


def test_not_found_is_asked_again_after_a_while_and_memory_is_bounded(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "MAX_KNOWN", 3)
    now = [0.0]
    with looking(tree.parent, monotonic=lambda: now[0]) as found:
        asked: list[int] = []
        read = found._read
        monkeypatch.setattr(found, "_read", lambda each: asked.append(each) or read(each))
        for _ in range(3):
            assert found.path(2**40) is None
        assert asked == [2**40]
        now[0] += cgroups.MISSING_S
        assert found.path(2**40) is None
        assert asked == [2**40] * 2
        for each in range(2**41, 2**41 + 9):
            found.path(each)
        assert len(found._paths) == 3


def test_what_may_not_be_asked_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Refusing:
        def open_by_handle_at(self, *_: object) -> int:
            ctypes.set_errno(errno.EPERM)
            return -1

    monkeypatch.setattr(cgroups, "_libc", Refusing)
    with looking(Path("/")) as found:
        assert [found.path(each) for each in (5, 6)] == [None, None]
    said = [record.message for record in caplog.records]
    assert len(said) == 1
    assert "CAP_DAC_READ_SEARCH" in said[0]


def test_a_file_system_without_such_handles_has_no_cgroups() -> None:
    with looking(Path("/proc")) as found:
        assert found.path(5) is None


def test_without_a_v2_tree_there_is_none() -> None:
    found = Cgroups(None)
    assert (found.of_cgroup(5), found.by_process(5)) == (None, True)


def _boot_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _proc(root: Path, stat: str, cgroup: str) -> Cgroups:
    (root / "70").mkdir()
    (root / "70" / "stat").write_text(stat)
    (root / "70" / "cgroup").write_text(cgroup)
    return Cgroups(None, root)


STAT = "70 (a) b) (c) S " + "0 " * 18 + "5000 0 0\n"
V1 = f"12:memory:/kubepods/burstable/pod{UID}/{CID}\n1:name=systemd:/x:y\n0::/\n"


def test_a_v1_process_that_lived_when_it_connected(tmp_path: Path) -> None:
    found = _proc(tmp_path, STAT, V1)
    began = 5000 * 10**9 // os.sysconf("SC_CLK_TCK")
    assert found.of_process(70, began) == Identity(UID, CID)
    assert found.of_process(70, began - 1) is None, "another process with the same pid"
    assert found.of_process(71, began) is None


def test_a_process_that_was_noted_is_known_after_its_end(tmp_path: Path) -> None:
    found = _proc(tmp_path, STAT, V1)
    began = 5000 * 10**9 // os.sysconf("SC_CLK_TCK")
    found.note(70)
    noted = _boot_ns()
    shutil.rmtree(tmp_path / "70")
    assert found.of_process(70, began + 1) == Identity(UID, CID)
    assert found.of_process(70, began - 1) is None, "a process before it had the pid"
    assert found.of_process(70, noted + 1) is None, "another may have the pid since"
    found.note(70)
    assert found.of_process(70, began + 1) == Identity(UID, CID), "what is gone takes nothing with it"


def test_only_so_many_processes_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "MAX_KNOWN", 2)
    found = _proc(tmp_path, STAT, V1)
    for pid in (71, 72):
        shutil.copytree(tmp_path / "70", tmp_path / str(pid))
    for pid in (70, 71, 70, 72):
        found.note(pid)
    shutil.rmtree(tmp_path)
    began = 5000 * 10**9 // os.sysconf("SC_CLK_TCK")
    assert [found.of_process(pid, began) is not None for pid in (70, 71, 72)] == [True, False, True]


@pytest.mark.parametrize("stat", ["", "70 (x) S 0\n", "70 (x) S " + "0 " * 18 + "x\n"])
def test_a_stat_that_cannot_be_read_is_no_process(tmp_path: Path, stat: str) -> None:
    assert _proc(tmp_path, stat, V1).of_process(70, 2**62) is None


def test_a_real_process_in_a_real_cgroup(tree: Path) -> None:
    pod = tree / f"kubepods/burstable/pod{UID}/{CID}"
    pod.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            (pod / "cgroup.procs").write_text(str(child.pid))
            assert Cgroups(None).of_process(child.pid, _boot_ns()) == Identity(UID, CID)
        finally:
            child.kill()
            child.wait()
    assert Cgroups(None).of_process(child.pid, _boot_ns()) is None
