"""Disks that are really full, and really read-only, in a mount namespace of their own that ends with its process."""

from pathlib import Path

import pytest
from private_mounts import in_namespace

pytestmark = pytest.mark.needs("netns")


def test_a_full_disk_costs_rows_by_count_and_nothing_else(tmp_path: Path) -> None:
    out = in_namespace(
        """
mount("-t", "tmpfs", "-o", "size=256k", "none")
clocks = Clocks()
data = Dataset(root, RUN, WallClock(0, EPOCH), monotonic=clocks.monotonic, wall_ns=clocks.wall_ns)
data.write(make_records(10))
data.publish({})
ballast = root / "ballast"
with open(ballast, "wb", buffering=0) as file:
    try:
        while True: file.write(bytes(4096))
    except OSError: pass
for first in (11, 1011):
    data.write(make_records(1000, first=first))
data.publish({})
out["full"] = [data.written, data.lost, data.unpublished]
out["hidden"] = [str(p) for p in root.rglob(".*")]
ballast.unlink()
clocks.seconds = 300
data.write(make_records(5, first=2011))
data.publish({})
out["after"] = [data.written, data.lost, data.unpublished]
out["ids"] = published_ids(root)
rows = coverage_rows(root)
out["coverage"] = [[row["emitted"], row["written"], row["lost_writer"]] for row in rows]
""",
        tmp_path,
    )
    assert out["full"] == [10, 2000, 0]
    assert out["hidden"] == []
    assert out["after"] == [15, 2000, 0]
    assert out["ids"] == [*range(1, 11), *range(2011, 2016)]
    assert out["coverage"] == [[10, 10, 0], [2005, 5, 2000]]
    assert [level for level, _ in out["said"]] == ["ERROR", "WARNING"]
    assert "No space left on device" in out["said"][0][1]
    assert "2000 rows were lost" in out["said"][1][1]


def test_a_disk_that_fills_in_the_middle_of_a_file(tmp_path: Path) -> None:
    out = in_namespace(
        """
mount("-t", "tmpfs", "-o", "size=300k", "none")
random = np.random.default_rng(0)
writer = DatasetWriter(root, RUN, WallClock(0, EPOCH), group_rows=1000, pending_bytes=1 << 30)
for first in range(1, 30001, 1000):
    rows = make_records(1000, first=first)
    rows["ct_id"] = random.integers(0, 2**32, 1000)
    rows["bytes_sent"] = rows["started"] = random.integers(0, 2**40, 1000)
    writer.put(rows)
writer.close()
counts = writer.snapshot()
out["counts"] = [counts.emitted, counts.written, counts.lost]
out["files"] = [str(p) for p in root.rglob("*.*") if p.is_file() and not p.name.startswith(".lock")]
out["lost"] = [row["lost_writer"] for row in coverage_rows(root)]
""",
        tmp_path,
    )
    # The failed file gives its space back, so that at least the loss can be published.
    assert out["counts"] == [30000, 0, 30000]
    assert out["lost"] == [30000]
    assert len(out["files"]) == 1


def test_a_disk_that_becomes_read_only(tmp_path: Path) -> None:
    out = in_namespace(
        """
mount("-t", "tmpfs", "none")
clocks = Clocks()
data = Dataset(root, RUN, WallClock(0, EPOCH), monotonic=clocks.monotonic, wall_ns=clocks.wall_ns)
data.write(make_records(10))
data.publish({})
mount("-o", "remount,ro")
data.write(make_records(7, first=11))
data.publish({})
out["counts"] = [data.written, data.lost, data.unpublished]
try:
    DatasetWriter(root, RUN, WallClock())
except TracerError as error:
    out["start"] = str(error)
mount("-o", "remount,rw")
clocks.seconds = 300
data.write(make_records(2, first=18))
data.publish({})
out["ids"] = published_ids(root)
""",
        tmp_path,
    )
    assert out["counts"] == [10, 7, 0]
    assert out["start"].startswith(f"cannot write to {tmp_path}: Read-only file system; choose")
    assert out["ids"] == [*range(1, 11), 18, 19]
    assert "Read-only file system" in out["said"][0][1]


def test_a_file_that_was_open_when_the_disk_became_read_only_goes_when_it_can(tmp_path: Path) -> None:
    out = in_namespace(
        """
mount("-t", "tmpfs", "none")
clocks = Clocks()
data = Dataset(root, RUN, WallClock(0, EPOCH), monotonic=clocks.monotonic, wall_ns=clocks.wall_ns)
data.write(make_records(7))
mount("--bind", str(root))  # what is open stays writable, no name can be changed
mount("-o", "remount,bind,ro")
data.publish({})
out["meanwhile"] = len(list(root.rglob(".*.tmp")))
subprocess.run(["umount", str(root)], check=True)
clocks.seconds = 300
data.write(make_records(2, first=8))
data.publish({})
out["counts"] = [data.written, data.lost, data.unpublished]
out["hidden"] = [str(path) for path in root.rglob(".*.tmp")]
out["ids"] = published_ids(root)
""",
        tmp_path,
    )
    assert out["meanwhile"] == 1
    assert out["hidden"] == []
    assert out["counts"] == [2, 7, 0]
    assert out["ids"] == [8, 9]
