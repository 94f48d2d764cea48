"""`headwater run`: load the script, train, and show how it goes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from headwater.cli.assignments import parse_settings
from headwater.cli.display import Display, LiveDisplay, PlainDisplay
from headwater.cli.script import load_function
from headwater.cli.summary import summarize
from headwater.run import run


@dataclass(frozen=True, slots=True)
class Job:
    """The options of `headwater run`, as given; `headwater.run` checks them."""

    workers: int
    servers: int
    sync: str
    engine: str
    settings: tuple[str, ...]
    rules: tuple[str, ...]
    transport: str
    patience: float
    deadline: float


def train_script(script: str, job: Job) -> None:
    """Run the script's function and print lines on the way and a summary at the end; blocks until it is over.

    Raises:
        HeadwaterError: as `headwater.run`, or the script cannot be loaded.
    """
    settings = parse_settings(job.settings)
    train = load_function(script)
    console = Console(highlight=False)
    display: Display = LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
    with display, _logs_to(display):
        result = run(
            train,
            workers=job.workers,
            servers=job.servers,
            sync=job.sync,
            engine=job.engine,
            settings=settings,
            patience=job.patience,
            deadline=job.deadline,
            rules=job.rules,
            transport=job.transport,
            output=display.line,
            started=lambda address: display.line(
                f"cluster address: {address}; ask with: headwater status {address}"
            ),
            watch=display.show,
        )
        display.show(result.statistics)
    for line in summarize(result):
        console.print(line, markup=False)


class _LinesHandler(logging.Handler):
    """Sends log records to a display, one line each."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.line(record.getMessage())


@contextmanager
def _logs_to(display: Display) -> Iterator[None]:
    """Show what Headwater logs in this process, which is the coordinator's, while the block runs."""
    logger, handler = logging.getLogger("headwater"), _LinesHandler(display)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
