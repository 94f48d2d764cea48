"""What a machine asks of the world, and how the world speaks to a machine.

A machine is every decision of a node and nothing else: it holds no thread, socket, clock, file or source of
randomness. The runtime (`headwater.runtime`) and the simulator (`headwater.testing`) drive the same machine:

1. Something happens: a connection opened, a message came, a connection closed, time passed.
2. The driver calls the method of that name under the machine's one lock.
3. The machine changes its state and returns actions.
4. The driver queues them in order before it lets go of the lock, and carries them out afterwards. So one call
   never overtakes another, and nothing is sent under a lock.

The order of actions is part of the decision. A `Persist` stands before every `Send` that depends on it: the
driver returns from `Persist` only once the record is safe, so nobody hears of what could still be forgotten.

A wait is state: an entry with a deadline and a reason. `due` is the earliest deadline; `tick` ends the waits
that are over. Times are seconds of one monotonic clock, given by the driver.

A connection ends once: `closed` is the last that a machine hears of it, whichever side ended it. After a
`Close` nothing that still arrives over that connection is handed to the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from headwater.errors import HeadwaterError
from headwater.messages import AnyMessage, Member

Conn: TypeAlias = int
"""Names one connection of this node. The driver numbers connections from 1 and never uses a number again."""

BESIDE: Conn = 0
"""To the other machine of this node, where a node has two. Never opened or closed; nothing is lost on it."""


class Send(NamedTuple):
    """Send `message` over `conn`; nothing happens where the connection has ended.

    `request`: of the message that this answers, 0 for none. `buffers`: arrays that follow the message; the
    machine does not change them before the driver has sent them. `descriptors`: memory that travels with it.
    """

    conn: Conn
    message: AnyMessage
    buffers: Sequence[Any] = ()
    request: int = 0
    descriptors: Sequence[Any] = ()


class Close(NamedTuple):
    """End `conn` once what was sent before has left. `why` goes into the log; "" for an ordinary end.

    `at_once`: what has not left is not sent any more.
    """

    conn: Conn
    why: str = ""
    at_once: bool = False


class Dial(NamedTuple):
    """Connect to `member`, or to whoever listens at an address.

    The driver answers with `opened(conn, tag)`, or with `unreachable(tag, why)`.
    """

    member: Member | str
    tag: str


class Persist(NamedTuple):
    """Make `record` safe before any later action is carried out."""

    record: Any


class Tell(NamedTuple):
    """Tell the node's owner of `event`: a departure, a failure, the end."""

    event: Any


class Note(NamedTuple):
    """Write `text` into the node's log."""

    text: str
    level: Literal["debug", "info", "warning"] = "info"


class Pause(NamedTuple):
    """Take no further message from `conn` until `Resume`; what arrives meanwhile waits in the connection."""

    conn: Conn


class Resume(NamedTuple):
    """Take messages from `conn` again."""

    conn: Conn


class HandOver(NamedTuple):
    """From now on `conn` belongs to this node's other machine, which hears of it with `opened(conn, tag)`.

    This machine hears nothing more of it, and can send nothing more over it.
    """

    conn: Conn
    tag: str


class Perform(NamedTuple):
    """Do `task` without the lock, since it takes long; the driver answers with `performed(tag, result)`.

    `task` says what is to be done; what reads or writes files is the driver's business.
    """

    task: Any
    tag: str


Action: TypeAlias = Send | Close | Dial | Persist | Tell | Note | Pause | Resume | HandOver | Perform
Actions: TypeAlias = list[Action]


class Machine(Protocol):
    """A node's decisions. The caller holds the machine's lock; no method blocks.

    Attributes:
        due: when `tick` should come, in seconds of the driver's clock; None for never.
    """

    @property
    def due(self) -> float | None: ...

    def opened(self, conn: Conn, dialled: str | None, now: float) -> Actions:
        """A connection exists. `dialled`: the tag of the `Dial` that made it; None where a peer connected."""

    def received(
        self, conn: Conn, message: AnyMessage, payload: Any, now: float, *, request: int = 0
    ) -> Actions:
        """A message came. `payload`: memory that came with it, as the node's payload protocol says.

        Raises:
            HeadwaterError: the peer broke the protocol; nothing changed. The driver ends the connection, with
                this error in the log.
        """

    def unreachable(
        self, dialled: str, why: str, now: float, *, nobody: bool = False, refused: bool = False
    ) -> Actions:
        """A `Dial` failed.

        `nobody`: the machine answers, and no process listens at that address. `refused`: one side does not
        admit the other, so trying again will not help.
        """

    def closed(self, conn: Conn, now: float) -> Actions:
        """A connection has ended, by either side."""

    def tick(self, now: float) -> Actions:
        """Time has passed."""


class Performing(Machine, Protocol):
    """A machine that has tasks performed."""

    def performed(self, tag: str, result: Any, now: float) -> Actions:
        """What came of a `Perform`; the error with which it failed where that is one of Headwater's."""


@runtime_checkable
class Advancing(Protocol):
    """A machine that does some of its work piece by piece, between messages.

    Attributes:
        busy: whether `advance` has something to do; may be read without the lock.
        unprepared: whether `prepare` has; likewise.
    """

    @property
    def busy(self) -> bool: ...

    def advance(self, now: float) -> Actions:
        """Do the next piece. Raises HeadwaterError: it cannot be done, so the machine is stopped."""

    @property
    def unprepared(self) -> bool: ...

    def prepare(self) -> None:
        """Make the next pieces quicker; called without the lock, in a thread of its own. May block."""


@runtime_checkable
class Traceable(Protocol):
    """A machine that says what its work is about, for traces."""

    def exchanges_of(self, conn: Conn, message: AnyMessage) -> tuple[tuple[int, int], ...]:
        """The exchange, as (member, number), that a message from `conn` is."""

    def next_piece(self) -> tuple[str, tuple[tuple[int, int], ...]]:
        """What `advance` would do next, and the exchanges that it is about."""


@runtime_checkable
class Refusing(Protocol):
    """A machine that has a word for a peer that breaks the protocol."""

    def failed(self, conn: Conn, error: HeadwaterError, now: float) -> Actions:
        """What came over `conn`, or `received` made of it, breaks the protocol."""
