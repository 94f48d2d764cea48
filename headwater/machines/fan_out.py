"""The readers of a follower that is served: who may join, what each is sent or lent, and when.

Theory of operation. A served follower speaks to its readers as a cluster does: it is coordinator and only
server in one. So whoever can follow a cluster can follow a follower, and that one may be served too. A reader
joins (`Join`), which makes it a member, and opens a second connection as to a server (`Hello`), over which it
asks what there is (`Describe`) and for versions (`Publish`). Nothing of this has a log: what a reader gets is
whatever version the follower shows.

A version goes to a reader in one of two ways:

- *sent*: the values, of what has changed since the reader's version. It is under way until the reader's
  `Taken`. At most `ROOM` versions but the current one are under way at a time, so slow readers do not pile up
  memory; who asks meanwhile waits, and a version that nobody has taken for `SLOW_S` then ends its reader's
  connection. That reader comes back by itself.
- *lent*: to a reader of this machine, the memory itself, to be read and not written. It is lent until the
  reader no longer lists it in `Taken`.

A version that is neither current nor with anybody is *released*: its memory is filled with a newer one. The
memory of one that is lent is never written. A reader whose connection ends may still read what it was lent,
so that memory is *given up*: it belongs to its readers, and goes with the last of them. A reader that keeps
versions for ever so holds only what it has, and nobody waits for it.

All readers are of one generation. When the follower shows a version of a later one they are told of the
rewind, as by a coordinator, and join again.

Pure: no thread, clock, file or connection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import HeadwaterError, ProtocolError
from headwater.kernels.cast import cast_bfloat16
from headwater.machines.actions import Actions, Close, Conn, Note, Perform, Send, Tell
from headwater.machines.follower import Slot
from headwater.shard.touched import Touched
from headwater.spec.version import Version

Ids = NDArray[np.int64]

ROOM = 2
"""Versions under way, but the current one, at a time."""

SLOW_S = 30.0
"""After so many seconds a version that is under way ends its reader's connection, where others wait."""

ASK_S = 1.0
"""How long a reader waits for the follower to ask which version is the newest, in seconds."""

MOST_LENT = 256
"""Versions that one reader may keep. A reader keeps as many as its pins, and two."""

_HEARTBEAT_S = 5.0


class AskNewest(NamedTuple):
    """Event: a reader wants to know which version is the newest now."""


class Released(NamedTuple):
    """Event: nobody is sent or lent this version any more. `reusable`: its memory may be written again."""

    slot: Slot
    reusable: bool


@dataclass(slots=True, eq=False)
class Offer:
    """One version as readers are given it.

    Attributes:
        slot: with its copy, pinned until `Released`.
        version: of it.
        tables: ids in the copy, by the number that readers know a table by.
        description: what there is; its version and number are not.
        shared: where everything is in `memory`; None where that cannot be lent.
        memory: what travels to a reader of this machine.
        touched: by id in the copy, ids of rows that may differ from the version offered before; None: any.
    """

    slot: Slot
    version: Version
    tables: Sequence[int]
    description: m.Description
    touched: Mapping[int, Ids | None]
    shared: m.SharedVersion | None = None
    memory: Any = None
    holders: int = 0
    given_up: bool = False


@dataclass(slots=True, eq=False)
class _Reader:
    """A connection over which versions are asked for.

    Attributes:
        asked: a request for a version that has no answer yet, and since when.
        describes: a question that has none yet: its number, and since when.
        sent: what is under way to it, and since when.
        preparing: whether what it is sent is being made.
        lent: what it may read.
    """

    member: m.Member
    asked: m.Publish | None = None
    since: float = 0.0
    describes: tuple[int, float] | None = None
    sent: Offer | None = None
    sent_at: float = 0.0
    preparing: bool = False
    lent: list[Offer] = field(default_factory=list)


class ReaderCut(NamedTuple):
    """Work: what a reader is sent of `offer`. `touched`: rows that may differ from its own; None: any."""

    offer: Offer
    request: m.Publish
    dtype: m.ReadType
    touched: Mapping[int, Ids | None]

    def make(self) -> tuple[m.Publication, list[Any]]:
        """The message without its age, and what follows it. Blocks for a pass over what is copied."""
        copy, request = self.offer.slot.copy, self.request
        cast = request.dtype != self.dtype
        models = [one.id for one in request.models if copy.models[one.id] > one.have]
        arrays: list[Any] = [_cast(copy.vectors[id]) if cast else copy.vectors[id] for id in models]
        rows = []
        for wanted in request.tables:
            own = self.offer.tables[wanted.id]
            cut = copy.tables[own].cut(wanted.have, self.touched[own])
            rows.append(cut.describe(wanted.id))
            arrays += cut.arrays()
        number, position = self.offer.version.number, copy.position
        said = m.Publication(
            request.number, number, position, tuple(models), tuple(rows), recorded=copy.recorded
        )
        return said, [array for array in arrays if array.size]


def _cast(values: Any) -> Any:
    out = np.empty(len(values), np.uint16)
    cast_bfloat16(values, out)
    return out


class FanOutMachine:
    """The readers of one follower.

    Args:
        own: this node, as a member that readers dial. Its `machine` tells who can be lent memory.
        cluster: the identity of what is followed. of: its address, for those who came to the wrong node.
        dtype: of the parameters here.
        shares: whether memory can travel over a connection.

    Attributes:
        due: when `tick` should come.
        joined: readers that have joined since the beginning. readers: that are here now.
        sent: versions sent; lent: versions lent. given_up: versions whose memory readers have kept.
        slow: readers whose connection was ended since they took too long.
    """

    def __init__(
        self, own: m.Member, cluster: str, of: str, dtype: m.ReadType, shares: Callable[[Conn], bool]
    ) -> None:
        self.own, self.cluster, self.of, self.dtype = own, cluster, of, dtype
        self.due: float | None = None
        self.joined = self.sent = self.lent = self.given_up = self.slow = 0
        self._shares = shares
        self._members: dict[Conn, m.Member] = {}
        self._readers: dict[Conn, _Reader] = {}
        self._offer: Offer | None = None
        self._touched: dict[int, Touched] = {}
        self._newest, self._heard_at = -1, 0.0
        self._refusal: m.Refused | m.Finished | None = None

    @property
    def readers(self) -> int:
        """How many have joined and are here."""
        return len(self._members)

    @property
    def kept(self) -> int:
        """Versions that are current, under way or lent."""
        offers = {id(one) for reader in self._readers.values() for one in (*reader.lent, reader.sent) if one}
        return len(offers | ({id(self._offer)} if self._offer is not None else set()))

    # ── the follower ────────────────────────────────────────────────────────────────────────────

    def shown(self, offer: Offer, now: float) -> Actions:
        """The follower shows another version."""
        former, self._offer = self._offer, offer
        number = offer.version.number
        self._newest = max(self._newest, number)
        actions: Actions = []
        if former is None or former.version.generation != offer.version.generation:
            self._touched, self._newest = {}, number
            for id in offer.slot.copy.tables:
                self._touched[id] = Touched()
                self._touched[id].begin(number)
            if former is not None:
                generation = offer.version.generation
                why = f"training began anew from a checkpoint: this is generation {generation}"
                actions += self._dismiss(m.Refused("RewoundError", why))
        else:
            for id, ids in offer.touched.items():
                touched, rows = self._touched[id], len(offer.slot.copy.tables[id])
                if ids is None:
                    touched.end()
                    touched.begin(number)
                else:
                    touched.add(ids, number, rows)
        if former is not None:
            actions += self._let_go(former)
        return actions + self._serve_all(now)

    def heard(self, newest: int, at: float, now: float) -> Actions:
        """The follower was told `at` that time which version of this generation is the newest."""
        self._newest, self._heard_at = max(self._newest, newest), max(self._heard_at, at)
        actions: Actions = []
        for conn, reader in self._readers.items():
            if reader.describes is not None and reader.describes[1] <= self._heard_at:
                actions += self._describe(conn, reader)
        return actions

    def ended(self, refusal: m.Refused | m.Finished) -> Actions:
        """Nothing newer will come: readers are told, and nobody is taken in any more."""
        self._refusal = refusal
        return self._dismiss(refusal)

    def _dismiss(self, word: m.Refused | m.Finished) -> Actions:
        """Every reader is a member no more."""
        actions: Actions = []
        for conn in list(self._members):
            actions += [Send(conn, word), Close(conn)]
        self._members.clear()
        return actions + [Close(conn) for conn in self._readers]

    # ── what happens ────────────────────────────────────────────────────────────────────────────

    def opened(self, conn: Conn, dialled: str | None, now: float) -> Actions:
        """Somebody has connected, and will say what for."""
        return []

    def unreachable(
        self, dialled: str, why: str, now: float, *, nobody: bool = False, refused: bool = False
    ) -> Actions:
        """Nobody is dialled."""
        return []

    def received(
        self, conn: Conn, message: m.AnyMessage, payload: Any, now: float, *, request: int = 0
    ) -> Actions:
        """A reader, or whoever it is, has said something."""
        reader = self._readers.get(conn)
        if reader is not None:
            return self._asked(conn, reader, message, now)
        if isinstance(message, m.Hello):
            return self._greeted(conn, message)
        if isinstance(message, m.Join):
            return self._join(conn, message)
        if isinstance(message, m.GetServers):
            return [Send(conn, m.ServerAddresses(1, (self.own,)), request=request)]
        if isinstance(message, m.Heartbeat | m.Departed | m.FollowerProgress):
            return []
        why = (
            f"this is a follower of the cluster at {self.of}, which knows nothing but what it reads: ask that"
        )
        return [Send(conn, m.Refused("RefusedError", why), request=request), Close(conn)]

    def failed(self, conn: Conn, error: HeadwaterError, now: float) -> Actions:
        """A peer broke the protocol."""
        return [Send(conn, m.Refused(type(error).__name__, str(error)))]

    def closed(self, conn: Conn, now: float) -> Actions:
        """A connection has ended. Whoever was lent memory over it may still read it."""
        self._members.pop(conn, None)
        reader = self._readers.pop(conn, None)
        if reader is None:
            return []
        actions: Actions = []
        for offer in reader.lent:
            if not offer.given_up:
                offer.given_up = True
                self.given_up += 1
            actions += self._drop(offer)
        if reader.sent is not None:
            actions += self._drop(reader.sent)
        return actions + self._serve_all(now)

    def tick(self, now: float) -> Actions:
        """Time has passed."""
        actions: Actions = []
        for conn, reader in list(self._readers.items()):
            if reader.describes is not None and now >= reader.describes[1] + ASK_S:
                actions += self._describe(conn, reader)
        if self._crowded(now):
            conn, slowest = min(self._under_way(), key=lambda pair: pair[1].sent_at)
            if now >= slowest.sent_at + SLOW_S:
                self.slow += 1
                why = f"a reader has not taken {_named(slowest.sent)} for {SLOW_S:g} s, and others wait"
                actions.append(Close(conn, why, at_once=True))
                slowest.sent_at = now  # until it is closed
        self._set_due(now)
        return actions

    # ── members ─────────────────────────────────────────────────────────────────────────────────

    def _join(self, conn: Conn, join: m.Join) -> Actions:
        if self._refusal is not None or self._offer is None:
            gone = m.Refused("ClusterEndedError", f"the follower of {self.of} ends")
            return [Send(conn, self._refusal or gone), Close(conn)]
        if join.role != "observer":
            why = f"this is a follower of the cluster at {self.of}: a {join.role} joins that"
            return [Send(conn, m.Refused("RefusedError", why)), Close(conn)]
        if join.cluster and join.cluster != self.cluster:
            why = f"this follows cluster {self.cluster}, not {join.cluster}"
            return [Send(conn, m.Refused("OtherClusterError", why)), Close(conn)]
        self.joined += 1
        member = m.Member(self.joined, "observer", -1, join.pid, join.host, (), join.machine)
        self._members[conn] = member
        welcome = m.Welcome(
            member,
            term=1,
            servers=(self.own,),
            workers=0,
            sync="async",
            settings=b"",
            patience=10.0,
            deadline=600.0,
            heartbeat=_HEARTBEAT_S,
            generation=self._offer.version.generation,
            cluster=self.cluster,
            keeps=self.dtype,
        )
        return [
            Send(conn, welcome),
            Note(f"a reader on {join.host} (pid {join.pid}) has joined, {self.readers} in all"),
        ]

    def _greeted(self, conn: Conn, hello: m.Hello) -> Actions:
        member = next((one for one in self._members.values() if one.id == hello.member), None)
        if member is None or hello.cluster != self.cluster:
            why = f"member {hello.member} of cluster {hello.cluster} has not joined this follower"
            return [Send(conn, m.Refused("RefusedError", why)), Close(conn)]
        self._readers[conn] = _Reader(member)
        return []

    # ── what readers ask for ────────────────────────────────────────────────────────────────────

    def _asked(self, conn: Conn, reader: _Reader, message: m.AnyMessage, now: float) -> Actions:
        if isinstance(message, m.Describe):
            reader.describes = message.number, now
            if self._heard_at >= now:
                return self._describe(conn, reader)
            self._set_due(now)
            return [Tell(AskNewest())]
        if isinstance(message, m.Publish):
            return self._publish(conn, reader, message, now)
        if isinstance(message, m.Taken):
            actions = self._taken(reader, message)
            answer = m.Answer(message.number, self._newest)
            return [Send(conn, answer), *actions, *self._serve_all(now)]
        raise ProtocolError(f"a reader sent {type(message).__name__}, which a follower does not answer")

    def _describe(self, conn: Conn, reader: _Reader) -> Actions:
        assert self._offer is not None
        assert reader.describes is not None
        (number, since), reader.describes = reader.describes, None
        told = self._offer.description
        age = max(0.0, since - self._heard_at)
        return [Send(conn, m.Description(number, self._newest, told.models, told.tables, age))]

    def _publish(self, conn: Conn, reader: _Reader, request: m.Publish, now: float) -> Actions:
        assert self._offer is not None
        known = {info.model for info in self._offer.description.models}
        wrong = [one.id for one in request.models if one.id not in known]
        wrong += [one.id for one in request.tables if not 0 <= one.id < len(self._offer.tables)]
        if wrong or request.dtype not in (self.dtype, "bfloat16"):
            what = f"asked for {wrong} that are not followed" if wrong else f"keeps {self.dtype}"
            failure = m.Refused("ConfigurationError", f"the follower of {self.of} {what}")
            return [Send(conn, m.Publication(request.number, self._offer.version.number, failure=failure))]
        actions = [] if reader.sent is None else self._drop(reader.sent)  # it asks again: nothing arrived
        reader.asked, reader.since, reader.sent, reader.preparing = request, now, None, False
        return actions + self._serve_all(now)

    def _taken(self, reader: _Reader, message: m.Taken) -> Actions:
        sent, reader.sent = reader.sent, None
        actions = [] if sent is None else self._drop(sent)
        gone = [offer for offer in reader.lent if offer.version.number not in message.keeps]
        reader.lent = [offer for offer in reader.lent if offer.version.number in message.keeps]
        for offer in gone:
            actions += self._drop(offer)
        return actions

    # ── giving versions ─────────────────────────────────────────────────────────────────────────

    def _serve_all(self, now: float) -> Actions:
        """Answer whoever can be answered now."""
        actions: Actions = []
        for conn, reader in self._readers.items():
            if reader.asked is not None and not reader.preparing:
                actions += self._serve(conn, reader, reader.asked, now)
        self._set_due(now)
        return actions

    def _serve(self, conn: Conn, reader: _Reader, request: m.Publish, now: float) -> Actions:
        offer = self._offer
        assert offer is not None
        if offer.version.number < request.at:
            return []
        touched = self._since(request, offer)
        if request.shared and request.dtype == self.dtype and offer.shared is not None and self._shares(conn):
            return self._lend(conn, reader, request, offer, touched, now)
        if not self._has_room(offer):
            return []
        offer.holders += 1
        reader.sent, reader.sent_at, reader.preparing = offer, now, True
        return [Perform(ReaderCut(offer, request, self.dtype, touched), f"{conn} {request.number}")]

    def _since(self, request: m.Publish, offer: Offer) -> dict[int, Ids | None]:
        """By table of the offer, which rows may differ from those that the reader has."""
        found: dict[int, Ids | None] = {}
        for wanted in request.tables:
            own = offer.tables[wanted.id]
            found[own] = self._touched[own].after(wanted.have) if wanted.have >= 0 else None
        return found

    def _lend(
        self,
        conn: Conn,
        reader: _Reader,
        request: m.Publish,
        offer: Offer,
        touched: Mapping[int, Ids | None],
        now: float,
    ) -> Actions:
        if offer not in reader.lent and len(reader.lent) >= MOST_LENT:
            return [Close(conn, f"a reader keeps {len(reader.lent)} versions", at_once=True)]
        assert offer.shared is not None
        reader.asked = None
        if offer not in reader.lent:
            reader.lent.append(offer)
            offer.holders += 1
            self.lent += 1
        models = {one.id for one in request.models}
        places = {one.table: one for one in offer.shared.tables}
        shared = m.SharedVersion(
            offer.shared.size,
            tuple(one for one in offer.shared.models if one.model in models),
            tuple(places[wanted.id] for wanted in request.tables),
        )
        rows, arrays = [], []
        for wanted in request.tables:
            ids = touched[offer.tables[wanted.id]]
            known = ids is not None
            arrays.append(np.empty(0, np.int64) if ids is None else ids)
            rows.append(m.PublishedRows(wanted.id, wanted.have if known else -1, 0, len(arrays[-1]), False))
        said = m.Publication(
            request.number,
            offer.version.number,
            offer.slot.copy.position,
            tables=tuple(rows),
            recorded=offer.slot.copy.recorded,
            age=max(0.0, now - offer.slot.as_of),
            shared=shared,
        )
        buffers = [array for array in arrays if array.size]
        return [Send(conn, said, buffers, descriptors=(offer.memory,))]

    def performed(self, tag: str, result: Any, now: float) -> Actions:
        """What a reader is sent has been made."""
        conn, number = map(int, tag.split())
        reader = self._readers.get(conn)
        if reader is None or reader.asked is None or reader.asked.number != number or not reader.preparing:
            return []
        offer = reader.sent
        assert offer is not None
        reader.asked, reader.preparing = None, False
        if isinstance(result, HeadwaterError):
            failure = m.Refused(type(result).__name__, str(result))
            return [Send(conn, m.Publication(number, offer.version.number, failure=failure))]
        self.sent += 1
        said, arrays = result
        return [Send(conn, _aged(said, max(0.0, now - offer.slot.as_of)), arrays)]

    # ── memory ──────────────────────────────────────────────────────────────────────────────────

    def _under_way(self) -> list[tuple[Conn, _Reader]]:
        """Readers of versions that are not current any more."""
        readers = self._readers.items()
        return [(conn, one) for conn, one in readers if one.sent is not None and one.sent is not self._offer]

    def _has_room(self, offer: Offer) -> bool:
        former = {id(one.sent) for _, one in self._under_way()}
        current = any(one.sent is offer for one in self._readers.values())
        return current or len(former) < ROOM

    def _crowded(self, now: float) -> bool:
        """Whether a reader waits for room."""
        offer = self._offer
        if offer is None or self._has_room(offer):
            return False
        return any(
            one.asked is not None and not one.preparing and one.asked.at <= offer.version.number
            for one in self._readers.values()
        )

    def _set_due(self, now: float) -> None:
        times = [one.describes[1] + ASK_S for one in self._readers.values() if one.describes is not None]
        if self._crowded(now):
            times.append(min(one.sent_at for _, one in self._under_way()) + SLOW_S)
        self.due = min(times, default=None)

    def _drop(self, offer: Offer) -> Actions:
        """One reader fewer has it."""
        offer.holders -= 1
        return self._let_go(offer)

    def _let_go(self, offer: Offer) -> Actions:
        if offer.holders or offer is self._offer:
            return []
        return [Tell(Released(offer.slot, reusable=not offer.given_up))]


def _aged(said: m.Publication, age: float) -> m.Publication:
    return m.Publication(
        said.number, said.version, said.position, said.models, said.tables, said.recorded, age=age
    )


def _named(offer: Offer | None) -> str:
    return "a version" if offer is None else str(offer.version)
