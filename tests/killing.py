"""An export that is killed at random moments, and what is to be seen of it."""

import hashlib
import random
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
from command_world import command, environment

from tracer.lab.netns import wait_until
from tracer.store.inventory import Inventory


def sums(root: Path) -> dict[str, str]:
    """Names and checksums of what is visible."""
    entries = Inventory(root).entries()
    return {entry.name(root): hashlib.sha256(entry.path.read_bytes()).hexdigest() for entry in entries}


def kill_often(here: Path, there: Path, kills: int, longest_s: float = 1.5, seed: int = 1) -> int:
    """Exports, killed so many times, and then to the end; returns how many kills met it at work. All that is visible at
    the destination after each is whole."""
    moments, met = random.Random(seed), 0
    seen: set[Path] = set()
    for number in range(kills):
        process = subprocess.Popen(command("export", here, there), env=environment(), stdout=subprocess.DEVNULL)
        before = len(seen)
        wait_until(lambda: process.poll() is not None or _published(there) > before, "it to begin")  # noqa: B023
        time.sleep(moments.uniform(0.0, longest_s) if number else 0.0)  # one that no machine is too quick for
        met += process.poll() is None
        process.kill()
        process.wait()
        for path in set(there.rglob("*.parquet")) - seen:
            pq.read_metadata(path)
            seen.add(path)
    done = subprocess.run(
        command("export", here, there), env=environment(), capture_output=True, text=True, check=False, timeout=3000
    )
    assert done.returncode == 0, done.stderr
    return met


def _published(there: Path) -> int:
    return sum(1 for _ in there.rglob("*.parquet"))
