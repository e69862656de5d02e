"""Prints what every configuration needs of a GPU, after its tests."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows: dict[str, dict[str, str]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            needs = dict(report.user_properties)
            if "needs" in needs:
                rows.setdefault(str(needs["configuration"]), {})[str(needs["gpu"])] = str(needs["needs"])
    if rows:
        terminalreporter.section("registers per thread / bytes of shared memory per block")
        width = max(map(len, rows))
        for name, by_gpu in sorted(rows.items()):
            cells = "   ".join(f"{gpu} {needs:>11}" for gpu, needs in sorted(by_gpu.items()))
            terminalreporter.write_line(f"{name:{width}}   {cells}")
