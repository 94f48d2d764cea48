"""What the log keeps for the program of every rank: the state that it asked to keep, and results of meetings.

A state machine without I/O, the same on all servers. A rank that runs its program again makes the same
meetings again; each gives the result that it gave the first time.

Which results are kept, and why that suffices:
- A rank without a loop over `worker.epochs` runs its program from the top, and asks for every result again.
- A rank within such a loop begins at the epoch that the log recorded, so it asks for no result of the loop's
  epochs before. What no rank can ask for again is forgotten.
- What remains is bounded by `RESULTS_BYTES`: beyond that the oldest results are forgotten. A rank that asks
  for one of those is told so with an error; it never gets another meeting's result.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from headwater.messages import KeptRecord, LoopProgress, MeetingResult

RESULTS_BYTES = 64 << 20
"""Bytes of results of meetings that a server keeps at most; the newest result is kept in any case."""

_EACH = 200
"""Bytes that a result takes besides its content."""

_encode = msgspec.msgpack.Encoder().encode
_result = msgspec.msgpack.Decoder(MeetingResult).decode
_record = msgspec.msgpack.Decoder(KeptRecord).decode


class Programs:
    """Of all ranks."""

    def __init__(self, encoded: bytes = b"") -> None:
        """Of `to_bytes`."""
        record = _record(encoded) if encoded else KeptRecord()
        self._kept = dict(record.kept)
        self._results = dict(record.results)
        self._size = sum(len(result) + _EACH for result in self._results.values())

    def keep(self, rank: int, state: bytes | None) -> None:
        """From now on the rank keeps this; None: what it kept before."""
        if state is not None:
            self._kept[rank] = state

    def kept(self, rank: int) -> bytes:
        """What the rank keeps; b"" for nothing."""
        return self._kept.get(rank, b"")

    def record(self, result: MeetingResult) -> None:
        """Note what the meeting after all others came to."""
        encoded = _encode(result)
        self._results[result.meeting.number] = encoded
        self._size += len(encoded) + _EACH
        while self._size > RESULTS_BYTES and len(self._results) > 1:
            self._forget(next(iter(self._results)))

    def result(self, number: int) -> MeetingResult | None:
        """What a meeting came to; None where it is kept no more."""
        encoded = self._results.get(number)
        return None if encoded is None else _result(encoded)

    def forget_results(self, loops: Iterable[tuple[LoopProgress, ...]]) -> None:
        """Forget what no rank can ask for again; `loops`: of every rank that may run its program again."""
        passed = [[range(loop.first + 1, loop.meetings + 1) for loop in of_rank] for of_rank in loops]
        if not all(passed):
            return  # a rank begins at the top
        for number in list(self._results)[:-1]:
            if all(any(number in span for span in spans) for spans in passed):
                self._forget(number)

    def _forget(self, number: int) -> None:
        self._size -= len(self._results.pop(number)) + _EACH

    def to_bytes(self) -> bytes:
        """All of it; `Programs(encoded)` is equal to this."""
        kept = tuple((rank, self._kept[rank]) for rank in sorted(self._kept))
        return _encode(KeptRecord(kept, tuple(self._results.items())))
