"""Situations written down by hand."""

import numpy as np
import pandas as pd

from tracer.analysis.causes.situation import COUNTS, KEYS, Situation
from tracer.analysis.partial import SUMS, Partial


def situation(cells: list[dict[str, object]], n_backends: int = 3, **more: object) -> Situation:
    """A situation of the given cells; what a cell leaves out is nothing."""
    rows = [dict.fromkeys((*KEYS, *COUNTS), 0) | cell for cell in cells]
    return situation_of(
        n_backends, more, **{name: np.array([row[name] for row in rows], dtype=np.int64) for name in (*KEYS, *COUNTS)}
    )


def situation_of(n_backends: int, more: dict[str, object] | None = None, **given: np.ndarray) -> Situation:
    """A situation of the given columns; those that are left out are nothing. `more`: other fields of `Situation`."""
    nothing = np.zeros_like(given["backend"])
    columns = {name: given.get(name, nothing) for name in (*KEYS, *COUNTS)}
    n_clients, n_nodes = int(columns["client"].max()) + 1, int(columns["node"].max()) + 1
    known = pd.DataFrame({
        "ip": [f"10.0.0.{i}" for i in range(n_backends)],
        "port": 8080,
        "pod": [f"pod-{i}" for i in range(n_backends)],
        "workload": "web",
        "node": [f"node-{i}" for i in range(n_backends)],
        "zone": None,
    })  # fmt: skip
    fields = {"service": "shop/web:80/tcp", "protocol": "tcp", "bin_s": 60.0, "range_s": 600.0, "cells": columns,
              "clients": [f"client-{i}" for i in range(n_clients)], "nodes": [f"node-{i}" for i in range(n_nodes)],
             "node_zones": [None] * n_nodes, "backends": known}  # fmt: skip
    return Situation(**(fields | (more or {})))  # type: ignore[arg-type]


def as_dict(part: Partial) -> dict[tuple[object, ...], dict[str, int]]:
    """Partial counts by what they are of: route, source and bin."""
    keys = zip(part.route.tolist(), part.source.tolist(), part.bin.tolist(), strict=True)
    return {
        (*part.routes[route], *part.sources[source], bin_): {name: int(part.sum(name)[i]) for name in SUMS}
        for i, (route, source, bin_) in enumerate(keys)
    }
