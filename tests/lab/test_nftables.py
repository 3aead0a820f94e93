"""The nftables rules against those of a real kube-proxy, and what all modes do with real connections."""

import errno
import re
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from sampled_node import (
    AFFINE,
    ECHO,
    HTTP,
    NFTABLES,
    NODE_ADDRESS,
    NODE_ADDRESS6,
    NONE,
    POD_CIDR,
    POD_CIDR6,
    SERVICE_CIDR,
    SERVICES,
    SERVICES6,
    at,
)

from tracer.errors import TracerError
from tracer.lab import iptables, nftables
from tracer.lab.netns import Namespace, open_all, wait_until
from tracer.lab.rules import Service

Table = dict[str, list[str]]


def listed(text: str) -> Table:
    """`chain x`, `set x` or `map x` → its lines; the elements, whose order is the kernel's, sorted, one a line."""
    found: Table = {}
    for block in re.finditer(r"^\t((?:chain|set|map) \S+) \{\n(.*?)^\t\}", text, re.MULTILINE | re.DOTALL):
        body, _, elements = block[2].partition("elements = {")
        # nft 1.0.6 does not print the comments of sets that it read as JSON
        lines = [line.strip() for line in body.splitlines() if not re.match(r"\s*(comment .*)?$", line)]
        found[block[1]] = lines + sorted(" ".join(one.split()) for one in elements.strip(" }\n\t").split(",") if one)
    # an endpoint of which the lab was not told whether it is local stands there too, and does no harm
    with suppress(KeyError, ValueError):
        found["set hairpin-connections"].remove("172.30.0.10 . 172.30.0.10 . tcp . 6443")
    return found


def written(text: str) -> Table:
    """The same from a first transaction, as far as it can be read without nft: the rules, and the elements."""
    found: Table = {}
    for line in text.splitlines():
        verb, kind, _, _, name, *rest = line.split(" ", 5)
        if verb != "add":
            continue
        if kind == "chain":
            found.setdefault(f"chain {name}", [])
        elif kind == "rule":
            found[f"chain {name}"] += rest
        elif kind == "element":
            found[f"elements {name}"] = sorted(rest[0].strip("{ }").split(", "))
    return found


def loader(node: Namespace) -> nftables.Loader:
    return nftables.Loader(node, POD_CIDR, [NODE_ADDRESS, NODE_ADDRESS6], [SERVICE_CIDR])


def test_the_text_is_kube_proxys_chain_for_chain() -> None:
    theirs = listed(NFTABLES.read_text())
    ours = written(nftables.document(SERVICES, POD_CIDR, [NODE_ADDRESS, NODE_ADDRESS6], [SERVICE_CIDR]))
    chains = {name for name in theirs if name.startswith("chain")}
    assert {name for name in ours if name.startswith("chain")} == chains
    assert len(chains) == 33
    for chain in chains:
        assert ours[chain] == [line for line in theirs[chain] if not line.startswith("type")], chain
    for name in ("service-ips", "service-nodeports", "no-endpoint-services"):
        assert ours[f"elements {name}"] == theirs[f"map {name}"][1:]
    for name in ("cluster-ips", "nodeport-ips"):
        assert ours[f"elements {name}"] == theirs[f"set {name}"][1:]


@pytest.mark.needs("netns", "nft")
def test_the_kernel_gives_back_what_kube_proxy_had() -> None:
    with Namespace("node") as node:
        rules = loader(node)
        rules.load(SERVICES)
        assert listed(rules.save()) == listed(NFTABLES.read_text())
        assert rules.backend == "nftables"


@pytest.mark.needs("netns", "nft")
def test_many_changes_end_where_one_load_does() -> None:
    with Namespace("step") as one, Namespace("leap") as other:
        stepwise, at_once = loader(one), loader(other)
        for services in (SERVICES[:1], SERVICES, (), SERVICES[2:], (replace(HTTP, endpoints=(), local_endpoints=()),)):
            stepwise.load(services)
            assert {name for name in listed(stepwise.save()) if "/" in name} == {
                *(f"chain {name}" for name in nftables.chains(services)),
                *(f"set {name}" for name in nftables.affinities(services)),
            }
        stepwise.load(SERVICES)
        at_once.load(SERVICES)
        assert listed(stepwise.save()) == listed(at_once.save())


@pytest.mark.needs("netns", "nft", "ipv6")
def test_ipv6_is_accepted_replaced_and_removed() -> None:
    with Namespace("node") as node:
        rules = nftables.Loader(node, POD_CIDR6, [NODE_ADDRESS, NODE_ADDRESS6])
        for services in (SERVICES6, SERVICES6[:1], ()):
            rules.load(services)
            found = {name.removeprefix("chain ") for name in listed(rules.save()) if re.match(r"chain .*/", name)}
            assert found == set(nftables.chains(services))
        rules.load(SERVICES6)
        table = listed(rules.save())
        web, away, *_ = SERVICES6
        assert table[f"chain {nftables.service_chain(web)}"] == [
            "meta l4proto tcp dnat ip6 to numgen random mod 2 map "
            "{ 0 : fd00:10:244:1::b . 8080, 1 : fd00:10:244:2::c . 8080 }"
        ]
        assert len(table[f"chain {nftables.service_chain(away, 'external')}"]) == 3
        assert table["set nodeport-ips"][-1] == NODE_ADDRESS6
        assert 'fd00:172:31::2 . tcp . 80 comment "shop/away:http" : drop' in table["map no-endpoint-services"]


@pytest.mark.needs("netns", "nft")
def test_a_refused_load_changes_nothing() -> None:
    with Namespace("node") as node:
        rules = loader(node)
        rules.load([HTTP])
        before = listed(rules.save())
        with pytest.raises(TracerError, match="nft"):
            rules.load([replace(HTTP, port=65536)])
        assert listed(rules.save()) == before
        rules.load([ECHO])
        assert {name for name in listed(rules.save()) if "/" in name} == {f"chain {nftables.service_chain(ECHO)}"}


@pytest.mark.needs("netns", "nft")
def test_who_was_where_outlasts_a_reload_of_the_service() -> None:
    first, second, third = AFFINE.endpoints
    with Namespace("node") as node:
        rules = loader(node)
        rules.load([AFFINE])

        def clients(endpoint: tuple[str, int]) -> list[str]:
            return listed(rules.save())[f"set {nftables.endpoint_name(AFFINE, endpoint, 'affinity')}"]

        for endpoint in (first, second):
            name = nftables.endpoint_name(AFFINE, endpoint, "affinity")
            node.run(["nft", "add", "element", "ip", "kube-proxy", name, "{ 10.9.8.7 timeout 500s }"])
        fewer = replace(AFFINE, endpoints=(first, second), local_endpoints=())
        rules.load([HTTP, fewer])
        assert clients(first)[-1].startswith("10.9.8.7 ")
        assert clients(second)[-1].startswith("10.9.8.7 ")
        assert nftables.endpoint_name(AFFINE, third, "affinity") not in rules.save()
        rules.load([replace(fewer, affinity_seconds=60)])
        assert clients(first)[-1] == "timeout 1m"  # the kernel cannot change the timeout of a set that exists


def test_what_stays_as_it_was_is_left_alone() -> None:
    text = nftables.document([HTTP, AFFINE, replace(ECHO, port=9001)], POD_CIDR, [], (), [HTTP, AFFINE, ECHO, NONE])
    changed = {line.split()[4] for line in text.splitlines() if line.split()[1] in ("chain", "rule")}
    assert changed == {nftables.service_chain(ECHO)}
    assert "affinity-" not in text


def test_a_name_that_the_kernel_would_not_take_is_cut() -> None:
    long = replace(HTTP, namespace="n" * 63, name="s" * 63, port_name="p" * 63)
    name = nftables.endpoint_name(long, ("fd00:1111:2222:3333:4444:5555:6666:7777", 65535))
    assert len(name) == len("endpoint-") + 240
    assert name.endswith("...")
    assert ":" not in name


@dataclass
class Road:
    """outside — node — pod: three namespaces in a row; the pods' addresses are all in the last."""

    family: int
    node: Namespace
    outside: Namespace
    pod: Namespace
    pods: tuple[str, str]
    cidr: str
    node_ip: str
    outside_ip: str
    gateway: str
    listeners: list[socket.socket] = field(default_factory=list)

    def service(self, name: str, number: int, endpoints: tuple[str, ...], **more: Any) -> Service:
        made = Service("shop", name, "p", self.virtual(number), 80, at(endpoints, 8080))
        return replace(made, load_balancers=(self.balanced(number),), node_port=30000 + number, **more)

    def virtual(self, number: int) -> str:
        return f"10.96.0.{number}" if self.family == 4 else f"fd00:10:96::{number}"

    def balanced(self, number: int) -> str:
        return f"172.31.0.{number}" if self.family == 4 else f"fd00:172:31::{number}"

    def socket(self, where: Namespace, kind: int = socket.SOCK_STREAM) -> socket.socket:
        family = socket.AF_INET if self.family == 4 else socket.AF_INET6
        return where.call(lambda: socket.socket(family, kind))

    def reach(self, where: Namespace, address: str, port: int, source: str = "") -> tuple[str, str]:
        """(the pod that answered, the client's address as it sees it)."""
        with self.socket(where) as client:
            client.settimeout(10)
            if source:
                client.bind((source, 0))
            client.connect((address, port))
            ready, _, _ = select.select(self.listeners, [], [], 10)
            with ready[0].accept()[0] as accepted:
                return accepted.getsockname()[0], accepted.getpeername()[0]

    def is_refused(self, where: Namespace, address: str, port: int) -> None:
        """Returns when an error has come back.

        It is there at once, but IPv6 ends connect() only at the next retransmission: the answer arrives while connect()
        still holds the socket, since one kernel is both ends.
        """
        with self.socket(where) as client:
            client.setblocking(False)
            client.connect_ex((address, port))
            wait_until(
                lambda: client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED,
                f"{address} port {port} to be refused",
            )


@pytest.fixture(params=[4, 6])
def road(request: pytest.FixtureRequest) -> Iterator[Road]:
    with ExitStack() as stack:
        node, outside, pod = (stack.enter_context(one) for one in open_all(["node", "outside", "pod"]))
        six = request.param == 6
        built = Road(
            request.param,
            node,
            outside,
            pod,
            ("fd00:10:244:1::b", "fd00:10:244:1::c") if six else ("10.244.1.11", "10.244.1.12"),
            POD_CIDR6 if six else POD_CIDR,
            NODE_ADDRESS6 if six else NODE_ADDRESS,
            "fd00:172:30::64" if six else "172.30.0.100",
            "fd00:10:244:1::1" if six else "10.244.1.1",
        )
        length = "/64" if six else "/24"
        for name, other in (("eth0", outside), ("pods", pod)):
            node.run(["ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(other.pid)])
        family = f"-{request.param}"
        for where, device, addresses in (
            (node, "eth0", [built.node_ip]),
            (node, "pods", [built.gateway]),
            (outside, "eth0", [built.outside_ip]),
            (pod, "eth0", built.pods),
        ):
            for address in addresses:
                where.run(["ip", family, "addr", "add", address + length, "dev", device, *(["nodad"] if six else [])])
            where.run(["ip", "link", "set", device, "up"])
            where.run(["ip", "link", "set", "lo", "up"])
        for where, via in ((node, built.outside_ip), (outside, built.node_ip), (pod, built.gateway)):
            where.run(["ip", family, "route", "add", "default", "via", via])
        node.sysctl({"net.ipv6.conf.all.forwarding" if six else "net.ipv4.ip_forward": 1})
        # else a second refusal within a second is kept back, and its client waits for a retransmission
        node.sysctl({"net.ipv6.icmp.ratelimit" if six else "net.ipv4.icmp_ratelimit": 0})
        for address in built.pods:
            listener = stack.enter_context(built.socket(pod))
            listener.bind((address, 8080))
            listener.listen(64)
            built.listeners.append(listener)
        yield built


@pytest.mark.needs("netns", "iptables", "nft", "ipv6")
@pytest.mark.parametrize("mode", ["nft", "legacy", "nftables"])
def test_connections_go_where_the_service_says(mode: str, road: Road) -> None:
    one, two = road.pods
    web = road.service("web", 1, (one, two))
    here = road.service("here", 2, (one, two), external_policy="Local", local_endpoints=at((two,), 8080))
    away = road.service("away", 3, (one, two), external_policy="Local")
    none = road.service("none", 4, ())
    alone = road.service("alone", 5, (one,))
    same = road.service("same", 6, (one, two), affinity_seconds=600)
    dgram = replace(road.service("dgram", 1, (one,)), protocol="udp")
    services = [web, here, away, none, alone, same, dgram]
    rules: iptables.Loader | nftables.Loader
    if mode == "nftables":
        rules = nftables.Loader(road.node, road.cidr, [road.node_ip])
    else:
        rules = iptables.Loader(road.node, road.cidr, mode)
    rules.load(services)

    def ways(service: Service) -> list[tuple[str, int]]:
        return [(service.address, 80), (service.load_balancers[0], 80), (road.node_ip, service.node_port)]

    for address, port in ways(web):  # 2^-31 that one endpoint is never chosen
        seen = {road.reach(road.outside, address, port) for _ in range(32)}
        assert seen == {(one, road.gateway), (two, road.gateway)}
    for address, port in ways(here)[1:]:  # this node's endpoint, and the client's own address
        assert {road.reach(road.outside, address, port) for _ in range(8)} == {(two, road.outside_ip)}
    for address, port in ways(away)[1:]:
        assert road.reach(road.node, address, port)[0] in road.pods
        with road.socket(road.outside) as client:
            client.settimeout(0.3)
            assert client.connect_ex((address, port)) == errno.EAGAIN  # no answer at all
    for address, port in ways(none):
        road.is_refused(road.outside, address, port)
    road.is_refused(road.node, none.address, 80)
    assert road.reach(road.pod, alone.address, 80, source=one) == (one, road.gateway)

    chosen, _ = road.reach(road.outside, same.address, 80)
    rules.load([replace(same, endpoints=same.endpoints[::-1]), dgram])
    assert {road.reach(road.outside, same.address, 80)[0] for _ in range(12)} == {chosen}

    with road.socket(road.pod, socket.SOCK_DGRAM) as server, road.socket(road.outside, socket.SOCK_DGRAM) as client:
        server.bind((one, 8080))
        for end in (server, client):
            end.settimeout(10)
        client.connect((dgram.address, 80))
        client.send(b"there")
        text, peer = server.recvfrom(64)
        assert (text, peer[0]) == (b"there", road.gateway)
        server.sendto(b"back", peer)
        assert client.recv(64) == b"back"
