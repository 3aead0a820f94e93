"""What the agent's process must not load: each of these is between 9 and 50 MB that would never be used."""

import subprocess
import sys

CODE = """
import sys, tempfile
from pathlib import Path
sys.path.insert(0, {here!r})
from store_world import RUN, make_records
from tracer.clock import WallClock
from tracer.store.writer import DatasetWriter
with tempfile.TemporaryDirectory() as directory:
    writer = DatasetWriter(Path(directory), RUN, WallClock(), lambda: {{"opened": 1}})
    writer.put(make_records(1000))
    writer.flush()
    writer.close()
    assert writer.snapshot().written == 1000
print(*sys.modules)
"""


def test_writing_imports_neither_pandas_nor_arrow_compute() -> None:
    code = CODE.format(here=__file__.rsplit("/", 1)[0])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "pyarrow.parquet" in loaded
    assert not loaded & {"pandas", "pyarrow.dataset", "pyarrow.compute", "pyarrow._compute"}
