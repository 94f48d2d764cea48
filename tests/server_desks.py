"""One server's machine on a desk: what it asks for is looked at, and nothing else happens by itself."""

import itertools

import numpy as np
from clusters import model_spec

from headwater import messages as m
from headwater.errors import HeadwaterError
from headwater.machines.actions import (
    BESIDE,
    Close,
    Dial,
    HandOver,
    Note,
    Pause,
    Perform,
    Resume,
    Send,
    Tell,
)
from headwater.machines.log_host import SequencerMachine
from headwater.machines.log_link import Policy
from headwater.machines.server import ServerMachine, ServerPlan
from headwater.shard import Shard
from headwater.spec.layout import PAGE
from headwater.spec.sync import parse_sync
from headwater.testing.processes.machine_driver import pour
from headwater.testing.processes.memory import SharedArrays

SPEC = model_spec(shapes={"a": (3,)})
"""A model of one page: all of it on server 0, where there is one."""


def member(id, role="worker", index=0):
    return m.Member(id, role, index, 100 + id, "here", (f"{role} {index}",))


def roster(term, *members, since=1, cluster="c1", workers=1):
    return m.Roster(term, workers, members, since, cluster=cluster)


class Desk:
    """A server (or standby) of a cluster; its own member is number 1.

    Attributes:
        sent: by connection what was sent over it; to the sequencer, where that is not here, over BESIDE.
        carried: payload and memory of each of these.
        closed: by connection why this machine ended it. paused: connections that it takes nothing from.
        dialled, told, notes, handed: what it asked for besides.
        tasks: that are to be performed.
    """

    def __init__(
        self, index=0, servers=1, role="server", *, replicated=False, shares=True, sequencer=None, **plan
    ):
        self.now = 0.0
        self.role, self.index, self.servers = role, index, servers
        place = ServerPlan(index, servers, role, replicated=replicated, **{"patience": 10.0, **plan})
        self.memory = SharedArrays(shares)
        self.machine = ServerMachine(
            place,
            Shard(index, servers, "mean"),
            self.memory,
            lambda snapshot: Shard.restore(snapshot, "mean"),
        )
        mode = None if sequencer is None else parse_sync(sequencer)
        self.sequencer = None
        if mode is not None:
            self.sequencer = SequencerMachine(servers, Policy(mode, 1, replicated), patience=10.0)
        self.sent, self.carried, self.requests, self.closed, self.paused = {}, {}, {}, {}, set()
        self.dialled, self.told, self.notes, self.handed, self.tasks = [], [], [], {}, []
        self._conns = itertools.count(1)

    # ── events ──────────────────────────────────────────────────────────────────────────────────

    def do(self, actions):
        """Note what is asked for; the sequencer, where it is here, hears at once, and the log goes on."""
        for action in actions:
            self._note(action)
        while self.machine.busy:
            self.do(self.machine.advance(self.now))

    def _note(self, action):
        if isinstance(action, Send) and action.conn == BESIDE and self.sequencer is not None:
            self.from_sequencer(self.sequencer.received(BESIDE, action.message, None, self.now))
        elif isinstance(action, Send):
            assert action.conn not in self.closed
            self.sent.setdefault(action.conn, []).append(action.message)
            buffers = [np.array(array) for array in action.buffers]
            self.carried.setdefault(action.conn, []).append((buffers, list(action.descriptors)))
            self.requests[action.conn] = action.request
        elif isinstance(action, Close):
            self.closed[action.conn] = action.why
        elif isinstance(action, Pause):
            self.paused.add(action.conn)
        elif isinstance(action, Resume):
            self.paused.discard(action.conn)
        elif isinstance(action, Dial):
            self.dialled.append((action.member, action.tag))
        elif isinstance(action, HandOver):
            self.handed[action.conn] = action.tag
        elif isinstance(action, Perform):
            self.tasks.append(action)
        elif isinstance(action, Tell):
            self.told.append(action.event)
        else:
            assert isinstance(action, Note)
            self.notes.append(action.text)

    def from_sequencer(self, actions):
        for action in actions:
            if isinstance(action, Send) and action.conn == BESIDE:
                self.do(self.machine.received(BESIDE, action.message, None, self.now))

    def connects(self, dialled=None):
        conn = next(self._conns)
        self.do(self.machine.opened(conn, dialled, self.now))
        return conn

    def says(self, conn, message, *, buffers=(), given=(), request=0, compiled=True):
        """A message comes, with payload and memory; what breaks the protocol is told as a driver does.

        `compiled`: the loops that a declaration needs are there at once.
        """
        assert conn not in self.paused, "nothing is taken from a paused connection"
        given = list(given)
        try:
            if buffers:
                pour(buffers, self.machine.place(conn, message, sum(array.nbytes for array in buffers)))
            payload = self.machine.unpack(conn, message, given)
            self.do(self.machine.received(conn, message, payload, self.now, request=request))
        except HeadwaterError as error:
            self.do(self.machine.failed(conn, error, self.now))
        if compiled and isinstance(message, m.Register | m.RegisterTable):
            self.perform()

    def ends(self, conn):
        self.do(self.machine.closed(conn, self.now))

    def passes(self, seconds):
        """Time passes, with a tick whenever one is due."""
        until = self.now + seconds
        while self.machine.due is not None and self.machine.due <= until:
            self.now = max(self.now, self.machine.due)
            self.do(self.machine.tick(self.now))
        self.now = until

    def perform(self):
        """Everything that takes long is done now."""
        while self.tasks:
            task = self.tasks.pop(0)
            try:
                result = task.task()
            except HeadwaterError as error:
                result = error
            self.do(self.machine.performed(task.tag, result, self.now))

    def last(self, conn):
        return self.sent[conn][-1]

    # ── how it becomes part of a cluster ────────────────────────────────────────────────────────

    def joins(self):
        """It is welcomed as member 1."""
        own = member(1, self.role, self.index)
        self.do(self.machine.joined(m.Welcome(own, 1, (), 1, "sync", {}, 10, 60, cluster="c1"), self.now))
        return self

    def hello(self, id=0, role="worker", term=0, epoch=0, cluster="c1"):
        """Somebody connects and says who it is."""
        conn = self.connects()
        self.says(conn, m.Hello(id, role, term, epoch, cluster))
        return conn

    def coordinator(self):
        if not hasattr(self, "_control"):
            self._control = self.hello(role="coordinator")
        return self._control

    def takes(self, term, *others, since=1, **fields):
        """A roster of this node, servers of the other indices, and whoever else."""
        own = member(1, self.role, self.index)
        indices = {one.index for one in others if one.role == "server"} | {self.index}
        servers = [member(80 + i, "server", i) for i in range(self.servers) if i not in indices]
        present = (own, *servers, *others)
        if self.role == "standby":
            present = (own, *(one for one in present if one is not own))
        self.says(self.coordinator(), roster(term, *present, since=since, **fields))
        return self

    def serves(self, *workers):
        """It has joined, the log has begun, and these workers (by id) are in the roster."""
        self.joins().takes(
            2, *(member(id, "worker", rank) for rank, id in enumerate(workers)), workers=len(workers)
        )
        return self

    def trains(self, *workers, window=True):
        """As `serves`, and each worker has registered the model; returns their connections and memories."""
        self.serves(*workers)
        conns, memories = [], []
        for id in workers:
            conn = self.hello(id, term=2)
            gradients, parameters = np.zeros(PAGE, np.float32), np.zeros(PAGE, np.float32)
            if window:
                self.says(conn, m.Register(1, SPEC, m.WindowSpec(0)), given=[gradients, parameters])
            else:
                self.says(conn, m.Register(1, SPEC, None), buffers=[parameters])
            conns.append(conn)
            memories.append((gradients, parameters))
        return conns, memories


def step(number, count=1, **fields):
    """A step that carries the model; its gradients are where the model is staged."""
    return m.Step(number, number - count, 0, (m.Carried(0, b"\1"),), (), True, **fields)
