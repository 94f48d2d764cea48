"""Clusters in which connections break and servers die: `machines.py` with attempts, standbys and recovery.

What is checked besides:
- a standby equals its primary at every position: values, rule state, ledger, standings, to the bit;
- what a server of an older term sends is refused; what was answered is never discarded;
- the log continues as one: entries that stand are never written anew.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec
import numpy as np
from clients import Client
from machines import Cluster, Server, refused

from headwater import messages as m
from headwater.log.sequencer import Sequencer
from headwater.shard import Shard, Staging
from headwater.shard.replica import Resolved, arriving

MOST_LOSSES = 30
"""Of connections in one run: each makes ten messages, so with more a run might never end."""


class FlakyCluster(Cluster):
    """Members lose connections: before each delivery one of them does with probability `flaky`."""

    def __init__(self, mode: str, *, flaky: float = 0.0, **arguments: Any) -> None:
        super().__init__(mode, **arguments)
        self.flaky = flaky
        self.losses = 0

    def deliver(self) -> bool:
        flaky = self.losses < MOST_LOSSES and self.random.random() < self.flaky
        if flaky and (living := self.living()):
            self.lose(self.random.choice(living))
        return super().deliver()

    def lose(self, client: Client) -> None:
        """It loses a connection: it closes all, makes new windows, connects again, repeats its request."""
        self.losses += 1
        self.disconnect(client)
        client.attempt += 1
        if client.leaves():  # it does not come back for that answer
            if client.outstanding:
                client.outstanding = False
                self.depart(client)
            return
        if not self.private:
            for mirror in client.mirrors():
                mirror.renew()
        client.connected = list(self.serving)
        for server in client.connected:
            sent = self.links["request", client.id, client.attempt, server.id]
            sent.append(("hello",))
            for id, mirror in client.models.items():
                sent.append(("window", id, mirror.gradients, mirror.parameters))
        if client.outstanding:
            client.exchange.repeat()
            self.send(client)

    def _take_hello(self, server: Server, client: Client, attempt: int) -> None:
        server.shard.reconnected(client.id, attempt)

    def _take_window(self, server: Server, client: Client, attempt: int, model: int, *arrays) -> None:
        """A new private buffer has what the old one holds, for an exchange that may still be outstanding."""
        shard = server.shard
        start, stop = shard.vectors[model].start, shard.vectors[model].stop
        memory = [array[start:stop] for array in arrays]
        if self.private:
            staged = shard._members.stagings(client.id).get(model)
            private = np.zeros(stop - start, np.float32) if staged is None else staged.gradients.copy()
            memory = [private, private]
        shard.replace_staging(client.id, model, Staging(*memory), attempt)


class ReplicatedCluster(FlakyCluster):
    """Every server has a standby; servers die, standbys take over, a new sequencer finds where all are.

    Attributes:
        failovers: how often the log was taken over.
    """

    def __init__(self, mode: str, *, servers: int, **arguments: Any) -> None:
        super().__init__(mode, servers=servers, **arguments)
        self._next_term = 0
        self.failovers = 0
        self._digests: dict[tuple[int, int], Any] = {}
        self._told = 0
        self._found: dict[int, list[m.Recovery]] = {}
        self._zombies: dict[int, tuple[Sequencer, Server]] = {}
        self.sequencer = Sequencer(
            servers, self.sync, min_workers=self.min_workers, replicated=True, term=self.term
        )
        for server in self.serving:
            self.attach_standby(server)

    # ── standbys ────────────────────────────────────────────────────────────────────────────────

    def attach_standby(self, server: Server) -> None:
        """A new standby begins with a snapshot of its primary's now and what is not committed yet."""
        shard = server.shard
        member = self.book.join(m.Join("standby", shard.index, 0, "here"))
        self.book.caught_up(member.id)
        snapshot, closed = shard.attach_standby()
        standby = Server(len(self.all), Shard.restore(snapshot, self.sync.reduce))
        standby.shard.admit(shard.agreed_term)
        self.all[standby.id] = server.standby = standby
        for resolved in closed:
            self.ship(server, resolved)

    def ship(self, server: Server, item: Any) -> None:
        self.links["ship", server.id, server.standby.id].append((server.shard.term, item))

    def _ship(self, link: deque[Any], primary: int, standby: int) -> None:
        term, item = link.popleft()
        server = self.all[standby]
        if server.down:
            return
        if isinstance(item, Resolved):
            if not refused(server.shard.follow, through_the_wire(item)):
                self.links["ack", standby, primary].append((term, server.shard.prepared))
        elif isinstance(item, m.Agreed):
            refused(server.shard.truncate, item)
        elif not refused(server.shard.admit, term):
            self.apply(server, item)

    def _ack(self, link: deque[Any], standby: int, primary: int) -> None:
        term, position = link.popleft()
        server = self.all[primary]
        if not server.down:
            server.shard.acknowledged(term, position)
            self.report(server, (), server.shard.safe)

    def apply(self, server: Server, position: int) -> None:
        """Apply what is committed, and compare with what the other of the pair became."""
        shard = server.shard
        while shard.position < position:
            entry = shard._closed[0].entry
            self.answer(server, entry, shard.commit(shard.position + 1))
            place = shard.index, shard.position
            assert self._digests.setdefault(place, digest(shard)) == digest(shard), place

    # ── the log ─────────────────────────────────────────────────────────────────────────────────

    def is_open(self, kind: str, *where: Any) -> bool:
        if kind == "roster":
            return self.sequencer is not None
        if kind == "report":
            term = where[1]
            return term in self._zombies or (self.sequencer is not None and term <= self.sequencer.term)
        if kind == "lost":
            return not self.links["promote",]
        return kind != "request" or self.all[where[2]].is_open()

    def _report(self, link: deque[Any], server: int, term: int) -> None:
        if term in self._zombies:
            held, prepared, sums = link.popleft()
            zombie, _ = self._zombies[term]
            index = self.all[server].shard.index
            entries = zombie.report(index, held, self.now, term=term, prepared=prepared, sums=sums)
            if self.sequencer is None and term == self.term:  # nobody has asked yet what there is
                self.log += entries
            self.spread(zombie, entries)
        elif term < self.sequencer.term:
            held, *_ = link.popleft()
            assert refused(lambda: self.sequencer.report(0, held, term=term))
        else:
            super()._report(link, server, term)

    def _extend(self, entries: list[m.AnyEntry]) -> None:
        for entry in entries:
            assert entry.position == len(self.log) + 1
            self.log.append(entry)
        if entries or self.sequencer.committed > self._told:
            self._told = self.sequencer.committed
            self.spread(self.sequencer, entries)

    def spread(self, sequencer: Sequencer, entries: list[m.AnyEntry]) -> None:
        message = m.Entries(tuple(entries), sequencer.term, sequencer.committed)
        members = self.serving
        if sequencer is not self.sequencer:  # a deposed one goes on with the servers that it knew
            _, host = self._zombies[sequencer.term]
            members = [host, *(server for server in self.serving if server.shard.index != host.shard.index)]
        for server in members:
            self.links["entry", server.id, sequencer.term].append(message)

    def _entry(self, link: deque[Any], server: int, term: int) -> None:
        message = link.popleft()
        self.take(self.all[server], message)

    def take(self, server: Server, message: m.Entries | m.Agreed) -> None:
        """What a server does with what the sequencer tells it."""
        shard = server.shard
        if server.down or refused(shard.admit, message.term):
            return
        if isinstance(message, m.Agreed):
            shard.truncate(message)
            server.reported = min(server.reported, message.position)
            if server.standby:
                self.ship(server, message)
            self.report(server, (), shard.safe)
            server.opens_at = message.position
            return
        for entry in message.entries:
            resolved = shard.prepare(entry)
            if resolved is not None:
                self.ship(server, resolved)
            self.report(server, (), shard.safe)
        self.commit(server, message.committed)

    def commit(self, server: Server, position: int) -> None:
        """Apply what is committed here, and have it applied by the standby."""
        if position > server.shard.position:
            self.apply(server, position)
            if server.standby is not None:
                self.ship(server, position)

    # ── deaths of servers ───────────────────────────────────────────────────────────────────────

    def kill_standby(self, index: int) -> None:
        """Its primary goes on alone: what it has counts as prepared."""
        server = self.serving[index]
        if server.standby is None or self.is_struck_off(index):
            return
        server.standby.down = True
        self.book.remove(next(one.id for one in self.book.of("standby") if one.index == index))
        self.links["ship", server.id, server.standby.id].clear()
        self.links["ack", server.standby.id, server.id].clear()
        server.standby = None
        server.shard.detach_standby()
        self.report(server, (), server.shard.safe)

    def kill_server(self, index: int, *, zombie: bool = False) -> bool:
        """A primary dies, or is taken for dead and goes on; whether it had a standby to take over.

        That is one which has all that its primary ever reported as prepared.
        """
        server = self.serving[index]
        if self.is_struck_off(index) or server.standby is None or server.shard.safe < server.reported:
            return False
        self.book.remove(next(one.id for one in self.book.of("server") if one.index == index))
        if not zombie:
            self._die(server)
        self._depose(server, index == 0 and zombie)
        self.links["promote",].append((index, self.book.term))
        for client in self.living():
            self.links["lost", client.id].append(None)
        return True

    def is_struck_off(self, index: int) -> bool:
        """Whether the standby of this index is about to take over."""
        return any(index == other for other, _ in self.links["promote",])

    def _die(self, server: Server) -> None:
        """Of what it sent a part may still arrive; what was sent to it is lost."""
        server.down = True
        for (kind, *where), link in self.links.items():
            if kind in ("entry", "ask") and where[0] == server.id:
                link.clear()
            if kind == "ack" and where[1] == server.id:
                link.clear()
            from_it = kind in ("report", "ship") and where[0] == server.id
            from_it |= kind == "answer" and where[2] == server.id
            from_it |= kind == "entry" and server is self.serving[0]
            while from_it and link and self.random.random() < 0.5:
                link.pop()

    def _depose(self, server: Server, lives: bool) -> None:
        """There is no sequencer until the new one has asked everybody."""
        if self.sequencer is not None and lives:
            self._zombies[self.sequencer.term] = self.sequencer, server
        self.sequencer = None

    def _promote(self, link: deque[Any]) -> None:
        index, term = link.popleft()
        former, server = self.serving[index], self.serving[index].standby
        server.shard.promote(term)
        server.opens_at = None
        self.serving[index] = server
        if former.down:
            self.links["ship", former.id, server.id].clear()
        if not self.links["promote",]:
            self._next_term = term
            self._found[term] = []
            for each in self.serving:
                self.links["ask", each.id, term].append(None)

    def _ask(self, link: deque[Any], server: int, term: int) -> None:
        link.popleft()
        if term == self._next_term and not self.all[server].down:
            self._found[term].append(self.all[server].shard.recovery(term))
            if len(self._found[term]) == len(self.servers):
                self._recover(self._found[term], term)

    def _recover(self, answers: list[m.Recovery], term: int) -> None:
        answers = [msgspec.msgpack.decode(msgspec.msgpack.encode(one), type=m.Recovery) for one in answers]
        self.random.shuffle(answers)
        self.failovers += 1
        self.sequencer, agreed, entries = Sequencer.recover(
            self.sync, answers, self.book.view(), term=term, min_workers=self.min_workers, now=self.now
        )
        self.term = term
        assert agreed.position >= max(position for _, position in self._digests or [(0, 0)])
        self.log = self.log[: agreed.position]
        assert len(self.log) == agreed.position
        for server in self.serving:
            self.links["entry", server.id, term].append(agreed)
        self._told = 0
        self._extend(entries)

    def _lost(self, link: deque[Any], member: int) -> None:
        """It hears of new servers, and closes its connections to those that they replace."""
        link.popleft()
        client = self.clients[member]
        if client.connected not in ([], self.serving) and not (client.dead or client.ended):
            self.lose(client)


def through_the_wire(resolved: Resolved) -> Resolved:
    """What arrives of it at the standby."""
    inputs = msgspec.msgpack.decode(msgspec.msgpack.encode(resolved.inputs), type=m.Inputs)
    arrived = arriving(inputs)
    for there, here in zip(arrived.payload(), resolved.payload(), strict=True):
        there[...] = here
    return arrived


def digest(shard: Shard) -> Any:
    """All that must be the same on a primary and its standby."""
    snapshot = shard.snapshot()
    arrays = [
        array.tobytes()
        for model in snapshot.models
        for array in (model.values, model.counts, *model.states.values())
    ]
    for table in snapshot.tables:
        rows = (table.ids, table.values, table.counts, table.last, table.pending_ids, table.pending_counts)
        arrays += [array.tobytes() for array in (*rows, *table.states.values())]
    models = [(model.rules, model.updates) for model in snapshot.models]
    models += [(table.rule, table.updates) for table in snapshot.tables]
    rest = (snapshot.position, snapshot.version, snapshot.changed, snapshot.ledger, snapshot.standings)
    return hash((*arrays, repr(models), repr(rest)))
