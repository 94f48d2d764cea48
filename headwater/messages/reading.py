"""Who reads which samples: positions, as the log records them, and splits leased on demand."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from headwater.messages.base import Message, Refused


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Positions [start, stop) in the order of an epoch."""

    epoch: int
    start: int
    stop: int


class StaticProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a worker's static part in one call of `batches` is: `done` of `size` samples of `epoch`.

    `size` -1: the part was cut anew, and nobody has read of it yet.
    """

    call: int
    epochs: int
    size: int
    epoch: int
    done: int


class DynamicProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a step adds to the done part of a data set of `size` samples that all workers read together."""

    call: int
    epochs: int
    size: int
    spans: tuple[Span, ...]


class LoopProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a worker is in one loop over `worker.epochs`: in `epoch`, which is their number at the end.

    `loop` numbers the loops from 0, in the order in which they were begun. `calls`, `meetings`, `loops`: how
    many of each the program had begun when that epoch began; `first`: how many meetings when the loop began.
    """

    loop: int
    epoch: int
    calls: int
    meetings: int
    loops: int
    first: int


class StreamProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a worker is in the partitions of a stream that are its own: partition and offset."""

    call: int
    offsets: tuple[tuple[str, str], ...] = ()


class Position(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a worker is in its data: what is done once the step that carries this is committed.

    `call` numbers the calls of `batches` and `splits` of one incarnation from 0, in the order in which
    they were begun. Calls before `over` are over; `places` and `visits` are of calls that are not. `loops`:
    over epochs, in the order in which they were begun. `streams`: of calls that read streams.
    """

    rank: int
    over: int
    places: tuple[StaticProgress, ...] = ()
    visits: tuple[DynamicProgress, ...] = ()
    loops: tuple[LoopProgress, ...] = ()
    streams: tuple[StreamProgress, ...] = ()


class Visited(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that is done of a call with dynamic splits: `complete` epochs, and `spans` of those after them."""

    call: int
    epochs: int
    size: int
    complete: int
    spans: tuple[Span, ...]


class Recut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was left of the static parts of a call was cut anew, since there are more or fewer workers.

    `workers`: how many had parts before. `done`: by rank the epoch it was in, and how many samples of its
    part of that epoch it had done.
    """

    call: int
    workers: int
    done: tuple[tuple[int, int], ...]


class DataProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All positions at one position of the log. `last`: by rank; calls before `first` are over for all.

    `workers`: how many workers static parts are cut for, 0 before there are any; `recuts`: of calls that are
    not over, in the order in which they were cut.
    """

    last: tuple[Position, ...] = ()
    visited: tuple[Visited, ...] = ()
    first: int = 0
    workers: int = 0
    recuts: tuple[Recut, ...] = ()


class Lease(Message, frozen=True):
    """From a worker to the coordinator: the next split, please; what was leased before is handed out.

    The same call is made by all workers, so `call`, `epochs`, `size`, `shuffle` and `seed` must agree.
    `pending`: of the samples handed out, how many are not part of a committed step yet, the last ones.
    `meetings`: how many meetings the worker's program has been in.
    """

    number: int
    call: int
    epochs: int
    size: int
    shuffle: bool
    seed: int
    batch: int
    pending: int
    meetings: int = 0


class Leased(Message, frozen=True):
    """A split for one worker alone. `handed` of the `total` samples still to do are leased or done by now."""

    number: int
    span: Span
    handed: int
    total: int


class Unleased(Message, frozen=True):
    """No split: the call is `over`, or another answer will follow, when what `reason` says has changed.

    `failure`: the request was impossible.
    """

    number: int
    over: bool
    reason: str
    failure: Refused | None = None


class Finish(Message, frozen=True):
    """From a worker to the coordinator: it reads no more of this call.

    The last `left` samples of its split go back; with `stopped` nobody is leased more of the call.
    """

    call: int
    left: int
    stopped: bool


class InMeeting(Message, frozen=True):
    """From a worker that has a split to the coordinator: it waits in meeting `number` of its program.

    Whoever waits for that split and has not been in that meeting waits for ever, as the meeting waits for it.
    """

    number: int
    what: str


class Unvisited(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Samples of a call that nobody reads any more: of a rank's part, or (`rank` None) of what all shared."""

    call: int
    rank: int | None
    samples: int


ReadingMessage: TypeAlias = Lease | Leased | Unleased | Finish | InMeeting
"""What a worker and the coordinator tell each other of splits."""
