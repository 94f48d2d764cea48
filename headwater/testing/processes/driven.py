"""A simulated process that runs a machine: what `headwater.runtime.pump` does with threads, under virtual
time.

Nothing is decided here. Events are decided one after the other, and what each asked for is carried out
before the next. The process may die between any two actions: `dies_after` says how many of what it does
next are its last.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from headwater.machines.actions import (
    Action,
    Actions,
    Close,
    Conn,
    Dial,
    Machine,
    Note,
    Pause,
    Perform,
    Performing,
    Persist,
    Resume,
    Send,
    Tell,
)
from headwater.testing.processes.network import End, Frame, Network, Process


class Driven(Process):
    """A process of this name that runs `machine`.

    Attributes:
        dies_after: after so many actions of the next event that leads to some it dies; None: it does not.
    """

    def __init__(self, network: Network, name: str, machine: Machine) -> None:
        super().__init__(network, name)
        self.dies_after: int | None = None
        self._machine = machine
        self._ends: dict[Conn, End] = {}
        self._last: Conn = 0
        self._events: deque[Callable[[float], Actions]] = deque()
        self._deciding = False
        self._tick: tuple[float, bool] = (math.inf, True)

    # ── for whoever it is ───────────────────────────────────────────────────────────────────────

    def persist(self, record: Any) -> None:
        """It outlives the process."""
        raise NotImplementedError

    def tell(self, event: Any) -> None:
        """The machine says this."""
        raise NotImplementedError

    def perform(self, task: Any) -> Any:
        """What comes of a task; it takes no time."""
        raise NotImplementedError

    def dies(self, undone: Actions) -> None:
        """It dies here and now, without having carried these out."""
        raise NotImplementedError

    def note(self, text: str) -> None:
        """For the trace."""
        raise NotImplementedError

    def waits(self) -> bool:
        """Whether something waits for time to pass, other than what recurs whether or not anything
        happens."""
        return True

    # ── events ──────────────────────────────────────────────────────────────────────────────────

    def does(self, decide: Callable[[float], Actions]) -> None:
        """Have the machine decide something, and do what follows, and whatever that leads to."""
        self._events.append(decide)
        if self._deciding:
            return
        self._deciding = True
        try:
            while self._events and self.alive:
                self._carry_out(self._events.popleft()(self.network.agenda.now))
        finally:
            self._deciding = False
        if self.alive:
            self._keep_time()

    def accept(self, end: End) -> None:
        """Another process has connected."""
        self._adopt(end, None)

    def _adopt(self, end: End, dialled: str | None) -> None:
        self._last += 1
        conn = self._last
        self._ends[conn] = end
        self.does(lambda now: self._machine.opened(conn, dialled, now))
        self._listen(conn)

    def _listen(self, conn: Conn) -> None:
        end = self._ends.get(conn)
        if end is not None and not end.closed:
            end.listen(lambda frame: self._take(conn, frame), lambda: self._ended(conn))

    def _take(self, conn: Conn, frame: Frame) -> None:
        self.does(lambda now: self._machine.received(conn, frame.message, frame, now))

    def _ended(self, conn: Conn) -> None:
        if self._ends.pop(conn, None) is not None:
            self.does(lambda now: self._machine.closed(conn, now))

    def _keep_time(self) -> None:
        due = math.inf if self._machine.due is None else self._machine.due
        tick = due, not self.waits()
        if tick != self._tick and due < math.inf:
            self._tick = tick
            agenda = self.network.agenda
            agenda.at(due, self._do, self._pass, (tick,), tick[1], idle=tick[1])

    def _pass(self, tick: tuple[float, bool]) -> None:
        if tick == self._tick:
            self._tick = (math.inf, True)
            self.does(self._machine.tick)

    # ── actions ─────────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, actions: Actions) -> None:
        for number, action in enumerate(actions):
            if self.dies_after == 0:
                self.dies(actions[number:])
                return
            if self.dies_after is not None:
                self.dies_after -= 1
            self._do_action(action)

    def _do_action(self, action: Action) -> None:
        if isinstance(action, Send):
            end = self._ends.get(action.conn)
            if end is not None and not end.closed:
                end.send(
                    action.message,
                    request=action.request,
                    buffers=action.buffers,
                    descriptors=action.descriptors,
                )
        elif isinstance(action, Close):
            end = self._ends.get(action.conn)
            if end is not None:
                end.close()
                self._ended(action.conn)
        elif isinstance(action, Dial):
            self._dial(action)
        elif isinstance(action, Persist):
            self.persist(action.record)
        elif isinstance(action, Tell):
            self.tell(action.event)
        elif isinstance(action, Note):
            self.note(action.text)
        elif isinstance(action, Perform):
            result = self.perform(action.task)
            self.does(lambda now: cast(Performing, self._machine).performed(action.tag, result, now))
        elif isinstance(action, Pause):
            self._ends[action.conn].wait()
        elif isinstance(action, Resume):
            self._listen(action.conn)

    def _dial(self, dial: Dial) -> None:
        name = dial.member if isinstance(dial.member, str) else dial.member.addresses[0]
        end = self.network.dial(self, name)
        if end is None:
            why = f"{name} has ended"
            self.does(lambda now: self._machine.unreachable(dial.tag, why, now, nobody=True))
        else:
            self._adopt(end, dial.tag)
