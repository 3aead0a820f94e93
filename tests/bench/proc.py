"""What /proc says of a process."""

import os
from pathlib import Path


def memory(pid: int, field: str) -> int:
    """A memory field of /proc/PID/status, in bytes. Raises RuntimeError if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} has ended")


def cpu_seconds(pid: int) -> tuple[float, float]:
    """User and system time of a process and of its children that ended. Raises RuntimeError if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    except FileNotFoundError as error:
        raise RuntimeError(f"process {pid} has ended") from error
    tick = os.sysconf("SC_CLK_TCK")
    user, system, user_below, system_below = (int(fields[place]) / tick for place in (11, 12, 13, 14))
    return user + user_below, system + system_below
