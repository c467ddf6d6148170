"""What the tests of real parts found out, at the end of pytest's output."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.system.docker_engine import Deployment

FINDINGS = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def findings(pytestconfig: pytest.Config) -> list[str]:
    """Lines to report: sizes, times, and what could not be had on this machine."""
    return pytestconfig.stash.setdefault(FINDINGS, [])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what the containers wrote to the report of a test that fails with a deployment."""
    report = yield
    deployment = getattr(item, "funcargs", {}).get("deployment")
    if report.failed and isinstance(deployment, Deployment):
        report.sections.append(("containers", deployment.logs()))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the findings."""
    lines = config.stash.get(FINDINGS, [])
    if lines:
        terminalreporter.section("findings")
        for line in lines:
            terminalreporter.line(line)
