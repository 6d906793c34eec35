"""The report of what tests cost names what is over its budget, and fails a light run that has become slow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.costs import FILE_BUDGET, TEST_BUDGET, TEST_LIMIT, Costs, cpu_seconds


def costs(spent: dict[str, float], light: bool = True) -> tuple[Costs, str, int]:
    """A plugin that has seen these tests, what it writes, and the exit status of a run that passed."""
    plugin, lines, session = Costs(light), [], SimpleNamespace(exitstatus=0)
    for name, seconds in spent.items():
        for when in ("setup", "call", "teardown"):
            measured = [("cpu_seconds", seconds)] if when == "teardown" else []
            report: Any = SimpleNamespace(when=when, nodeid=name, user_properties=measured)
            plugin.pytest_runtest_logreport(report)
    reporter: Any = SimpleNamespace(write_line=lines.append)
    plugin.pytest_terminal_summary(reporter)
    watched: Any = session
    plugin.pytest_sessionfinish(watched, 0)
    return plugin, "\n".join(lines), session.exitstatus


def test_what_costs_too_much_is_named_and_a_test_beyond_the_limit_fails_the_run() -> None:
    file, test = FILE_BUDGET - TEST_BUDGET, TEST_BUDGET + 1
    _, report, status = costs({"a.py::one": file, "a.py::two": test, "b.py::one": TEST_BUDGET - 1})
    assert f"{file + test + TEST_BUDGET - 1:.0f} CPU seconds in 3 tests" in report
    assert "a.py::one" in report and "a.py::two" in report and "b.py" not in report
    assert f"{file + test:.1f} CPU s, more than a file's {FILE_BUDGET:.0f}: a.py\n" in report
    assert status == 0
    assert costs({"a.py::one": TEST_LIMIT + 1})[2] == 1
    _, report, status = costs({"a.py::one": TEST_LIMIT + 1}, light=False)
    assert "more than" not in report and status == 0


def test_a_running_session_measures_its_own_tests(request: pytest.FixtureRequest) -> None:
    plugin = request.config.pluginmanager.get_plugin("costs")
    assert isinstance(plugin, Costs)
    before = cpu_seconds()
    while cpu_seconds() - before < 0.02:
        pass
    assert 0.02 <= cpu_seconds() - plugin._started < TEST_LIMIT
