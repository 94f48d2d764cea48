"""What a person sees while a run goes on: a live table on a terminal, a line now and then elsewhere.

Every worker has its line from the beginning: before its first step the line says what is waited for.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from headwater.messages import ClusterStatistics
from headwater.observe.exposure import Exposure, RecentExposure
from headwater.observe.worker_lines import ProgressLines, WorkerLine

Taken = TypeVar("Taken")

_EVERY_S = 5.0
"""How often the plain display prints a line for each worker, in seconds."""


class Display(Protocol):
    """A context manager around a run; its methods may be called from any thread."""

    def print(self, text: str) -> None:
        """Show a line that a node printed, which belongs to the output of the run."""

    def log(self, text: str) -> None:
        """Show a line about the run."""

    def started(self, address: str) -> None:
        """Say where the cluster is."""

    def show(self, statistics: ClusterStatistics) -> None:
        """Take the newest statistics, a few times a second."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LiveDisplay:
    """A table with a row for each worker, redrawn in place below the lines that are printed.

    Args:
        console: the terminal.
        script: what the workers run.
    """

    def __init__(self, console: Console, *, workers: int, script: str) -> None:
        self._console = console
        self._lines = ProgressLines(workers, script)
        self._exposure = RecentExposure()
        self._live = Live(shown(self._lines.starting()), console=console, auto_refresh=False)

    def print(self, text: str) -> None:
        """Print above the table, or to where standard output leads."""
        if sys.stdout.isatty():
            self.log(text)
        else:
            print(text, flush=True)

    def log(self, text: str) -> None:
        """Print above the table."""
        self._console.print(text, markup=False, soft_wrap=True)

    def started(self, address: str) -> None:
        """Print how to ask for it, in lines that can be copied."""
        for line in _where(address):
            self.log(line)

    def show(self, statistics: ClusterStatistics) -> None:
        """Redraw the table."""
        first = self._exposure.look(statistics.totals, time.monotonic())
        self._live.update(shown(self._lines.update(statistics), first), refresh=True)

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


class PlainDisplay:
    """A line for each worker every few seconds; before its first step, whenever it waits for something else.

    Args:
        console: where lines about the run go.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        console: Console,
        *,
        workers: int,
        script: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._clock = clock
        self._lines = ProgressLines(workers, script)
        self._due = clock() + _EVERY_S
        self._exposure = RecentExposure()
        self._said: dict[int, str] = {}

    def print(self, text: str) -> None:
        """Print to standard output."""
        print(text, flush=True)

    def log(self, text: str) -> None:
        """Print to the console."""
        self._console.print(text, markup=False, soft_wrap=True)

    def started(self, address: str) -> None:
        """Print how to ask for it."""
        for line in _where(address):
            self.log(line)

    def show(self, statistics: ClusterStatistics) -> None:
        """Print the workers' lines, when it is time."""
        if self._clock() < self._due:
            return
        self._due = self._clock() + _EVERY_S
        for line in self._lines.update(statistics):
            if line.steps:
                self.log(f"worker {line.rank}: {', '.join(_phrases(line))}")
            elif self._said.get(line.rank) != line.phase:
                self._said[line.rank] = line.phase
                self.log(f"worker {line.rank}: {line.phase}")
        first = self._exposure.look(statistics.totals, self._clock())
        if first is not None and len(statistics.totals) > 1:
            self.log(f"slowest: {first}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def is_watched() -> bool:
    """Whether somebody sees standard error: on a terminal, or in a notebook."""
    shell = sys.modules.get("IPython")
    kernel = shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None
    return kernel or (sys.stderr is not None and sys.stderr.isatty())


def display_for(workers: int, train: Callable[..., Any]) -> Display:
    """What shows a run of this function here."""
    code = getattr(train, "__code__", None)
    name = os.path.basename(code.co_filename) if code is not None else "what it runs"
    console = Console(highlight=False, stderr=True)
    live = console.is_terminal or console.is_jupyter
    return (LiveDisplay if live else PlainDisplay)(console, workers=workers, script=name)


def both(first: Callable[[Taken], None], then: Callable[[Taken], None] | None) -> Callable[[Taken], None]:
    """A function that calls both."""

    def call(taken: Taken) -> None:
        first(taken)
        if then is not None:
            then(taken)

    return call


def _where(address: str) -> list[str]:
    return [f"cluster address: {address}", f"to see how it is: headwater status {address}"]


def shown(lines: list[WorkerLine], slowest: Exposure | None = None) -> RenderableType:
    """The live table: at most 80 columns, but for the user's own metrics. `slowest`: whom all wait for.

    Below it is a line for each worker that has made no step yet, or waits: sentences need the whole width.
    """
    training = [line for line in lines if line.steps]
    said = [Text(f"worker {line.rank}: {line.waits_for or line.phase}") for line in lines if _speaks(line)]
    if slowest is not None and len(lines) > 1:
        said.append(Text(f"slowest: {slowest}"))
    return Group(*([_table(training)] if training else []), *said)


def _speaks(line: WorkerLine) -> bool:
    return not line.steps or line.waits_for is not None


def _table(lines: list[WorkerLine]) -> Table:
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("worker", "step", "steps/s", "version", "staleness", "waiting", "left"):
        rows.add_column(heading, justify="right", no_wrap=True)
    rows.add_column("", overflow="fold")
    for line in lines:
        rows.add_row(
            str(line.rank),
            str(line.steps),
            f"{line.rate:.1f}",
            str(line.version),
            "" if line.staleness is None else f"{line.staleness:.1f}",
            f"{line.waiting:.0%}",
            "" if line.left is None else duration(line.left),
            "  ".join(_metrics(line)),
        )
    return rows


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
