"""The child that compiles, loads and attaches, hands the descriptors over, and is gone.

bcc maps LLVM (about 150 MB, never given back), so it lives in this process only: `tracer.kernel.capture` starts it as
``python -m tracer.kernel.loader`` with one end of a UNIX socket pair, sends it a `Job`, and receives the descriptors
or one sentence. Programs live as long as somebody holds their descriptors or links.
"""

import ctypes
import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tracer.errors import TracerError
from tracer.kernel import btf, libbpf, netns

#: Names of the descriptors that are handed over: sockets, links (named as their program), programs, directories.
DESCRIPTORS = (
    "conntrack_socket",
    "socket_iterator",
    "datagram_iterator",
    "socket_state",
    "socket_destroyed",
    "socket_state_program",
    "socket_destroyed_program",
    "conntrack_events_program",
    "connect_enters_program",
    "connect_exits_program",
)
#: Those that a node without cgroup v2 is without.
OPTIONAL = ("socket_released", "socket_released_program")

# include/uapi/linux/netfilter/nfnetlink_compat.h: NF_NETLINK_CONNTRACK_NEW, NF_NETLINK_CONNTRACK_DESTROY
_GROUP_NEW, _GROUP_DESTROY = 1 << 0, 1 << 2
_NETLINK_NETFILTER = 12
_SO_ATTACH_BPF = 50
_PROG_TYPE_TRACING = 26
#: (program, tracepoint). The one that only catches what the other missed comes last.
_TRACEPOINTS = (("socket_state", "inet_sock_set_state"), ("socket_destroyed", "tcp_destroy_sock"))


@dataclass(frozen=True)
class Job:
    """What to compile and where to listen."""

    maps: dict[str, int]  # name → descriptor, inherited
    constants: dict[str, int]  # -D name=value
    node_netns: str  # path of the node's network namespace
    cgroups: int | None  # descriptor of the root of the cgroup tree, inherited; None: there is none

    def encode(self) -> bytes:
        """For the socket."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> "Job":
        """From the socket."""
        return cls(**json.loads(data))


def source_directory() -> Path:
    """Where bpf/ is: inside the installed package, or beside it in a source tree.

    Raises:
        TracerError: neither.
    """
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "bpf", package.parent / "bpf"):
        if (candidate / "tracer.c").is_file():
            return candidate
    raise TracerError(f"The BPF sources were not found beside {package}: install vip-tracer again.")


def flags(job: Job) -> list[str]:
    """Compiler flags for bpf/tracer.c."""
    source = source_directory()
    constants = {**btf.defines(), **job.constants, **{f"{name.upper()}_FD": fd for name, fd in job.maps.items()}}
    return [
        f"-I{source}",
        "-DCONFIG_BPF_SYSCALL=1",
        "-DPAGE_SIZE=4096",  # bcc's headers want one; nothing here uses it
        "-Wno-everything",  # bcc's own headers, compiled without a kernel tree; ours are linted by clang itself
        *(f"-D{name}={value}" for name, value in sorted(constants.items())),
    ]


def _import_bcc() -> Any:
    try:
        import bcc
    except ImportError as error:
        raise TracerError(
            f"BPF's Python bindings cannot be imported ({error}): install them with "
            "'apt-get install python3-bpfcc' and run vip-tracer with the system's Python or a venv made with "
            "--system-site-packages (PyPI's 'bcc' is something else)."
        ) from error
    if not hasattr(bcc, "BPF"):
        raise TracerError(
            "The module 'bcc' that Python finds is not BPF's: 'pip uninstall bcc; apt-get install python3-bpfcc'."
        )
    return bcc


def _listen(program: int, path: str) -> socket.socket:
    """The netlink socket on conntrack's events, with the filter attached before it hears anything."""
    with netns.entered(path):
        try:
            listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_BPF, program)
            listener.bind((0, _GROUP_NEW | _GROUP_DESTROY))
        except OSError as error:
            raise TracerError(
                f"Conntrack's event stream cannot be opened ({error.strerror}): the kernel needs nf_conntrack and "
                "nf_conntrack_netlink ('modprobe nf_conntrack_netlink')."
            ) from error
    return listener


def _iterate(lib: Any, program: int) -> int:
    """An iterator's link, to be opened once per walk."""
    lib.bcc_iter_attach.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32]
    link = lib.bcc_iter_attach(program, None, 0)
    if link < 0:
        raise TracerError(
            f"The socket iterator could not be attached ({os.strerror(-link)}): Linux 5.9 or newer has it."
        )
    return int(link)


def load(job: Job) -> dict[str, int]:
    """Compiles, loads and attaches; returns the descriptors named in DESCRIPTORS, and what can be had of OPTIONAL.

    The connect probe is loaded and not attached: it costs nothing until `tracer.kernel.capture` attaches it.

    Raises:
        TracerError: no bcc, no BTF, a program that does not compile or that the kernel refuses.
    """
    arguments = flags(job)
    os.environ["BCC_KERNEL_SOURCE"] = str(source_directory())
    bcc = _import_bcc()
    try:
        module = bcc.BPF(src_file=str(source_directory() / "tracer.c"), cflags=arguments)
        conntrack = module.load_func("conntrack_events", bcc.BPF.SOCKET_FILTER)
        iterators = [module.load_func(f"bpf_iter__{kind}", _PROG_TYPE_TRACING) for kind in ("tcp", "udp")]
    except Exception as error:  # bcc raises nothing narrower
        raise TracerError(f"The BPF programs could not be loaded: {error}. See 'vip-tracer doctor'.") from error
    found = {"conntrack_events_program": conntrack.fd}
    for name, where in _TRACEPOINTS:
        found[f"{name}_program"] = libbpf.load_tracepoint(name, module.dump_func(name), where)
    for name in ("connect_enters", "connect_exits"):
        found[f"{name}_program"] = libbpf.load_program(libbpf.PROG_TYPE_TRACEPOINT, name, module.dump_func(name))
    for name, program in zip(("socket_iterator", "datagram_iterator"), iterators, strict=True):
        found[name] = _iterate(bcc.lib, program.fd)
    # Translations are heard before connections, so that no connection is seen whose translation could not be.
    found["conntrack_socket"] = _listen(conntrack.fd, job.node_netns).detach()
    if job.cgroups is not None:
        name, release = "socket_released", libbpf.ATTACH_SOCK_RELEASE
        program = libbpf.load_program(libbpf.PROG_TYPE_CGROUP_SOCK, name, module.dump_func(name), release)
        found[f"{name}_program"] = program
        found[name] = libbpf.attach_cgroup(program, job.cgroups, release)
    for name, _ in _TRACEPOINTS:
        found[name] = libbpf.attach_tracepoint(found[f"{name}_program"])
    return found


def main() -> None:
    """Serves one job on the descriptor named by the first argument."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    job = Job.decode(channel.recv(1 << 20))
    try:
        found = load(job)
    except TracerError as error:
        channel.send(b"!" + str(error).encode())
        os._exit(1)
    socket.send_fds(channel, [b"." + ",".join(found).encode()], list(found.values()))
    # bcc's exit handlers would detach what was just handed over.
    os._exit(0)


if __name__ == "__main__":
    main()
