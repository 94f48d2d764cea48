"""How errors leave the command: one text on standard error, and an exit code that says whose fault it was."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from headwater.errors import HeadwaterError, UsageError
from headwater.spec.words import at_the_command_line

FAILED = 1
USAGE = 2
INTERRUPTED = 130


@contextmanager
def faults_reported(context: Any = None) -> Iterator[None]:
    """Turn errors of Headwater's tree and Ctrl-C into a message and an exit code.

    `context`: of the command line, for options that came from the environment.

    Raises:
        typer.Exit: 2 for a wrong call, 130 for Ctrl-C, 1 for every other error of the tree.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with at_the_command_line():
            yield
    except KeyboardInterrupt:
        complain("interrupted: everything was stopped")
        raise typer.Exit(INTERRUPTED) from None
    except HeadwaterError as error:
        usage = isinstance(error, UsageError)
        complain(f"{error}{_from_the_environment(context)}" if usage else str(error))
        raise typer.Exit(USAGE if usage else FAILED) from None


def complain(text: str) -> None:
    """Write to standard error."""
    print(f"headwater: {text}", file=sys.stderr)


def said(error: Any) -> str:
    """A wrong command line in one sentence: which option, where its value came from, where to read on. ""
    where its help was shown instead."""
    context, text = getattr(error, "ctx", None), error.format_message().rstrip(".")
    if context is None or not text:
        return str(text)
    parameter = getattr(error, "param", None)
    if parameter is not None and _is_from_environment(context, parameter):
        text = f"{text} (from the environment variable {_variable(context, parameter)})"
    return f"{text}; try '{context.command_path} --help'"


def _from_the_environment(context: Any) -> str:
    """Which options of a command came from the environment, as one of them may be what is wrong."""
    parameters = [] if context is None else context.command.params
    names = [_variable(context, one) for one in parameters if _is_from_environment(context, one)]
    return f" (set by the environment: {', '.join(names)})" if names else ""


def _is_from_environment(context: Any, parameter: Any) -> bool:
    source = context.get_parameter_source(parameter.name)
    return source is not None and source.name == "ENVIRONMENT"


def _variable(context: Any, parameter: Any) -> str:
    return parameter.envvar or f"{context.auto_envvar_prefix}_{parameter.name.upper()}"
