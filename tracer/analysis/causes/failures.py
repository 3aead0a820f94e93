"""Backends that refuse, time out, or are slow to accept."""

from collections.abc import Iterator

import numpy as np

from tracer.analysis.causes.explain import Explained, by_chance, distance, units
from tracer.analysis.causes.hypothesis import Hypothesis, percent, some
from tracer.analysis.causes.situation import FAILURES, Situation

#: A backend fails if it fails this many times as often as the others, and this much more in standard deviations.
TIMES, SIGMAS = 3.0, 4.0
#: It is slow to accept if its mean connect latency is this many times the others' median, and is so too without two
#: SYNs that may have been lost on their way: those are sent again after a second (RFC 6298, 2.1).
SLOWER, LOST_SYNS, AGAIN_US = 3.0, 2, 1e6


def failing_backend(situation: Situation, measure: str) -> Iterator[Hypothesis]:
    """Failures take load away from a backend (nothing is served) and connection time to it (timeouts)."""
    if measure == "connections":
        return
    among = situation.known & situation.endpoint_then
    opened = situation.load("connections", among)
    by_kind = {kind: situation.load(measure, among, situation.column(kind)) for kind in FAILURES}
    failed = np.minimum(sum(by_kind.values()), opened)
    others = (failed.sum() - failed + 0.5) / np.maximum(1.0, opened.sum() - opened + 1)
    rate = failed / np.maximum(1.0, opened)
    sigmas = (failed - others * opened) / np.sqrt(np.maximum(1e-9, others * (1 - others) * opened))
    bad = np.flatnonzero((rate > TIMES * others) & (sigmas > SIGMAS) & (failed >= 5))
    if not len(bad):
        return
    ok = situation.fair(measure) * (1 - rate)
    load = situation.load(measure)
    rest = (
        load - situation.load(measure, values=situation.column("failed_us")) if measure == "connection_time" else load
    )
    explained = Explained(
        distance(load, situation.fair(measure)), distance(rest, ok), by_chance(ok, units(situation, measure))
    )
    kinds = [kind for kind in FAILURES if by_kind[kind][bad].sum() > 0.2 * failed[bad].sum()]
    names = some([situation.backend_name(i) for i in bad])
    yield Hypothesis(
        "failing-backend",
        explained.score,
        f"{names} failed {int(failed[bad].sum())} of {int(opened[bad].sum())} connections ({', '.join(kinds)}), the "
        f"others {percent(float(failed.sum() - failed[bad].sum()) / max(1.0, opened.sum() - opened[bad].sum()))}.",
        f"Look at {names}: is the process listening, does its readiness probe tell the truth, is a network policy in "
        "the way?",
        {"failed": float(failed[bad].sum()), "opened": float(opened[bad].sum()), "before": explained.before,
         "after": explained.after},
        (("backend_ip", "in", [str(situation.backends.iloc[i]["ip"]) for i in bad]), ("result", "in", kinds)),
    )  # fmt: skip


def slow_to_accept(situation: Situation, measure: str) -> Iterator[Hypothesis]:
    """Connect latency counts as connection time: a full accept queue shows as load."""
    if measure != "connection_time":
        return
    latency, n = (situation.load(measure, values=situation.column(name)) for name in ("latency_us", "latencies"))
    mean = latency / np.maximum(1.0, n)
    usual = float(np.median(mean[n > 0])) if (n > 0).any() else 0.0
    waited = latency - AGAIN_US * np.minimum(LOST_SYNS, latency // AGAIN_US)
    slow = np.flatnonzero((n >= 20) & (waited > SLOWER * usual * n))
    if not len(slow) or len(slow) > len(mean) / 2:
        return
    load, fair = situation.load(measure), situation.fair(measure)
    explained = Explained(
        distance(load, fair), distance(load - latency, fair), by_chance(fair, units(situation, measure))
    )
    names = some([situation.backend_name(i) for i in slow])
    yield Hypothesis(
        "failing-backend",
        explained.score,
        f"{names} took {mean[slow].max() / 1000:.1f} ms to accept on average, the others {usual / 1000:.1f} ms.",
        f"Look at {names}: its accept queue overflows (`nstat -az TcpExtListenOverflows` in the pod), or packets are "
        "lost on its way.",
        {"latency_ms": float(mean[slow].max() / 1000), "usual_ms": usual / 1000, "before": explained.before,
         "after": explained.after},
        (("backend_ip", "in", [str(situation.backends.iloc[i]["ip"]) for i in slow]), ("opened", "==", True)),
    )  # fmt: skip
