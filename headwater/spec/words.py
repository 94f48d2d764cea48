"""How an option is called in an error: as an argument of Python, or as an option of a command line.

An error names what to change. Whoever typed `--checkpoint` is not helped by `checkpoint=DIR`. The command
line says once, for as long as it is at work, that it is who reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_at_the_command_line: ContextVar[bool] = ContextVar("at_the_command_line", default=False)


@contextmanager
def at_the_command_line() -> Iterator[None]:
    """Name options as a command line has them, in this thread while the block runs."""
    token = _at_the_command_line.set(True)
    try:
        yield
    finally:
        _at_the_command_line.reset(token)


def option(name: str, value: object = None) -> str:
    """`keep`, or `keep=3` with a value; at the command line `--keep` or `--keep 3`, a flag without its True.

    A value in capitals, such as DIR, stands for one.
    """
    if not _at_the_command_line.get():
        text = repr(value) if isinstance(value, str) and not value.isupper() else value
        return name if value is None else f"{name}={text}"
    flag = f"--{name.replace('_', '-')}"
    return flag if value is None or value is True else f"{flag} {value}"


def wording(python: str, command_line: str) -> str:
    """The text for who reads, where the two are not called alike."""
    return command_line if _at_the_command_line.get() else python
