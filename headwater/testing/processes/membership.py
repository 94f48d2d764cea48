"""A simulated node's dealings with the coordinator: the machine that every node has for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from headwater import messages as m
from headwater.errors import ConnectionLostError
from headwater.machines.actions import Actions, Close, Dial, Send, Tell
from headwater.machines.membership import Ended, Joined, Membership
from headwater.testing.processes import coordinator
from headwater.testing.processes.network import End, Frame, Process
from headwater.testing.processes.times import START_S


class CoordinatorLine:
    """Of `process`, which joins as `join` says; `tell` gets the machine's events.

    A node whose join ends with the coordinator joins the next one.

    Attributes:
        machine: what decides.
    """

    def __init__(self, process: Process, join: m.Join, tell: Callable[[Any], None]) -> None:
        self.machine = Membership(coordinator.NAME, join)
        self._process = process
        self._join = join
        self._tell = tell
        self._end: End | None = None
        self._conn = 0
        self._tick = math.inf
        self._joined = False

    @property
    def over(self) -> bool:
        """Whether this node is no member any more."""
        return self.machine.phase == "over"

    @property
    def away(self) -> bool:
        """Whether the coordinator is."""
        return self.machine.phase == "away"

    def begin(self) -> None:
        """Join."""
        self._does(self.machine.join(self._process.network.agenda.now))

    def tell(self, message: m.AnyMessage) -> None:
        """Say something; lost where the coordinator is away."""
        self._does(self.machine.tell(message))

    def _does(self, actions: Actions) -> None:
        for action in actions:
            if isinstance(action, Send):
                if self._end is not None and not self._end.closed:
                    self._end.send(action.message)
            elif isinstance(action, Close):
                self._hang_up()
            elif isinstance(action, Dial):
                self._process.after(0.0, self._dial)
            elif isinstance(action, Tell):
                self._event(action.event)
        self._keep_time()

    def _event(self, event: Any) -> None:
        if isinstance(event, Joined):
            self._joined = True
        if isinstance(event, Ended) and isinstance(event.error, ConnectionLostError) and not self._joined:
            self._process.after(START_S, self._join_again)
        else:
            self._tell(event)

    def _join_again(self) -> None:
        self.machine = Membership(coordinator.NAME, self._join)
        self.begin()

    def _dial(self) -> None:
        now = self._process.network.agenda.now
        end = self._process.network.dial(self._process, coordinator.NAME)
        if end is None:
            self._does(self.machine.unreachable(coordinator.NAME, "its process has ended", now, nobody=True))
            return
        self._end = end
        self._conn += 1
        conn = self._conn
        end.listen(lambda frame: self._heard(conn, frame), lambda: self._ended(conn))
        self._does(self.machine.opened(conn, coordinator.NAME, now))

    def _heard(self, conn: int, frame: Frame) -> None:
        now = self._process.network.agenda.now
        self._does(self.machine.received(conn, frame.message, None, now))
        if isinstance(frame.message, m.ServerAddresses):
            self._tell(frame.message)

    def _ended(self, conn: int) -> None:
        self._does(self.machine.closed(conn, self._process.network.agenda.now))

    def _hang_up(self) -> None:
        end, self._end = self._end, None
        if end is not None:
            end.close()

    def _keep_time(self) -> None:
        due = self.machine.due
        if due is not None and due != self._tick and due < math.inf:
            self._tick = due
            idle = self.machine.phase == "member"
            agenda = self._process.network.agenda
            self._process.after(due - agenda.now, self._pass, due, idle=idle)

    def _pass(self, due: float) -> None:
        if due == self._tick:
            self._tick = math.inf
            self._does(self.machine.tick(max(due, self._process.network.agenda.now)))
