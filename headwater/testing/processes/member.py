"""A simulated worker or reader: its program, and what carries out the decisions of its machine.

The machine is the one that every member runs (`headwater.machines.client`). As in `headwater.runtime.client`
what servers send is read only while an exchange is outstanding.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import ConnectionLostError, HeadwaterError
from headwater.machines.actions import Actions, Conn, Send
from headwater.machines.client import Asked, ClientMachine, Failed, Settled
from headwater.machines.client import Call as Exchange
from headwater.machines.connections import Connected, Frame, Renewal
from headwater.machines.membership import Joined, TraceAsked
from headwater.machines.split_request import SplitAnswer
from headwater.testing.processes import coordinator
from headwater.testing.processes.asker import Asker
from headwater.testing.processes.client import (
    AwaitAnswer,
    Call,
    Client,
    Program,
    Question,
    Rest,
    SendAhead,
    WriteNow,
)
from headwater.testing.processes.machine_driver import MachineDriver, Node
from headwater.testing.processes.network import End, Network
from headwater.testing.processes.times import START_S
from headwater.testing.processes.trace_recording import ToldEvents
from headwater.testing.timeline import Timeline


class World(Protocol):
    """What a member tells the world."""

    def timeline_of(self, generation: int, begins: str | None = None) -> Timeline:
        """A generation of the log."""

    def joined(self, member: Member) -> None:
        """It knows its id now."""

    def sends(self, member: Member, call: Call) -> None:
        """It begins an exchange."""

    def answered(self, member: Member, call: Call, answer: m.Answer) -> None:
        """Its exchange is over."""

    def published(self, member: Member) -> None:
        """A publication has arrived."""

    def wakes(self, member: Member) -> None:
        """Between two exchanges, its program goes on."""

    def read_ahead(self, member: Member, table: int, ids: Sequence[int]) -> None:
        """It reads rows that came ahead."""

    def took_checkpoint(self, member: Member, path: str) -> None:
        """It had one written."""

    def failed(self, member: Member, error: HeadwaterError) -> None:
        """Its program ended with an error."""

    def note(self, text: str) -> None:
        """For the trace."""


class Member(Client, Node):
    """One incarnation.

    Attributes:
        role, wanted: as what it joins, and with which rank (None: the next free one).
        call: its last one; outstanding: whether that is without an answer.
        ended: its program is over; `value` is what it returned. dead: it was killed.
        timeline: the generation that it is of.
        waited_for: whether the run is over only once its program is.
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
        waited_for: bool = True,
    ) -> None:
        Node.__init__(self, network, name)
        self.world = world
        self.waited_for = waited_for
        self.timeline = world.timeline_of(0)
        self.role, self.wanted = role, wanted
        self._join = m.Join(role, wanted, self.pid, "here")
        Client.__init__(self, self._machine(), shares=shares)
        self.call: Call | None = None
        self.outstanding = False
        self.ended = self.dead = False
        self.value: Any = None
        self._program = program(self)
        self._begun = self._ahead = False
        self._recorder = ToldEvents(
            self, lambda told: self.driver.do(lambda now: self.machine.membership.tell(told))
        )
        self._asked = 0
        self._outcome: Any = None
        self._chance = chance
        self._thinks_s = thinks_s
        self._listens = False
        self._replies: deque[m.Leased | m.Unleased | HeadwaterError] = deque()

    def __repr__(self) -> str:
        return self.name

    @property
    def connection_epoch(self) -> int:
        """Of its connections."""
        return self.machine.connections.epoch

    @property
    def is_declared(self) -> bool:
        """Whether there is a model to read."""
        return self.timeline.declared

    def is_cut_off(self) -> bool:
        """Whether it is no member any more, whether it knows that or not."""
        return self.machine.membership.phase == "over"

    def start(self) -> None:
        """Join the coordinator."""
        machine = self.machine
        self.driver = MachineDriver(self, machine, self, opened=self._opened, waits=self._waits)
        self.driver.do(machine.join)

    def _machine(self) -> ClientMachine:
        return ClientMachine(coordinator.NAME, self._join)

    def _start_again(self) -> None:
        """The coordinator ended before it took this one in: join the next one."""
        self.use(self._machine())
        self.start()

    # ── as its driver sees it ───────────────────────────────────────────────────────────────────

    def accept(self, end: End) -> None:
        """Nobody connects to a member."""
        raise AssertionError(end.label)

    def note(self, text: str) -> None:
        """For the trace."""
        self.world.note(text)

    def _opened(self, conn: Conn, dialled: str | None, now: float) -> Actions:
        return self.machine.opened(conn, dialled, now, shared=self._shares)

    def _waits(self) -> bool:
        """Whether somebody waits, or only heartbeats are to come."""
        return self.machine.call_due is not None or self.machine.membership.phase != "member"

    def place(self, conn: Conn, message: m.AnyMessage, length: int) -> Any:
        """Where payload goes."""
        links = self.machine.connections.links
        if conn not in links or not isinstance(message, m.Answer | m.Publication):
            return ()
        return self.machine.place(links.index(conn), message)

    def unpack(self, conn: Conn, message: m.AnyMessage, given: list[Any]) -> None:
        """Nobody sends a member memory."""
        assert not given, message

    def broke_protocol(self, driver: MachineDriver, conn: Conn, error: HeadwaterError) -> None:
        """The machine fails with it."""

    def tell(self, event: Any) -> None:
        """What the machine tells whoever runs it."""
        if isinstance(event, Asked):
            self._send(event)
        elif isinstance(event, Settled):
            self._settled(event)
        elif isinstance(event, SplitAnswer):
            self._replies.append(event.reply)
            self._hear_replies()
        elif isinstance(event, Joined):
            welcome = event.welcome
            self.id, self.rank, self.recorded = welcome.member.id, welcome.member.index, welcome.position
            self.timeline = self.world.timeline_of(welcome.generation)
            self.world.joined(self)
        elif isinstance(event, Connected):
            self._connected()
        elif isinstance(event, Renewal):
            for buffer in self.machine.connections.buffers:
                buffer.renew()
        elif isinstance(event, TraceAsked):
            self._recorder.obey(event.asked)
        elif isinstance(event, Failed):
            self._failed(event.error)

    def _connected(self) -> None:
        """Messages of servers are not read before something is waited for."""
        if not self.outstanding or self._ahead:
            self._pause()
        if not self._begun:
            self._begun = True
            self.after(0.0, self._wake)

    def _pause(self) -> None:
        for conn in self.machine.connections.links:
            self.driver.pause(conn)

    def _send(self, asked: Asked) -> None:
        for conn, frame in zip(asked.links, asked.frames, strict=True):
            self.driver.send(Send(conn, frame.message, frame.buffers, asked.number, frame.descriptors))
        if not self._ahead:
            self._resume()

    def _resume(self) -> None:
        for conn in list(self.machine.connections.links):
            self.driver.resume(conn)

    def _settled(self, settled: Settled) -> None:
        """All servers have answered; or it had left already, and the answers were lost on their way."""
        call, answer = self.call, settled.outcome
        assert call is not None
        self.outstanding = False
        self._pause()
        if call.expects is m.Publication:
            self.world.published(self)
        elif isinstance(answer, m.Answer):
            if call.brought is not None:
                call.brought(answer)
            for model in answer.values:
                self.windows[model].buffer.arrived()
            self.world.answered(self, call, answer)
            self.version = max(self.version, answer.version)
        self._go_on_with(settled.error if settled.error is not None else answer)

    def _failed(self, error: HeadwaterError) -> None:
        if not self.id and isinstance(error, ConnectionLostError):
            self.after(START_S, self._start_again)
        elif self._ahead:
            pass  # `AwaitAnswer` raises it
        elif self.outstanding:
            self.outstanding, self._outcome = False, error
            self.after(0.0, self._wake)
        else:
            self._fail(error)

    def read_ahead(self, table: int, ids: NDArray[np.int64]) -> bool:
        """As a client does."""
        found = super().read_ahead(table, ids)
        if found:
            self.world.read_ahead(self, table, ids.tolist())
        return found

    def lose(self) -> None:
        """Have its connections break, here and now, as if it had found one broken."""
        links = list(self.machine.connections.links)
        for conn in links:
            end = self.driver.ends.get(conn)
            if end is not None and not end.closed:
                end.break_off(self._chance)
                end.close()
        for conn in links[:1]:
            self.driver.ended(conn)

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
        elif isinstance(call, AwaitAnswer):
            self._finish()
        elif isinstance(call, Rest):
            self._go_on_with(self.machine.membership.error)
        elif isinstance(call, WriteNow):
            self._asked += 1
            Asker(self.network, f"{self.name} asks #{self._asked}", self._hear_of_checkpoint)
        elif isinstance(call, SendAhead):
            self._ahead = True
            exchange = self._exchange(call.call)
            self.driver.do(lambda now: self.machine.begin(exchange, now))
            self._go_on_with(None)
        else:
            exchange = self._exchange(call)
            self.driver.do(lambda now: self.machine.call(exchange, now))

    def _finish(self) -> None:
        """Wait for what was begun; it may have failed meanwhile."""
        self._ahead = False
        if self.machine.failure is not None:
            self._failed(self.machine.failure)
        else:
            self.driver.do(self.machine.wait)
            self._resume()

    def _exchange(self, call: Call) -> Exchange:
        """The exchange that begins now."""
        self.call, self.outstanding = call, True
        self.world.sends(self, call)
        request = call.request
        assert request.number == self.machine.number + 1, call
        return Exchange(
            repr(call),
            call.frame or (lambda server, number: Frame(request)),
            call.place,
            call.expects,
            memory=self.scratch if call.rows else None,
            leaves=isinstance(request, m.Leave),
        )

    def _ask(self, question: Question) -> None:
        """Also once the coordinator has ended the connection: what it said before counts."""
        self._listens = True
        lease = question.lease
        if lease is not None:
            self._replies.clear()
            self.driver.do(lambda now: self.machine.next_split(lease, now))
        self._hear_replies()

    def _hear_replies(self) -> None:
        if self._listens and self._replies:
            self._listens = False
            reply = self._replies.popleft()
            if not isinstance(reply, m.Unleased) or reply.over:
                self.machine.splits.taken()
            self._go_on_with(reply)

    def _hear_of_checkpoint(self, outcome: str | HeadwaterError) -> None:
        if self.alive and isinstance(outcome, str):
            self.world.took_checkpoint(self, outcome)
        self._go_on_with(outcome)

    def _go_on_with(self, outcome: Any) -> None:
        self._outcome = outcome
        self.after(self._chance.expovariate(1.0) * self._thinks_s, self._wake)

    def _end(self) -> None:
        """The program is over; if it left the log before, the coordinator hears of it."""
        self.ended = True
        if self.leaves():
            self.driver.do(lambda now: self.machine.leave(True))
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
