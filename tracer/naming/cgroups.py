"""Which pod a process belongs to, by its cgroup: from a cgroup's id (v2), or from a living process (v1).

Knows how kubelets and container runtimes name cgroups, and how the kernel finds a cgroup by its id: a file handle of
type FILEID_KERNFS (0xfe) whose eight bytes are the id (include/linux/exportfs.h, fs/kernfs/mount.c), opened by
open_by_handle_at(2), which takes CAP_DAC_READ_SEARCH. Leaves it to `book` which pod has the uid.
"""

import contextlib
import ctypes
import errno
import functools
import logging
import os
import re
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_log = logging.getLogger(__name__)

#: Cgroups remembered, the least recently asked for forgotten first: ten times what a big node has of them.
MAX_KNOWN = 8192
#: How long a cgroup that was not found stays so: ids are not reused, but reading one may have failed.
MISSING_S = 10.0
#: The longest cgroup path looked at (PATH_MAX).
MAX_PATH = 4096

# struct file_handle: handle_bytes, handle_type, then the handle.
_HANDLE = struct.Struct("=IiQ")
_FILEID_KERNFS = 0xFE
_UID = r"[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32}"
# The kubelet's own level is always called kubepods, alone (cgroupfs) or in front of the pod's (systemd). The first
# match counts: what a container makes below its own cgroup says nothing.
_POD = re.compile(
    rf"(?:/(?:[^/]*-)?kubepods[^/]*)(?:/[^/]*)?/pod(?P<plain>{_UID})(?=[/:]|$)"
    rf"|/(?:[^/]*-)?kubepods[^/:]*-pod(?P<slice>{_UID})\.slice(?=[/:]|$)"
)
# "<cid>", "cri-containerd-<cid>.scope", "crio-<cid>.scope", "crio-conmon-<cid>.scope", "docker-<cid>.scope", and
# containerd's ":cri-containerd:<cid>" where it and the kubelet do not agree on the driver.
_CONTAINER = re.compile(r"(?:/|:)(?:[a-z][a-z-]*[-:])?(?P<id>[0-9a-f]{64})(?:\.scope)?(?=[/:]|$)")


class Identity(NamedTuple):
    """What a cgroup's path says: the pod's uid (a static pod: its file's), and the container's id where it is there."""

    uid: str
    container: str | None


class _Life(NamedTuple):
    """A process that lived from `since` to `noted` at least (CLOCK_BOOTTIME), and whose it was."""

    since: int
    noted: int
    identity: Identity | None


def parse(path: str) -> Identity | None:
    """What a cgroup path of any hierarchy says of a pod; None if it is no pod's."""
    if len(path) > MAX_PATH:
        return None
    found = _POD.search(path)
    if found is None:
        return None
    container = _CONTAINER.match(path, found.end())
    uid = (found["plain"] or found["slice"]).replace("_", "-")
    return Identity(uid, container["id"] if container else None)


class Cgroups:
    """Finds pods of cgroups. `root` is a descriptor of a cgroup v2 root, which stays the caller's; None: there is
    none. `proc` is where the host's processes are seen. Looking up never raises: who cannot be found is None.

    Raises OSError if `root` is no directory that can be opened."""

    def __init__(
        self, root: int | None, proc: Path = Path("/proc"), monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        # A mount of one's own comes as an O_PATH descriptor (fsmount(2)), which open_by_handle_at does not take.
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        self._root = None if root is None else os.open(".", flags, dir_fd=root)
        self._proc, self._monotonic = proc, monotonic
        # By id: the path and when it stops to hold. Bounded by MAX_KNOWN.
        self._paths: OrderedDict[int, tuple[str | None, float]] = OrderedDict()
        # By pid, where only living processes tell. Bounded by MAX_KNOWN.
        self._lives: OrderedDict[int, _Life] = OrderedDict()
        self._refused = False

    def close(self) -> None:
        """Closes its descriptor; from then on no cgroup is found by its id."""
        if self._root is not None:
            os.close(self._root)
        self._root = None

    def path(self, cgroup_id: int) -> str | None:
        """The path of a v2 cgroup, as far as the root's mount shows it; None if it is gone, or may not be asked for."""
        known = self._paths.get(cgroup_id)
        if known is not None and self._monotonic() < known[1]:
            self._paths.move_to_end(cgroup_id)
            return known[0]
        path = self._read(cgroup_id)
        until = float("inf") if path is not None else self._monotonic() + MISSING_S
        self._paths[cgroup_id] = path, until
        self._paths.move_to_end(cgroup_id)
        if len(self._paths) > MAX_KNOWN:
            self._paths.popitem(last=False)
        return path

    def by_process(self, cgroup_id: int) -> bool:
        """Whether the id says nothing, because containers are told apart by v1 hierarchies only.

        Every process is then in the v2 root, whose id is 1, or there is no v2 tree.
        """
        return self._root is None or cgroup_id == 1

    def of_cgroup(self, cgroup_id: int) -> Identity | None:
        """The pod of a v2 cgroup."""
        path = self.path(cgroup_id)
        return None if path is None else parse(path)

    def note(self, pid: int) -> None:
        """Remembers the pod of a process while it lives: rows are named later."""
        life = self._life(pid)
        if life is not None:
            self._lives[pid] = life
            self._lives.move_to_end(pid)
            if len(self._lives) > MAX_KNOWN:
                self._lives.popitem(last=False)

    def of_process(self, pid: int, begun_ns: int) -> Identity | None:
        """The pod of a process that lived at `begun_ns` of CLOCK_BOOTTIME, and lives or was noted since.

        A pid is reused: what was noted before `begun_ns`, or began after it, may be another process.
        """
        noted = self._lives.get(pid)
        life = noted if noted is not None and noted.since <= begun_ns <= noted.noted else self._life(pid)
        return life.identity if life is not None and life.since <= begun_ns else None

    def _life(self, pid: int) -> _Life | None:
        try:
            stat = (self._proc / str(pid) / "stat").read_bytes()
            groups = (self._proc / str(pid) / "cgroup").read_bytes()
            # Field 22, after the name, which is in brackets and may hold anything (proc_pid_stat(5)).
            ticks = int(stat.rpartition(b")")[2].split()[19])
        except (OSError, ValueError, IndexError):
            return None
        paths = (line.split(":", 2)[-1] for line in groups.decode("utf-8", errors="replace").splitlines())
        identity = next((found for path in paths if (found := parse(path)) is not None), None)
        noted = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        return _Life(ticks * (10**9 // os.sysconf("SC_CLK_TCK")), noted, identity)

    def _read(self, cgroup_id: int) -> str | None:
        if self._root is None:
            return None
        handle = ctypes.create_string_buffer(_HANDLE.pack(8, _FILEID_KERNFS, cgroup_id), _HANDLE.size)
        descriptor = _libc().open_by_handle_at(self._root, handle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if descriptor < 0:
            self._say(ctypes.get_errno())
            return None
        try:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError as error:
            self._say(error.errno or 0)
            return None
        finally:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        return path.removesuffix(" (deleted)")

    def _say(self, code: int) -> None:
        """A cgroup that is gone is no news; anything else is said once."""
        if code not in (errno.ESTALE, errno.ENOENT) and not self._refused:
            self._refused = True
            _log.warning(
                "cannot look up cgroups (%s): host-network pods stay unnamed; give the agent CAP_DAC_READ_SEARCH",
                os.strerror(code),
            )


@functools.cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.open_by_handle_at.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    library.open_by_handle_at.restype = ctypes.c_int
    return library
