"""The rules against those of a real kube-proxy: as text, and as a kernel gives them back."""

import re
import shlex
from pathlib import Path

import pytest

from tracer.lab import rules
from tracer.lab.iptables import Loader
from tracer.lab.netns import Namespace

SAMPLE = Path(__file__).parents[1] / "data" / "kube-proxy-iptables.rules"
CIDR = "10.244.0.0/16"
PODS = ("10.244.1.11", "10.244.1.12", "10.244.2.13")


def service(port_name: str, port: int, target: int, pods: tuple[str, ...] = PODS) -> rules.Service:
    return rules.Service("shop", "web", port_name, "10.96.10.10", port, tuple((pod, target) for pod in pods))


HTTP = service("http", 80, 8080)
ECHO = service("echo", 9000, 9000)
NONE = rules.Service("shop", "web-none", "http", "10.96.10.50", 80, ())


def normal(line: str) -> str:
    """One spelling for what can be spelt in several ways: quotes, marks, a rounded probability."""
    line = " ".join(shlex.split(line))
    line = re.sub(r"--probability (\S+)", lambda match: f"--probability {float(match[1]):.6f}", line)
    line = line.replace("--or-mark 0x4000", "--set-xmark 0x4000/0x4000")
    return line.replace("--xor-mark 0x4000", "--set-xmark 0x4000/0x0")


def sample() -> list[str]:
    lines = [line for line in SAMPLE.read_text().splitlines() if line.startswith("-A")]
    assert len(lines) == 30
    return lines


def appended(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("-A")]


def test_the_text_has_every_rule_of_kube_proxy_and_no_other() -> None:
    text = rules.document([HTTP, ECHO, NONE], CIDR, first=True)
    ours = {normal(line) for line in appended(text)}
    theirs = {normal(line) for line in sample()}
    assert theirs <= ours
    beyond = {line for line in ours - theirs if "KUBE-FORWARD" not in line}
    assert beyond == {  # the filter table's hooks, which the excerpt leaves out
        "-A FORWARD -m conntrack --ctstate NEW -m comment --comment kubernetes service portals -j KUBE-SERVICES",
        "-A OUTPUT -m conntrack --ctstate NEW -m comment --comment kubernetes service portals -j KUBE-SERVICES",
    }


def test_the_order_within_each_chain_is_kube_proxys() -> None:
    ours = [normal(line) for line in appended(rules.document([HTTP, ECHO, NONE], CIDR, first=True))]
    theirs = [normal(line) for line in sample()]
    for chain in {line.split()[1] for line in theirs} - {"KUBE-SERVICES", "OUTPUT"}:
        assert [r for r in ours if r.split()[1] == chain] == [r for r in theirs if r.split()[1] == chain], chain


@pytest.mark.needs("netns", "iptables")
@pytest.mark.parametrize("backend", ["nft", "legacy"])
def test_the_kernel_gives_back_what_kube_proxy_had(backend: str) -> None:
    with Namespace("node") as node:
        loader = Loader(node, CIDR, backend)
        loader.load([HTTP, ECHO, NONE])
        ours = {" ".join(shlex.split(line)) for line in appended(loader.save("nat") + loader.save("filter"))}
        assert {" ".join(shlex.split(line)) for line in sample()} <= ours


@pytest.mark.needs("netns", "iptables")
@pytest.mark.parametrize("backend", ["nft", "legacy"])
def test_a_change_removes_what_is_stale_and_nothing_else(backend: str) -> None:
    with Namespace("node") as node:
        loader = Loader(node, CIDR, backend)
        loader.load([HTTP, ECHO])
        node.run([f"iptables-{backend}", "-t", "nat", "-N", "OTHERS"])
        fewer = service("http", 80, 8080, PODS[:1])
        loader.load([fewer])
        after = loader.save()
        assert set(re.findall(r"KUBE-(?:SVC|SEP)-\w+", after)) == rules.chains([fewer])
        assert ":OTHERS -" in after
        assert after.count("-A PREROUTING") == 1
        assert "--probability" not in after


def test_stale_chains_are_emptied_and_removed_in_the_same_step() -> None:
    text = rules.document([], CIDR, stale=rules.chains([HTTP]))
    for chain in rules.chains([HTTP]):
        assert text.index(f":{chain} - [0:0]") < text.index(f"-X {chain}") < text.rindex("COMMIT")


def test_a_chain_in_use_is_never_removed() -> None:
    assert "-X" not in rules.document([HTTP], CIDR, stale=rules.chains([HTTP]))


def test_ipv6_is_written_as_ip6tables_takes_it() -> None:
    dual = rules.Service("shop", "web", "http", "fd00:10:96::10", 80, (("fd00:10:244:1::b", 8080),))
    none = rules.Service("shop", "none", "http", "fd00:10:96::11", 80, ())
    text = rules.document([dual, none], "fd00:10:244::/48")
    assert "-j DNAT --to-destination [fd00:10:244:1::b]:8080" in text
    assert "-s fd00:10:244:1::b/128 " in text
    assert "-d fd00:10:96::10/128 " in text
    assert "--reject-with icmp6-port-unreachable" in text


@pytest.mark.parametrize("count", [1, 2, 3, 6, 100])
def test_the_probabilities_give_every_endpoint_the_same_share(count: int) -> None:
    pods = tuple(f"10.244.1.{number}" for number in range(count))
    chain = rules.service_chain(HTTP)
    text = rules.document([service("http", 80, 8080, pods)], CIDR)
    left, shares = 1.0, []
    for line in appended(text):
        if line.startswith(f"-A {chain} -m"):
            found = re.search(r"--probability (\S+)", line)
            shares.append(left * (float(found[1]) if found else 1.0))
            left -= shares[-1]
    assert shares == pytest.approx([1 / count] * count, abs=1e-7)
