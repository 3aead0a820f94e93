"""The iptables rules against those of a real kube-proxy: as text, and as a kernel gives them back."""

import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
from sampled_node import AFFINE, ECHO, HTTP, IPTABLES, NONE, POD_CIDR, POD_CIDR6, SERVICES, SERVICES6, WEB, at

from tracer.errors import TracerError, UsageError
from tracer.lab import rules
from tracer.lab.iptables import Loader
from tracer.lab.netns import Namespace
from tracer.lab.rules import Service

BACKENDS = ["nft", "legacy"]


def normal(line: str) -> str:
    """One spelling for what can be spelt in several ways, and no accounting objects, which the lab has none of."""
    line = " ".join(shlex.split(line))
    line = re.sub(r"--probability (\S+)", lambda match: f"--probability {float(match[1]):.6f}", line)
    line = re.sub(r" -m nfacct --nfacct-name \S+| --mask \S+", "", line)
    line = line.replace("--or-mark 0x4000", "--set-xmark 0x4000/0x4000")
    return line.replace("--xor-mark 0x4000", "--set-xmark 0x4000/0x0")


def by_chain(text: str) -> dict[tuple[str, str], list[str]]:
    """(table, chain) → its rules, in order; KUBE- chains and the hooks into others."""
    found: dict[tuple[str, str], list[str]] = {}
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":KUBE-"):
            found.setdefault((table, line[1:].split()[0]), [])
        # kube-proxy counts what comes for a node port by the loopback address, then does with it as with the rest
        elif line.startswith("-A") and "localhost_nps_accepted_pkts" not in line:
            found.setdefault((table, line.split()[1]), []).append(normal(line))
    return found


def assert_like_kube_proxy(text: str) -> None:
    ours, theirs = by_chain(text), by_chain(IPTABLES.read_text())
    assert ours.keys() == theirs.keys()
    assert len(theirs) == 60
    for chain, expected in theirs.items():
        if chain[1] in ("KUBE-SERVICES", "KUBE-NODEPORTS"):  # kube-proxy walks its services in no order
            assert sorted(ours[chain]) == sorted(expected), chain
        else:
            assert ours[chain] == expected, chain
    assert ours["nat", "KUBE-SERVICES"][-1].endswith("-j KUBE-NODEPORTS")


def rule(text: str, *parts: str) -> str:
    """The only rule that has all these parts."""
    found = [line for line in text.splitlines() if line.startswith("-A") and all(part in line for part in parts)]
    assert len(found) == 1, found
    return found[0]


def test_the_text_is_kube_proxys_chain_for_chain() -> None:
    assert_like_kube_proxy(rules.document(SERVICES, POD_CIDR))


@pytest.mark.needs("netns", "iptables")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kernel_gives_back_what_kube_proxy_had(backend: str) -> None:
    with Namespace("node") as node:
        loader = Loader(node, POD_CIDR, backend)
        loader.load(SERVICES)
        assert_like_kube_proxy(loader.save("nat") + loader.save("filter"))
        assert loader.backend == backend


@pytest.mark.needs("netns", "iptables")
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_changes_end_where_one_load_does(backend: str) -> None:
    with Namespace("step") as one, Namespace("leap") as other:
        emptied = replace(HTTP, endpoints=(), local_endpoints=())
        stepwise, at_once = Loader(one, POD_CIDR, backend), Loader(other, POD_CIDR, backend)
        for services in (SERVICES[:1], SERVICES, (), SERVICES[2:], (emptied, AFFINE), SERVICES):
            stepwise.load(services)
        at_once.load(SERVICES)
        for table in ("nat", "filter"):
            assert by_chain(stepwise.save(table)) == by_chain(at_once.save(table))


@pytest.mark.needs("netns", "iptables")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_change_removes_what_is_stale_and_nothing_else(backend: str) -> None:
    with Namespace("node") as node:
        loader = Loader(node, POD_CIDR, backend)
        loader.load(SERVICES)
        node.run([f"iptables-{backend}", "-t", "nat", "-N", "OTHERS"])
        fewer = replace(HTTP, endpoints=at(WEB[:1], 8080), local_endpoints=())
        loader.load([fewer])
        after = loader.save()
        assert set(re.findall(r"KUBE-(?:SVC|SVL|EXT|SEP)-\w+", after)) == rules.chains([fewer])
        assert ":OTHERS -" in after
        assert after.count("-A PREROUTING") == 1
        assert "--probability" not in after


@pytest.mark.needs("netns", "iptables", "ipv6")
@pytest.mark.parametrize("backend", BACKENDS)
def test_ipv6_is_accepted_replaced_and_removed(backend: str) -> None:
    with Namespace("node") as node:
        loader = Loader(node, POD_CIDR6, backend)
        for services in (SERVICES6, SERVICES6[:1], ()):
            loader.load(services)
            found = set(re.findall(r"KUBE-(?:SVC|SVL|EXT|SEP)-\w+", loader.save()))
            assert found == rules.chains(services)


@pytest.mark.needs("netns", "iptables")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_load_changes_nothing(backend: str) -> None:
    with Namespace("node") as node:
        loader = Loader(node, POD_CIDR, backend)
        loader.load([HTTP])
        before = by_chain(loader.save())
        with pytest.raises(TracerError, match="restore"):
            loader.load([replace(HTTP, port=65536)])
        assert by_chain(loader.save()) == before
        loader.load([ECHO])
        assert by_chain(loader.save()).keys() >= {("nat", chain) for chain in rules.chains([ECHO])}


@pytest.mark.needs("netns", "iptables")
@pytest.mark.parametrize("backend", BACKENDS)
def test_who_was_where_outlasts_a_reload_of_the_service(backend: str) -> None:
    first, second, third = AFFINE.endpoints
    with Namespace("node") as node:
        loader = Loader(node, POD_CIDR, backend)
        loader.load([AFFINE])

        def recent(endpoint: rules.Endpoint, mode: str, text: str = "") -> str:
            def access() -> str:
                with open(f"/proc/thread-self/net/xt_recent/{rules.endpoint_chain(AFFINE, endpoint)}", mode) as table:
                    return str(table.write(text)) if text else table.read()

            return node.call(access)

        recent(first, "w", "+10.9.8.7")
        recent(second, "w", "+10.9.8.6")
        loader.load([HTTP, replace(AFFINE, endpoints=(first, second), local_endpoints=(), affinity_seconds=700)])
        assert "src=10.9.8.7 " in recent(first, "r")
        assert "src=10.9.8.6 " in recent(second, "r")
        with pytest.raises(FileNotFoundError):
            recent(third, "r")


def test_what_stays_as_it_was_is_left_alone() -> None:
    text = rules.document([HTTP, replace(ECHO, endpoints=ECHO.endpoints[:2])], POD_CIDR, [HTTP, ECHO])
    declared = {line[1:].split()[0] for line in text.splitlines() if line.startswith(":KUBE-S")} - {"KUBE-SERVICES"}
    assert declared == rules.chains([ECHO])
    assert not any(f"-A {chain} " in text for chain in rules.chains([HTTP]))
    assert "-A PREROUTING" not in text


def test_stale_chains_are_emptied_and_removed_in_the_same_step() -> None:
    text = rules.document([], POD_CIDR, [HTTP])
    for chain in rules.chains([HTTP]):
        assert text.index(f":{chain} - [0:0]") < text.index(f"-X {chain}") < text.rindex("COMMIT")


def test_a_load_balancer_leads_to_the_external_chain() -> None:
    balanced = replace(HTTP, load_balancers=("172.31.0.1", "172.31.0.2"))
    text = rules.document([balanced], POD_CIDR)
    for address in balanced.load_balancers:
        found = rule(text, "-A KUBE-SERVICES ", f"-d {address}/32 ")
        assert '"shop/web:http loadbalancer IP" -m tcp --dport 80 ' in found
        assert found.endswith(f"-j {rules.service_chain(balanced, 'EXT')}")
    assert "KUBE-NODEPORTS -p" not in text


def test_a_service_without_endpoints_is_refused_at_every_address() -> None:
    service = replace(NONE, node_port=30050, load_balancers=("172.31.0.1",), protocol="udp")
    text = rules.document([service], POD_CIDR)
    for start in (
        "-A KUBE-SERVICES -d 10.96.10.50/32 ",
        "-A KUBE-EXTERNAL-SERVICES -d 172.31.0.1/32 ",
        "-A KUBE-EXTERNAL-SERVICES -p udp ",
    ):
        assert rule(text, start, "web-none").endswith("-j REJECT --reject-with icmp-port-unreachable")
    assert "-m addrtype --dst-type LOCAL -m udp --dport 30050 -j REJECT" in text
    assert rules.chains([service]) == set()


@pytest.mark.parametrize("policy", ["internal", "external"])
def test_a_policy_that_finds_no_endpoint_here_drops(policy: str) -> None:
    away = Service(
        "shop",
        "web",
        "http",
        "10.96.10.10",
        80,
        at(WEB, 8080),
        node_port=30080,
        load_balancers=("172.31.0.1",),
        external_policy="Local" if policy == "external" else "Cluster",
        internal_policy="Local" if policy == "internal" else "Cluster",
    )
    text = rules.document([away], POD_CIDR)
    drops = [line for line in text.splitlines() if line.endswith("-j DROP") and "shop/web:http" in line]
    assert all("shop/web:http has no local endpoints" in line for line in drops)
    external = f"-A {rules.service_chain(away, 'EXT')} "
    if policy == "internal":
        assert [line.split()[:4] for line in drops] == [["-A", "KUBE-SERVICES", "-d", "10.96.10.10/32"]]
        assert "cluster IP" not in text
        assert text.count(external) == 2
    else:
        assert [line.split()[1] for line in drops] == ["KUBE-EXTERNAL-SERVICES"] * 2
        assert text.count(external) == 3  # pods and the node may go anywhere; nobody else gets through
    assert "KUBE-SVL-" not in text


def test_ipv6_is_written_as_ip6tables_takes_it() -> None:
    text = rules.document(SERVICES6, POD_CIDR6)
    web, _, _, none, _ = SERVICES6
    chain = rules.endpoint_chain(web, web.endpoints[0])
    assert rule(text, f"-A {chain} -p").endswith("-j DNAT --to-destination [fd00:10:244:1::b]:8080")
    assert f"-A {chain} -s fd00:10:244:1::b/128 " in text
    assert rule(text, f"-d {none.address}/128 ").endswith("--reject-with icmp6-port-unreachable")
    assert rule(text, "-A KUBE-SERVICES ! -d ::1/128 ").endswith("-j KUBE-NODEPORTS")


@pytest.mark.parametrize("count", [1, 2, 3, 6, 100])
def test_the_probabilities_give_every_endpoint_the_same_share(count: int) -> None:
    pods = tuple(f"10.244.1.{number}" for number in range(count))
    web = replace(HTTP, endpoints=at(pods, 8080), local_endpoints=())
    left, shares = 1.0, []
    for line in rules.document([web], POD_CIDR).splitlines():
        if line.startswith(f"-A {rules.service_chain(web)} -m"):
            found = re.search(r"--probability (\S+)", line)
            shares.append(left * (float(found[1]) if found else 1.0))
            left -= shares[-1]
    assert shares == pytest.approx([1 / count] * count, abs=1e-7)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"protocol": "TCP"}, "protocol 'TCP'"),
        ({"external_policy": "local"}, "policy 'local'"),
        ({"internal_policy": ""}, "policy ''"),
        ({"local_endpoints": (("10.244.9.9", 8080),)}, "10.244.9.9"),
    ],
)
def test_what_no_service_can_be_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        replace(HTTP, **wrong)
