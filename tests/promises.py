"""The tests that docs/guarantees.md names: which they are, and whether all of them ran."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

EXCUSES = ("needs a CUDA GPU", "no slow links: ")
"""How the reasons begin for which a named test may be skipped: this machine has no GPU, or no netem."""

_WORD = re.compile(r"\w*")


def promised():
    """The tests that the page names, as `test_file.py::test_name`."""
    page = (ROOT / "docs" / "guarantees.md").read_text()
    return set(re.findall(r"`(test_\w+\.py::test_\w+)`", page))


def unkept(promised, passed, skipped):
    """What is wrong, a line for each promised test that was skipped without an excuse or never passed.

    `passed`: names; `skipped`: (name, reason) for each parameter that was skipped.
    """
    wrong = {
        name: f"was skipped: {reason}"
        for name, reason in skipped
        if name in promised and not reason.startswith(EXCUSES)
    }
    excused = {name for name, _ in skipped} - wrong.keys()
    wrong |= dict.fromkeys(promised - passed - excused - wrong.keys(), "did not run")
    return [f"{name} {why}" for name, why in sorted(wrong.items())]


class PromisedTests:
    """Fails a run in which a test that the page names was skipped; in a whole run each must have passed."""

    def __init__(self, *, whole):
        self._whole = whole
        self._passed, self._skipped, self._wrong = set(), [], []

    def pytest_runtest_logreport(self, report):
        file, _, test = report.nodeid.rpartition("/")[2].partition("::")
        name = f"{file}::{_WORD.match(test).group()}"  # without parameters and group
        if report.skipped and isinstance(report.longrepr, tuple):
            self._skipped.append((name, report.longrepr[2].removeprefix("Skipped: ")))
        elif report.when == "call" and not report.skipped:
            self._passed.add(name)  # or failed, which fails the run anyway

    def pytest_sessionfinish(self, session):
        expected = promised() if self._whole else promised() & {name for name, _ in self._skipped}
        self._wrong = unkept(expected, self._passed, self._skipped)
        if self._wrong and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self._wrong:
            terminalreporter.section("promised tests", red=True)
            for line in self._wrong:
                terminalreporter.line(line)
