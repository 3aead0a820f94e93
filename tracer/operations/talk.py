"""The two lines that every run of the agent says: what runs and how, and what came of it."""

import importlib.util
import logging
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tracer.kernel import libbpf
from tracer.version import __version__

if TYPE_CHECKING:
    from tracer.kernel.capture import Capture

_log = logging.getLogger(__name__)


def bcc_version() -> str:
    """As the package says it; not imported, which would map LLVM. "unknown" where it does not say."""
    spec = importlib.util.find_spec("bcc")
    if spec is None or spec.origin is None:
        return "unknown"
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"__version__ = '([^'\n]{1,40})'", text)
    return found[1] if found else "unknown"


def begun(
    capture: "Capture", *, node: str, output: Path, rotate_s: float, naming: str, listen: str | None, seconds: float
) -> None:
    """Says that connections are traced: versions and modes, in one line."""
    options, attached = capture.options, capture.programs
    probe = "on" if "tracepoint/sys_enter_connect" in attached else "off"
    about = {
        "version": __version__,
        "kernel": os.uname().release,
        "python": platform.python_version(),
        "libbpf": libbpf.version(),
        "bcc": bcc_version(),
        "node": node,
        "output": str(output),
        "programs": attached,
        "roles": options.roles,
        "interval_s": options.interval_s,
        "rotate_s": rotate_s,
        "naming": naming,
        "connect_probe": probe if options.connect_probe == probe else f"{options.connect_probe}, now {probe}",
        "maps_bytes": options.sizes.kernel_bytes(),
        "adopted": capture.counters()["adopted"],
        "listen": listen,
        "ready_after_s": round(seconds, 1),
    }
    _log.info(
        "ready after %.1f s: vip-tracer %s on Linux %s (Python %s, libbpf %s, bcc %s); node %s; attached: %s; "
        "roles %s, a row every %g s, a file every %g s; names: %s; connect probe: %s; "
        "maps take %.1f MiB of kernel memory; %d open connections found; metrics and health: %s; writing to %s",
        seconds,
        about["version"],
        about["kernel"],
        about["python"],
        about["libbpf"],
        about["bcc"],
        node,
        ", ".join(attached),
        ", ".join(options.roles),
        options.interval_s,
        rotate_s,
        naming,
        about["connect_probe"],
        options.sizes.kernel_bytes() / (1 << 20),
        about["adopted"],
        "off" if listen is None else f"http://{listen}",
        output,
        extra={"about": about},
    )


def ended(reason: str, rows: int, counters: Mapping[str, int], lost_writer: int) -> None:
    """Says why it ended, what was written, and what was lost at which stage."""
    losses = {name: count for name, count in counters.items() if name.startswith("lost_") and count}
    if lost_writer:
        losses["lost_writer"] = lost_writer
    said = ", ".join(f"{name} {count}" for name, count in losses.items()) or "nothing lost"
    about = {"reason": reason, "rows_written": rows} | losses
    _log.info("stopped (%s): %d rows written, %s", reason, rows, said, extra={"about": about})
