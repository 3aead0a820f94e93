"""Subnets on bridges whose traffic no conntrack hook sees, so that the lack of a translation there means something.

Knows rtnetlink's dumps of links and addresses (include/uapi/linux/{rtnetlink,if_link,if_addr}.h) and bridge
netfilter's switches. Nothing of what follows from it for a connection: that is bpf/'s.

A bridge hands what it forwards between two ports to IPv4's hooks, where conntrack sits, if
net.bridge.bridge-nf-call-iptables is set *or* the bridge's own IFLA_BR_NF_CALL_IPTABLES is; to IPv6's likewise by the
ip6tables pair (br_nf_pre_routing in net/bridge/br_netfilter_hooks.c). The settings belong to the network namespace
since "netfilter: bridge: namespace bridge netfilter sysctls" (22567590b2e6, Linux 5.3), and are there while
br_netfilter is loaded. Without it the bridge's own flags do nothing; they are believed all the same, as loading it,
which anybody may do between two looks, brings them to life.

What this cannot tell:

- Bridges can track by themselves (nf_conntrack_bridge: a `ct` expression in an nft table of the family `bridge` makes
  its namespace do so). That is not looked for: the module's presence says nothing about this namespace, one that is
  built in leaves no trace in /sys/module, and the list of hooks (nfnetlink_hook) comes with 5.14 and is optional. Such
  entries cannot be rewritten ones, as the family has no nat chains (net/netfilter/nft_chain_nat.c registers them for
  ip, ip6 and inet), so "not rewritten" stays true of its connections.
- Two addresses of one subnet may talk by way of the node, routed and tracked: a pod with host routes, isolated ports
  with proxy ARP, ebtables' `broute`. Nor is tc's `act_ct` on a port seen. Look for a translation first.
- Of a bridge with VLANs some traffic may pass no hook though the switches are on: it counts as filtered.
"""

import errno
import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

from tracer.errors import TracerError

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_SETTINGS = {4: "bridge/bridge-nf-call-iptables", 6: "bridge/bridge-nf-call-ip6tables"}
_GETLINK, _NEWLINK, _GETADDR, _NEWADDR = 18, 16, 22, 20  # RTM_*
_REQUEST_DUMP, _DUMP_INTERRUPTED = 0x301, 0x10  # NLM_F_REQUEST | NLM_F_DUMP, NLM_F_DUMP_INTR
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_TYPE = 0x3FFF  # NLA_TYPE_MASK
_IFLA_LINKINFO, _IFLA_EXT_MASK = 18, 29
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_IFLA_BR_NF_CALL = {36: 4, 37: 6}  # IFLA_BR_NF_CALL_IPTABLES, IFLA_BR_NF_CALL_IP6TABLES
_SKIP_STATS = 1 << 3  # RTEXT_FILTER_SKIP_STATS
_IFA_ADDRESS = 1
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port id
_ATTRIBUTE = struct.Struct("=HH")  # nlattr: length with this header, type
_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, hardware type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_LINK_LOCAL = ipaddress.IPv6Network("fe80::/10")
_BUFFER = 1 << 16  # the kernel fills up to 32 KiB for whoever reads so much at once
#: The address dump of a node with kube-proxy in IPVS mode holds every service: 20,000 of them are 2 MB.
_MAX_BYTES = 1 << 26
_ATTEMPTS = 5  # a dump during which links or addresses changed is repeated
_PATIENCE_SECONDS = 5.0


class Bridge(NamedTuple):
    """A bridge device, and the IP versions (4, 6) for which its own switch of bridge netfilter is on."""

    ifindex: int
    filtered: frozenset[int]


class Subnet(NamedTuple):
    """The subnet of an address, and the index of the device that has the address."""

    ifindex: int
    network: Network


def unfiltered() -> list[tuple[Network, int]]:
    """The subnets on bridges of the calling thread's network namespace whose bridged traffic passes no conntrack hook.

    A subnet is that of an address which the bridge itself has; of a peer's address where it has one. Left out are
    IPv6 link-local ones, those of a single address, and 0.0.0.0/0 and ::/0, which say nothing about neighbours; also
    any that overlaps a subnet of a bridge which is filtered for that IP version, as it is then not known on which of
    the two an address is.

    Returns:
        Pairs of network and the bridge's ifindex, in the kernel's order, none twice. Two bridges may have one network.

    Raises:
        TracerError: the kernel does not list its links or addresses, or its settings cannot be read.
    """
    everywhere = filtered_everywhere()
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
            netlink.bind((0, 0))
            netlink.settimeout(_PATIENCE_SECONDS)
            links = dump(netlink, _GETLINK, _only_bridges())
            bridges = [found for kind, body in links if kind == _NEWLINK and (found := bridge(body))]
            if not bridges:
                return []
            addresses = dump(netlink, _GETADDR, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
    except OSError as error:
        raise TracerError(f"The bridges and their addresses cannot be read ({error}): try 'ip -d link'.") from error
    wanted = frozenset(one.ifindex for one in bridges)
    subnets = [net for kind, body in addresses if kind == _NEWADDR and (net := subnet(body, wanted))]
    return select(bridges, subnets, everywhere)


def select(
    bridges: Iterable[Bridge], subnets: Iterable[Subnet], everywhere: frozenset[int]
) -> list[tuple[Network, int]]:
    """Those of the bridges' subnets whose bridged traffic passes no hook.

    Args:
        bridges: all of a namespace.
        subnets: of these bridges' own addresses.
        everywhere: the IP versions for which the namespace's switch is on, whatever a bridge says.
    """
    filtered = {one.ifindex: one.filtered | everywhere for one in bridges}
    passing: dict[tuple[Network, int], None] = {}
    hooked: set[Network] = set()
    for index, network in subnets:
        if network.version in filtered[index]:
            hooked.add(network)
        else:
            passing[network, index] = None
    return [(network, index) for network, index in passing if not any(map(network.overlaps, hooked))]


def bridge(body: bytes) -> Bridge | None:
    """The bridge that an RTM_NEWLINK message (without its nlmsghdr) describes; None if that is another device.

    Raises:
        TracerError: the message is malformed.
    """
    if len(body) < _LINK.size:
        raise _malformed("a link", body)
    index = _LINK.unpack_from(body)[2]
    for kind, value in _attributes(body[_LINK.size :]):
        if kind == _IFLA_LINKINFO:
            about = dict(_attributes(value))
            if about.get(_IFLA_INFO_KIND, b"").rstrip(b"\0") != b"bridge":
                return None
            switches = _attributes(about.get(_IFLA_INFO_DATA, b""))
            return Bridge(
                index, frozenset(_IFLA_BR_NF_CALL[k] for k, v in switches if k in _IFLA_BR_NF_CALL and any(v))
            )
    return None


def subnet(body: bytes, wanted: frozenset[int]) -> Subnet | None:
    """The subnet in an RTM_NEWADDR message (without its nlmsghdr); None if it is of no use, see `unfiltered`.

    Args:
        body: the message.
        wanted: indexes of the devices whose addresses are asked for; others' messages are not looked into.

    Raises:
        TracerError: the message is malformed.
    """
    if len(body) < _ADDRESS.size:
        raise _malformed("an address", body)
    family, prefix, _, _, index = _ADDRESS.unpack_from(body)
    width = {socket.AF_INET: 4, socket.AF_INET6: 16}.get(family)
    if index not in wanted or width is None:
        return None
    for kind, value in _attributes(body[_ADDRESS.size :]):
        if kind == _IFA_ADDRESS:  # IFA_LOCAL differs where there is a peer, and the prefix is then the peer's
            if len(value) != width or prefix > 8 * width:
                raise _malformed("an address", body)
            network = ipaddress.ip_network((value, prefix), strict=False)
            alone = prefix in (0, 8 * width)
            return None if alone or (network.version == 6 and network.overlaps(_LINK_LOCAL)) else Subnet(index, network)
    return None


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """The netlink messages of a datagram: (type, flags, sequence, what follows the nlmsghdr).

    Raises:
        TracerError: the datagram is cut off, or a length in it makes no sense.
    """
    at = 0
    while at < len(data):
        if at + _HEADER.size > len(data):
            raise _malformed("a message", data[at:])
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or at + length > len(data):
            raise _malformed("a message", data[at:])
        yield kind, flags, sequence, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


def dump(netlink: socket.socket, kind: int, request: bytes) -> list[tuple[int, bytes]]:
    """What the kernel lists: (type, body) of every message of a consistent dump.

    Args:
        netlink: a bound NETLINK_ROUTE socket with a timeout.
        kind: RTM_GET*.
        request: what follows the nlmsghdr.

    Raises:
        TracerError: the kernel refuses, its answer is malformed or endless, or changes while it is read, every time.
        OSError: the socket fails, or nothing comes within its timeout.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        number = kind << 8 | attempt  # so that an answer to another request is none to this one
        netlink.send(_HEADER.pack(_HEADER.size + len(request), kind, _REQUEST_DUMP, number, 0) + request)
        listed, interrupted = _listed(netlink, number)
        if not interrupted:
            return listed
    raise TracerError(
        f"The kernel's bridges and addresses changed during each of {_ATTEMPTS} readings: try again later."
    )


def _listed(netlink: socket.socket, number: int) -> tuple[list[tuple[int, bytes]], bool]:
    """The messages with this sequence number up to NLMSG_DONE, and whether the kernel calls them inconsistent."""
    listed: list[tuple[int, bytes]] = []
    interrupted, read = False, 0
    while read < _MAX_BYTES:
        data, _, how, sender = netlink.recvmsg(_BUFFER)
        if how & socket.MSG_TRUNC:
            raise _malformed("a datagram", data)
        read += len(data) or _HEADER.size  # an empty one must not go on for ever either
        if sender[0] != 0:  # another process may write to this socket; the kernel has port 0
            continue
        for kind, flags, sequence, body in messages(data):
            if sequence != number:
                continue
            interrupted |= bool(flags & _DUMP_INTERRUPTED)
            if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                _refusal(kind, body)
                return listed, interrupted
            listed.append((kind, body))
    raise TracerError(
        f"The kernel's list of bridges or addresses does not end after {_MAX_BYTES >> 20} MiB: look at 'ip address'."
    )


def _refusal(kind: int, body: bytes) -> None:
    """Raises TracerError if the last message of a dump carries an error: both kinds begin with its negative number."""
    code = -int.from_bytes(body[:4], sys.byteorder, signed=True)
    if code or kind == _NLMSG_ERROR:
        reason = errno.errorcode.get(code, str(code))
        raise TracerError(f"The kernel does not list its bridges and their addresses ({reason}): try 'ip -d link'.")


def _only_bridges() -> bytes:
    """The body of an RTM_GETLINK for bridges, without statistics. A kernel without bridges lists every link."""
    kind = _attribute(_IFLA_INFO_KIND, b"bridge\0")
    header = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    return header + _attribute(_IFLA_LINKINFO, kind) + _attribute(_IFLA_EXT_MASK, struct.pack("=I", _SKIP_STATS))


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, value) of the attributes that fill `data`. Raises TracerError if they do not."""
    at = 0
    while at < len(data):
        if at + _ATTRIBUTE.size > len(data):
            raise _malformed("an attribute", data[at:])
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or at + length > len(data):
            raise _malformed("an attribute", data[at:])
        yield kind & _TYPE, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def filtered_everywhere(settings: Path = Path("/proc/sys/net")) -> frozenset[int]:
    """The IP versions for which bridge netfilter is on for all bridges of the calling thread's namespace."""
    return frozenset(version for version, name in _SETTINGS.items() if _is_on(settings, name))


def _is_on(settings: Path, name: str) -> bool:
    try:
        return int((settings / name).read_bytes()) != 0
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and settings.is_dir():  # br_netfilter is not loaded
            return False
        raise TracerError(f"The setting {settings / name} cannot be read ({error}): is /proc mounted?") from error


def _malformed(what: str, data: bytes) -> TracerError:
    return TracerError(
        f"The kernel's list of bridges or addresses was not understood ({what}, {len(data)} bytes: "
        f"{data[:24].hex()}): please report this with the output of 'uname -r'."
    )
