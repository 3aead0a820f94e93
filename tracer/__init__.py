"""vip-tracer: which pod did each connection to a virtual IP really go to, and why is the load uneven.

From Python: `open` a dataset for pandas frames; `balance` and `diagnose` it. Nothing heavy is imported before one of
them is called.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracer.version import __version__

if TYPE_CHECKING:
    from tracer.analysis.dataset import Dataset, Frame
    from tracer.analysis.diagnose import Diagnosis

__all__ = ["__version__", "balance", "diagnose", "open"]


def open(place: "str | Path") -> "Dataset":
    """The dataset at a directory, or at an address such as ``s3://bucket/prefix``: see `Dataset.frame`."""
    from tracer.analysis.dataset import Dataset

    return Dataset(place)


def balance(place: "str | Path", **chosen: Any) -> "Frame":
    """A row per backend of every service port; takes the arguments of `Dataset.balance`."""
    return open(place).balance(**chosen)


def diagnose(place: "str | Path", **chosen: Any) -> "Diagnosis":
    """Verdicts, causes and shares; takes the arguments of `Dataset.diagnose`."""
    return open(place).diagnose(**chosen)
