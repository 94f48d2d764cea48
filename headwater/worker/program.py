"""Where this worker's program is: how many meetings and loops it has begun, and what it keeps.

A program that runs again makes the same calls in the same order, so counting them names them. A loop over
`worker.epochs` begins where the log recorded the rank, and sets all counters to what they were there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import msgspec

from headwater import messages as m
from headwater.errors import UsageError
from headwater.worker import plain

KEPT_BYTES = 4 << 20
"""Longest state that a rank may keep, encoded."""

LOOPS = 256
"""Loops over epochs of one program at most, not counting those inside of others that have gone on."""


ENDED = 1 << 62
"""Added to the epoch in which a loop was left before its end."""


class Calls(Protocol):
    """Who counts the calls of `batches` and `splits`."""

    begun: int


class Program:
    """Follows the program of one incarnation; `recalled` tells it what the log knows of its rank.

    Attributes:
        restarted: an earlier incarnation of this rank has taken part.
        steps_before: steps of those.
        meetings: meetings that the program has begun, those of before that it skipped among them.
    """

    def __init__(self, recalled: m.Recalled) -> None:
        self.restarted = recalled.restarted
        self.steps_before = recalled.steps
        self.meetings = 0
        self._epoch = -1
        self._met = recalled.met
        loops = recalled.position.loops if recalled.position is not None else ()
        self._recorded = {loop.loop: loop for loop in loops}
        self._loops = dict(self._recorded)
        self._loops_begun = 0
        self._left: list[int] = []
        self._kept: dict[str, msgspec.Raw] = _fields(recalled.kept) if recalled.kept else {}
        self._unsent: bytes | None = None

    # ── what it keeps ───────────────────────────────────────────────────────────────────────────

    def keep(self, state: dict[str, Any]) -> None:
        """Keep these beside what is kept already.

        Raises:
            UsageError: something else than plain data and arrays, or more than `KEPT_BYTES` in all.
        """
        kept = dict(self._kept)
        for name, value in state.items():
            kept[name] = msgspec.Raw(plain.encode(value, name))
        encoded = msgspec.msgpack.encode(kept)
        if len(encoded) > KEPT_BYTES:
            sizes = sorted(((len(bytes(raw)), name) for name, raw in kept.items()), reverse=True)
            largest = ", ".join(f"{name} {size:,} bytes" for size, name in sizes[:3])
            raise UsageError(
                f"keep: {len(encoded):,} bytes in all, at most {KEPT_BYTES:,} are kept ({largest}): keep "
                f"less, or what is large in a model or table; nothing was changed"
            )
        self._kept, self._unsent = kept, encoded

    @property
    def kept(self) -> dict[str, Any]:
        """What is kept, as copies of the caller's own."""
        return {name: plain.decode(bytes(raw)) for name, raw in self._kept.items()}

    def unsent(self) -> bytes | None:
        """What is to travel with the next request that the log records; None where it knows it already."""
        return self._unsent

    def recorded(self, sent: bytes | None) -> None:
        """The log has recorded what `unsent` gave."""
        if self._unsent is sent:
            self._unsent = None

    # ── meetings ────────────────────────────────────────────────────────────────────────────────

    def next_meeting(
        self, kind: m.MeetingKind, names: tuple[str, ...], of: m.Attendance, root: int
    ) -> m.Meeting:
        """The place of the meeting that the program comes to."""
        self.meetings += 1
        return m.Meeting(self.meetings, kind, names, of, root, self._epoch)

    def is_new(self, meeting: m.Meeting) -> bool:
        """Whether it had not ended when this worker joined: it cannot end without this worker then."""
        return meeting.number > self._met

    # ── loops over epochs ───────────────────────────────────────────────────────────────────────

    def loops(self) -> tuple[m.LoopProgress, ...]:
        """Where the program is in each."""
        return tuple(self._loops[number] for number in sorted(self._loops))

    def begin_loop(self, calls: Calls) -> m.LoopProgress:
        """Begin the next loop, at the epoch at which the rank was.

        Raises:
            UsageError: the program came here with other calls than those recorded, or has too many loops.
        """
        self.settle(calls)
        number = self._loops_begun
        self._loops_begun += 1
        recorded = self._recorded.pop(number, None)
        if recorded is None:
            if len(self._loops) >= LOOPS:
                raise UsageError(f"worker.epochs: more than {LOOPS} loops one after the other: use one")
            begun = self.meetings
            return self._enter(m.LoopProgress(number, 0, calls.begun, begun, number + 1, first=begun))
        if recorded.first != self.meetings:
            raise UsageError(
                f"worker.epochs: loop {number} was recorded after {recorded.first} meetings, now it begins "
                f"after {self.meetings}: a restarted program must make the same calls in the same order"
            )
        calls.begun, self.meetings, self._loops_begun = recorded.calls, recorded.meetings, recorded.loops
        return self._enter(recorded)

    def next_epoch(self, calls: Calls, loop: m.LoopProgress) -> m.LoopProgress:
        """An epoch of the loop is over."""
        for inner in [number for number in self._loops if number > loop.loop]:
            del self._loops[inner]
        return self._enter(
            m.LoopProgress(
                loop.loop, loop.epoch + 1, calls.begun, self.meetings, self._loops_begun, loop.first
            )
        )

    def left(self, loop: m.LoopProgress) -> None:
        """Whoever ran the loop has gone on without its end; from any thread, at any moment."""
        self._left.append(loop.loop)

    def settle(self, calls: Calls) -> None:
        """The program goes on: loops that were left are over with what the log records next."""
        while self._left:
            number = self._left.pop()
            if (loop := self._loops.get(number)) is not None:
                left = ENDED + loop.epoch
                self._loops[number] = m.LoopProgress(
                    number, left, calls.begun, self.meetings, self._loops_begun, loop.first
                )

    def _enter(self, loop: m.LoopProgress) -> m.LoopProgress:
        self._loops[loop.loop] = loop
        self._epoch = loop.epoch % ENDED
        return loop


class Epochs(Iterator[int]):
    """The epochs of one loop, from the one at which this rank was; `len` is the number of all of them."""

    def __init__(self, program: Program, calls: Calls, count: int) -> None:
        self._program = program
        self._calls = calls
        self._count = count
        self._loop: m.LoopProgress | None = None
        self._over = False

    def __iter__(self) -> Epochs:
        if self._over:
            self._loop, self._over = None, False
        return self

    def __next__(self) -> int:
        if self._over:
            raise StopIteration
        if self._loop is None:
            self._loop = self._program.begin_loop(self._calls)
        else:
            self._loop = self._program.next_epoch(self._calls, self._loop)
        self._over = self._loop.epoch >= self._count
        if self._over:
            raise StopIteration
        return self._loop.epoch

    def __len__(self) -> int:
        return self._count

    def __del__(self) -> None:
        if self._loop is not None and not self._over:
            self._program.left(self._loop)


def _fields(kept: bytes) -> dict[str, msgspec.Raw]:
    return msgspec.msgpack.decode(kept, type=dict[str, msgspec.Raw])
