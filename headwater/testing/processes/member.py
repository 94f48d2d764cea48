"""A simulated worker or reader: its program, its connections, and one exchange at a time over them.

It does what `headwater.runtime.session` and `connections` do, without blocking: when a connection is lost,
all
are made anew, to wherever the coordinator says that the servers are, with new windows, and the outstanding
exchange is repeated in a new connection epoch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import HeadwaterError, ProtocolError
from headwater.machines.exchange import Exchange
from headwater.machines.membership import Ended, Heard, Joined, Returned
from headwater.spec.placement import servers_of
from headwater.testing.processes.client import Call, Client, Floats, Program, Question, Window
from headwater.testing.processes.membership import CoordinatorLine
from headwater.testing.processes.network import End, Frame, Network, Process
from headwater.testing.processes.times import ANSWER_S, FIRST_PAUSE_S, LONGEST_PAUSE_S


class World(Protocol):
    """What a member tells the world."""

    servers: int

    def joined(self, member: Member) -> None:
        """It knows its id now."""

    def sends(self, member: Member, call: Call) -> None:
        """It begins an exchange."""

    def answered(self, member: Member, call: Call, answer: m.Answer) -> None:
        """Its exchange is over."""

    def wakes(self, member: Member) -> None:
        """Between two exchanges, its program goes on."""

    def failed(self, member: Member, error: HeadwaterError) -> None:
        """Its program ended with an error."""


class Member(Client, Process):
    """One incarnation.

    Attributes:
        role, wanted: as what it joins, and with which rank (None: the next free one).
        attempt: of its connections.
        call: its last one; outstanding: whether that is without an answer.
        ended: its program is over; `value` is what it returned. dead: it was killed.
    """

    def __init__(
        self,
        network: Network,
        world: World,
        name: str,
        program: Program,
        chance: random.Random,
        *,
        role: m.Role = "worker",
        wanted: int | None = None,
        shares: bool = True,
        thinks_s: float = 0.0,
    ) -> None:
        Client.__init__(self, shares=shares)
        Process.__init__(self, network, name)
        self.world = world
        self.role, self.wanted = role, wanted
        self.connection_epoch = -1
        self.call: Call | None = None
        self.outstanding = False
        self.ended = self.dead = False
        self.value: Any = None
        self._program = program(self)
        self._outcome: Any = None
        self._exchange = Exchange(0, world.servers)
        self._chance = chance
        self._thinks_s = thinks_s
        self._line = CoordinatorLine(self, m.Join(role, wanted, self.pid, "here"), self._told)
        self._refusal: HeadwaterError | None = None
        self._asked = 0
        self._lease: m.Lease | None = None
        self._term = 0
        self._listens = False
        self._replies: list[m.Leased | m.Unleased] = []
        self._servers: tuple[m.Member, ...] = ()
        self._connected: list[End] = []
        self._broken = False
        self._locating = False
        self._pause = FIRST_PAUSE_S

    def __repr__(self) -> str:
        return self.name

    # ── membership ──────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Join the coordinator."""
        self._line.begin()

    def accept(self, end: End) -> None:
        """Nobody connects to a member."""
        raise AssertionError(end.label)

    def _told(self, event: Any) -> None:
        if isinstance(event, Joined):
            welcome = event.welcome
            self.id, self.rank, self.place = welcome.member.id, welcome.member.index, welcome.position
            self.world.joined(self)
            self._connect(welcome.servers, welcome.term)
        elif isinstance(event, Returned):
            self._line.machine.watching = bool(self._connected)
            if self._listens and self._lease is not None:
                self._line.tell(self._lease)  # it may never have read the question
        elif isinstance(event, m.ServerAddresses):
            if self._locating:
                self._locating = False
                self._connect(event.servers, event.term)
            else:
                self._compare(event.servers)
        elif isinstance(event, Heard) and isinstance(event.message, m.Leased | m.Unleased):
            self._replied(event.message)
        elif isinstance(event, Ended):
            self._refusal = event.error
            if not self.id or self._locating or self._listens:
                self._fail(event.error)

    def is_cut_off(self) -> bool:
        """Whether it is no member any more, whether it knows that or not."""
        return self._line.over

    def _compare(self, servers: tuple[m.Member, ...]) -> None:
        """A server that is stopped keeps its connections open, so nothing else tells that it was replaced."""
        moved = tuple(server.id for server in servers) != tuple(server.id for server in self._servers)
        if moved and len(servers) == self.world.servers and self._connected:
            self._lost()

    # ── connections to servers ──────────────────────────────────────────────────────────────────

    def _connect(self, servers: tuple[m.Member, ...], term: int) -> None:
        self.connection_epoch += 1
        self._term = term
        ends = []
        if len(servers) == self.world.servers:
            for server in servers:
                end = self.network.dial(self, server.addresses[0])
                if end is None:
                    break
                ends.append(end)
                end.send(
                    m.Hello(
                        self.id,
                        "worker" if self.role == "worker" else "observer",
                        term,
                        self.connection_epoch,
                    )
                )
                self._offer_windows(end)
        if len(ends) < self.world.servers:
            for end in ends:
                end.close()
            self.after(self._pause, self._locate)
            self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
            return
        self._servers, self._connected, self._broken = servers, ends, False
        self._line.machine.watching = True
        self._pause = FIRST_PAUSE_S
        for index, end in enumerate(ends):
            end.listen(lambda frame, index=index: self._heard(index, frame), self._lost)  # type: ignore[misc]
        if self.call is None:
            self._wake()
        elif self.outstanding:
            self._exchange = Exchange(self._exchange.number, self.world.servers)
            self._send()

    def _offer_windows(self, end: End) -> None:
        if not self.connection_epoch:
            return
        for id, window in self.windows.items():
            given = (window.gradients, window.parameters) if self._shares else ()
            end.send(m.Renew(id, self._offer()), descriptors=given)

    def _lost(self) -> None:
        """One connection is lost: close all, and connect again when there is something to ask."""
        ends, self._connected = self._connected, []
        for end in ends:
            end.close()
        if self.ended:
            return
        self._broken = True
        if self.outstanding:
            self._repeat()

    def _repeat(self) -> None:
        if self._shares:
            for window in self.memory():
                window.renew()
        self._locate()

    def _locate(self) -> None:
        if self.ended:
            return
        self._locating = True
        if self._refusal is not None:
            self._fail(self._refusal)
        elif self._line.away:  # they may still be where they were
            self._locating = False
            self._connect(self._servers, self._term)
        else:
            self._line.tell(m.GetServers())
            self.after(ANSWER_S, self._ask_again, self.connection_epoch)

    def _ask_again(self, epoch: int) -> None:
        """The coordinator may have ended before it answered."""
        if self._locating and epoch == self.connection_epoch:
            self._locate()

    def lose(self) -> None:
        """Have its connections break, here and now, as if it had found one broken."""
        if self._connected:
            for end in self._connected:
                end.break_off(self._chance)
            self._lost()

    # ── the program ─────────────────────────────────────────────────────────────────────────────

    def _wake(self) -> None:
        """The program goes on until its next call."""
        self.world.wakes(self)
        try:
            if isinstance(self._outcome, HeadwaterError):
                call = self._program.throw(self._outcome)
            else:
                call = self._program.send(self._outcome)
        except StopIteration as stop:
            self.value = stop.value
            self._end()
            return
        except HeadwaterError as error:
            self._fail(error)
            return
        if not self.alive:
            return  # it killed itself
        if isinstance(call, Question):
            self._ask(call)
            return
        self.call, self.outstanding = call, True
        self._exchange = Exchange(call.request.number, self.world.servers)
        self.world.sends(self, call)
        if self._broken:
            self._repeat()
        else:
            self._send()

    def _ask(self, question: Question) -> None:
        """Also once the coordinator has ended the connection: what it said before counts."""
        self._listens = True
        if question.lease is not None:
            self._asked, self._lease = question.lease.number, question.lease
            self._line.tell(question.lease)
        self._hear_replies()
        if self._listens and self._refusal is not None:
            self._fail(self._refusal)

    def _replied(self, message: m.Leased | m.Unleased) -> None:
        self._replies.append(message)
        self._hear_replies()

    def _hear_replies(self) -> None:
        """The next reply to the outstanding question; earlier ones are of questions given up."""
        while self._listens and self._replies:
            reply = self._replies.pop(0)
            if reply.number == self._asked:
                self._listens = False
                self._go_on_with(reply)

    def _go_on_with(self, outcome: Any) -> None:
        self._outcome = outcome
        self.after(self._chance.expovariate(1.0) * self._thinks_s, self._wake)

    def _end(self) -> None:
        """The program is over; if it left the log before, the coordinator hears of it."""
        self.ended = True
        if self.leaves():
            self._line.tell(m.Departed(self.id))
            self.exit()

    def _fail(self, error: HeadwaterError) -> None:
        """The process ends without leaving."""
        if not self.ended:
            self.ended = self.dead = True
            self.outstanding = False
            self.world.failed(self, error)
            self.exit()

    def leaves(self) -> bool:
        """Whether its last call is its end."""
        return self.call is not None and isinstance(self.call.request, m.Leave)

    def memory(self) -> list[Window]:
        """Of all models, and of the one that its call is about to bring."""
        new = self.call.window if self.outstanding and self.call is not None else None
        return [*self.windows.values(), *([new] if new is not None and new.id not in self.windows else [])]

    # ── one exchange ────────────────────────────────────────────────────────────────────────────

    def _send(self) -> None:
        for index, end in enumerate(self._connected):
            self._send_to(index, end)

    def _send_to(self, index: int, end: End) -> None:
        call = self.call
        assert call is not None
        request: m.Request = call.request
        buffers: list[Any] = []
        shared: tuple[Floats, ...] = ()
        if call.window is not None and self._shares:
            shared = (call.window.gradients, call.window.parameters)
        elif isinstance(request, m.Register) and call.window is not None:
            start, stop = call.window.layout.cut(self.world.servers)[index]
            buffers = [call.window.parameters[start:stop].copy()]
        elif not self._shares and isinstance(request, m.Step | m.Assign):
            request, buffers = self._with_payload(request, index)
        if call.pushed or call.pulled:
            assert isinstance(request, m.Step)
            request, rows = self._with_rows(request, call, index)
            buffers += rows
        end.send(request, buffers=buffers, descriptors=shared)

    def _with_payload(self, request: m.Step | m.Assign, index: int) -> tuple[m.Step | m.Assign, list[Any]]:
        carried = (request.carried,) if isinstance(request, m.Assign) else request.carried
        runs: list[m.Run] = []
        arrays: list[Any] = []
        for one in carried:
            window = self.windows[one.model]
            source = window.parameters if isinstance(request, m.Assign) else window.gradients
            start, stop = window.layout.cut(self.world.servers)[index]
            for low, high in window.layout.runs(window.layout.unmask(one.tensors), start, stop):
                runs.append(m.Run(one.model, low, high))
                arrays.append(source[low:high].copy())
        if isinstance(request, m.Assign):
            return m.Assign(request.number, request.carried, tuple(runs)), arrays
        return _replaced(request, payload=tuple(runs)), arrays

    def _with_rows(self, request: m.Step, call: Call, index: int) -> tuple[m.Step, list[Any]]:
        """The step as one server gets it, with its part of the rows; they always travel."""
        pushed, pulled, arrays = [], [], []
        for table, (ids, gradients) in call.pushed.items():
            here = servers_of(ids, self.world.servers) == index
            pushed.append(m.Rows(table, int(here.sum()), 0, 0))
            arrays += [ids[here], gradients[here]]
        for table, ids in call.pulled.items():
            own = self._own(ids, index)
            pulled.append(m.Rows(table, len(own), 0, 0))
            arrays.append(own)
        return _replaced(request, pushed=tuple(pushed), pulled=tuple(pulled)), arrays

    def _own(self, ids: NDArray[np.int64], index: int) -> NDArray[np.int64]:
        """Those that one server has."""
        own: NDArray[np.int64] = ids[servers_of(ids, self.world.servers) == index]
        return own

    def _heard(self, index: int, frame: Frame) -> None:
        message = frame.message
        try:
            done = self._exchange.received(index, message)
        except ProtocolError:
            raise
        except HeadwaterError as error:
            if self.leaves():
                self._settled(None)  # it had left already, and the answer was lost on its way
            else:
                self._fail(error)
            return
        if isinstance(message, m.Answer) and frame.buffers:
            self._take_values(index, message, frame.buffers)
        if done and not self._exchange.unanswered():
            self._settle()

    def _take_values(self, index: int, answer: m.Answer, arrays: Sequence[Any]) -> None:
        """What follows an answer: arrays made for it, values of models without a window, rows."""
        call = self.call
        assert call is not None
        rest = iter(arrays[len(answer.states) :])
        for model in () if self._shares else answer.values:
            window = call.window or self.windows.get(model)
            assert window is not None
            start, stop = window.layout.cut(self.world.servers)[index]
            window.parameters[start:stop] = next(rest)
        for table, ids in call.pulled.items():
            rows = next(rest)
            self.rows.update(
                {(table, int(id)): row for id, row in zip(self._own(ids, index), rows, strict=True)}
            )

    def _settle(self) -> None:
        assert self.call is not None
        try:
            answer = self._exchange.outcome()
            assert isinstance(answer, m.Answer)
        except ProtocolError:
            raise
        except HeadwaterError as error:
            self._settled(error)
            return
        if answer.table is not None:
            assert isinstance(self.call.request, m.RegisterTable)
            self.tables[answer.table] = self.call.request.spec.dim
        if answer.model is not None:
            assert self.call.window is not None
            self.call.window.id = answer.model
            self.windows[answer.model] = self.call.window
        self.world.answered(self, self.call, answer)
        self.version = max(self.version, answer.version)
        self._settled(answer)

    def _settled(self, outcome: m.Answer | HeadwaterError | None) -> None:
        self.outstanding = False
        self._go_on_with(outcome)


def _replaced(step: m.Step, **fields: Any) -> m.Step:
    replaced: m.Step = msgspec.structs.replace(step, **fields)
    return replaced
