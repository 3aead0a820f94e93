"""What is left behind on a machine on which others are at work too: BPF objects that nobody holds, mounts, settings."""

import ctypes
from pathlib import Path

from tracer.kernel import libbpf
from tracer.lab.netns import Namespace

#: (kind, id): "prog", "map" or "link".
Object = tuple[str, int]
_KINDS = ("prog", "map", "link")


def loaded() -> set[Object]:
    """All BPF objects of this kernel."""
    found, following = set(), ctypes.c_uint32()
    for kind in _KINDS:
        following_of, current = getattr(libbpf.library(), f"bpf_{kind}_get_next_id"), 0
        while following_of(ctypes.c_uint32(current), ctypes.byref(following)) == 0:
            current = following.value
            found.add((kind, current))
    return found


def held(pid: int | str) -> set[Object]:
    """Those that a process has a descriptor of."""
    found: set[Object] = set()
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if "bpf" not in str(entry.readlink()):
                    continue
                for line in Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().splitlines():
                    name, _, value = line.partition(":")
                    if name.removesuffix("_id") in _KINDS and name.endswith("_id"):
                        found.add((name[:-3], int(value)))
            except OSError:
                continue  # closed meanwhile
    except OSError:
        pass  # it has ended
    return found


def orphans() -> set[Object]:
    """Objects without a process that holds them: attached for good, pinned, or about to be freed."""
    before = loaded()
    everybody = set().union(*(held(entry.name) for entry in Path("/proc").glob("[0-9]*")))
    return (before - everybody) & loaded()


def processes(mark: str) -> set[int]:
    """Living processes whose environment has this entry."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def mounts(pid: int) -> set[str]:
    """The mounts of a process's mount namespace: their numbers, roots and places."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return {" ".join(line.split()[:5]) for line in lines}


#: Not settings but levels, or different each time they are read.
_LEVELS = ("nf_conntrack_count",)


def settings(namespace: Namespace) -> dict[str, str]:
    """Every setting of a network namespace, by its path under /proc/sys/net."""

    def read() -> dict[str, str]:
        found = {}
        for path in Path("/proc/sys/net").rglob("*"):
            try:
                if path.is_file() and path.name not in _LEVELS:
                    found[str(path)] = path.read_text(errors="replace")
            except OSError:
                continue  # only to be written, or not set yet
        return found

    return namespace.call(read)


def listeners(namespace: Namespace) -> int:
    """Netlink sockets that hear conntrack's events."""
    lines = namespace.call(lambda: Path("/proc/thread-self/net/netlink").read_text()).splitlines()[1:]
    return sum(line.split()[1] == "12" and int(line.split()[3], 16) != 0 for line in lines)
