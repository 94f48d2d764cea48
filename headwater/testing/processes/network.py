"""Processes and the connections between them, under virtual time.

What the real transport does: a connection is FIFO both ways; a message takes as long as chance says, and some
ways are slow; one that breaks loses the last of what is on its way, in each direction another part; what a
process that dies sent may arrive without its end. Connections are independent of each other, so what is sent
over two may arrive in any order, also an older connection epoch's after a newer one's. A stopped process
receives when
it goes on; a partition holds back what crosses it until it heals.

Every way draws its delays from a stream of its own, named by its two ends: what happens elsewhere does not
change them, so a schedule with a fault less is nearly the same schedule.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from math import log
from typing import Any, NamedTuple, TypeAlias

from headwater.errors import ConnectionLostError
from headwater.testing.processes.agenda import Action, Agenda

SPEEDS_S = (0.0001, 0.0004, 0.002, 0.01)
"""Mean seconds that a message takes, over quick, ordinary and slow ways."""


class Frame(NamedTuple):
    """A message on its way: `buffers` are its payload, `shared` is memory that comes with it."""

    message: Any
    buffers: Sequence[Any]
    shared: Sequence[Any]
    sent: float


Join: TypeAlias = Callable[[Any, Any], Any]
"""One message that says both, in their order; None where there is none."""

_END = Frame(None, (), (), 0.0)


class Process:
    """Something that can die or stop as a whole.

    Attributes:
        alive: False once it has ended, however.
        stopped_until: it does nothing before this moment.
        ends: of its connections. pid: its number.
    """

    def __init__(self, network: Network, name: str) -> None:
        self.network = network
        self.name = name
        self.alive = True
        self.stopped_until = 0.0
        self.ends: set[End] = set()
        self._agenda = network.agenda
        self._unfinished: list[Action] = []
        network.processes[name] = self
        self.pid = len(network.processes)

    def accept(self, end: End) -> None:
        """Another process has connected."""
        raise NotImplementedError

    def after(self, seconds: float, action: Action, *arguments: Any, idle: bool = False) -> None:
        """Have this process do something later; not if it has ended, and not while it is stopped."""
        agenda = self._agenda
        agenda.at(agenda.now + seconds, self._do, action, arguments, idle, idle=idle)

    def _do(self, action: Action, arguments: tuple[Any, ...], idle: bool) -> None:
        if not self.alive:
            return
        agenda = self._agenda
        if self.stopped_until > agenda.now:
            agenda.at(self.stopped_until, self._do, action, arguments, idle, idle=idle)
        else:
            action(*arguments)

    def freeze(self, seconds: float, unfinished: Iterable[Action] = ()) -> None:
        """Stand still for a while, and then do first what it was in the middle of.

        Nothing where it is stopped already: what it was about to send has its time.
        """
        agenda = self.network.agenda
        if self.stopped_until > agenda.now:
            return
        self.stopped_until = agenda.now + seconds
        self._unfinished += unfinished
        agenda.at(self.stopped_until, self._go_on)

    def _go_on(self) -> None:
        if self.alive and self.stopped_until <= self.network.agenda.now:
            unfinished, self._unfinished = self._unfinished, []
            for action in unfinished:
                action()

    def kill(self, chance: random.Random) -> None:
        """It dies, with or without a message that it has just sent."""
        self.alive = False
        self.stopped_until = 0.0
        for end in sorted(self.ends, key=lambda end: end.label):
            end.break_off(chance, both=False)
        self.ends.clear()

    def exit(self) -> None:
        """It ends by itself: what it sent arrives."""
        self.alive = False
        for end in sorted(self.ends, key=lambda end: end.label):
            end.close()
        self.ends.clear()


class End:
    """One end of a connection, with what nodes use of a `Channel`; nothing blocks.

    Attributes:
        process: whose end it is; peer: the other end.
        label: names the connection in traces.
    """

    peer: End
    _way: _Way

    def __init__(self, process: Process, label: str) -> None:
        self.process = process
        self.label = label
        self.closed = False
        self._take: Callable[[Frame], None] | None = None
        self._on_end: Action = lambda: None
        self._backlog: deque[Frame] = deque()
        process.ends.add(self)

    def listen(self, take: Callable[[Frame], None], on_end: Action) -> None:
        """Have `take` called with what arrives, with what has arrived already first; then, once, `on_end`."""
        self._take, self._on_end = take, on_end
        while self._backlog and self._take is take and not self.closed:
            self._hand_over(self._backlog.popleft())

    def wait(self) -> None:
        """Keep what arrives for whoever listens next."""
        self._take = None

    def arrived(self, frame: Frame) -> None:
        """A frame has come, or the end of all."""
        if self.closed or not self.process.alive:
            return
        if self._take is None:
            self._backlog.append(frame)
        else:
            self._hand_over(frame)

    def _hand_over(self, frame: Frame) -> None:
        if frame.message is None:
            self.close()
            self._on_end()
        elif self._take is not None:
            self._take(frame)

    def send(
        self,
        message: Any,
        *,
        request: int = 0,
        buffers: Sequence[Any] = (),
        descriptors: Sequence[Any] = (),
        timeout: float | None = None,
        join: Join | None = None,
    ) -> None:
        """Put a message on its way. Raises ConnectionLostError where this end is closed.

        `join`: makes one message of two; the last one of those that are under way may still wait to leave.
        """
        if self.closed:
            raise ConnectionLostError(f"{self.label} is closed")
        frame = Frame(message, buffers, descriptors, self._way.earliest())
        if join is None or request or buffers or descriptors or not self._way.joins(frame, join):
            self._way.put(frame)

    def give(self, process: Process) -> None:
        """It is another process's from now on, as where one becomes the other."""
        self.process.ends.discard(self)
        self.process = self._way.source = process
        process.ends.add(self)

    def close(self) -> None:
        """Say and hear no more; the other end hears what was sent, and that this is all. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self.process.ends.discard(self)
        self._way.put(_END)

    def break_off(self, chance: random.Random, both: bool = True) -> None:
        """The connection breaks: the last of what this end sent is lost, with `both` both ways."""
        if both:
            self._way.lose(chance)
            self.peer._way.lose(chance)
            self._way.put(_END)
            self.peer._way.put(_END)
        else:
            self.closed = True
            self._way.lose(chance)
            self._way.put(_END)


class _Way:
    """From one end to the other."""

    __slots__ = ("_agenda", "_chance", "_frames", "_last", "_mean", "_network", "_target", "source")

    def __init__(self, network: Network, source: Process, target: End, stream: str) -> None:
        self._network = network
        self._agenda = network.agenda
        self.source = source
        self._target = target
        self._chance = random.Random(stream)
        self._mean = self._chance.choice(network.speeds)
        self._frames: deque[Frame] = deque()
        self._last = 0.0

    def earliest(self) -> float:
        """When what is sent now leaves: one that is stopped in the middle of something says it later."""
        now, until = self._agenda.now, self.source.stopped_until
        return until if until > now else now

    def joins(self, frame: Frame, join: Join) -> bool:
        """Whether the last message under way is one with this one, as where it has not left yet."""
        last = self._frames[-1] if self._frames else _END
        if last.buffers or last.shared or frame.sent > self._agenda.now or last.sent > frame.sent:
            return False
        both = join(last.message, frame.message)
        if both is None or self._chance.random() < 0.5:
            return False
        self._frames[-1] = last._replace(message=both)
        return True

    def put(self, frame: Frame) -> None:
        """On its way, behind what is."""
        delay = -log(1.0 - self._chance.random()) * self._mean
        arrives = (frame.sent or self.earliest()) + delay
        if arrives > self._last:
            self._last = arrives
        self._frames.append(frame)
        self._agenda.at(self._last, self._arrive)

    def _arrive(self) -> None:
        if not self._frames:
            return  # it was lost
        network, target = self._network, self._target
        until = target.process.stopped_until
        if network.parted:
            until = max(until, network.parted_until(self.source, target.process))
        if until > self._agenda.now and target.process.alive:
            self._agenda.at(until, self._arrive)
            return
        frame = self._frames.popleft()
        if network.on_delivery is not None and frame.message is not None and target.process.alive:
            network.on_delivery(self.source, target.process, frame.message)
        target.arrived(frame)

    def lose(self, chance: random.Random) -> None:
        """Lose a last part of what is on its way, and what has not left."""
        now = self._agenda.now
        while self._frames and (self._frames[-1].sent > now or chance.random() < 0.5):
            self._frames.pop()


class _Partition(NamedTuple):
    """Nothing passes between `group` and `others`, everybody else where there are none, before `until`."""

    group: frozenset[Process]
    others: frozenset[Process]
    until: float

    def parts(self, one: Process, other: Process) -> bool:
        """Whether these two."""
        if (one in self.group) == (other in self.group):
            return False
        return not self.others or one in self.others or other in self.others


class Network:
    """All processes by name, and how their connections come about.

    Attributes:
        speeds: mean seconds a message takes; each way has one of them.
        on_delivery: told of each message that arrives, with its source and target.
        parted: whether there ever was a partition.
    """

    def __init__(self, agenda: Agenda, seed: int, speeds: Sequence[float] = SPEEDS_S) -> None:
        self.agenda = agenda
        self.speeds = speeds
        self.processes: dict[str, Process] = {}
        self.on_delivery: Callable[[Process, Process, Any], None] | None = None
        self.seed = seed
        self._connections: dict[tuple[str, str], int] = {}
        self.parted = False
        self._partitions: list[_Partition] = []

    def dial(self, source: Process, name: str) -> End | None:
        """Connect to the process of this name; None where it has ended."""
        target = self.processes[name]
        if not target.alive:
            return None
        pair = source.name, name
        ordinal = self._connections[pair] = self._connections.get(pair, 0) + 1
        label = f"{source.name} – {name} #{ordinal}"
        here, there = End(source, label), End(target, label)
        here.peer, there.peer = there, here
        here._way = _Way(self, source, there, f"{self.seed} {label} out")
        there._way = _Way(self, target, here, f"{self.seed} {label} back")
        target.accept(there)
        return here

    def part(self, group: Iterable[Process], seconds: float, others: Iterable[Process] = ()) -> None:
        """Nothing passes between `group` and everybody else, or only these `others`, for a while; it all
        arrives afterwards.
        """
        until = self.agenda.now + seconds
        self._partitions = [partition for partition in self._partitions if partition.until > self.agenda.now]
        self._partitions.append(_Partition(frozenset(group), frozenset(others), until))
        self.parted = True

    def parted_until(self, source: Process, target: Process) -> float:
        """Until when nothing passes from one to the other."""
        return max((one.until for one in self._partitions if one.parts(source, target)), default=0.0)
