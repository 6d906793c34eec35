"""What tests cost in CPU seconds: the sum under every run, and the files and tests that cost too much."""

from __future__ import annotations

import resource
from collections import defaultdict

import pytest

# CPU seconds: unlike the time on the clock they say the same on a machine with other work to do. A module's
# fixtures count for the first test that needs them.
FILE_BUDGET = 15.0
TEST_BUDGET = 6.0
# A light test that costs so much fails the run.
TEST_LIMIT = 30.0


def cpu_seconds() -> float:
    """CPU seconds of this process, its threads and its finished children."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def over_budget(spent: dict[str, float], budget: float) -> list[tuple[str, float]]:
    """The names that spent more than `budget`, dearest first."""
    return sorted(((n, s) for n, s in spent.items() if s > budget), key=lambda found: -found[1])


class Costs:
    """A plugin that measures each test where it runs and reports where the run is watched."""

    def __init__(self, light: bool) -> None:
        self.light = light
        self.tests: dict[str, float] = defaultdict(float)
        self._started = 0.0

    def pytest_runtest_logstart(self) -> None:
        self._started = cpu_seconds()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        if call.when == "teardown":  # a worker sends the properties with its report
            item.user_properties.append(("cpu_seconds", cpu_seconds() - self._started))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.tests[report.nodeid] += float(dict(report.user_properties).get("cpu_seconds", 0.0))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        files: dict[str, float] = defaultdict(float)
        for name, seconds in self.tests.items():
            files[name.partition("::")[0]] += seconds
        terminalreporter.write_line(f"{sum(files.values()):.0f} CPU seconds in {len(self.tests)} tests")
        if not self.light:
            return
        for name, seconds in over_budget(files, FILE_BUDGET):
            terminalreporter.write_line(f"{seconds:6.1f} CPU s, more than a file's {FILE_BUDGET:.0f}: {name}")
        for name, seconds in over_budget(self.tests, TEST_BUDGET):
            terminalreporter.write_line(f"{seconds:6.1f} CPU s, more than a test's {TEST_BUDGET:.0f}: {name}")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.light and exitstatus == 0 and over_budget(self.tests, TEST_LIMIT):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
