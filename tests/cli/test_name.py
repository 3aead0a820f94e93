"""`vip-tracer name`: a dataset written without names gets them afterwards, and keeps those it has."""

import re
from collections.abc import Iterator
from pathlib import Path

import kube_lab
import numpy as np
import pyarrow.parquet as pq
import pytest
from command_world import dataset, named, rows, run, sentence
from kube_api import KubeApi, lines, refuse, serving

from tracer.naming.fields import address_bytes
from tracer.store.names import COLUMNS

CLIENT, VIP, FIRST, SECOND = "10.244.1.150", "10.244.1.10", "10.244.1.11", "10.244.2.12"


def pod(name: str, ip: str, on: str, owner: str, at: str = "2026-07-31T11:00:00Z") -> kube_lab.Raw:
    made = kube_lab.pod_at(name, on, ip, owner=owner, startTime=at)
    made["metadata"]["creationTimestamp"] = at
    return made


@pytest.fixture
def server() -> Iterator[KubeApi]:
    """The cluster of which `rows` are: a client, a service, a backend here and one on another node."""
    meta = {"namespace": "shop", "creationTimestamp": "2026-07-31T10:00:00Z"}
    ports = [{"name": "http", "port": 80, "protocol": "TCP"}]
    with serving() as api:
        for name, zone in (("node-1", "a"), ("node-2", "b")):
            node = {"metadata": meta | {"name": name, "labels": {"topology.kubernetes.io/zone": zone}}, "status": {}}
            del node["metadata"]["namespace"]
            api.set("nodes", node)
        api.set(
            "pods",
            pod("client", CLIENT, "node-1", "Deployment/cart"),
            pod("web-0", FIRST, "node-1", "StatefulSet/web"),
            pod("web-1", SECOND, "node-2", "StatefulSet/web"),
        )
        api.set("services", {"metadata": meta | {"name": "web"}, "spec": {"clusterIP": VIP, "ports": ports}})
        yield api


@pytest.fixture
def config(server: KubeApi, tmp_path: Path) -> Path:
    return server.kubeconfig(tmp_path / "kubeconfig")


def second_backend(records: np.ndarray) -> None:
    """Every other row goes to the backend on the other node."""
    found = address_bytes(SECOND)
    assert found is not None
    records["backend"][1::2] = np.void(found)


def read(path: Path) -> list[dict[str, object]]:
    return pq.read_table(path, columns=list(COLUMNS)).to_pylist()


NAMED = {
    "src_namespace": "shop", "src_pod": "client", "src_workload": "deployment/cart",
    "dst_namespace": "shop", "dst_service": "web", "dst_service_port": "http",
}  # fmt: skip
HERE = {"backend_pod": "web-0", "backend_workload": "statefulset/web", "backend_node": "node-1", "backend_zone": "a"}
THERE = {"backend_pod": "web-1", "backend_workload": "statefulset/web", "backend_node": "node-2", "backend_zone": "b"}


def test_a_dataset_is_named_from_the_api_server(tmp_path: Path, config: Path, server: KubeApi) -> None:
    first, second = dataset(tmp_path / "data", rows(4, second_backend), rows(2))
    before = pq.read_table(first)
    done = run("name", tmp_path / "data", "--kubeconfig", config)
    assert done.returncode == 0, done.stderr
    assert read(first) == [NAMED | HERE, NAMED | THERE] * 2
    assert read(second) == [NAMED | HERE] * 2
    counted = dict(re.findall(r"^(\w+) +0 +(\d+) +6$", done.stdout, re.M))
    assert counted == dict.fromkeys(COLUMNS, "6")
    after = pq.read_table(first)
    assert after.schema == before.schema
    rest = [name for name in before.column_names if name not in COLUMNS]
    assert after.select(rest) == before.select(rest)
    assert server.asked("pods", "list")[0].get("fieldSelector") is None  # the pods of all nodes
    assert sorted(path.name for path in first.parent.iterdir()) == sorted((first.name, second.name))


def test_a_second_run_changes_nothing(tmp_path: Path, config: Path) -> None:
    (path,) = dataset(tmp_path / "data", rows(4))
    run("name", tmp_path / "data", "--kubeconfig", config)
    inode = path.stat().st_ino
    done = run("name", tmp_path / "data", "--kubeconfig", config)
    assert re.search(r"^backend_pod +4 +4 +4$", done.stdout, re.M)
    assert path.stat().st_ino == inode


def test_names_that_are_there_stay(tmp_path: Path, config: Path) -> None:
    (path,) = dataset(tmp_path / "data", named(rows(2), backend_pod="web-gone", src_pod="client"))
    run("name", tmp_path / "data", "--kubeconfig", config)
    # another pod had the address: nothing that belongs to today's is put beside it
    nothing = {"backend_workload": None, "backend_node": None, "backend_zone": None}
    assert read(path) == [NAMED | {"backend_pod": "web-gone"} | nothing] * 2


def test_a_row_from_before_its_pod_is_not_named_after_it(tmp_path: Path, config: Path, server: KubeApi) -> None:
    server.set("pods", pod("web-0", FIRST, "node-1", "StatefulSet/web", at="2026-08-01T11:00:00Z"))
    (path,) = dataset(tmp_path / "data", rows(2))
    run("name", tmp_path / "data", "--kubeconfig", config)
    assert read(path) == [NAMED | dict.fromkeys(HERE)] * 2


def test_a_snapshot_names_without_a_server(tmp_path: Path, config: Path, server: KubeApi) -> None:
    saved = tmp_path / "names.snapshot"
    done = run("name", "--kubeconfig", config, "--save", saved)
    assert (done.returncode, done.stdout) == (0, "")
    assert "1 services and 3 pods" in done.stderr
    server.stop()
    (path,) = dataset(tmp_path / "data", rows(4, second_backend))
    done = run("name", tmp_path / "data", "--snapshot", saved)
    assert done.returncode == 0, done.stderr
    assert read(path) == [NAMED | HERE, NAMED | THERE] * 2


def test_what_drives_a_terminal_is_spelled_out_in_names(tmp_path: Path, config: Path, server: KubeApi) -> None:
    owner = "evil\x1b[31m\u202e, \"'\n"
    server.set("pods", pod("client", CLIENT, "node-1", f"Job/{owner}"))
    (path,) = dataset(tmp_path / "data", rows(1))
    done = run("name", tmp_path / "data", "--kubeconfig", config)
    assert done.returncode == 0, done.stderr
    assert read(path)[0]["src_workload"] == "job/evil\\x1b[31m\\u202e, \"'\\n"


def test_what_cannot_be_done_is_a_sentence(tmp_path: Path, config: Path, server: KubeApi) -> None:
    assert "--save" in sentence(run("name"), 2)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no connections" in sentence(run("name", empty, "--kubeconfig", config), 3)
    dataset(tmp_path / "data", rows(1))
    saved = tmp_path / "saved"
    saved.write_bytes(b"\x00garbage")
    assert str(saved) in sentence(run("name", tmp_path / "data", "--snapshot", saved), 1)
    both = run("name", tmp_path / "data", "--snapshot", saved, "--kubeconfig", config)
    assert "not from both" in sentence(both, 2)
    broken = tmp_path / "broken"
    broken.write_text("{", encoding="ascii")
    assert str(broken) in sentence(run("name", tmp_path / "data", "--kubeconfig", broken), 2)
    server.faults["pods", "list"].extend(refuse(403) for _ in range(100))
    refused = run("name", tmp_path / "data", "--kubeconfig", config, "--timeout", "4s")
    assert "give this account list and watch on pods" in sentence(refused, 1)
    server.stop()
    gone = run("name", tmp_path / "data", "--kubeconfig", config, "--timeout", "1s")
    assert "does not answer" in sentence(gone, 1)


def test_a_file_that_cannot_be_read_is_said_and_left_as_it_is(tmp_path: Path, config: Path) -> None:
    (path,) = dataset(tmp_path / "data", rows(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert str(path) in sentence(run("name", tmp_path / "data", "--kubeconfig", config), 1)
    assert path.read_bytes() == whole[:-9]


def test_a_watch_that_breaks_afterwards_is_no_error(tmp_path: Path, config: Path, server: KubeApi) -> None:
    """The lists are what is asked for; the watches that follow them may end as they like."""
    for kind in server.objects:
        server.faults[kind, "watch"].append(lines(b"{garbage", cut=True))
    (path,) = dataset(tmp_path / "data", rows(1))
    done = run("name", tmp_path / "data", "--kubeconfig", config)
    assert done.returncode == 0, done.stderr
    assert read(path) == [NAMED | HERE]


def test_outside_a_pod_somebody_must_say_whose_names(tmp_path: Path) -> None:
    assert "--kubeconfig FILE, or from a saved --snapshot FILE" in sentence(run("name", tmp_path), 2)
