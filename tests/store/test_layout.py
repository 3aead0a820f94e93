"""Names on disk: safe, ordered by time, and one writer for each."""

import fcntl
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.errors import TracerError
from tracer.store import layout

NOON = 1_785_499_200 * 10**9  # 2026-07-31T12:00:00Z


def test_paths() -> None:
    directory = layout.partition(Path("/d"), "connections", NOON // layout.HOUR_NS)
    assert directory == Path("/d/connections/v1/date=2026-07-31/hour=12")
    name = layout.published_name("node-1", NOON + 1_500_000, "0a", 7)
    assert name == "node-1-20260731T120000.001500Z-0a.7.parquet"
    assert layout.start_of(name) == "20260731T120000.001500Z"
    assert layout.unpublished_name("node-1", "0a", 7) == ".node-1-0a-7.tmp"


@given(st.text())
def test_safe_node(node: str) -> None:
    safe = layout.safe_node(node)
    assert safe.isascii()
    assert set(safe) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert safe[0] not in "._"
    assert len(layout.published_name(node, NOON, "0123456789ab", 10**9)) < 255


def test_nodes_that_look_alike_stay_apart() -> None:
    assert layout.safe_node("ip-10-0-0-1.eu.internal") == "ip-10-0-0-1.eu.internal"
    assert len({layout.safe_node(node) for node in ("a/b", "a_b", "a b", "_a_b", ".a_b", "x" * 200, "x" * 201)}) == 7


def test_a_second_agent_of_the_same_node_is_refused(tmp_path: Path) -> None:
    lock = layout.Lock(tmp_path, "a")
    with pytest.raises(TracerError, match=r"another agent is writing to .* as node 'a'; stop it, or"):
        layout.Lock(tmp_path, "a")
    layout.Lock(tmp_path, "b").release()
    lock.release()
    layout.Lock(tmp_path, "a").release()


def test_an_exporter_that_looks_whether_an_agent_writes_keeps_none_out(tmp_path: Path) -> None:
    layout.Lock(tmp_path, "a").release()
    looks = os.open(tmp_path / ".lock-a", os.O_RDONLY)
    fcntl.flock(looks, fcntl.LOCK_SH)
    threading.Timer(0.1, os.close, [looks]).start()
    layout.Lock(tmp_path, "a").release()


def test_unwritable_root_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TracerError, match=r"cannot write to .*/file: Not a directory; choose"):
        layout.Lock(tmp_path / "file", "a")


def test_only_this_nodes_unpublished_files_are_removed(tmp_path: Path) -> None:
    hour = layout.partition(tmp_path, "connections", 1)
    layout.make_directory(hour)
    mine = hour / layout.unpublished_name("a", "0123456789ab", 1)
    others = [
        hour / layout.unpublished_name("a-b", "0123456789ab", 1),
        hour / layout.unpublished_name("a-0123456789ab-1", "0123456789ab", 1),
        hour / layout.published_name("a", NOON, "0123456789ab", 1),
        hour / ".a-notes.tmp",
    ]
    for path in (mine, *others):
        path.touch()
    assert layout.remove_stale(tmp_path, "a") == [mine]
    assert sorted(hour.iterdir()) == sorted(others)
