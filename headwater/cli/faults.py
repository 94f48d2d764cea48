"""How errors leave the command: one text on standard error, and an exit code that says whose fault it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from headwater.errors import HeadwaterError, UsageError

FAILED = 1
USAGE = 2
INTERRUPTED = 130


@contextmanager
def faults_reported() -> Iterator[None]:
    """Turn errors of Headwater's tree and Ctrl-C into a message and an exit code.

    Raises:
        typer.Exit: 2 for a wrong call, 130 for Ctrl-C, 1 for every other error of the tree.
    """
    try:
        yield
    except KeyboardInterrupt:
        complain("interrupted: everything was stopped")
        raise typer.Exit(INTERRUPTED) from None
    except HeadwaterError as error:
        complain(str(error))
        raise typer.Exit(USAGE if isinstance(error, UsageError) else FAILED) from None


def complain(text: str) -> None:
    """Write to standard error."""
    print(f"headwater: {text}", file=sys.stderr)
