"""The real agent, watched as an operator watches it: what it exports, what it answers, what it says."""

import ipaddress
import json
import os
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kube_lab
import promql_parser
import pytest
import yaml
from agent_world import Agent, agent, published, rows, until
from command_world import ROOT, run, sentence
from kube_api import serving
from prometheus_client.parser import text_string_to_metric_families

from tracer.lab.cluster import Cluster
from tracer.operations.metrics import METRICS, NAMING_STATES, STAGES
from tracer.operations.server import bind
from tracer.version import __version__

pytestmark = pytest.mark.needs("bpf", "netns", "conntrack", "iptables")

#: Prometheus' own, of every target.
OF_PROMETHEUS = {"up"}


@dataclass
class Watched:
    """An agent that serves its pages, and the line it began with."""

    agent: Agent
    cluster: Cluster
    begun: dict[str, Any]

    def page(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.begun['about']['listen']}{path}", timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            return refused.code, refused.read().decode()

    def scrape(self) -> dict[str, dict[str, float]]:
        """Values by metric and by the label's value ("" where there is none)."""
        found: dict[str, dict[str, float]] = {}
        for family in text_string_to_metric_families(self.page("/metrics")[1]):
            for sample in family.samples:
                found.setdefault(sample.name, {})["/".join(sample.labels.values())] = sample.value
        return found

    def value(self, metric: str, label: str = "") -> float:
        return self.scrape()[f"vip_tracer_{metric}"][label]

    def hang_up(self) -> None:
        self.agent.process.send_signal(signal.SIGHUP)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Beside an API server, publishing only when told to."""
    where = tmp_path_factory.mktemp("watched")
    with Cluster(backends=2, clients=1) as cluster, serving() as api:
        for kind, objects in kube_lab.objects(cluster).items():
            api.set(kind, *objects)
        options = ["--kubeconfig", str(api.kubeconfig(where / "kubeconfig")), "--name-wait", "0.1s", "--rotate", "1h"]
        with agent(cluster, where / "data", "--listen", "127.0.0.1:0", *options) as running:
            lines = map(json.loads, running.said.splitlines())
            begun = next(line for line in lines if line["message"].startswith("ready after"))
            made = Watched(running, cluster, begun)
            until(lambda: made.value("naming_state", "current") == 1, "the names")
            yield made


def test_the_line_it_begins_with_says_versions_and_modes(watched: Watched) -> None:
    about = watched.begun["about"]
    assert (about["version"], about["kernel"], about["node"]) == (__version__, os.uname().release, "node-1")
    assert re.fullmatch(r"v[0-9.]+", about["libbpf"])
    assert re.fullmatch(r"[0-9.]+", about["bcc"])
    assert {"tp_btf/inet_sock_set_state", "socket_filter/ctnetlink", "iter/tcp"} <= set(about["programs"])
    assert (about["roles"], about["interval_s"], about["rotate_s"]) == (["client", "forwarded"], 60.0, 3600.0)
    assert about["naming"] in NAMING_STATES
    assert about["connect_probe"] == "auto, now off"
    assert about["maps_bytes"] > 40 << 20
    assert about["output"] == str(watched.agent.output)
    for value in ("version", "kernel", "libbpf", "bcc", "node", "output", "listen"):
        assert about[value] in watched.begun["message"]


def test_every_metric_of_the_list_is_exported_as_the_convention_has_it(watched: Watched) -> None:
    families = list(text_string_to_metric_families(watched.page("/metrics")[1]))
    exported = {family.name + ("_total" if family.type == "counter" else ""): family for family in families}
    assert {metric.name for metric in METRICS} == {name for name in exported if name.startswith("vip_tracer_")}
    kinds = {"info": "gauge"}
    for metric in METRICS:
        family = exported[metric.name]
        assert (family.type, family.documentation) == (kinds.get(metric.kind, metric.kind), metric.help)
        assert re.fullmatch(r"vip_tracer_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        assert metric.kind == "info" or labels == ({metric.label} if metric.label else set())
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"} <= exported.keys()


def test_no_label_is_an_address_and_there_are_few(watched: Watched) -> None:
    families = list(text_string_to_metric_families(watched.page("/metrics")[1]))
    values = [value for family in families for sample in family.samples for value in sample.labels.values()]
    for value in values:
        with pytest.raises(ValueError, match="does not appear to be"):
            ipaddress.ip_address(value)
    assert sum(len(family.samples) for family in families) < 200


def test_what_happens_is_counted(watched: Watched) -> None:
    before = watched.scrape()
    watched.cluster.clients[0].connect_many(23, watched.cluster.vip(), 100, 100)
    watched.cluster.settle()

    def grown(metric: str, label: str = "") -> float:
        name = f"vip_tracer_{metric}"
        return watched.scrape()[name][label] - before[name][label]

    until(lambda: grown("emitted_total") == 23, "the rows")
    assert (grown("opened_total"), grown("closed_total")) == (23, 23)
    assert watched.value("map_entries", "translations") >= 23
    assert watched.value("unpublished_rows") >= 23
    assert watched.value("oldest_unpublished_row_age_seconds") > 0
    assert watched.value("publication_age_seconds") > 0
    assert watched.value("map_max_entries", "connections") == 65_536
    assert set(watched.scrape()["vip_tracer_lost_total"]) == set(STAGES)
    assert watched.value("program_attached", "iter/tcp") == 1
    assert watched.value("program_attached", "tracepoint/sys_enter_connect") == 0
    assert watched.value("drain_age_seconds") < 30
    addresses = {ip for pod in watched.cluster.backend_pods for ip in pod.ips.values()} | {watched.cluster.vip()[0]}
    assert not [text for text in addresses if text in watched.page("/metrics")[1]]
    fills = watched.scrape()
    assert fills["vip_tracer_ring_fill_ratio_bucket"]["+Inf"] == fills["vip_tracer_ring_fill_ratio_count"][""] > 0


def test_sighup_publishes_and_the_agent_goes_on(watched: Watched) -> None:
    count, before = watched.value("published_files_total", "connections"), published(watched.agent.output)
    rows_before, waiting = watched.value("written_total"), watched.value("unpublished_rows")
    watched.cluster.clients[0].connect_many(5, watched.cluster.vip(), 100, 100)
    watched.cluster.settle()
    until(lambda: watched.value("unpublished_rows") >= waiting + 5, "the rows")
    watched.hang_up()
    until(lambda: watched.value("unpublished_rows") == 0, "the publication")
    assert watched.value("written_total") >= rows_before + 5
    made = published(watched.agent.output) - before
    assert watched.value("published_files_total", "connections") == count + len(made)
    assert len(made) == len({path.parent for path in made}) > 0  # two where an hour ended since the last ones
    assert watched.value("published_bytes_total", "connections") > 0
    assert watched.value("publication_duration_seconds_count") > 0
    assert watched.value("oldest_unpublished_row_age_seconds") == 0
    assert len(rows(watched.agent.output)) == watched.value("written_total")
    watched.cluster.clients[0].connect_many(3, watched.cluster.vip(), 100, 100)
    until(lambda: watched.value("unpublished_rows") == 3, "rows after it")
    assert watched.agent.process.poll() is None


def test_an_output_that_cannot_be_written_is_told(watched: Watched) -> None:
    assert watched.page("/readyz") == watched.page("/healthz") == (200, "ok\n")
    root, aside = watched.agent.output, watched.agent.output.with_name("aside")
    root.rename(aside)
    root.touch()  # a file where the directory should be
    watched.cluster.clients[0].connect_many(2, watched.cluster.vip(), 10, 10)
    watched.hang_up()
    until(lambda: watched.page("/readyz")[0] == 503, "the trouble")
    said = watched.page("/readyz")[1]
    assert said.startswith("The output cannot be written (")
    assert "rows are lost, and counted" in said
    assert watched.page("/healthz")[0] == 200
    until(lambda: watched.value("output_failing") == 1, "the metric")
    until(lambda: watched.value("publication_failures_total") >= 1, "the end of the publication")
    assert watched.value("lost_total", "writer") >= 2
    root.unlink()
    aside.rename(root)
    watched.hang_up()
    until(lambda: watched.page("/readyz") == (200, "ok\n"), "its end")
    until(lambda: watched.value("output_failing") == 0, "the metric")


def test_an_address_that_is_not_to_be_had_is_a_sentence(watched: Watched, tmp_path: Path) -> None:
    output = ("agent", "--output", tmp_path / "data", "--netns", watched.cluster.node.path)
    with bind("127.0.0.1", 0) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = sentence(run(*output, "--listen", address), 1)
    assert f"Cannot listen on {address} (Address already in use)" in said
    assert "is no address to listen on" in sentence(run(*output, "--listen", "localhost:80"), 2)
    assert not (tmp_path / "data").exists()


# -- the dashboard and the alerts --------------------------------------------------------------------------------------


def rules() -> list[tuple[str, str]]:
    """Of each alert its name and expression."""
    text = (ROOT / "deploy/alerts/rules.yaml").read_text(encoding="utf-8")
    return [(rule["alert"], rule["expr"]) for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def panels() -> list[tuple[str, str]]:
    """Of each query of the dashboard the panel's title and the expression, variables filled in."""
    board = json.loads((ROOT / "deploy/grafana/vip-tracer.json").read_text(encoding="utf-8"))
    variables = {"$__rate_interval": "5m", "$__range": "1h", "$job": "vip-tracer", "$instance": ".*"}
    found = []
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"]
            for name, value in variables.items():
                text = text.replace(name, value)
            found.append((panel["title"], text))
    return found


def metrics_of(expression: str) -> set[str]:
    """Every metric that a PromQL expression names. Raises ValueError where it is none."""
    found: set[str] = set()

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector) and node.name:
            found.add(node.name)
        return True

    promql_parser.walk(promql_parser.parse(expression), pre_visit=visit)
    return found


def test_every_metric_of_the_alerts_and_the_dashboard_is_exported(watched: Watched) -> None:
    exported = set(watched.scrape()) | OF_PROMETHEUS
    for title, expression in rules() + panels():
        named = metrics_of(expression)
        assert named, f"{title}: {expression}"
        assert named <= exported, f"{title}: {named - exported}"


def test_this_test_sees_what_it_should() -> None:
    found = metrics_of('sum(rate(a_total{x="b"}[5m])) / on () d or absent(e) + max_over_time((f - g)[5m:1m])')
    assert found == {"a_total", "d", "e", "f", "g"}
    with pytest.raises(ValueError, match="parenthesis"):
        metrics_of("sum(")
    assert len(rules()) >= 12
    assert len(panels()) >= 12


def test_the_rules_of_the_operator_are_the_plain_ones() -> None:
    plain = yaml.safe_load((ROOT / "deploy/alerts/rules.yaml").read_text(encoding="utf-8"))
    made = yaml.safe_load((ROOT / "deploy/alerts/prometheusrule.yaml").read_text(encoding="utf-8"))
    assert (made["kind"], made["apiVersion"]) == ("PrometheusRule", "monitoring.coreos.com/v1")
    assert made["spec"] == plain, "deploy/alerts/prometheusrule.yaml is stale: make docs"


def test_every_alert_is_explained() -> None:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    assert [name for name, _ in rules() if f"**{name}**" not in page] == []
