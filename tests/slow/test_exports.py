"""Ten thousand files, and an export that is killed twenty times: every row once, and nothing beside."""

from collections import Counter
from pathlib import Path

import duckdb
import pytest
from command_world import dataset, rows
from killing import kill_often, sums


@pytest.mark.timeout(3600)
def test_ten_thousand_files_and_twenty_kills(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"

    def numbered(first: int) -> None:
        def change(records: object) -> None:
            records["conn_id"] += first  # type: ignore[index]

        tables.append(rows(2, change))

    tables: list[object] = []
    for number in range(10_000):
        numbered(2 * number)
    dataset(here, *tables)  # type: ignore[arg-type]
    tables.clear()
    met = kill_often(here, there, 20, 3.0)
    assert met >= 15
    assert sums(there) == sums(here)
    glob = f"{there}/connections/v*/*/*/*.parquet"
    found = Counter(n for (n,) in duckdb.connect().execute(f"SELECT conn_id FROM '{glob}'").fetchall())
    assert found == dict.fromkeys(range(1, 20_001), 1)
    assert [path for path in there.rglob(".*") if path.is_file()] == []
