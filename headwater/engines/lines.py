"""Cuts the bytes that a process prints into the lines that a person is shown.

Pure: the time is an argument, in seconds. A line that is not finished, such as a progress bar that redraws
itself after a carriage return, is shown while it changes: once a second at first, and then ever more rarely,
so that a long bar does not fill a log. What a terminal would show at the end of the line is always a line.

Invariants:
- Every finished line is given once, in order, and as soon as its end is there.
- What is kept is bounded: a redrawn line is forgotten with the next carriage return, and a line without an
  end is cut after `LONGEST` bytes.
"""

from __future__ import annotations

LONGEST = 65_536
"""Bytes after which a line is cut."""

_QUIET_S = 0.5
"""How long nothing must come before the beginning of a line is shown: it may be half of what is written."""
_FIRST_S, _LAST_S = 1.0, 60.0
"""Shortest and longest time between two looks at a line that is not finished."""
_SHARE = 0.1
"""Between these, this share of the time that the line has lasted."""


class LineSplitter:
    """The output of one process. For one thread at a time."""

    def __init__(self) -> None:
        self._rest = b""
        self._arrived = 0.0
        self._began: float | None = None
        self._next = 0.0
        self._shown = b""

    def feed(self, data: bytes, now: float) -> list[bytes]:
        """The lines to show once `data` has been printed."""
        *ended, rest = (self._rest + data).split(b"\n")
        lines = [line for part in ended if (line := self._end(part)) is not None]
        self._arrived = now
        if self._began is None:
            self._began = now
        drawn, redraws, begun = rest.rpartition(b"\r")
        if redraws:
            frame = _visible(drawn)
            lines += self._look(frame, now)
            rest = b"\r" + (begun or frame + b"\r")
        if len(rest) > LONGEST:
            lines.append(_visible(rest))
            rest = b""
        self._rest = rest
        return lines

    @property
    def due(self) -> float | None:
        """When `tick` should be called, if nothing is fed before; None: never."""
        frame = _visible(self._rest)
        if not frame.strip() or frame == self._shown:
            return None
        return max(self._arrived + _QUIET_S, self._next)

    def tick(self, now: float) -> list[bytes]:
        """The line to show because nothing has come for a while, if any."""
        due = self.due
        return self._look(_visible(self._rest), now) if due is not None and now >= due else []

    def end(self) -> list[bytes]:
        """What is left when the process prints no more."""
        rest, self._rest = self._rest, b""
        line = self._end(rest) if rest else None
        return [] if line is None else [line]

    def _look(self, frame: bytes, now: float) -> list[bytes]:
        """Show the state of an unfinished line, unless it was shown a moment ago."""
        if not frame.strip() or frame == self._shown or now < self._next:
            return []
        assert self._began is not None
        self._shown = frame
        self._next = now + min(max(_FIRST_S, _SHARE * (now - self._began)), _LAST_S)
        return [frame]

    def _end(self, line: bytes) -> bytes | None:
        """A finished line; None where it was shown already as it is."""
        text, shown = _visible(line), self._shown
        self._began, self._next, self._shown = None, 0.0, b""
        return None if shown and text.rstrip() == shown.rstrip() else text


def _visible(line: bytes) -> bytes:
    """What a terminal shows of a line that carriage returns redraw."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]
