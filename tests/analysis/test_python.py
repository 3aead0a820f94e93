"""From Python: frames by range, service and column; the same from an address; and a worked example."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from analysis import cases, habits, troubles
from command_world import ROOT, environment
from datasets import publish

import tracer
from tracer.errors import NoDataError, UsageError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("python")
    publish(where, cases.troubled(troubles.late_joiner, "late-backend", "strong", 3).tables)
    return where


def test_frames_by_range_service_and_column(root: Path) -> None:
    data = tracer.open(root)
    whole = data.frame()
    assert len(whole) == len(pd.read_parquet(root / "connections"))
    assert data.frame(columns=["bytes_sent", "ts"]).columns.tolist() == ["ts", "bytes_sent"]
    middle = whole["ts"].min() + (whole["ts"].max() - whole["ts"].min()) / 2
    first, second = data.frame(end=middle), data.frame(begin=str(middle))
    assert len(first) > 100
    assert len(first) + len(second) == len(whole)
    assert second["ts"].min() > middle
    mine = data.frame(service="shop/web", columns=["backend_pod", "bytes_sent"])
    assert mine.columns.tolist() == ["backend_pod", "bytes_sent"]
    assert len(mine) == (whole["dst_service"] == "web").sum()
    address = whole["dst_ip"][whole["dst_service"] == "web"].iloc[0]
    assert len(data.frame(service=address)) == len(mine)
    assert len(data.frame(table="endpoints", service="shop/web")) > 0
    assert data.frame(table="coverage")["emitted"].sum() == len(whole)


def test_what_is_not_there_is_said(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no column nonsense"):
        tracer.open(root).frame(columns=["nonsense"])
    with pytest.raises(UsageError, match="is no time"):
        tracer.open(root).frame(begin="yesterday evening")
    with pytest.raises(UsageError, match="no directory"):
        tracer.open(tmp_path / "missing")
    with pytest.raises(NoDataError, match="no connections"):
        tracer.open(tmp_path).frame()
    assert len(tracer.open(root).frame(service="shop/nobody")) == 0
    with pytest.raises(NoDataError, match="shop/nobody"):
        tracer.diagnose(root, service="shop/nobody")


def test_an_address_gives_the_same(root: Path) -> None:
    here, there = tracer.open(root), tracer.open(root.as_uri())
    pd.testing.assert_frame_equal(here.frame(), there.frame())
    pd.testing.assert_frame_equal(here.balance(), there.balance())


def test_balance_and_diagnosis(root: Path) -> None:
    shares = tracer.balance(root)
    assert shares.groupby("service")["connections_share"].sum().to_numpy() == pytest.approx(1)
    found = tracer.diagnose(root, service="shop/web")
    assert [each.verdict.word for each in found.findings] == ["uneven"]
    assert found.findings[0].causes[0].name == "late-backend"
    mine = shares[shares["service"] == "shop/web:80/tcp"]
    assert mine["connections"].tolist() == found.findings[0].backends["connections"].tolist()
    assert set(mine["verdict"]) == {"uneven"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, tracer; print([m for m in ('numpy', 'pandas', 'pyarrow', 'click') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.strip() == "[]"


def test_the_documented_example_runs(tmp_path: Path) -> None:
    publish(tmp_path, cases.troubled(habits.heavy_client, "few-clients", "strong", 2).tables)
    text = (ROOT / "docs" / "python.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) >= 4
    program = "\n".join(blocks).replace("/var/lib/vip-tracer", str(tmp_path))
    scope: dict[str, object] = {}
    exec(compile(program, "docs/python.md", "exec"), scope)  # the page's own code
    assert isinstance(scope["pivot"], pd.DataFrame)
    assert "few-clients" in str(scope["answers"])
