"""The pages of `server`: metrics in Prometheus' text format, and the two questions of a kubelet.

Knows how a value becomes an exposition. Which metrics there are, and what their values are now, it is given: the agent
and the exporter have their own.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracer.operations.metrics import Metric
from tracer.operations.server import Page, sentence
from tracer.words import printable

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family

#: Seconds for which the metrics page is served again, so that many who ask do not keep the process busy.
KEPT_S = 2.0
#: The text format that every Prometheus reads.
KIND = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations in classes: `counts[i]` are those up to `bounds[i]` and above the bound before."""

    bounds: Sequence[float]
    counts: Sequence[int]
    total: float


@dataclass(frozen=True, slots=True)
class Summary:
    """How many observations, and what they add up to."""

    count: int
    total: float


#: A number; numbers by the label's value; for info the labels' values.
Value = float | Mapping[str, float] | Mapping[str, str] | Histogram | Summary


def families(metrics: Iterable[Metric], values: Mapping[str, Value]) -> "Iterator[Family]":
    """The metrics that have a value, in their order.

    Raises:
        KeyError: there is a value of no metric.
    """
    known = {metric.name: metric for metric in metrics}
    unknown = values.keys() - known.keys()
    if unknown:
        raise KeyError(f"no such metric: {sorted(unknown)}")
    return (_family(metric, values[name]) for name, metric in known.items() if name in values)


def _family(metric: Metric, value: Value) -> "Family":
    from prometheus_client import core

    if isinstance(value, Histogram):
        below, buckets = 0, []
        for bound, count in zip(value.bounds, value.counts, strict=True):
            below += count
            buckets.append((str(float(bound)), below))
        buckets.append(("+Inf", below))
        return core.HistogramMetricFamily(metric.name, metric.help, buckets=buckets, sum_value=value.total)
    if isinstance(value, Summary):
        return core.SummaryMetricFamily(metric.name, metric.help, count_value=value.count, sum_value=value.total)
    kind = core.CounterMetricFamily if metric.kind == "counter" else core.GaugeMetricFamily
    if not isinstance(value, Mapping):
        return kind(metric.name, metric.help, value=value)
    if metric.kind == "info":
        made = kind(metric.name, metric.help, labels=list(value))
        made.add_metric([str(each) for each in value.values()], 1)
        return made
    assert metric.label is not None, f"{metric.name} has no label"
    made = kind(metric.name, metric.help, labels=[metric.label])
    for label, number in value.items():
        made.add_metric([label], float(number))
    return made


class _Collector:
    """What the registry asks: the values of the moment as families."""

    def __init__(self, metrics: Sequence[Metric], values: Callable[[], Mapping[str, Value]]) -> None:
        self._metrics, self._values = metrics, values

    def collect(self) -> "Iterator[Family]":
        return families(self._metrics, self._values())

    def describe(self) -> "Iterator[Family]":
        """Nothing: so that registering does not ask for values."""
        return iter(())


def pages(
    metrics: Sequence[Metric],
    values: Callable[[], Mapping[str, Value]],
    alive: Callable[[], str],
    ready: Callable[[], str],
) -> dict[str, Callable[[], Page]]:
    """The pages of one process, for `Server`: /metrics, /healthz, /readyz.

    Args:
        metrics: what there is.
        values: asked for the values now, by the metrics' names; what is left out is not exposed.
        alive: asked what is wrong that only a new start can mend; empty: nothing.
        ready: asked what keeps the process from its work; empty: nothing.
    """
    # Imported here: 4 MB that a process without a server does without.
    from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    registry.register(_Collector(metrics, values))
    kept = [(-KEPT_S, b"")]

    def exposition() -> Page:
        if time.monotonic() >= kept[0][0] + KEPT_S:
            body = generate_latest(registry)
            kept[0] = (time.monotonic(), body)
        return Page(200, kept[0][1], KIND)

    def answer(question: Callable[[], str]) -> Page:
        trouble = question()
        return sentence(503, printable(trouble)) if trouble else sentence(200, "ok")

    return {"/metrics": exposition, "/healthz": lambda: answer(alive), "/readyz": lambda: answer(ready)}
