"""Which subnets lie on bridges without bridge netfilter, in real namespaces; and messages that make no sense."""

import contextlib
import ipaddress
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tracer.errors import TracerError
from tracer.kernel import bridges, netns
from tracer.lab.netns import Namespace

PORT_ID, DUMP_INTERRUPTED = (0, 0), 0x10
NEWLINK, GETLINK, NEWADDR = 16, 18, 20
ERROR, DONE = 2, 3

#: conntrack attaches its hooks to a namespace when a rule there asks for it.
TRACKING = "table ip t { chain f { type filter hook forward priority 0; ct state new counter; }; }"


def switch(namespace: Namespace, on: int) -> None:
    for name in ("iptables", "ip6tables"):
        namespace.sysctl({f"net.bridge.bridge-nf-call-{name}": on})


@pytest.fixture
def namespace(need: Callable[[str], None]) -> Iterator[Namespace]:
    """One without any bridge, and with bridge netfilter off."""
    need("bridge-netfilter")
    with Namespace("bridges") as made:
        switch(made, 0)
        yield made


def add(namespace: Namespace, name: str, *addresses: str, **options: int) -> int:
    """A new bridge's ifindex."""
    pairs = [word for option, value in options.items() for word in (option, str(value))]
    namespace.run(["ip", "link", "add", name, "type", "bridge", *pairs])
    for address in addresses:
        namespace.run(["ip", "address", "add", *address.split(), "dev", name, *["nodad"] * (":" in address)])
    namespace.run(["ip", "link", "set", name, "up"])
    return namespace.call(lambda: socket.if_nametoindex(name))


def seen(namespace: Namespace) -> set[tuple[str, int]]:
    found = namespace.call(bridges.unfiltered)
    assert len(found) == len(set(found))
    return {(str(network), ifindex) for network, ifindex in found}


@pytest.mark.needs("netns")
class TestInNamespaces:
    def test_no_bridge(self, namespace: Namespace) -> None:
        namespace.run(["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"])
        namespace.run(["ip", "address", "add", "10.1.0.1/24", "dev", "eth0"])
        assert seen(namespace) == set()

    @pytest.mark.needs("ipv6")
    def test_the_subnets_of_every_bridge_of_both_families(self, namespace: Namespace) -> None:
        first = add(namespace, "cni0", "10.1.0.1/24", "fd00:1::1/64")
        second = add(namespace, "br-2", "10.2.0.77/20")
        assert seen(namespace) == {("10.1.0.0/24", first), ("fd00:1::/64", first), ("10.2.0.0/20", second)}

    def test_a_bridges_ports_are_no_bridges(self, namespace: Namespace) -> None:
        bridge = add(namespace, "cni0", "10.1.0.1/24")
        namespace.run(["ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1"])
        namespace.run(["ip", "link", "set", "veth0", "master", "cni0"])
        for port in ("veth0", "veth1"):
            namespace.run(["ip", "address", "add", "10.9.0.1/24", "dev", port])
        assert seen(namespace) == {("10.1.0.0/24", bridge)}

    @pytest.mark.needs("ipv6")
    def test_the_namespaces_switches_are_one_per_family(self, namespace: Namespace) -> None:
        bridge = add(namespace, "cni0", "10.1.0.1/24", "fd00:1::1/64")
        namespace.sysctl({"net.bridge.bridge-nf-call-iptables": 1})
        assert seen(namespace) == {("fd00:1::/64", bridge)}
        namespace.sysctl({"net.bridge.bridge-nf-call-iptables": 0, "net.bridge.bridge-nf-call-ip6tables": 1})
        assert seen(namespace) == {("10.1.0.0/24", bridge)}
        switch(namespace, 1)
        assert seen(namespace) == set()

    @pytest.mark.needs("ipv6")
    def test_a_bridges_own_switches_are_one_per_family(self, namespace: Namespace) -> None:
        add(namespace, "both", "10.1.0.1/24", "fd00:1::1/64", nf_call_iptables=1, nf_call_ip6tables=1)
        four = add(namespace, "four", "10.2.0.1/24", "fd00:2::1/64", nf_call_iptables=1)
        six = add(namespace, "six", "10.3.0.1/24", "fd00:3::1/64", nf_call_ip6tables=1)
        neither = add(namespace, "neither", "10.4.0.1/24", "fd00:4::1/64")
        assert seen(namespace) == {
            ("fd00:2::/64", four),
            ("10.3.0.0/24", six),
            ("10.4.0.0/24", neither),
            ("fd00:4::/64", neither),
        }

    def test_a_bridge_cannot_switch_off_what_its_namespace_switches_on(self, namespace: Namespace) -> None:
        switch(namespace, 1)
        add(namespace, "cni0", "10.1.0.1/24", nf_call_iptables=0)
        assert seen(namespace) == set()

    def test_the_switches_are_the_calling_threads(self, namespace: Namespace) -> None:
        bridge = add(namespace, "cni0", "10.1.0.1/24")
        with Namespace("other") as other:
            add(other, "cni0", "10.1.0.1/24")  # filtered: a new namespace has the switches on
            switch(other, 1)
            assert seen(other) == set()
            with netns.entered(namespace.path):
                assert [(str(network), ifindex) for network, ifindex in bridges.unfiltered()] == [
                    ("10.1.0.0/24", bridge)
                ]

    @pytest.mark.needs("ipv6")
    def test_addresses_that_say_nothing_about_neighbours(self, namespace: Namespace) -> None:
        addresses = ["10.1.0.1/32", "10.2.0.1/0", "fd00:1::1/128", "fe80::1/64", "fd00::1/0"]
        bridge = add(namespace, "cni0", *addresses, "10.3.0.1/31")
        assert seen(namespace) == {("10.3.0.0/31", bridge)}

    def test_of_a_peers_address_the_subnet_is_the_peers(self, namespace: Namespace) -> None:
        bridge = add(namespace, "cni0", "10.1.0.1 peer 10.7.0.9/24")
        assert seen(namespace) == {("10.7.0.0/24", bridge)}

    def test_several_addresses_in_one_subnet(self, namespace: Namespace) -> None:
        bridge = add(namespace, "cni0", "10.1.0.1/24", "10.1.0.2/24", "10.1.0.3/25")
        assert seen(namespace) == {("10.1.0.0/24", bridge), ("10.1.0.0/25", bridge)}

    def test_what_may_be_on_a_filtered_bridge_is_left_out(self, namespace: Namespace) -> None:
        add(namespace, "br0", "10.1.0.1/16")
        clear = add(namespace, "br1", "10.2.0.1/16")
        add(namespace, "br2", "10.1.5.1/24", "10.2.0.9/32", nf_call_iptables=1)
        assert seen(namespace) == {("10.2.0.0/16", clear)}

    def test_more_than_one_datagram_of_each_kind(self, namespace: Namespace) -> None:
        lines = [f"link add br{i} type bridge" for i in range(150)]
        lines += [f"address add 10.{i}.{k}.1/24 dev br{i}" for i in range(150) for k in range(8)]
        namespace.run(["ip", "-batch", "-"], feed="\n".join(lines))
        sizes = datagram_sizes(namespace)
        assert len(sizes[GETLINK]) > 1
        assert len(sizes[GETLINK + 4]) > 1
        assert len(seen(namespace)) == 1200

    @pytest.mark.needs("conntrack", "nft")
    @pytest.mark.parametrize("everywhere", [0, 1])
    @pytest.mark.parametrize("own", [0, 1])
    def test_conntrack_agrees(self, namespace: Namespace, everywhere: int, own: int) -> None:
        """The independent truth: whether a connection between two ports leaves an entry."""
        namespace.run(["nft", "-f", "-"], feed=TRACKING)
        switch(namespace, everywhere)
        add(namespace, "cni0", "10.1.0.1/24", nf_call_iptables=own)
        with Namespace("one") as one, Namespace("two") as two:
            for i, pod in enumerate((one, two), 2):
                peer = ["peer", "name", "eth0", "netns", str(pod.pid)]
                namespace.run(["ip", "link", "add", f"veth{i}", "type", "veth", *peer])
                namespace.run(["ip", "link", "set", f"veth{i}", "master", "cni0", "up"])
                pod.run(["ip", "address", "add", f"10.1.0.{i}/24", "dev", "eth0"])
                pod.run(["ip", "link", "set", "eth0", "up"])
            with (
                two.call(lambda: socket.create_server(("10.1.0.3", 8080))),
                one.call(lambda: socket.create_connection(("10.1.0.3", 8080), timeout=30)),
            ):
                tracked = "dst=10.1.0.3 sport=" in namespace.run(["conntrack", "-L", "-p", "tcp"])
        assert tracked == bool(everywhere or own)
        assert tracked == (not seen(namespace))

    def test_nothing_is_left_open(self, namespace: Namespace) -> None:
        add(namespace, "cni0", "10.1.0.1/24")
        before = os.listdir("/proc/self/fd")
        seen(namespace)
        assert os.listdir("/proc/self/fd") == before

    def test_it_imports_nothing_heavy(self) -> None:
        code = "import sys, tracer.kernel.bridges; print(sorted({'numpy', 'pyarrow', 'bcc'} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout == "[]\n"


def datagram_sizes(namespace: Namespace) -> dict[int, list[int]]:
    """The sizes of the datagrams of whole dumps, by the kind of request."""

    def read() -> dict[int, list[int]]:
        sizes: dict[int, list[int]] = {}
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
            netlink.settimeout(30)
            for kind, body in ((GETLINK, bytes(16)), (GETLINK + 4, bytes(8))):
                netlink.send(message(kind, body, flags=0x301))
                sizes[kind] = []
                last = 0
                while last != DONE:
                    data = netlink.recv(1 << 16)
                    sizes[kind].append(len(data))
                    last = [kind for kind, *_ in bridges.messages(data)][-1]
        return sizes

    return namespace.call(read)


def message(kind: int, body: bytes, flags: int = 2, sequence: int = 1) -> bytes:
    length = 16 + len(body)
    return struct.pack("=IHHII", length, kind, flags, sequence, 0) + body + bytes(-length % 4)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def link(ifindex: int, kind: bytes, data: bytes) -> bytes:
    info = attribute(1, kind) + attribute(2 | 0x8000, data)
    return struct.pack("=BxHiII", 0, 1, ifindex, 0, 0) + attribute(3, b"name\0") + attribute(18 | 0x8000, info)


def address(family: int, prefix: int, ifindex: int, packed: bytes) -> bytes:
    return struct.pack("=BBBBI", family, prefix, 0, 0, ifindex) + attribute(1, packed)


BOTH = attribute(36, b"\1") + attribute(37, b"\1") + attribute(38, b"\1")


class TestMessages:
    def test_links(self) -> None:
        assert bridges.bridge(link(7, b"bridge\0", BOTH)) == (7, {4, 6})
        assert bridges.bridge(link(7, b"bridge\0", attribute(36, b"\0") + attribute(37, b"\1"))) == (7, {6})
        assert bridges.bridge(link(7, b"bridge", b"")) == (7, set())  # a kernel without bridge netfilter
        assert bridges.bridge(link(7, b"veth\0", BOTH)) is None
        assert bridges.bridge(struct.pack("=BxHiII", 0, 1, 7, 0, 0)) is None  # a device without a kind: lo

    def test_addresses(self) -> None:
        assert bridges.subnet(address(socket.AF_INET, 8, 7, b"\x0a\1\2\3"), frozenset([7])) == (
            7,
            ipaddress.ip_network("10.0.0.0/8"),
        )
        assert bridges.subnet(address(socket.AF_INET, 8, 7, b"\x0a\1\2\3"), frozenset([8])) is None
        assert bridges.subnet(address(28, 8, 7, b"\x0a"), frozenset([7])) is None  # AF_MPLS

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            bytes(7),
            address(socket.AF_INET, 8, 7, b"\x0a\1\2"),
            address(socket.AF_INET6, 8, 7, b"\x0a\1\2\3"),
            address(socket.AF_INET, 33, 7, b"\x0a\1\2\3"),
            address(socket.AF_INET, 8, 7, b"\x0a\1\2\3")[:-1],
            struct.pack("=BBBBI", 2, 8, 0, 0, 7) + b"\0\0\1\0",
        ],
    )
    def test_odd_addresses(self, body: bytes) -> None:
        with pytest.raises(TracerError, match="was not understood"):
            bridges.subnet(body, frozenset([7]))

    @given(st.binary(max_size=96))
    @example(link(7, b"bridge\0", BOTH))
    @example(link(7, b"bridge\0", b"\0\0\0\0"))
    @example(link(7, b"bridge\0", BOTH)[:-3])
    @example(address(socket.AF_INET, 24, 7, b"\x0a\1\2\3"))
    @example(message(NEWLINK, link(7, b"bridge\0", BOTH)))
    def test_any_bytes_are_read_or_refused(self, data: bytes) -> None:
        readers: list[Callable[[], object]] = [
            lambda: list(bridges.messages(data)),
            lambda: bridges.bridge(data),
            lambda: bridges.bridge(link(7, b"bridge\0", data)),
            lambda: bridges.bridge(bytes(16) + attribute(18, data)),
            lambda: bridges.subnet(data, frozenset([7])),
            lambda: bridges.subnet(struct.pack("=BBBBI", 2, 24, 0, 0, 7) + data, frozenset([7])),
            lambda: bridges.dump(Kernel(data, message(DONE, bytes(4))), GETLINK, b""),
        ]
        for reader in readers:
            with contextlib.suppress(TracerError):
                reader()

    @given(
        st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.integers(0, 9), st.binary(max_size=40)))
    )
    def test_whole_messages_come_back(self, sent: list[tuple[int, int, int, bytes]]) -> None:
        data = b"".join(message(kind, body, flags, sequence) for kind, flags, sequence, body in sent)
        assert list(bridges.messages(data)) == sent


class Kernel(socket.socket):
    """Answers every request with the same datagrams, each message under the number of the request; then is silent."""

    def __init__(self, *datagrams: bytes, sender: tuple[int, int] = PORT_ID, how: int = 0) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._datagrams, self._sender, self._how = datagrams, sender, how
        self._left: list[bytes] = []
        self.requests: list[bytes] = []

    def send(self, request: bytes, flags: int = 0) -> int:  # type: ignore[override]
        self.requests.append(request)
        number = request[8:12]
        self._left = [
            data[:8] + number + data[12:] if data[8:12] == struct.pack("=I", 1) else data for data in self._datagrams
        ]
        return len(request)

    def recvmsg(self, *_: int) -> tuple[bytes, list[object], int, tuple[int, int]]:  # type: ignore[override]
        if not self._left:
            self.close()
            raise TimeoutError("timed out")
        return self._left.pop(0), [], self._how, self._sender


END = message(DONE, bytes(4))


class TestDump:
    def test_what_the_kernel_says_until_it_is_done(self) -> None:
        kernel = Kernel(message(NEWLINK, b"one!"), message(NEWLINK, b"two!"), END, message(NEWLINK, b"late"))
        with kernel:
            assert bridges.dump(kernel, GETLINK, b"body") == [(NEWLINK, b"one!"), (NEWLINK, b"two!")]
        assert kernel.requests[0][16:] == b"body"

    def test_another_senders_messages_are_passed_over(self) -> None:
        with Kernel(message(NEWLINK, b"fake"), END, sender=(4711, 0)) as kernel, pytest.raises(TimeoutError):
            bridges.dump(kernel, GETLINK, b"")

    def test_an_answer_to_another_request_is_passed_over(self) -> None:
        with Kernel(message(NEWLINK, b"old!", sequence=77), message(NEWLINK, b"new!"), END) as kernel:
            assert bridges.dump(kernel, GETLINK, b"") == [(NEWLINK, b"new!")]

    def test_a_dump_that_changed_meanwhile_is_repeated_but_not_for_ever(self) -> None:
        with (
            Kernel(message(NEWLINK, b"one!", flags=2 | DUMP_INTERRUPTED), END) as kernel,
            pytest.raises(TracerError, match="changed during each of 5 readings"),
        ):
            bridges.dump(kernel, GETLINK, b"")
        assert len({request[8:12] for request in kernel.requests}) == 5

    @pytest.mark.parametrize(
        ("last", "said"),
        [
            (message(ERROR, struct.pack("=i", -1) + bytes(16)), "EPERM"),
            (message(DONE, struct.pack("=i", -12)), "ENOMEM"),
            (message(ERROR, bytes(20)), "does not list"),
        ],
    )
    def test_a_refusal_is_an_error(self, last: bytes, said: str) -> None:
        with Kernel(last) as kernel, pytest.raises(TracerError, match=said):
            bridges.dump(kernel, GETLINK, b"")

    def test_a_datagram_that_was_cut_is_an_error(self) -> None:
        with (
            Kernel(message(NEWLINK, b"one!"), END, how=socket.MSG_TRUNC) as kernel,
            pytest.raises(TracerError, match="was not understood"),
        ):
            bridges.dump(kernel, GETLINK, b"")

    def test_a_list_without_end_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bridges, "_MAX_BYTES", 1 << 20)
        with Kernel(*[message(NEWADDR, bytes(40000))] * 40) as kernel, pytest.raises(TracerError, match="does not end"):
            bridges.dump(kernel, GETLINK, b"")

    def test_silence_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bridges, "_PATIENCE_SECONDS", 0.001)
        monkeypatch.setattr(socket.socket, "send", lambda *_: 0)  # the kernel is never asked
        with pytest.raises(TracerError, match="cannot be read"):
            bridges.unfiltered()


class TestSettings:
    def test_without_br_netfilter_nothing_is_filtered(self, tmp_path: Path) -> None:
        assert bridges.filtered_everywhere(tmp_path) == set()

    def test_each_family_has_its_own(self, tmp_path: Path) -> None:
        (tmp_path / "bridge").mkdir()
        (tmp_path / "bridge/bridge-nf-call-iptables").write_text("0\n")
        (tmp_path / "bridge/bridge-nf-call-ip6tables").write_text("1\n")
        assert bridges.filtered_everywhere(tmp_path) == {6}

    def test_without_proc_nothing_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(TracerError, match="cannot be read"):
            bridges.filtered_everywhere(tmp_path / "net")

    def test_what_is_no_number_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "bridge").mkdir()
        (tmp_path / "bridge/bridge-nf-call-iptables").write_text("\n")
        with pytest.raises(TracerError, match="cannot be read"):
            bridges.filtered_everywhere(tmp_path)
