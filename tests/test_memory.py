"""What the node process does without."""

import subprocess
import sys

_AGENTS_IMPORTS = """
from tracer import memory
memory.save()
import sys
import tracer.agent, tracer.kernel.capture, tracer.store.writer
print(*(name for name in sys.modules if sys.modules[name] is not None))
"""


def test_the_node_process_imports_no_object_store_and_no_data_frames() -> None:
    done = subprocess.run([sys.executable, "-c", _AGENTS_IMPORTS], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "pyarrow.parquet" in imported
    unwanted = {"pyarrow._s3fs", "pyarrow._gcsfs", "pyarrow._azurefs", "pyarrow.dataset", "pyarrow.compute", "pandas"}
    assert not imported & unwanted


def test_arrow_takes_its_memory_from_the_c_library() -> None:
    asked = "import pyarrow; print(pyarrow.default_memory_pool().backend_name)"
    script = f"from tracer import memory; memory.save(); {asked}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "system\n"
