"""Runs the machines of simulated nodes: what `headwater.runtime` does with threads and channels.

Every node is driven by this: coordinator, servers, standbys, members. Nothing is decided here. Actions take
effect in the order in which they were decided. A dial, a task, the end of a connection and a message to the
node's other machine take a moment, drawn from a stream of the process's own, so that other things happen
meanwhile. The process may die between any two actions.
"""

from __future__ import annotations

import functools
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
    Persist,
    Refusing,
    Resume,
    Send,
    Tell,
)
from headwater.testing.processes.network import End, Frame, Join, Process

_MOMENT_S = 0.001
"""Mean seconds that a task, or the end of a connection takes."""

_DIALS_S = (0.0002, 0.001, 0.001, 0.01)
"""Mean seconds that a dial takes: most are quick, some last as long as much else."""


class Unpacking(Protocol):
    """A machine that says where payload goes, and what comes of memory that came with a message."""

    def place(self, conn: Conn, message: m.AnyMessage, length: int) -> Any: ...
    def unpack(self, conn: Conn, message: m.AnyMessage, given: list[Any]) -> Any: ...


class Later:
    """What comes of a task that takes its time; whoever does it says it to `then`."""

    def __init__(self) -> None:
        self.then: Callable[[Any], None] = lambda result: None


class Node(Process):
    """A process that runs machines, and what it does for them."""

    def tell(self, event: Any) -> None:
        """A machine tells this."""
        raise NotImplementedError

    def note(self, text: str) -> None:
        """For the trace."""
        raise NotImplementedError

    def persist(self, record: Any) -> None:
        """It outlives the process."""
        raise AssertionError(f"{self.name} keeps nothing, and was given {record}")

    def perform(self, task: Any) -> Any:
        """What comes of a task, or `Later`; it may raise an error of Headwater's."""
        return task()

    def broke_protocol(self, driver: MachineDriver, conn: Conn, error: HeadwaterError) -> None:
        """What came over a connection of this machine breaks the protocol."""
        raise error

    def dies(self, undone: Sequence[Action]) -> None:
        """It dies here and now, without having carried these out."""
        raise NotImplementedError


def _always() -> bool:
    return True


@functools.cache
def _abilities(machine: type) -> tuple[bool, bool]:
    """Whether machines of this class advance, and whether they refuse; asking takes long."""
    return hasattr(machine, "advance"), hasattr(machine, "failed")


class MachineDriver:
    """Drives `machine` in the process `node`.

    Args:
        payloads: says where payload goes; None where there is none.
        beside: drives the node's other machine.
        opened: what tells the machine of a connection, where that needs more than every machine is told.
        waits: whether the machine waits for time to pass, other than for what recurs whatever happens.
        join: makes one message of two that wait to be sent.

    Attributes:
        ends: the connections.
        dies_after: so many of its next actions are the node's last; None: it does not die.
    """

    def __init__(
        self,
        node: Node,
        machine: Machine,
        payloads: Unpacking | None = None,
        beside: MachineDriver | None = None,
        opened: Callable[[Conn, str | None, float], Actions] | None = None,
        waits: Callable[[], bool] = _always,
        join: Join | None = None,
    ) -> None:
        self.node = node
        self.ends: dict[Conn, End] = {}
        self.dies_after: int | None = None
        self._machine = machine
        advances, refuses = _abilities(type(machine))
        self._advancing = cast(Advancing, machine) if advances else None
        self._refusing = cast(Refusing, machine) if refuses else None
        self._payloads = payloads
        self._beside = beside
        if beside is not None:
            beside._beside = self
        self._opened = opened or machine.opened
        self._waits = waits
        self._join = join
        self._agenda = node.network.agenda
        self._chance = random.Random(f"{node.network.seed} {node.name} driver")
        self._last: Conn = 0
        self._paused: set[Conn] = set()
        self._inbox: list[m.AnyMessage] = []
        self._todo: deque[Action] = deque()
        self._working = False
        self._ticking: tuple[float, bool] | None = None

    # ── what happens ────────────────────────────────────────────────────────────────────────────

    def connect(self, end: End, dialled: str | None = None) -> None:
        """The machine has this connection from now on."""
        self._last += 1
        conn = self._last
        self.ends[conn] = end
        self.do(lambda now: self._opened(conn, dialled, now))
        self._listen(conn)

    def _listen(self, conn: Conn) -> None:
        end = self.ends.get(conn)
        if end is not None and not end.closed and conn not in self._paused:
            end.listen(lambda frame: self._take(conn, frame), lambda: self.ended(conn))

    def do(self, decide: Callable[[float], Actions]) -> None:
        """Have the machine decide something, and carry out what follows."""
        self._carry_out(decide(self._agenda.now))

    def _carry_out(self, actions: Actions) -> None:
        self._queue(actions)
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
            if type(action) in _STOPS and action.conn in self.ends:  # type: ignore[union-attr]
                self.ends[action.conn].wait()  # type: ignore[union-attr]
        due, ticking = self._machine.due, self._ticking
        if due is None or (ticking is not None and due >= ticking[0] and not ticking[1]):
            return
        idle = not self._waits()
        if ticking is None or due < ticking[0] or not idle:
            self._ticking = due, idle
            self.node.after(due - self._agenda.now, self._tick, self._ticking, idle=idle)

    def _work(self) -> None:
        while True:
            while self._todo and self.node.alive:
                if self.dies_after is not None:
                    if self.dies_after == 0:
                        self.node.dies(tuple(self._todo))
                        return
                    self.dies_after -= 1
                action = self._todo.popleft()
                _CARRY_OUT[type(action)](self, action)
            if self._advancing is None or not self._advancing.busy or not self.node.alive:
                return
            self._queue(self._advancing.advance(self._agenda.now))

    def _take(self, conn: Conn, frame: Frame) -> None:
        self._carry_out(self._received(conn, frame, self._agenda.now))

    def _received(self, conn: Conn, frame: Frame, now: float) -> Actions:
        message, payloads = frame.message, self._payloads
        payload = None
        try:
            if payloads is not None:
                if frame.buffers:
                    length = sum(array.nbytes for array in frame.buffers)
                    pour(frame.buffers, payloads.place(conn, message, length))
                payload = payloads.unpack(conn, message, list(frame.shared))
            return self._machine.received(conn, message, payload, now)
        except HeadwaterError as error:
            broken = error
        self.node.broke_protocol(self, conn, broken)
        if self._refusing is None:
            return [Close(conn, str(broken))]
        return self._refusing.failed(conn, broken, now)

    def ended(self, conn: Conn) -> None:
        """A connection has ended."""
        if self.ends.pop(conn, None) is not None:
            self._paused.discard(conn)
            self.do(lambda now: self._machine.closed(conn, now))

    def _soon(self, action: Callable[..., None], *arguments: Any) -> None:
        self.node.after(self._chance.expovariate(1.0) * _MOMENT_S, action, *arguments)

    def post(self, message: m.AnyMessage) -> None:
        """The node's other machine says this; like a message to another node, it is taken a little later."""
        self._inbox.append(message)
        if len(self._inbox) == 1:
            self._soon(self._take_inbox)

    def _take_inbox(self) -> None:
        messages, self._inbox = self._inbox, []
        for message in messages:
            self._carry_out(self._machine.received(BESIDE, message, None, self._agenda.now))

    # ── time ────────────────────────────────────────────────────────────────────────────────────

    def _tick(self, tick: tuple[float, bool]) -> None:
        if self._ticking == tick:
            self._ticking = None
            if self._machine.due is not None and self._machine.due <= self._agenda.now:
                self.do(self._machine.tick)
            else:
                self._queue([])

    # ── actions ─────────────────────────────────────────────────────────────────────────────────

    def _tell(self, tell: Tell) -> None:
        self.node.tell(tell.event)

    def _note(self, note: Note) -> None:
        self.node.note(note.text)

    def _persist(self, persist: Persist) -> None:
        self.node.persist(persist.record)

    def _hand_over(self, hand: HandOver) -> None:
        end = self.ends.pop(hand.conn, None)
        if end is not None and self._beside is not None:
            self._beside.connect(end, hand.tag)

    def _pause(self, pause: Pause) -> None:
        self.pause(pause.conn)

    def _resume(self, resume: Resume) -> None:
        self.resume(resume.conn)

    def _dial_soon(self, dial: Dial) -> None:
        self.node.after(self._chance.expovariate(1.0) * self._chance.choice(_DIALS_S), self._dial, dial)

    def _perform_soon(self, perform: Perform) -> None:
        self._soon(self._perform, perform)

    def send(self, send: Send) -> None:
        """Put a message on its way; nothing happens where the connection has ended."""
        if send.conn == BESIDE:
            assert self._beside is not None
            self._beside.post(send.message)
            return
        end = self.ends.get(send.conn)
        if end is not None and not end.closed:
            buffers = [np.array(array) for array in send.buffers]  # as the kernel does
            end.send(
                send.message,
                request=send.request,
                buffers=buffers,
                descriptors=send.descriptors,
                join=self._join,
            )

    def pause(self, conn: Conn) -> None:
        """What arrives over this connection waits in it."""
        if conn in self.ends:
            self._paused.add(conn)
            self.ends[conn].wait()

    def resume(self, conn: Conn) -> None:
        """What waits in this connection, and what is still to arrive, is taken again."""
        self._paused.discard(conn)
        self._listen(conn)

    def _close(self, close: Close) -> None:
        end = self.ends.get(close.conn)
        if end is not None and not end.closed:
            if close.why:
                self.node.note(f"{self.node.name} closes {end.label}: {close.why}")
            end.close()
            self._soon(self.ended, close.conn)

    def _dial(self, dial: Dial) -> None:
        address = dial.member if isinstance(dial.member, str) else dial.member.addresses[0]
        end = self.node.network.dial(self.node, address)
        if end is None:
            self.do(lambda now: self._machine.unreachable(dial.tag, "nobody is there", now, nobody=True))
        else:
            self.connect(end, dial.tag)

    def _perform(self, perform: Perform) -> None:
        try:
            result: Any = self.node.perform(perform.task)
        except HeadwaterError as error:
            result = error
        if isinstance(result, Later):
            result.then = lambda found: self._soon(self._performed, perform.tag, found)
        else:
            self._performed(perform.tag, result)

    def _performed(self, tag: str, result: Any) -> None:
        machine = cast(Performing, self._machine)
        self.do(lambda now: machine.performed(tag, result, now))


_STOPS = {Pause, Close, HandOver}

_CARRY_OUT: dict[type, Callable[[MachineDriver, Any], None]] = {
    Send: MachineDriver.send,
    Close: MachineDriver._close,
    Dial: MachineDriver._dial_soon,
    Persist: MachineDriver._persist,
    Tell: MachineDriver._tell,
    Note: MachineDriver._note,
    Pause: MachineDriver._pause,
    Resume: MachineDriver._resume,
    HandOver: MachineDriver._hand_over,
    Perform: MachineDriver._perform_soon,
}


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
