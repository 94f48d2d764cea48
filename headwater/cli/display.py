"""What a person sees while a run goes on: a live table on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from headwater.cli.progress import ProgressLines, WorkerLine
from headwater.messages import ClusterStatistics

_EVERY_S = 5.0
"""How often the plain display prints a line for each worker, in seconds."""


class Display(Protocol):
    """A context manager around a run."""

    def line(self, text: str) -> None:
        """Print one line; from any thread."""

    def show(self, statistics: ClusterStatistics) -> None:
        """Take the newest statistics, a few times a second."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LiveDisplay:
    """A table with a row for each worker, redrawn in place below the lines that are printed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines = ProgressLines()
        self._live = Live(console=console, auto_refresh=False)

    def line(self, text: str) -> None:
        """Print above the table."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, statistics: ClusterStatistics) -> None:
        """Redraw the table."""
        self._live.update(table(self._lines.update(statistics)), refresh=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


class PlainDisplay:
    """A line for each worker every few seconds. `clock`: monotonic seconds."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._lines = ProgressLines()
        self._due = clock() + _EVERY_S

    def line(self, text: str) -> None:
        """Print it."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, statistics: ClusterStatistics) -> None:
        """Print the workers' lines, when it is time."""
        if self._clock() < self._due:
            return
        self._due = self._clock() + _EVERY_S
        for line in self._lines.update(statistics):
            self.line(f"worker {line.rank}: {', '.join(_phrases(line))}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def table(lines: list[WorkerLine]) -> Table:
    """The live table."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("worker", "step", "steps/s", "version", "staleness", "waiting", "left"):
        shown.add_column(heading, justify="right")
    shown.add_column("", overflow="fold")
    for line in lines:
        shown.add_row(
            str(line.rank),
            str(line.steps),
            f"{line.rate:.1f}",
            str(line.version),
            "" if line.staleness is None else f"{line.staleness:.1f}",
            f"{line.waiting:.0%}",
            "" if line.left is None else duration(line.left),
            "  ".join(_metrics(line)),
        )
        if line.waits_for:
            shown.add_row(*[""] * 7, line.waits_for)
    return shown


def _metrics(line: WorkerLine) -> list[str]:
    return [f"{name}={value:.4g}" for name, value in line.metrics.items()]


def _phrases(line: WorkerLine) -> list[str]:
    """A worker's line in words."""
    phrases = [f"step {line.steps}", f"{line.rate:.1f} steps/s", *_metrics(line), f"version {line.version}"]
    if line.staleness is not None:
        phrases.append(f"staleness {line.staleness:.1f}")
    phrases.append(f"{line.waiting:.0%} waiting")
    if line.left is not None:
        phrases.append(f"{duration(line.left)} left")
    if line.waits_for:
        phrases.append(line.waits_for)
    return phrases


def duration(seconds: float) -> str:
    """`7 s`, `3:07` or `2:03:07`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
