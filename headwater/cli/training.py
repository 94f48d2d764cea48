"""`headwater run`: load the script, train, and show how it goes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from headwater.cli.assignments import parse_settings
from headwater.cli.display import Display, LiveDisplay, PlainDisplay
from headwater.cli.script import load_function
from headwater.cli.summary import summarize
from headwater.run import run


def train_script(script: str, assignments: Sequence[str], **options: Any) -> None:
    """Run the script's function and print lines on the way and a summary at the end; blocks until it is over.

    `assignments`: KEY=VALUE, for `worker.settings`; `options`: arguments of `headwater.run`.

    Raises:
        HeadwaterError: as `headwater.run`, or the script cannot be loaded.
    """
    settings = parse_settings(tuple(assignments))
    train = load_function(script)
    console = Console(highlight=False)
    display: Display = LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
    with display, _logs_to(display):
        result = run(
            train,
            settings=settings,
            output=display.line,
            started=lambda address: display.line(
                f"cluster address: {address}; ask with: headwater status {address}"
            ),
            watch=display.show,
            **options,
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
