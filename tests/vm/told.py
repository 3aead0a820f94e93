"""A pytest plugin: a line of JSON for each test as soon as it ended, so that a guest that dies has told what it did.

$VM_TOLD is a JSON file: test file → the file that its lines are appended to. A line has name, outcome ("passed",
"failed", "skipped: why"), seconds by phase, and of a failure its text.
"""

import json
import os
from pathlib import Path

import pytest

_reports: dict[str, list[pytest.TestReport]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collects set-up, call and end of a test."""
    _reports.setdefault(report.nodeid, []).append(report)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Tells of it."""
    reports = _reports.pop(nodeid)
    line: dict[str, object] = {"name": nodeid, "outcome": "passed"}
    for report in reports:
        if report.failed:
            line |= {"outcome": "failed", "said": report.longreprtext[-20_000:]}
            break
        if report.skipped:
            line["outcome"] = f"skipped: {report.longrepr[2] if isinstance(report.longrepr, tuple) else 'unexpected'}"
    line["seconds"] = {report.when: round(report.duration, 1) for report in reports}
    where = json.loads(Path(os.environ["VM_TOLD"]).read_text())[nodeid.partition("::")[0]]
    with open(where, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
