"""Traces as files: Chrome trace events, which Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

A process is a member, a line a thread of it. Times are microseconds by the coordinator's clock; the metadata
of each process says how far its own clock was behind, and within which error that is known. The file is an
array of events that is closed at the end: what was written before a disk was full can be opened as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import IO, Any

import msgspec

from headwater.messages import TraceChunk, TraceEvent

_CATEGORY = "headwater"
_BEFORE_NS = 60_000_000_000
"""How long before the first event that was told time begins: small numbers are exact to the nanosecond."""


class TraceFile:
    """Writes what comes to `file`.

    Attributes:
        events: slices and instants that were written.
        dropped: events that nodes could not keep.
        largest_error: of the clocks' offsets, in nanoseconds.
    """

    def __init__(self, file: IO[str]) -> None:
        self.events = self.dropped = self.largest_error = 0
        self._file = file
        self._encode = msgspec.json.Encoder().encode
        self._first = True
        self._origin: int | None = None
        self._ahead: dict[int, tuple[int, int]] = {}
        self._threads: dict[tuple[int, str], int] = {}
        self._flows: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._file.write("[")

    def add(self, chunk: TraceChunk) -> None:
        """Write the events of one member. Raises OSError."""
        pid = chunk.member
        if pid not in self._ahead:
            self._ahead[pid] = chunk.ahead, chunk.error
            self.largest_error = max(self.largest_error, chunk.error)
            self._write(_process(chunk))
        ahead, _ = self._ahead[pid]
        self.dropped += chunk.dropped
        for event in chunk.events:
            self._add(pid, event, ahead)
        self._file.flush()

    def close(self) -> None:
        """Write the flows that have both ends, and close the array. Raises OSError."""
        for parts in self._flows.values():
            for event in _flow(parts):
                self._write(event)
        about = {"dropped_events": self.dropped, "clock_error_us": self.largest_error / 1000}
        self._write({"ph": "M", "name": "headwater_trace", "pid": 0, "tid": 0, "args": about})
        self._file.write("\n]\n")
        self._file.flush()

    def _add(self, pid: int, event: TraceEvent, ahead: int) -> None:
        if self._origin is None:
            self._origin = event.began + ahead - _BEFORE_NS
        tid, ts = self._thread(pid, event.thread), (event.began + ahead - self._origin) / 1000
        where = {"pid": pid, "tid": tid, "ts": ts, "cat": _CATEGORY}
        self.events += 1
        if event.lasted < 0:
            self._write({"ph": "i", "s": "g", "name": event.name, **where})
            return
        lasted = event.lasted / 1000
        self._write({"ph": "X", "name": event.name, "dur": lasted, **where, "args": event.about})
        for flow in event.flows:
            self._flows.setdefault(flow, []).append({**where, "place": event.place})

    def _thread(self, pid: int, name: str) -> int:
        known = self._threads.get((pid, name))
        if known is None:
            known = self._threads[pid, name] = 1 + sum(one == pid for one, _ in self._threads)
            args = {"name": name}
            self._write({"ph": "M", "name": "thread_name", "pid": pid, "tid": known, "args": args})
        return known

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(("\n" if self._first else ",\n") + self._encode(event).decode())
        self._first = False


def _process(chunk: TraceChunk) -> dict[str, Any]:
    index = f" {chunk.index}" if chunk.role != "coordinator" else ""
    args = {
        "name": f"{chunk.role}{index} (pid {chunk.pid}{' on ' + chunk.host if chunk.host else ''})",
        "clock_ahead_us": chunk.ahead / 1000,
        "clock_error_us": chunk.error / 1000,
    }
    return {"ph": "M", "name": "process_name", "pid": chunk.member, "tid": 0, "args": args}


def _flow(parts: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The events of one flow, in order of time; none where an end is missing."""
    ordered = sorted(parts, key=lambda part: part["ts"])
    begins = [part for part in ordered if part["place"] == "begin"]
    ends = [part for part in ordered if part["place"] == "end"]
    if not begins or not ends:
        return
    first, last = begins[0], ends[-1]
    number = f"{first['pid']}.{first['tid']}.{first['ts']}"
    passes = [part for part in ordered if part["place"] == "pass" and first["ts"] <= part["ts"] <= last["ts"]]
    for kind, part in [("s", first), *(("t", one) for one in passes), ("f", last)]:
        event = {key: part[key] for key in ("pid", "tid", "ts", "cat")}
        binding = {"bp": "e"} if kind != "s" else {}
        yield {"ph": kind, "name": "step", "id": number, **event, **binding}
