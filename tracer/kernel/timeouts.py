"""How long conntrack waits after a flow's last packet before it drops the entry, by protocol and state.

Knows the sysctls net.netfilter.nf_conntrack_*_timeout* (Documentation/networking/nf_conntrack-sysctl.rst) of the
calling thread's network namespace.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_SYSCTL = Path("/proc/sys/net/netfilter")
#: enum tcp_conntrack (include/uapi/linux/netfilter/nf_conntrack_tcp.h) from SYN_SENT = 1 on, and the kernel's defaults.
_TCP = ("syn_sent", "syn_recv", "established", "fin_wait", "close_wait", "last_ack", "time_wait", "close")
_TCP_DEFAULTS = (120, 60, 432_000, 120, 60, 30, 120, 10)
TCP_SYN_SENT, TCP_SYN_RECV, TCP_ESTABLISHED, TCP_TIME_WAIT, TCP_CLOSE = 1, 2, 3, 7, 8
_ASSURED = 0x04
_UDP = 17


def _read(name: str, default: int) -> int:
    try:
        return int((_SYSCTL / name).read_text())
    except (OSError, ValueError):  # not this kernel's: its own default is as good as any
        return default


@dataclass(frozen=True)
class Timeouts:
    """In seconds. `tcp` by state; the unreplied and the assured UDP timeout."""

    tcp: npt.NDArray[np.uint32] = field(default_factory=lambda: np.array((0, *_TCP_DEFAULTS), np.uint32))
    udp: tuple[int, int] = (30, 120)

    @classmethod
    def here(cls) -> "Timeouts":
        """Those of the calling thread's network namespace."""
        states = [
            _read(f"nf_conntrack_tcp_timeout_{name}", default)
            for name, default in zip(_TCP, _TCP_DEFAULTS, strict=True)
        ]
        udp = _read("nf_conntrack_udp_timeout", 30), _read("nf_conntrack_udp_timeout_stream", 120)
        return cls(np.array((0, *states), np.uint32), udp)

    def of(
        self, protocol: npt.NDArray[Any], state: npt.NDArray[Any], status: npt.NDArray[Any]
    ) -> npt.NDArray[np.uint32]:
        """What entries wait, in seconds, by the state of their last packet; 0 where that is not known.

        UDP waits longer once it is assured, which conntrack says of a flow that was answered for two seconds
        (nf_conntrack_proto_udp.c).
        """
        tcp = self.tcp[np.where(state < len(self.tcp), state, 0)]
        udp = np.where(status & _ASSURED, self.udp[1], self.udp[0]).astype(np.uint32)
        return np.where(protocol == _UDP, udp, np.where(protocol == 6, tcp, 0)).astype(np.uint32)
