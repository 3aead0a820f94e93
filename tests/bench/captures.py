"""Other ways to hear of translations, and what each costs the traffic (docs/decisions/026).

How: short connections, and one byte there and back on one connection, in interleaved pairs of windows without anything
and with one source of translations alone: a listener on conntrack's events whose filter drops everything, which is what
ctnetlink's messages cost; one that hears only NEW, or only DESTROY; and a netfilter link (6.4+), which meets every
packet and puts the translations of new entries into a map.

    python -m tests.bench.captures [--pairs N] [--seconds S] [--json FILE]
"""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench import paired
from tests.bench.rig import Rig
from tests.bench.workloads import Load, Workload, workloads
from tracer.kernel import btf, compiler

SOURCE = Path(__file__).with_name("netfilter.c")
# include/uapi/linux: bpf.h, netfilter.h, netfilter_ipv4.h, netfilter/nfnetlink_compat.h
_LINK_CREATE, _PROG_TYPE_NETFILTER, _ATTACH_NETFILTER = 28, 32, 45
_SYSCALL = {"x86_64": 321, "aarch64": 280}
_IPV4, _IPV6, _LOCAL_IN, _POST_ROUTING = 2, 10, 1, 4
#: Behind NAT, and before the entry is confirmed, which comes last (NF_IP_PRI_CONNTRACK_CONFIRM).
_PRIORITY = 2**31 - 2
_NEW, _DESTROY = 1 << 0, 1 << 2
_SO_ATTACH_FILTER, _NETLINK_NETFILTER = 26, 12
_FIELDS = (("sk_buff", "_nfct"), ("nf_conn", "status"), ("nf_conn", "tuplehash"))


@contextmanager
def listener(groups: int, rig: Rig) -> Iterator[None]:
    """A socket on these groups of conntrack's events that drops all of them."""
    drop = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))  # classic BPF: return 0
    program = struct.pack("@HxxxxxxQ", 1, ctypes.addressof(drop))

    def listen() -> socket.socket:
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        made.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        made.bind((0, groups))
        return made

    with rig.node.call(listen):
        yield


@contextmanager
def netfilter(program: int, rig: Rig) -> Iterator[None]:
    """The netfilter link, where entries of forwarded and of local connections are confirmed."""

    def attach() -> list[int]:
        return [_link(program, family, hook) for family in (_IPV4, _IPV6) for hook in (_LOCAL_IN, _POST_ROUTING)]

    links = rig.node.call(attach)
    try:
        yield
    finally:
        for link in links:
            os.close(link)


def _link(program: int, family: int, hook: int) -> int:
    attributes = ctypes.create_string_buffer(
        struct.pack("=IIIIIIiI", program, 0, _ATTACH_NETFILTER, 0, family, hook, _PRIORITY, 0), 64
    )
    libc = ctypes.CDLL(None, use_errno=True)
    link = libc.syscall(_SYSCALL[platform.machine()], _LINK_CREATE, attributes, 64)
    if link < 0:
        raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())} when attaching to netfilter")
    return int(link)


def compiled() -> tuple[Any, int]:
    """The netfilter program, loaded: bcc's module, which holds its map, and the program's descriptor."""
    import bcc

    os.environ["BCC_KERNEL_SOURCE"] = str(compiler.source_directory())
    types = btf._Btf(btf.VMLINUX)
    offsets = []
    for name, field in _FIELDS:
        kind = types.find(name, btf._KIND_STRUCT)
        assert kind is not None, f"no struct {name}"
        offsets.append(f"-DOFFSET_{name}__{field}={types.offset(kind, field)}")
    types.close()
    module = bcc.BPF(src_file=bytes(SOURCE), cflags=[*compiler.flags({}), *offsets])
    function = module.load_func("translations", _PROG_TYPE_NETFILTER, attach_type=_ATTACH_NETFILTER)
    return module, int(function.fd)


def compare(rig: Rig, workload: Workload, captures: dict[str, Callable[[Rig], AbstractContextManager[None]]],
            pairs: int, seconds: float) -> list[dict[str, Any]]:  # fmt: skip
    """A line for each capture: the rate with it as a part of the rate without."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in captures}
    with Load(rig, workload) as load:
        load.window(0.5)  # warms up
        for turn in paired.order(pairs):
            for name, capture in captures.items():
                rates = {}
                for with_it in turn:
                    with capture(rig) if with_it else contextlib.nullcontext():
                        (done,) = load.window(seconds).values()
                    rates[with_it] = done.per_second
                found[name].append((rates[False], rates[True]))
    lines = []
    for name, results in found.items():
        ratio = paired.ratio(results)
        without = sorted(before for before, _ in results)[len(results) // 2]
        lines.append({"workload": workload.unit, "capture": name, "without": without, "ratio": ratio.median,
                      "low": ratio.low, "high": ratio.high, "pairs": ratio.pairs})  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures there, too")
    arguments = parser.parse_args()
    module, program = compiled()
    captures: dict[str, Callable[[Rig], AbstractContextManager[None]]] = {
        "nothing, twice": lambda _: contextlib.nullcontext(),
        "ctnetlink: NEW and DESTROY": partial(listener, _NEW | _DESTROY),
        "ctnetlink: NEW": partial(listener, _NEW),
        "ctnetlink: DESTROY": partial(listener, _DESTROY),
        "netfilter link": partial(netfilter, program),
    }
    lines = []
    print("| workload | capture | a second, without | with it (95 % interval) | pairs |\n|---|---|---|---|---|")
    with Rig() as rig:
        known = workloads(rig)
        for name in ("short", "packets"):
            lines += compare(rig, known[name], captures, arguments.pairs, arguments.seconds)
    for line in lines:
        ratio = f"{line['ratio']:.3f} ({line['low']:.3f} to {line['high']:.3f})"
        print(f"| {line['workload']} | {line['capture']} | {line['without']:,.0f} | {ratio} | {line['pairs']} |")
    met = int(module["met"][ctypes.c_int(0)].value)
    print(f"The netfilter link put {met:,} translations into its map.")
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
