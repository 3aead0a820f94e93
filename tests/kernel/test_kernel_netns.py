"""Entering and finding network namespaces."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tracer.errors import TracerError
from tracer.kernel import netns
from tracer.lab.netns import Namespace

pytestmark = pytest.mark.needs("netns")


def here() -> int:
    return os.stat(netns.OWN).st_ino


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_block_runs_inside_and_what_follows_does_not() -> None:
    home, before = here(), open_descriptors()
    with Namespace("a") as one, Namespace("b") as two:
        before = open_descriptors()
        with netns.entered(one.path):
            assert here() == one.inode
            with netns.entered(two.path):
                assert here() == two.inode
            assert here() == one.inode
            with netns.entered(netns.OWN):
                assert here() == one.inode
        assert here() == home
        assert open_descriptors() == before


def fail() -> None:
    raise ValueError("inside")


def test_an_exception_comes_home() -> None:
    home = here()
    with Namespace("a") as namespace:
        before = open_descriptors()
        with pytest.raises(ValueError, match="inside"), netns.entered(namespace.path):
            fail()
        with pytest.raises(ValueError, match="inside"), netns.entered(netns.OWN):
            fail()
        assert open_descriptors() == before
    assert here() == home


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/proc/self/ns/none", r"/proc/self/ns/none cannot be opened \(No such file or directory\): check the path"),
        ("", r"cannot be opened"),
        ("/proc/self/ns/uts", r"cannot be entered \(Invalid argument\): check the path, it is no network namespace"),
        ("/dev/null", r"cannot be entered \(Invalid argument\): check the path, it is no network namespace"),
        ("/", r"cannot be entered \(Invalid argument\): check the path, it is no network namespace"),
    ],
)
def test_what_cannot_be_entered_is_a_sentence(path: str, said: str) -> None:
    home, before = here(), open_descriptors()
    with pytest.raises(TracerError, match=said), netns.entered(path):
        pytest.fail("entered")
    assert (here(), open_descriptors()) == (home, before)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/proc/self/ns/none", r"cannot be read \(No such file or directory\): check the path"),
        ("/proc/self/ns/uts", "is of another kind: check the path"),
        ("/dev/null", r"cannot be read \(it is no namespace\): check the path"),
        (__file__, r"cannot be read \(it is no namespace\): check the path"),
        ("/", r"cannot be read \(it is no namespace\): check the path"),
    ],
)
def test_only_a_network_namespace_has_a_number(path: str, said: str) -> None:
    before = open_descriptors()
    with pytest.raises(TracerError, match=said):
        netns.inode(path)
    assert open_descriptors() == before


def test_the_number_is_the_one_that_lsns_prints() -> None:
    with Namespace("a") as namespace:
        before = open_descriptors()
        assert f"net:[{netns.inode(namespace.path)}]" == os.readlink(namespace.path)
        assert open_descriptors() == before


def test_a_namespace_held_by_a_process_is_visible_until_it_ends() -> None:
    with Namespace("a") as namespace:
        before = open_descriptors()
        found = netns.visible()
        assert open_descriptors() == before
        assert os.stat(found[namespace.inode]).st_ino == namespace.inode
        assert here() in found
        number = namespace.inode
    assert number not in netns.visible()


_MOUNT_ONLY = """
import ctypes, json, os, subprocess, sys
from tracer.kernel import netns
directory, libc = sys.argv[1], ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWNET, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x40000000, 4096, 16384, 1 << 18
def mount(source, target, flags):
    if libc.mount(source, target, None, ctypes.c_ulong(flags), None):
        raise OSError(ctypes.get_errno(), "mount")
if libc.unshare(CLONE_NEWNS):
    raise OSError(ctypes.get_errno(), "unshare")
mount(b"none", b"/", MS_REC | MS_PRIVATE)
home = os.open("/proc/self/ns/net", os.O_RDONLY)
wanted = {}
for name in sys.argv[2:]:
    target = os.path.join(directory, name)
    open(target, "w").close()
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    mount(b"/proc/self/ns/net", os.fsencode(target), MS_BIND)
    wanted[os.stat("/proc/self/ns/net").st_ino] = target
    libc.setns(home, CLONE_NEWNET)
found = netns.visible()
entered = {}
for number in wanted:
    with netns.entered(found[number]):
        entered[os.stat(netns.OWN).st_ino] = found[number]
print(json.dumps([entered == wanted, list(entered.values())]))
"""


def test_a_namespace_held_by_a_mount_alone_is_visible_whatever_its_path(tmp_path: Path) -> None:
    """In a mount namespace of its own, so that nothing is left."""
    names = ["plain", "with space", "tab\tand\\backslash", "é ü", "line\nbreak"]
    done = subprocess.run(
        [sys.executable, "-c", _MOUNT_ONLY, str(tmp_path), *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, [str(tmp_path / name) for name in names]]


def fake_proc(tmp_path: Path, add: Callable[[Path], None] | None = None) -> Path:
    for pid, number in (("1", 100), ("22", 100), ("333", 200)):
        (tmp_path / pid / "ns").mkdir(parents=True)
        (tmp_path / pid / "ns" / "net").symlink_to(f"net:[{number}]")
    (tmp_path / "444").mkdir()  # it ended while we looked
    (tmp_path / "sys").mkdir()
    if add:
        add(tmp_path)
    return tmp_path


def test_processes_that_vanish_and_things_that_are_none_are_skipped(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path)
    found = netns.visible(proc)
    assert set(found) == {100, 200}
    assert found[200] == f"{proc}/333/ns/net"


def test_a_mount_is_the_way_only_if_no_process_is(tmp_path: Path) -> None:
    def mounts(proc: Path) -> None:
        (proc / "self").mkdir()
        (proc / "self" / "mountinfo").write_bytes(
            b"1 0 0:4 net:[200] /run/netns/a rw - nsfs nsfs rw\n"
            b"2 0 0:4 net:[300] /run/netns/b\\040\xff\\134 rw - nsfs nsfs rw\n"
            b"3 0 0:4 mnt:[400] /run/m rw - nsfs nsfs rw\n"
            b"4 0 8:1 / / rw - ext4 /dev/sda rw\n"
        )

    found = netns.visible(fake_proc(tmp_path, mounts))
    assert set(found) == {100, 200, 300}
    assert found[200] == f"{tmp_path}/333/ns/net"
    assert os.fsencode(found[300]) == b"/run/netns/b \xff\\"
