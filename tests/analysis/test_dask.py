"""The same digits from a real Dask cluster of two worker processes."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from analysis import cases, habits
from datasets import publish
from distributed import LocalCluster

import tracer
from tracer import version
from tracer.analysis import cluster, diagnose
from tracer.analysis.diagnose import Diagnosis
from tracer.errors import TracerError


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as local:
        yield local.scheduler_address


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("dask")
    publish(where, cases.troubled(habits.heavy_client, "few-clients", "strong", 2).tables)
    return where


def same(one: Diagnosis, other: Diagnosis) -> None:
    assert (one.rows, one.nodes, one.bins, one.warnings) == (other.rows, other.nodes, other.bins, other.warnings)
    for mine, theirs in zip(one.findings, other.findings, strict=True):
        assert (mine.service, mine.verdict, mine.causes) == (theirs.service, theirs.verdict, theirs.causes)
        pd.testing.assert_frame_equal(mine.backends, theirs.backends, check_exact=True)


def test_the_same_to_the_last_digit(scheduler: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "GROUP", 2)  # several groups for each worker
    one, other = tracer.diagnose(root), tracer.diagnose(root, scheduler=scheduler)
    assert one.findings[0].causes
    same(one, other)


def test_a_corrupt_file_is_named_there_too(scheduler: str, root: Path, tmp_path: Path) -> None:
    paths = publish(tmp_path, cases.troubled(habits.heavy_client, "few-clients", "strong", 2).tables)
    bad = next(path for path in paths if "connections" in path.parts)
    bad.write_bytes(bad.read_bytes()[:-8])
    one, other = tracer.diagnose(tmp_path), tracer.diagnose(tmp_path, scheduler=scheduler)
    assert str(bad) in other.warnings[0]
    same(one, other)
    with pytest.raises(TracerError, match="cannot read"):
        tracer.diagnose(tmp_path, scheduler=scheduler, strict=True)


def test_no_scheduler_is_a_sentence(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PATIENCE_S", 1)
    with pytest.raises(TracerError, match="no Dask scheduler answers at tcp://127"):
        diagnose.diagnose(root, engine=cluster.engine("tcp://127.0.0.1:1"))


def test_another_version_there_is_a_sentence(scheduler: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "__version__", "9.9.9")
    with pytest.raises(TracerError, match="install the same there"):
        tracer.diagnose(root, scheduler=scheduler)
