"""What workers logged in a run, kept in bounded memory: a table, and curves of it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

KEPT = 10_000
"""Values of one metric of one worker that are kept; of more, every second one."""


@dataclass(frozen=True, slots=True)
class Point:
    """What one worker logged at one step, as sinks get it.

    Attributes:
        time: seconds since 1970, by the clock of the coordinator's machine.
        generation: of the log: grows when training begins anew from a checkpoint.
        version: of the worker's last answer, in commits.
        step: of the worker's rank, over all its incarnations.
        rank: which worker.
        metrics: value by name; NaN and infinity are values too.
    """

    time: float
    generation: int
    version: int
    step: int
    rank: int
    metrics: dict[str, float]


class HistoryRow(NamedTuple):
    """One value: as of `Point`, and its name."""

    time: float
    generation: int
    version: int
    step: int
    rank: int
    name: str
    value: float


class _Curve:
    """One metric of one worker."""

    __slots__ = ("rows", "seen", "stride")

    def __init__(self) -> None:
        self.rows: list[HistoryRow] = []
        self.seen, self.stride = 0, 1

    def add(self, row: HistoryRow) -> None:
        if self.seen % self.stride == 0:
            self.rows.append(row)
            if len(self.rows) > KEPT:
                self.rows = self.rows[::2]
                self.stride *= 2
        self.seen += 1


class History(Sequence[HistoryRow]):
    """The values that workers logged, a row each, in order of time: `pandas.DataFrame(history)` takes it.

    Of a metric that a worker logged more than 10,000 times every second value is kept, of more than 20,000
    every fourth, and so on. It may be read while it grows.
    """

    def __init__(self) -> None:
        self._curves: dict[tuple[str, int], _Curve] = {}
        self._lock = threading.Lock()
        self._rows: list[HistoryRow] | None = []

    def add(self, points: Iterable[Point]) -> None:
        """Take more of them; from any thread."""
        with self._lock:
            for one in points:
                for name, value in one.metrics.items():
                    row = HistoryRow(one.time, one.generation, one.version, one.step, one.rank, name, value)
                    self._curves.setdefault((name, one.rank), _Curve()).add(row)
            self._rows = None

    @property
    def names(self) -> list[str]:
        """Of all metrics that were logged, in order."""
        with self._lock:
            return sorted({name for name, _ in self._curves})

    def curve(self, name: str, rank: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Versions and values of one metric, in order of time: of one worker, or of all.

        Raises:
            KeyError: nobody logged it; lists what was.
        """
        rows = [row for row in self if row.name == name and (rank is None or row.rank == rank)]
        if not rows:
            whose = "nobody" if rank is None else f"worker {rank} never"
            raise KeyError(f"{whose} logged {name!r}; there are {', '.join(self.names) or 'no metrics'}")
        return np.array([row.version for row in rows]), np.array([row.value for row in rows], np.float64)

    def _table(self) -> list[HistoryRow]:
        with self._lock:
            if self._rows is None:
                rows = [row for curve in self._curves.values() for row in curve.rows]
                self._rows = sorted(rows, key=lambda row: row[:6])
            return self._rows

    def __len__(self) -> int:
        return len(self._table())

    @overload
    def __getitem__(self, index: int) -> HistoryRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[HistoryRow]: ...
    def __getitem__(self, index: int | slice) -> HistoryRow | list[HistoryRow]:
        return self._table()[index]

    def __iter__(self) -> Iterator[HistoryRow]:
        return iter(self._table())

    def __repr__(self) -> str:
        return f"History({len(self)} values of {', '.join(self.names) or 'no metrics'})"
