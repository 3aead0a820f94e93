"""What this node must be able to do, asked one by one: the same questions for `doctor` and for the agent's start.

Asks by feature, never by version. A `Check` says what was found and, where it does not suffice, what to do.
"""

import importlib.util
import os
import platform
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tracer.errors import TracerError
from tracer.kernel import accounting, btf, libbpf, netns
from tracer.kernel.capture import Capture, Options
from tracer.kernel.maps import Sizes

OK, NOTE, MISSING = "ok", "note", "missing"
#: What the agent does not work without (include/uapi/linux/capability.h): SYS_ADMIN includes BPF and PERFMON, and
#: enters pods' namespaces; SYS_PTRACE finds those.
CAPABILITIES = {"CAP_SYS_ADMIN": 21, "CAP_NET_ADMIN": 12, "CAP_SYS_PTRACE": 19}
_SYSCTL = Path("/proc/sys/net/netfilter")
#: Enough to try whether everything loads, cheap to make.
_TRIAL_SIZES = Sizes(connections=256, translations=256, ring_bytes=1 << 16, listeners=64, namespaces=64)


@dataclass(frozen=True)
class Check:
    """One answer: `state` is ok, note (it works, with a limit) or missing (it cannot work)."""

    name: str
    state: str
    found: str
    remedy: str = ""


def _privilege() -> Check:
    name = "privilege"
    if os.geteuid() != 0:
        return Check(name, MISSING, f"running as user {os.geteuid()}", "Run as root (sudo), or in a privileged pod.")
    status = Path("/proc/thread-self/status").read_text(encoding="ascii", errors="replace")
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    lacking = [capability for capability, bit in CAPABILITIES.items() if not effective >> bit & 1]
    if lacking:
        remedy = "Give the container these capabilities, as deploy/least-privilege does, or make it privileged."
        return Check(name, MISSING, f"running as root without {', '.join(lacking)}", remedy)
    return Check(name, OK, "running as root")


def _kernel_types() -> Check:
    try:
        constants = btf.defines()
    except TracerError as error:
        return Check("kernel types (BTF)", MISSING, "not usable", str(error))
    return Check("kernel types (BTF)", OK, f"{btf.VMLINUX}: all {len(constants)} constants found")


def _bcc() -> Check:
    """Without importing it: it maps 100 MB."""
    name = "bcc"
    spec = importlib.util.find_spec("bcc")
    remedy = "Install it: apt-get install python3-bpfcc; and run vip-tracer on the system's Python or a venv over it."
    if spec is None or spec.origin is None:
        return Check(name, MISSING, "Python module not found", remedy)
    if not (Path(spec.origin).parent / "libbcc.py").exists():
        return Check(name, MISSING, f"{spec.origin} is another package of that name", f"pip uninstall bcc. {remedy}")
    return Check(name, OK, str(Path(spec.origin).parent))


def _ring_buffer() -> Check:
    name = "BPF ring buffer"
    try:
        os.close(libbpf.map_create(libbpf.MAP_TYPE_RINGBUF, "vt_check", 0, 0, os.sysconf("SC_PAGESIZE")))
    except TracerError as error:
        return Check(name, MISSING, "libbpf not found", str(error))
    except OSError as error:
        return Check(name, MISSING, str(error.strerror), "Run as root on Linux 5.8 or newer (a newer kernel has it).")
    return Check(name, OK, "can be made")


def _conntrack() -> Check:
    name = "conntrack"
    try:
        limit = (_SYSCTL / "nf_conntrack_max").read_text().strip()
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netlink:
            netlink.bind((0, 0))
    except OSError as error:
        return Check(
            name,
            MISSING,
            f"not in this kernel, or not loaded ({error.strerror})",
            "Load it: modprobe nf_conntrack nf_conntrack_netlink. Where kube-proxy runs it is there.",
        )
    return Check(name, OK, f"room for {limit} entries")


def _conntrack_events() -> Check:
    name = "conntrack events"
    try:
        value = (_SYSCTL / "nf_conntrack_events").read_text().strip()
    except OSError:
        return Check(
            name, MISSING, "the kernel has none", "It needs CONFIG_NF_CONNTRACK_EVENTS=y and nf_conntrack_netlink."
        )
    if value == "0":
        return Check(
            name,
            MISSING,
            "net.netfilter.nf_conntrack_events = 0: no translation would be seen",
            "Turn them on: sysctl -w net.netfilter.nf_conntrack_events=1 (2 since Linux 5.19: while somebody listens).",
        )
    return Check(name, OK, f"net.netfilter.nf_conntrack_events = {value}")


def _accounting() -> Check:
    name = "conntrack accounting"
    if accounting.is_on():
        return Check(name, OK, f"{accounting.NAME} = 1")
    return Check(
        name,
        NOTE,
        "off: bytes and packets are known of local TCP sockets, not of forwarded connections and UDP",
        "If you want those: vip-tracer agent --enable-accounting sets it and leaves it, or sysctl -w "
        f"{accounting.NAME}=1. It costs two atomic additions a packet, and 32 bytes an entry.",
    )


def _tracefs() -> Check:
    try:
        if Path("/sys/kernel/tracing/events").is_dir():
            return Check("tracefs", OK, "mounted")
    except PermissionError:  # mounted or not, that is for root to see
        return Check("tracefs", NOTE, "not to be seen without privilege: nothing that runs now needs it")
    return Check(
        "tracefs",
        NOTE,
        "not mounted: nothing that runs now needs it",
        "mount -t tracefs tracefs /sys/kernel/tracing, for the connect probe of socket-level load balancers.",
    )


#: Asked inside the node's network namespace, whose own sysctls count.
_OF_THE_NODE: tuple[tuple[str, Callable[[], Check]], ...] = (
    ("conntrack", _conntrack),
    ("conntrack events", _conntrack_events),
    ("conntrack accounting", _accounting),
)


def _of_the_node(path: str) -> list[Check]:
    try:
        with netns.entered(path):
            return [ask() for _, ask in _OF_THE_NODE]
    except TracerError as error:
        found = "not asked: it belongs to the node's network namespace"
        unknown = [Check(name, NOTE, found) for name, _ in _OF_THE_NODE]
        return [Check("network namespace", MISSING, f"{path} cannot be used", str(error)), *unknown]


def _trial(options: Options) -> Check:
    name = "programs"
    try:
        with Capture(replace(options, sizes=_TRIAL_SIZES)):
            return Check(name, OK, "compiled, loaded, attached, and detached again")
    except TracerError as error:
        return Check(name, MISSING, "cannot be loaded", str(error))


def preconditions(options: Options) -> list[Check]:
    """Every precondition that can be asked without loading anything, cheapest first."""
    return [
        _privilege(),
        _bcc(),
        _kernel_types(),
        _ring_buffer(),
        *_of_the_node(options.node_netns),
        _tracefs(),
    ]


def examine(options: Options) -> list[Check]:
    """All of `preconditions`, and if none is missing, a trial: the programs are loaded and attached for a moment."""
    kernel = Check("kernel", OK, f"{platform.system()} {platform.release()} {platform.machine()}")
    checks = [kernel, *preconditions(options)]
    return checks if missing(checks) else [*checks, _trial(options)]


def missing(checks: list[Check]) -> list[Check]:
    """Those that keep the tracer from running."""
    return [check for check in checks if check.state == MISSING]


def demand(options: Options) -> list[Check]:
    """`preconditions`, all met.

    Raises:
        TracerError: those that are not, each with its remedy.
    """
    checks = preconditions(options)
    lacking = missing(checks)
    if lacking:
        sentences = "\n".join(f"  {check.name}: {check.found}. {check.remedy}" for check in lacking)
        raise TracerError(f"This node cannot be traced:\n{sentences}")
    return checks
