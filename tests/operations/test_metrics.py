"""The list of metrics follows the schema; its page is the list; values become what Prometheus reads."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from prometheus_client import parser

from tracer.cli import main
from tracer.operations import metrics, pages
from tracer.operations.metrics import Metric
from tracer.record import Counter
from tracer.store.coverage import COUNTED, GAUGES, WRITER

NAMES = {metric.name for metric in metrics.METRICS}


def test_every_counter_of_the_kernel_side_and_every_number_of_coverage_is_a_metric() -> None:
    for name in {counter.name.lower() for counter in Counter} | {*COUNTED, *WRITER}:
        if name.startswith("lost_"):
            assert name.removeprefix("lost_") in metrics.STAGES
        else:
            assert f"vip_tracer_{name}_total" in NAMES
    assert {metrics.gauge_name(name) for name in GAUGES} <= NAMES
    assert metrics.gauge_name("names_age_s") == "vip_tracer_names_age_seconds"


def test_each_is_there_once_and_explained() -> None:
    assert len(NAMES) == len(metrics.METRICS)
    for metric in metrics.METRICS:
        assert metric.help
        assert "\n" not in metric.help
        assert "|" not in metric.help
        assert "at ts" not in metric.help


def test_page_is_generated() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == metrics.as_markdown(), "docs/metrics.md is stale: make docs"


def test_the_command_lists_them() -> None:
    done = CliRunner().invoke(main, ["schema", "--metrics"])
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [metric.name for metric in metrics.METRICS]
    assert CliRunner().invoke(main, ["schema", "--metrics", "-o", "markdown"]).stdout == metrics.as_markdown()
    assert CliRunner().invoke(main, ["schema", "--metrics", "-o", "json"]).exit_code == 2


LIST = (
    Metric("x_total", "counter", 'a "b" \\ c'),
    Metric("y", "gauge", "y", "map"),
    Metric("z_seconds", "histogram", "z"),
    Metric("s_seconds", "summary", "s"),
    Metric("x_info", "info", "i"),
    Metric("absent", "gauge", "nobody knows"),
)


def scrape(values: dict[str, pages.Value]) -> dict[str, float]:
    text = pages.pages(LIST, lambda: values, lambda: "", lambda: "")["/metrics"]().body.decode()
    samples = [sample for family in parser.text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name + "".join(f" {k}={v}" for k, v in sample.labels.items()): sample.value for sample in samples}


def test_values_become_an_exposition() -> None:
    found = scrape(
        {
            "x_total": 3,
            "y": {"a": 1, 'b"\n': 2.5},
            "z_seconds": pages.Histogram((0.5, 1.0), (3, 2), 4.5),
            "s_seconds": pages.Summary(2, 0.5),
            "x_info": {"version": "1", "kernel": "6"},
        }
    )
    own = {name: value for name, value in found.items() if not name.startswith("process_")}
    assert own == {
        "x_total": 3, "y map=a": 1, 'y map=b"\n': 2.5, "z_seconds_bucket le=0.5": 3, "z_seconds_bucket le=1.0": 5,
        "z_seconds_bucket le=+Inf": 5, "z_seconds_count": 5, "z_seconds_sum": 4.5, "s_seconds_count": 2,
        "s_seconds_sum": 0.5, "x_info kernel=6 version=1": 1,
    }  # fmt: skip


def test_a_value_of_no_metric_is_a_defect() -> None:
    with pytest.raises(KeyError, match="typo_total"):
        scrape({"typo_total": 1})


def test_many_who_ask_cost_one_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    made = pages.pages(LIST, lambda: asked.append(1) or {"x_total": len(asked)}, lambda: "", lambda: "")
    bodies = {made["/metrics"]().body for _ in range(50)}
    assert len(asked) == len(bodies) == 1
    monkeypatch.setattr(pages, "KEPT_S", -1.0)
    assert made["/metrics"]().body not in bodies


def test_health_says_what_is_wrong() -> None:
    made = pages.pages(LIST, dict, lambda: "", lambda: "disk \x1b[31mfull\n")
    assert (made["/healthz"]().status, made["/healthz"]().body) == (200, b"ok\n")
    assert (made["/readyz"]().status, made["/readyz"]().body) == (503, b"disk \\x1b[31mfull\\n\n")
