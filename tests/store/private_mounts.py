"""Python in a mount namespace of its own, which ends with its process: for disks that are full, or read-only."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PRELUDE = f"""
import json, logging, subprocess, sys
from pathlib import Path
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}, {str(HERE.parents[1])!r}]
from store_world import *
from tracer.clock import WallClock
from tracer.errors import TracerError
from tracer.store.dataset import Dataset
from tracer.store.writer import DatasetWriter
root, out, said = Path(sys.argv[1]), {{}}, []
class Keep(logging.Handler):
    def emit(self, record): said.append([record.levelname, record.getMessage()])
logging.getLogger().addHandler(Keep())
def mount(*options): subprocess.run(["mount", *options, str(root)], check=True)
"""


def in_namespace(code: str, root: Path, more: str = "") -> dict[str, Any]:
    """What `code`, after `more` to begin with, leaves in `out`, and what it logged."""
    unshare = ["unshare", "--mount", "--propagation", "private"]
    code = PRELUDE + more + code + "\nprint(json.dumps(out | {'said': said}))"
    command = [*unshare, sys.executable, "-c", code, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Exception ignored" not in done.stderr
    assert str(root) not in Path("/proc/self/mounts").read_text()
    return json.loads(done.stdout)
