"""The images, built as an operator builds them, and run as the manifests say: with exactly the overlay's capabilities,
no writable root, the manifest's memory, podman's default seccomp profile; on real connections of the lab.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from agent_world import coverage, losses, rows, until
from deploy.manifests import Raw, container, one, pods, variables
from image.images import Images
from scenarios.truth import check

from tracer.lab.cluster import Cluster

pytestmark = [pytest.mark.needs("bpf", "netns", "conntrack", "iptables"), pytest.mark.timeout(1800)]

NODE, ANALYSIS = (f"localhost/vip-tracer{which}:test" for which in ("", "-analysis"))
#: What docs/deploy.md says of their size (MB), with the base.
SIZES = {NODE: 560, ANALYSIS: 380}
#: Prints pages, of which none may be an error.
GET = "import sys, urllib.request as r; [print(r.urlopen(at, timeout=20).read().decode()) for at in sys.argv[1:]]"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    made = Images(tmp_path_factory.mktemp("images"))
    try:
        made.make_base()
        made.build("node", NODE)
        made.build("analysis", ANALYSIS)
        yield made
    finally:
        made.close()
    mounts = Path("/proc/self/mountinfo").read_text()
    assert str(made.directory) not in mounts


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(backends=3, clients=1) as made:
        yield made


@pytest.fixture
def volumes(tmp_path: Path) -> dict[str, Path]:
    """An emptyDir each, and the node's directory as a kubelet makes it (DirectoryOrCreate)."""
    made = {name: tmp_path / name for name in ("data", "tmp", "tmp-export")}
    for name, path in made.items():
        path.mkdir()
        path.chmod(0o755 if name == "data" else 0o777)
    os.chmod(tmp_path, 0o755)
    return made


def files(images: Images, tag: str) -> str:
    return images(*images.plain("--user", "0", "--entrypoint", "/usr/bin/find", tag), "/", "-xdev", "-type", "f")


@pytest.mark.parametrize("tag", [NODE, ANALYSIS])
def test_what_is_in_it_and_what_is_not(images: Images, tag: str) -> None:
    about = images.describe(tag)
    size = about["Size"] / 1e6
    assert size < SIZES[tag] * 1.05, f"{size:.0f} MB: docs/deploy.md says less"
    assert about["Config"]["User"] == "65532:65532"
    labels = about["Config"]["Labels"]
    assert {"title", "description", "licenses"} <= {name.rpartition(".")[2] for name in labels}
    names = {Path(line).name for line in files(images, tag).splitlines()}
    assert not names & {"gcc", "cc", "clang", "clang-14", "ld", "as", "make", "pip", "pip3", "curl", "wget", "kubectl"}
    there = files(images, tag)
    assert "/pyarrow/tests/" not in there
    assert "/var/lib/apt/lists/" not in there.replace("/var/lib/apt/lists/lock", "")
    assert ".deb\n" not in there
    assert ("/pandas/" in there) == (tag == ANALYSIS)
    assert ("libbcc.so" in there) == ("libLLVM" in there) == (tag == NODE)


@contextmanager
def running(command: list[str], ready: Path) -> Iterator[subprocess.Popen[str]]:
    """A container in the foreground, until it is ready; ended if it still runs."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until(lambda: ready.exists() or process.poll() is not None, "the agent to be ready", 150)
        assert process.poll() is None, process.communicate()[0]
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def asked(netns: str, manifest: str, agent: Raw) -> str:
    """What a kubelet's probes and a scrape by the annotations are answered."""
    (port,) = (str(port["containerPort"]) for port in agent["ports"] if port["name"] == "metrics")
    pages = [agent[f"{which}Probe"]["httpGet"]["path"] for which in ("startup", "liveness", "readiness")]
    about = one(manifest, "DaemonSet")["spec"]["template"]["metadata"]["annotations"]
    assert about["prometheus.io/scrape"] == "true"
    addresses = [f"http://127.0.0.1:{port}{page}" for page in pages]
    addresses += [f"http://127.0.0.1:{about['prometheus.io/port']}{about['prometheus.io/path']}"]
    program = [f"--net={netns}", sys.executable, "-c", GET, *addresses]
    return subprocess.run(["nsenter", *program], check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.parametrize("manifest", ["least-privilege", "base"])
def test_the_agent_of_the_image_traces(
    manifest: str, images: Images, cluster: Cluster, volumes: dict[str, Path]
) -> None:
    pod, agent = pods(manifest)["vip-tracer"], container(manifest, "agent")
    scope = " ".join(made.netns.path for made in (*cluster.client_pods, *cluster.backend_pods))
    given = variables(manifest, agent) | {
        "VIP_TRACER_AGENT_NODE": "node-1", "VIP_TRACER_AGENT_INTERVAL": "1s",
        "VIP_TRACER_AGENT_READY_FILE": "/tmp/ready", "VIP_TRACER_AGENT_ONLY_NETNS": f"{cluster.node.path} {scope}",
    }  # fmt: skip
    client, dataset = cluster.clients[0], volumes["data"] / "dataset"
    held = client.hold(2, cluster.vip())["number"]
    # hostNetwork, where the lab's node is the host.
    node = f"ns:{cluster.node.path}"
    with running(images.run(NODE, pod, agent, given, volumes, node), volumes["tmp"] / "ready") as process:
        ledger = client.connect_many(200, cluster.vip(), 100, 300)
        time.sleep(1.5)
        metrics = asked(cluster.node.path, manifest, agent)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
    client.release(held)
    assert process.returncode == 0, said
    assert "WARNING" not in said, said
    opened = re.search(r"^vip_tracer_opened_total (.*)$", metrics, re.M)
    assert opened is not None
    assert float(opened[1]) >= 200
    assert 'vip_tracer_naming_state{state="off"} 1.0' in metrics
    table = rows(dataset)
    check(table[table.opened], ledger, cluster.servers)
    assert table[~table.opened].conn_id.nunique() == 2
    assert losses(dataset) == 0
    assert coverage(dataset).adopted.sum() == 2
    # What the exporter, another user, may read and delete.
    for path in (dataset, *dataset.rglob("*")):
        status = path.stat()
        assert status.st_gid == 65532
        assert status.st_mode & (0o070 if path.is_dir() else 0o040)
    # Started again it does without compiling, by what the emptyDir kept.
    assert list((volumes["tmp"] / "programs").glob("*.programs"))
    bare = ("--read-only", "--cap-drop", "all", "--volume", f"{dataset}:/data:ro")
    report = images(*images.plain(*bare, ANALYSIS), "report", "/data")
    assert f"{cluster.vip()[0]}:80/tcp" in report


def test_the_pod_carries_everything_away_and_deletes_it_here(
    images: Images, cluster: Cluster, volumes: dict[str, Path]
) -> None:
    """Both containers as a kubelet starts and ends them, at once, and by the manifest's schedule. The exporter is
    another user than the agent, without a capability; the next pod's agent, with the overlay's alone, goes on in what
    it left.
    """
    dataset = volumes["data"] / "dataset"
    for manifest in ("base", "least-privilege"):
        pod, agent, export = pods(manifest)["vip-tracer"], container(manifest, "agent"), container(manifest, "export")
        there, ready = (volumes[of] / manifest for of in ("tmp-export", "tmp"))
        traced = {"VIP_TRACER_AGENT_NODE": "node-1", "VIP_TRACER_AGENT_READY_FILE": f"/tmp/{manifest}"}
        traced["VIP_TRACER_AGENT_ONLY_NETNS"] = cluster.client_pods[0].netns.path
        # By a budget of a byte, what is exported goes at once. A busy machine may take longer than a kubelet waits.
        carried = {"VIP_TRACER_EXPORT_DISK_BUDGET": "1", "VIP_TRACER_EXPORT_GRACE": "120s"}
        carried["DESTINATION"] = f"/tmp/{manifest}"
        exporting = images.run(NODE, pod, export, variables(manifest, export) | carried, volumes)
        tracing = images.run(NODE, pod, agent, variables(manifest, agent) | traced, volumes, f"ns:{cluster.node.path}")
        with (
            running(exporting, volumes["tmp-export"]) as exporter,  # which waits for the agent
            running(tracing, ready) as tracer,
        ):
            until(there.exists, "the exporter", 60)
            ledger = cluster.clients[0].connect_many(50, cluster.vip(), 100, 300)
            for process in (exporter, tracer):
                process.send_signal(signal.SIGTERM)
            said = [process.communicate(timeout=150)[0] for process in (exporter, tracer)]
        assert (exporter.returncode, tracer.returncode) == (0, 0), said
        assert not any(level in each for each in said for level in ("WARNING", "ERROR", "Traceback")), said
        check(rows(there), ledger, cluster.servers)
        assert losses(there) == 0
        assert list(dataset.rglob("[!.]*.parquet")) == []
    assert (dataset / ".export" / "ledger.db").stat().st_uid == export["securityContext"]["runAsUser"]
    unset = subprocess.run(
        images.run(NODE, pod, export, variables(manifest, export), volumes),
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert unset.returncode == 2
    assert "DESTINATION: is empty in the ConfigMap vip-tracer" in unset.stderr


def test_the_agents_image_says_what_it_is_without(images: Images) -> None:
    done = subprocess.run(
        images.command(*images.plain(NODE), "report", "/nowhere"),
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "'vip-tracer report' needs pandas, which this installation is without" in done.stderr
