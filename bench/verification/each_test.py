"""A plugin of pytest: a line for each test as it ends, with the reason where it failed, however the run itself ends.

    python -m pytest -p bench.verification.each_test

The line is MARK and JSON: outcome (passed, failed, skipped), name, reason.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

MARK = "each test: "
MOST_CHARACTERS = 400  # of a reason


class EachTest:
    """Writes the lines by pytest's own terminal, which what tests print does not reach."""

    def __init__(self, terminal: Any) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Once for each of a test's three phases: of setup and teardown only what went wrong, or was skipped."""
        if report.passed and report.when != "call":
            return
        crash = getattr(report.longrepr, "reprcrash", None)  # a worker that dies leaves a text alone
        why = str(crash.message if crash is not None else report.longrepr) if report.failed else ""
        said = [report.outcome, report.nodeid, " ".join(why.split())[:MOST_CHARACTERS]]
        self.terminal.write(f"\n{MARK}{json.dumps(said)}\n", flush=True)  # a line of its own among pytest's dots


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """In the process that the reports of all workers come to."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(EachTest(config.pluginmanager.get_plugin("terminalreporter")))
