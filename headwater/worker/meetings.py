"""Meetings of all workers: barriers, sums, gathers and broadcasts, each at its place in the program."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import MeetingError, UsageError
from headwater.log.meetings import describe
from headwater.machines.connections import Frame
from headwater.runtime.client import Client
from headwater.spec.amounts import one_of, whole
from headwater.worker import plain
from headwater.worker.batches import DataReader
from headwater.worker.program import Program

_TOGETHER = 8 << 20
"""Bytes that one exchange brings from all declared workers; what is longer takes several."""

_LENGTH, _DIGEST = 8, 16
_HEAD = _LENGTH + _DIGEST


class Sums(dict[str, float]):
    """Name → sum over the workers of `ranks`."""

    def __init__(self, sums: Mapping[str, float], ranks: tuple[int, ...]) -> None:
        super().__init__(sums)
        self.ranks = ranks

    @property
    def contributors(self) -> int:
        """How many workers contributed."""
        return len(self.ranks)


class Gathered(dict[str, list[NDArray[Any]]]):
    """Name → the arrays of the workers of `ranks`, in that order."""

    def __init__(self, arrays: Mapping[str, list[NDArray[Any]]], ranks: tuple[int, ...]) -> None:
        super().__init__(arrays)
        self.ranks = ranks

    @property
    def contributors(self) -> int:
        """How many workers contributed."""
        return len(self.ranks)


class Meetings:
    """Takes one worker to its meetings with the others.

    Args:
        before: what to do before this worker waits for others. after: what to do once it has.
    """

    def __init__(
        self,
        session: Client,
        program: Program,
        reader: DataReader,
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        self._session = session
        self._program = program
        self._reader = reader
        self._before, self._after = before, after

    def barrier(self) -> None:
        """Wait for everybody."""
        self._before()
        self._meet("barrier")
        self._after()

    def sum(self, scalars: Mapping[str, Any], of: m.Attendance) -> Sums:
        """Add up, in rank order."""
        _check_attendance("sum", of)
        self._before()
        values = {name: _scalar(name, value) for name, value in scalars.items()}
        answer = self._meet("sum", tuple(values), of, values=values)
        self._after()
        return Sums(answer.sums or {}, answer.ranks)

    def gather(self, arrays: Mapping[str, Any], of: m.Attendance) -> Gathered:
        """Everybody's arrays, in rank order."""
        _check_attendance("gather", of)
        self._before()
        own = {name: _array(name, array) for name, array in arrays.items()}
        found = self._exchange("gather", tuple(own), of, -1, plain.encode(own, "gather"))
        self._after()
        return Gathered(
            {name: [plain.decode(data)[name] for data in found.values()] for name in own}, tuple(found)
        )

    def broadcast(self, value: Any, root: int) -> Any:
        """What the worker with rank `root` passed."""
        root = whole("broadcast: root, a rank,", root, 0, self._session.welcome.workers - 1)
        self._before()
        own = self._session.welcome.member.index == root
        data = plain.encode(value, "broadcast") if own else b""
        (found,) = self._exchange("broadcast", (), "present", root, data).values()
        self._after()
        return plain.decode(found)

    def operate(
        self,
        kind: m.MeetingKind,
        names: tuple[str, ...],
        of: m.Attendance,
        values: dict[str, float],
        frame: Callable[[m.Meet, int], Frame],
    ) -> m.Answer:
        """Have the servers work on vectors; `frame`: what a server is sent, from what every meeting says."""
        return self._meet(kind, names, of, values=values, frame=frame)

    def _exchange(
        self, kind: m.MeetingKind, names: tuple[str, ...], of: m.Attendance, root: int, data: bytes
    ) -> dict[int, bytes]:
        """Bytes by rank, of those who were there from beginning to end.

        The first exchange says how long each rank's are, so all make the same number of exchanges.

        Raises:
            MeetingError: a rank was started again between two of them, and brought other bytes than before.
        """
        share = max(_HEAD, _TOGETHER // self._session.welcome.workers)
        data = len(data).to_bytes(_LENGTH, "little") + _digest(data) + data
        found: dict[int, bytearray] = {}
        length = share
        sent = 0
        while sent < length:
            answer = self._meet(kind, names, of, root, data=data[sent : sent + share])
            pieces = dict(zip((root,) if root >= 0 else answer.ranks, answer.data, strict=True))
            if not sent:
                found = {rank: bytearray() for rank in pieces}
                length = max(int.from_bytes(piece[:_LENGTH], "little") for piece in pieces.values()) + _HEAD
            sent += share
            found = {rank: known + pieces[rank] for rank, known in found.items() if rank in pieces}
        return {rank: _whole(kind, rank, known) for rank, known in found.items()}

    def _meet(
        self,
        kind: m.MeetingKind,
        names: tuple[str, ...] = (),
        of: m.Attendance = "present",
        root: int = -1,
        *,
        values: dict[str, float] | None = None,
        data: bytes = b"",
        frame: Callable[[m.Meet, int], Frame] | None = None,
    ) -> m.Answer:
        self._session.check_open(kind)
        self._reader.settle()
        meeting = self._program.next_meeting(kind, names, of, root)
        position, kept = self._reader.resting(), self._program.unsent()
        new = self._program.is_new(meeting)
        if new and self._reader.holds_split():
            self._session.tell(m.InMeeting(meeting.number, describe(meeting)))

        def outgoing(server: int, number: int) -> Frame:
            meet = m.Meet(number, meeting, values or {}, data, position, kept)
            return Frame(meet) if frame is None else frame(meet, server)

        stages, waited = self._session.stages, self._session.waiting
        began = stages.now()
        try:
            answer: m.Answer = self._session.call(outgoing, kind)
        finally:
            stages.met(began, self._session.waiting - waited)
        if new:
            self._program.recorded(kept)
        return answer


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _whole(kind: str, rank: int, parts: bytearray) -> bytes:
    """What the exchanges brought of one rank."""
    data = bytes(parts[_HEAD:])
    if _digest(data) != parts[_LENGTH:_HEAD]:
        raise MeetingError(
            f"{kind}: worker {rank} was started again in the middle of it, and brought other data then: "
            f"a program must gather and broadcast the same when it runs again"
        )
    return data


def _check_attendance(what: str, of: object) -> None:
    one_of(f"{what}: of", of, ("present", "all"))


def _array(name: str, value: Any) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"gather: cannot read {name}, a {type(value).__name__}, as an array: {error}; nothing was sent"
        ) from error


def _scalar(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(
            f"sum: {name} is {reprlib.repr(value)}, expected a number; nothing was sent"
        ) from error
