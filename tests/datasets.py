"""Datasets as agents publish them, from tables."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tracer.store import layout


def publish(root: Path, tables: dict[str, pa.Table]) -> list[Path]:
    """Writes tables as agents do: a file per table, node and hour."""
    made = []
    for name, content in tables.items():
        hours = pc.divide(content["ts"].cast(pa.int64()), layout.HOUR_NS)
        for hour in pc.unique(hours).to_pylist():
            for node in pc.unique(content["node"].cast(pa.string())).to_pylist():
                mine = pc.and_(pc.equal(hours, hour), pc.equal(content["node"].cast(pa.string()), node))
                where = layout.partition(root, name, hour)
                where.mkdir(parents=True, exist_ok=True)
                begin = hour * layout.HOUR_NS
                made.append(where / layout.published_name(node, begin, "0123456789ab", len(made)))
                pq.write_table(content.filter(mine), made[-1])
    return made
