"""How evenly a service port's load lies on its backends: loads, fair shares, and the usual figures of inequality."""

import dataclasses

import numpy as np
import pandas as pd

from tracer.analysis.causes.situation import FAILURES, MEASURES, Floats, Situation


@dataclasses.dataclass(frozen=True)
class Inequality:
    """Figures of how unequal loads are among those that share them; all nan if there is no load.

    `ratio` is max/mean (1: even), `variation` the coefficient of variation, the standard deviation (of the population)
    over the mean; `gini` the Gini coefficient (0: even, 1 - 1/n: all on one); `jain` Jain's index (1: even, 1/n: all on
    one; Jain, Chiu and Hawe, 1984).
    """

    ratio: float
    variation: float
    gini: float
    jain: float


def inequality(loads: Floats) -> Inequality:
    """The figures of n loads, none negative."""
    total = float(loads.sum())
    if not len(loads) or total <= 0:
        return Inequality(*[float("nan")] * 4)
    mean, n = total / len(loads), len(loads)
    ranks = np.arange(1, n + 1)
    gini = float(((2 * ranks - n - 1) * np.sort(loads)).sum() / (n * total))
    return Inequality(
        ratio=float(loads.max()) / mean,
        variation=float(loads.std()) / mean,
        gini=gini,
        jain=total**2 / (n * float((loads**2).sum())),
    )


def per_backend(situation: Situation) -> pd.DataFrame:
    """A row per backend, the busiest first (by new connections, then connection time).

    backend (its pod, or address and port), ip, port, node, zone; connections (that began), open (connections at once on
    the average: connection time over the range), connection_time_s, bytes, failures (refused, timed out, unreachable),
    connect_ms (mean latency of the connects that succeeded; nan: none known); of each measure its share (0..1), and
    fair_share: an even split of each moment's new connections over those ready then. endpoint: whether it was to get
    connections at all.
    """
    loads = {measure: situation.load(measure) for measure in MEASURES}
    fair = situation.fair("connections")
    known = situation.known
    at = situation.places("backend")[known]

    def summed(column: str) -> Floats:
        return np.asarray(np.bincount(at, situation.column(column)[known], len(situation.backends)), dtype=np.float64)

    latencies = summed("latencies")
    frame = pd.DataFrame(
        {
            "backend": [situation.backend_name(i) for i in range(len(situation.backends))],
            "ip": situation.backends["ip"],
            "port": situation.backends["port"],
            "node": situation.backends["node"],
            "zone": situation.backends["zone"],
            "connections": loads["connections"].astype(np.int64),
            "open": loads["connection_time"] / 1e6 / max(1e-9, situation.range_s),
            "connection_time_s": loads["connection_time"] / 1e6,
            "bytes": loads["bytes"].astype(np.int64),
            "failures": sum((summed(kind) for kind in FAILURES), np.zeros(len(situation.backends))).astype(np.int64),
            "connect_ms": np.divide(
                summed("latency_us"), latencies * 1e3, out=np.full(len(latencies), np.nan), where=latencies > 0
            ),
        }
        | {f"{measure}_share": shares(load) for measure, load in loads.items()}
        | {"fair_share": shares(fair), "endpoint": situation.entitled}
    )
    return frame.iloc[_busiest(situation)].reset_index(drop=True)


def shares(load: Floats) -> Floats:
    """Each part of the whole; zeros if that is nothing."""
    return load / load.sum() if load.sum() > 0 else np.zeros(len(load))


def grouped(situation: Situation, by: str) -> pd.DataFrame:
    """Loads per client, per node of the clients, or per zone of the backends: `by` is "client", "node" or "zone".

    Columns: the group's name, connections, connection_time_s, bytes, backends (that it reached).
    """
    cells = {name: column[situation.known] for name, column in situation.cells.items()}
    names = {
        "client": lambda: np.asarray(situation.clients, dtype=object)[cells["client"]],
        "node": lambda: np.asarray(situation.nodes, dtype=object)[cells["node"]],
        "zone": lambda: np.asarray(situation.backends["zone"], dtype=object)[cells["backend"]],
    }[by]()
    frame = pd.DataFrame({by: names, "backend": cells["backend"]} | {
        measure: cells[column] for measure, column in MEASURES.items()
    })  # fmt: skip
    found = frame.groupby(by, dropna=False).agg(
        connections=("connections", "sum"),
        connection_time_s=("connection_time", "sum"),
        bytes=("bytes", "sum"),
        backends=("backend", "nunique"),
    )
    found["connection_time_s"] /= 1e6
    return found.sort_values(["connections", "bytes"], ascending=False).reset_index()


@dataclasses.dataclass(frozen=True)
class Depth:
    """Where a service port's load came from, and when; backends in the order of `per_backend`.

    `groups`: the frames of `grouped`, by client, node and zone. `over_time`: of each measure, bins by backends.
    `clients` and `by_client`: the busiest clients, and their new connections by backend; `others`: how many more there
    are.
    """

    groups: dict[str, pd.DataFrame]
    over_time: dict[str, Floats]
    clients: list[str]
    by_client: Floats
    others: int


def depth(situation: Situation, most_clients: int = 20) -> Depth:
    """All that a closer look at one service port shows."""
    order = _busiest(situation)
    known = situation.known
    bins = max(1, int(np.ceil(situation.range_s / situation.bin_s)))
    over_time = {}
    for measure, column in MEASURES.items():
        table = np.zeros((bins, len(order)))
        np.add.at(
            table,
            (situation.places("bin")[known], situation.places("backend")[known]),
            situation.column(column)[known],
        )
        over_time[measure] = table[:, order]
    by_client = np.zeros((len(situation.clients), len(order)))
    np.add.at(
        by_client,
        (situation.places("client")[known], situation.places("backend")[known]),
        situation.column("opened")[known],
    )
    busiest = np.argsort(-by_client.sum(axis=1), kind="stable")[:most_clients]
    return Depth(
        {by: grouped(situation, by) for by in ("client", "node", "zone")},
        over_time,
        [situation.clients[i] for i in busiest],
        by_client[busiest][:, order],
        len(situation.clients) - len(busiest),
    )


def _busiest(situation: Situation) -> list[int]:
    """Places of the backends, the busiest first: by connections, connection time, name."""
    loads = (situation.load("connections"), situation.load("connection_time"))
    names = [situation.backend_name(i) for i in range(len(situation.backends))]
    return sorted(range(len(names)), key=lambda i: (*(-load[i] for load in loads), names[i]))
