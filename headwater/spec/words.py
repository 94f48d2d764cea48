"""How things are called in what people read: options, and nodes by their numbers.

An option is an argument of Python, or an option of a command line. An error names what to change: whoever
typed `--checkpoint` is not helped by `checkpoint=DIR`. The command line says once, for as long as it is at
work, that it is who reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


_RUN, _PARTS = 4, 12


def numbered(noun: str, numbers: Iterable[int]) -> str:
    """`worker 3`, `workers 1, 2, 7`, `workers 0, 4 to 99`; `nobody` without any.

    Four or more numbers that follow each other are a part `4 to 99`. Of more than twelve parts the first
    twelve stand there, and how many numbers are left.
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [part for run in runs for part in ([run] if len(run) >= _RUN else [[one] for one in run])]
    if not parts:
        return "nobody"
    said = [f"{part[0]} to {part[-1]}" if len(part) > 1 else str(part[0]) for part in parts[:_PARTS]]
    left = sum(map(len, parts[_PARTS:]))
    several = len(parts) > 1 or len(parts[0]) > 1
    return f"{noun}{'s' * several} {', '.join(said)}{f' and {left} more' if left else ''}"
