"""Runs a node's machine in a simulated process: what `headwater.runtime.pump` does with threads and channels.

Actions take effect in the order in which they were decided. A dial, a task, the end of a connection and a
message to the node's other machine take a moment, drawn from a stream of the process's own, so that other
things happen meanwhile.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np

from headwater import messages as m
from headwater.errors import HeadwaterError, ProtocolError
from headwater.machines.actions import (
    BESIDE,
    Action,
    Actions,
    Advancing,
    Close,
    Conn,
    Dial,
    HandOver,
    Machine,
    Note,
    Pause,
    Perform,
    Performing,
    Refusing,
    Resume,
    Send,
    Tell,
)
from headwater.testing.processes.network import End, Frame, Process

_MOMENT_S = 0.001
"""Mean seconds that a dial, a task, or the end of a connection takes."""


class Unpacking(Protocol):
    """A machine that says where payload goes, and what comes of memory that came with a message."""

    def place(self, conn: Conn, message: m.AnyMessage, length: int) -> Any: ...
    def unpack(self, conn: Conn, message: m.AnyMessage, given: list[Any]) -> Any: ...


class MachineOwner(Protocol):
    """Whose machine it is."""

    def tell(self, event: Any) -> None:
        """What the machine tells."""

    def note(self, text: str) -> None:
        """For the trace."""

    def broke_protocol(self, conn: Conn, error: HeadwaterError) -> None:
        """A connection ends with this."""


class MachineDriver:
    """Drives `machine` in `process`; `payloads` says where payload goes, None where there is none.

    `beside`: drives the node's other machine.
    """

    def __init__(
        self,
        process: Process,
        machine: Machine,
        owner: MachineOwner,
        payloads: Unpacking | None = None,
        beside: MachineDriver | None = None,
    ) -> None:
        self.process = process
        self.ends: dict[Conn, End] = {}
        self._machine = machine
        self._advancing = machine if isinstance(machine, Advancing) else None
        self._refusing = machine if isinstance(machine, Refusing) else None
        self._owner = owner
        self._payloads = payloads
        self._beside = beside
        if beside is not None:
            beside._beside = self
        self._chance = random.Random(f"{process.network.seed} {process.name} driver")
        self._last: Conn = 0
        self._inbox: list[m.AnyMessage] = []
        self._todo: deque[Action] = deque()
        self._working = False
        self._ticking: float | None = None

    # ── what happens ────────────────────────────────────────────────────────────────────────────

    def connect(self, end: End, dialled: str | None = None) -> None:
        """The machine has this connection from now on."""
        self._last += 1
        conn = self._last
        self.ends[conn] = end
        self.do(lambda now: self._machine.opened(conn, dialled, now))
        if not end.closed:
            end.listen(lambda frame: self._take(conn, frame), lambda: self._ended(conn))

    def do(self, decide: Callable[[float], Actions]) -> None:
        """Have the machine decide something, and carry out what follows."""
        self._queue(decide(self.process.network.agenda.now))
        if self._working:
            return  # whoever is at it carries this out, in its turn
        self._working = True
        try:
            self._work()
        finally:
            self._working = False

    def _queue(self, actions: Actions) -> None:
        """What is decided takes effect in its turn; a connection that it stops is not read from already."""
        self._todo.extend(actions)
        for action in actions:
            if isinstance(action, Pause | Close | HandOver) and action.conn in self.ends:
                self.ends[action.conn].wait()
        due = self._machine.due
        if due is not None and (self._ticking is None or due < self._ticking):
            self._ticking = due
            self.process.after(due - self.process.network.agenda.now, self._tick, due)

    def _work(self) -> None:
        while True:
            while self._todo and self.process.alive:
                self._carry_out(self._todo.popleft())
            if self._advancing is None or not self._advancing.busy or not self.process.alive:
                return
            self._queue(self._advancing.advance(self.process.network.agenda.now))

    def _take(self, conn: Conn, frame: Frame) -> None:
        message, payloads = frame.message, self._payloads
        payload = None
        try:
            if payloads is not None:
                if frame.buffers:
                    length = sum(array.nbytes for array in frame.buffers)
                    pour(frame.buffers, payloads.place(conn, message, length))
                payload = payloads.unpack(conn, message, list(frame.shared))
            self.do(lambda now: self._machine.received(conn, message, payload, now))
        except HeadwaterError as error:
            self._break(conn, error)

    def _break(self, conn: Conn, error: HeadwaterError) -> None:
        """What came breaks the protocol: that ends its connection."""
        self._owner.broke_protocol(conn, error)
        refusing = self._refusing
        if refusing is None:
            self.do(lambda now: [Close(conn, str(error))])
        else:
            self.do(lambda now: refusing.failed(conn, error, now))

    def _ended(self, conn: Conn) -> None:
        if self.ends.pop(conn, None) is not None:
            self.do(lambda now: self._machine.closed(conn, now))

    def _soon(self, action: Callable[..., None], *arguments: Any) -> None:
        self.process.after(self._chance.expovariate(1.0) * _MOMENT_S, action, *arguments)

    def post(self, message: m.AnyMessage) -> None:
        """The node's other machine says this; like a message to another node, it is taken a little later."""
        self._inbox.append(message)
        if len(self._inbox) == 1:
            self._soon(self._take_inbox)

    def _take_inbox(self) -> None:
        messages, self._inbox = self._inbox, []
        for message in messages:
            self.do(lambda now, message=message: self._machine.received(BESIDE, message, None, now))  # type: ignore[misc]

    # ── time ────────────────────────────────────────────────────────────────────────────────────

    def _tick(self, due: float) -> None:
        if self._ticking == due:
            self._ticking = None
            if self._machine.due is not None and self._machine.due <= self.process.network.agenda.now:
                self.do(self._machine.tick)
            else:
                self._queue([])

    # ── actions ─────────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Send):
            self._send(action)
        elif isinstance(action, Close):
            self._close(action)
        elif isinstance(action, Resume):
            self._resume(action)
        elif isinstance(action, HandOver):
            end = self.ends.pop(action.conn, None)
            if end is not None and self._beside is not None:
                self._beside.connect(end, action.tag)
        elif isinstance(action, Dial):
            self._soon(self._dial, action)
        elif isinstance(action, Perform):
            self._soon(self._perform, action)
        elif isinstance(action, Tell):
            self._owner.tell(action.event)
        elif isinstance(action, Note):
            self._owner.note(action.text)

    def _send(self, send: Send) -> None:
        if send.conn == BESIDE:
            assert self._beside is not None
            self._beside.post(send.message)
            return
        end = self.ends.get(send.conn)
        if end is not None and not end.closed:
            buffers = [np.array(array) for array in send.buffers]  # as the kernel does
            end.send(send.message, request=send.request, buffers=buffers, descriptors=send.descriptors)

    def _close(self, close: Close) -> None:
        end = self.ends.get(close.conn)
        if end is not None and not end.closed:
            if close.why:
                self._owner.note(f"{self.process.name} closes {end.label}: {close.why}")
            end.close()
            self._soon(self._ended, close.conn)

    def _resume(self, resume: Resume) -> None:
        conn = resume.conn
        end = self.ends.get(conn)
        if end is not None and not end.closed:
            end.listen(lambda frame: self._take(conn, frame), lambda: self._ended(conn))

    def _dial(self, dial: Dial) -> None:
        address = dial.member if isinstance(dial.member, str) else dial.member.addresses[0]
        end = self.process.network.dial(self.process, address)
        if end is None:
            self.do(lambda now: self._machine.unreachable(dial.tag, "nobody is there", now, nobody=True))
        else:
            self.connect(end, dial.tag)

    def _perform(self, perform: Perform) -> None:
        machine = cast(Performing, self._machine)
        try:
            result: Any = perform.task()
        except HeadwaterError as error:
            result = error
        self.do(lambda now: machine.performed(perform.tag, result, now))


def pour(source: Sequence[Any], target: Sequence[Any]) -> None:
    """Copy all bytes of `source` into `target`, as a channel does. Raises ProtocolError: they do not fit."""
    data = b"".join(array.tobytes() for array in source)
    room = sum(array.nbytes for array in target)
    if room != len(data):
        raise ProtocolError(f"a payload of {len(data)} bytes, expected {room}")
    start = 0
    for array in target:
        if array.nbytes:
            flat = np.frombuffer(data, array.dtype, array.size, start)
            array[...] = flat.reshape(array.shape)
            start += array.nbytes
