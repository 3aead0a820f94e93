"""The child that compiles, loads and attaches, hands the descriptors over, and is gone.

bcc maps LLVM, so it lives in this process only: `tracer.kernel.capture` starts it as
``python -m tracer.kernel.loader`` with one end of a UNIX socket pair, sends it a `Job`, and receives the descriptors
or one sentence. Programs live as long as somebody holds their descriptors or links.
"""

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tracer.errors import TracerError
from tracer.kernel import btf, compiler, libbpf, netns, symbols

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
#: What a node without cgroup v2 is without, and one whose tracepoints are not preemptible.
OPTIONAL = ("socket_released", "socket_released_program", "socket_state_again", "socket_state_again_program")

# include/uapi/linux/netfilter/nfnetlink_compat.h: NF_NETLINK_CONNTRACK_NEW, NF_NETLINK_CONNTRACK_DESTROY
_GROUP_NEW, _GROUP_DESTROY = 1 << 0, 1 << 2
_NETLINK_NETFILTER = 12
_SO_ATTACH_BPF = 50
#: (program, tracepoint). What only catches what the first missed comes after it.
_TRACEPOINTS = (("socket_state", "inet_sock_set_state"), ("socket_destroyed", "tcp_destroy_sock"))
_SECOND_LOOK = (("socket_state_again", "inet_sock_set_state"),)


@dataclass(frozen=True)
class Job:
    """What to compile and where to listen."""

    maps: dict[str, int]  # name → descriptor, inherited
    switches: dict[str, int]  # the options that the sources ask for by #if
    values: dict[str, int]  # of `symbols.VALUES`
    node_netns: str  # path of the node's network namespace
    cgroups: int | None  # descriptor of the root of the cgroup tree, inherited; None: there is none
    cache: str | None  # where compiled programs are kept
    second_look: bool | None  # whether what one program misses is looked at by another; None: where that happens

    def encode(self) -> bytes:
        """For the socket."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> "Job":
        """From the socket."""
        return cls(**json.loads(data))


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


def load(job: Job) -> dict[str, int]:
    """Compiles, loads and attaches; returns the descriptors named in DESCRIPTORS, and what can be had of OPTIONAL.

    The connect probe is loaded and not attached: it costs nothing until `tracer.kernel.capture` attaches it.

    Raises:
        TracerError: no bcc, no BTF, a program that does not compile or that the kernel refuses.
    """
    compiled = compiler.programs(job.switches, None if job.cache is None else Path(job.cache))
    code = {name: symbols.resolve(text, job.maps, job.values) for name, text in compiled.items()}
    found = {}
    again = btf.are_tracepoints_preemptible() if job.second_look is None else job.second_look
    tracepoints = _TRACEPOINTS + _SECOND_LOOK if again else _TRACEPOINTS
    for name, where in tracepoints:
        found[f"{name}_program"] = libbpf.load_tracepoint(name, code[name], where)
    for name in ("connect_enters", "connect_exits"):
        found[f"{name}_program"] = libbpf.load_program(libbpf.PROG_TYPE_TRACEPOINT, name, code[name])
    for name, kind in (("socket_iterator", "tcp"), ("datagram_iterator", "udp")):
        found[name] = libbpf.load_iterator(f"bpf_iter__{kind}", code[f"bpf_iter__{kind}"], kind)
    # Translations are heard before connections, so that no connection is seen whose translation could not be.
    name = "conntrack_events"
    found[f"{name}_program"] = libbpf.load_program(libbpf.PROG_TYPE_SOCKET_FILTER, name, code[name])
    found["conntrack_socket"] = _listen(found[f"{name}_program"], job.node_netns).detach()
    if job.cgroups is not None:
        name, release = "socket_released", libbpf.ATTACH_SOCK_RELEASE
        program = libbpf.load_program(libbpf.PROG_TYPE_CGROUP_SOCK, name, code[name], release)
        found[f"{name}_program"] = program
        found[name] = libbpf.attach_cgroup(program, job.cgroups, release)
    for name, _ in tracepoints:
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
    except OSError as error:  # of a kernel, or a security module, that allows less than the checks could ask
        channel.send(f"!The kernel refused: {error.strerror}. See 'vip-tracer doctor'.".encode())
        os._exit(1)
    socket.send_fds(channel, [b"." + ",".join(found).encode()], list(found.values()))
    # bcc's exit handlers would detach what was just handed over.
    os._exit(0)


if __name__ == "__main__":
    main()
