"""A whole cluster of state machines in one thread: no sockets, no clock, delivery in an order of chance.

Links are FIFO; which of them delivers next is the seed's choice, and some links are slow. Time passes when
a round is held open for a while. Members are `Client`s; what fails is in `failures.py`.

What is checked on every delivery, whatever a test is about:
- all servers process the same log, and are at one version at each position of it;
- all servers give one answer to an exchange (`Exchange.answer`), and a member's versions never decrease;
- a server touches a member's memory only to answer the member's outstanding exchange;
- reports that come again, later, change nothing;
- whoever waits can be told for whom; at the end nobody waits.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from clients import SHAPES, Call, Client, Mirror, Program, model_spec

from headwater import messages as m
from headwater.errors import HeadwaterError, PeerError, ProtocolError, RefusedError, UsageError
from headwater.exchange import Exchange
from headwater.log.sequencer import Sequencer
from headwater.log.standings import tickets_of
from headwater.placement import servers_of
from headwater.roster import RosterBook
from headwater.shard import Shard, StagedRows, Staging
from headwater.sync import parse_sync

__all__ = ["SHAPES", "Call", "Client", "Cluster", "Mirror", "Program", "Server", "model_spec"]


class Server:
    """A process that hosts a shard, as primary or standby.

    `opens_at`: position that it must have applied to serve members; `reported`: what it said is prepared.
    """

    def __init__(self, id: int, shard: Shard) -> None:
        self.id, self.shard = id, shard
        self.standby: Server | None = None
        self.opens_at: int | None = 0
        self.reported = 0
        self.down = False

    def is_open(self) -> bool:
        return self.opens_at is not None and self.shard.position >= self.opens_at


class Cluster:
    """`workers` declared workers, `servers` servers; `private`: values travel instead of being shared.

    Attributes:
        log: the entries, in order.
        clients: all there ever were.
        serving: the server of each index; all: every server there ever was, by id.
        now: the virtual time; hasty: how probably it passes though something could be delivered.
    """

    def __init__(
        self, mode: str, *, workers: int, servers: int, seed: int = 0, private: bool = False, min_workers=1
    ):
        self.random = random.Random(seed)
        self.private = private
        self.servers = range(servers)
        self.sync = parse_sync(mode)
        self.min_workers = min_workers
        self.book = RosterBook(workers, servers)
        self.sequencer: Sequencer | None = Sequencer(servers, self.sync, min_workers=min_workers)
        self.all = {i: Server(i, Shard(i, servers, self.sync.reduce)) for i in self.servers}
        self.serving = [self.all[i] for i in self.servers]
        self.log: list[m.AnyEntry] = []
        self.clients: dict[int, Client] = {}
        self.links: dict[tuple[Any, ...], deque[Any]] = defaultdict(deque)
        self.now = 0.0
        self.hasty = 0.05
        self.term = 0
        self.pulled: dict[tuple[int, int, int], list[StagedRows]] = {}
        self.snapshots: dict[tuple[int, int], dict[int, Any]] = defaultdict(dict)
        self._speeds: dict[tuple[Any, ...], float] = {}
        self._versions: dict[int, int] = {}
        for i in self.servers:
            self.book.join(m.Join("server", i, 0, "here"))

    @property
    def shards(self) -> list[Shard]:
        return [server.shard for server in self.serving]

    # ── who is there ────────────────────────────────────────────────────────────────────────────

    def join(self, program: Program, role: m.Role = "worker", rank: int | None = None) -> Client:
        """A new member; its program starts once the sequencer has the roster with it."""
        client = Client(self, self.book.join(m.Join(role, rank, 0, "here")), program)
        self.clients[client.id] = client
        self.links["roster",].append((self.book.view(), client))
        return client

    def kill(self, client: Client) -> None:
        """It dies: of what it sent, each server may still get a part."""
        client.dead = True
        self.book.remove(client.id)
        self.disconnect(client)
        self.links["wake", client.id].clear()
        self.links["roster",].append((self.book.view(), None))

    def living(self) -> list[Client]:
        return [client for client in self.clients.values() if not (client.dead or client.ended)]

    def disconnect(self, client: Client) -> None:
        """Its connections end: what it sent last may be lost, what was sent to it is."""
        for server in self.all.values():
            sent = self.links["request", client.id, client.attempt, server.id]
            while sent and self.random.random() < 0.5:
                sent.pop()
            self.links["answer", client.id, client.attempt, server.id].clear()

    # ── time ────────────────────────────────────────────────────────────────────────────────────

    def run(self, *programs: Program, until: Callable[[], bool] = lambda: False) -> list[Any]:
        """Let the programs (and those joined before) run to their ends; what each returned, by join.

        With `until` stop as soon as that holds.
        """
        for program in programs:
            self.join(program)
        deliveries = 0
        while not until() and self.deliver():
            deliveries += 1
            assert deliveries < 100_000, f"no end in sight: {self.waits()}"
        waiting = {c.rank: c.call for c in self.living()}
        assert until() or not waiting, f"{waiting} wait for ever: {self.waits()}"
        return [client.value for client in self.clients.values()]

    def waits(self) -> dict[int, str]:
        return self.sequencer.waits() if self.sequencer is not None else {}

    def deliver(self) -> bool:
        """Deliver one message of one link, or let time pass; False when there is nothing to wait for."""
        links = [link for link, messages in self.links.items() if messages and self.is_open(*link)]
        if not links or (self.due() is not None and self.random.random() < self.hasty):
            return self._tick()
        for link in links:
            if link not in self._speeds:
                self._speeds[link] = self.random.choice((0.02, 0.3, 1.0))
        kind, *where = self.random.choices(links, [self._speeds[link] for link in links])[0]
        getattr(self, f"_{kind}")(self.links[kind, *where], *where)
        if self.random.random() < 0.1:
            assert all(self.waits().values())
        return True

    def is_open(self, kind: str, *where: Any) -> bool:
        """Whether this link can deliver now."""
        return True

    def due(self) -> float | None:
        return self.sequencer.due if self.sequencer is not None else None

    def _tick(self) -> bool:
        if (due := self.due()) is None:
            return False
        self.now = due
        self._extend(self.sequencer.tick(self.now))
        return True

    # ── members ─────────────────────────────────────────────────────────────────────────────────

    def _roster(self, link: deque[Any]) -> None:
        roster, joined = link.popleft()
        try:
            self._extend(self.sequencer.roster(roster, self.now))
        except RefusedError:
            assert roster.term < self.book.term  # a new sequencer began with a newer one
        if joined is not None and not joined.dead:
            self.links["wake", joined.id].append(None)

    def _wake(self, link: deque[Any], member: int) -> None:
        """The member computes until its next call."""
        link.popleft()
        client = self.clients[member]
        for before, now in zip(client.quiet, client.memory(), strict=False):
            assert np.array_equal(before, now, equal_nan=True), "memory was touched outside an exchange"
        try:
            if isinstance(client.outcome, HeadwaterError):
                client.call = client.program.throw(client.outcome)
            else:
                client.call = client.program.send(client.outcome)
        except StopIteration as stop:
            client.value = stop.value
            self.depart(client)
            return
        client.exchange = Exchange(client.call.request.number, len(self.servers))
        client.outstanding = True
        self.send(client)

    def depart(self, client: Client) -> None:
        """Its program is over; if it left the log before, the coordinator hears of it."""
        client.ended = True
        if client.leaves():
            self.book.remove(client.id)
            self.links["roster",].append((self.book.view(), None))

    def send(self, client: Client) -> None:
        """Send its outstanding request to every server."""
        call = client.call
        client.connected = client.connected or list(self.serving)
        for server in client.connected:
            memory = (call.mirror.gradients, call.mirror.parameters) if call.mirror else None
            payload = self._payload(client, server.shard) if self.private else {}
            request, rows = self._rows(client, server.shard.index)
            message = ("call", request, call.mirror, memory, payload, rows)
            self.links["request", client.id, client.attempt, server.id].append(message)

    def _rows(self, client: Client, index: int) -> tuple[Any, list[StagedRows]]:
        """The request as one server gets it, with its part of the rows; they always travel."""
        call, rows = client.call, []
        if not (call.pushed or call.pulled):
            return call.request, rows
        for table, (ids, gradients) in call.pushed.items():
            here = servers_of(ids, len(self.servers)) == index
            rows.append(StagedRows(table, ids[here], gradients[here]))
        for table, ids in call.pulled.items():
            here = ids[servers_of(ids, len(self.servers)) == index]
            rows.append(StagedRows(table, here, np.zeros((len(here), client.tables[table]), np.float32)))
        specs = [m.Rows(one.table, len(one.ids), 0, 0) for one in rows]
        pushed, pulled = tuple(specs[: len(call.pushed)]), tuple(specs[len(call.pushed) :])
        return msgspec.structs.replace(call.request, pushed=pushed, pulled=pulled), rows

    def _payload(self, client: Client, shard: Shard) -> dict[int, np.ndarray]:
        call = client.call
        if isinstance(call.request, m.Register):
            start, stop = shard.range_of(call.mirror.layout)
            return {-1: call.mirror.parameters[start:stop].copy()}
        return {id: getattr(client.models[id], call.part).copy() for id in call.models}

    # ── servers ─────────────────────────────────────────────────────────────────────────────────

    def _request(self, link: deque[Any], member: int, attempt: int, server: int) -> None:
        kind, *rest = link.popleft()
        if not self.all[server].down:
            try:
                getattr(self, f"_take_{kind}")(self.all[server], self.clients[member], attempt, *rest)
            except PeerError:
                # What a dead member or a former attempt sent may come after its end was decided.
                client = self.clients[member]
                if not (client.dead or client.ended or attempt < client.attempt):
                    raise

    def _take_call(self, server: Server, client: Client, attempt: int, request, mirror, *memory) -> None:
        windows, payload, rows = memory
        try:
            server.shard.reconnected(client.id, attempt)  # before a byte of the payload is placed
            staging = self._staging(server.shard, request, mirror, windows, payload)
            self._receive(server.shard, client.id, request, payload)
            held = server.shard.hold(client.id, request, staging, rows, attempt)
        except UsageError as error:
            refused = m.Refused(type(error).__name__, str(error))
            answer = m.Answer(request.number, server.shard.version, failure=refused)
            self.links["answer", client.id, attempt, server.id].append((answer, {}, []))
        else:
            pushed = len(request.pushed) if isinstance(request, m.Step) else 0
            self.pulled[client.id, attempt, server.id] = rows[pushed:]
            self.report(server, (held,))

    def _staging(self, shard: Shard, request: Any, mirror: Mirror, memory, payload) -> Staging | None:
        if not isinstance(request, m.Register | m.Attach):
            return None
        start, stop = shard.range_of(mirror.layout)
        if self.private:
            private = payload.get(-1, np.zeros(stop - start, np.float32))
            return Staging(private, private)
        return Staging(*(array[start:stop] for array in memory))

    def _receive(self, shard: Shard, member: int, request: Any, payload: dict[int, np.ndarray]) -> None:
        """Put what came as payload into the private buffer, runs of carried tensors only."""
        carried = [request.carried] if isinstance(request, m.Assign) else getattr(request, "carried", ())
        for one in carried if payload else ():
            vector, staging = shard.vectors[one.model], shard.staging(member, one.model)
            mask = vector.layout.unmask(one.tensors)
            for low, high in vector.layout.runs(mask, vector.start, vector.stop):
                here = slice(low - vector.start, high - vector.start)
                staging.gradients[here] = payload[one.model][low:high]

    def report(self, server: Server, held: tuple[m.Held, ...], prepared: int = 0) -> None:
        server.reported = max(server.reported, prepared)
        sums = tuple(server.shard.take_measured())
        self.links["report", server.id, server.shard.term].append((held, prepared, sums))

    def _report(self, link: deque[Any], server: int, term: int) -> None:
        batch = [link.popleft() for _ in range(self.random.randint(1, len(link)))]
        held = [one for held, _, _ in batch for one in held]
        sums = [one for _, _, sums in batch for one in sums]
        if held and self.random.random() < 0.1:
            again = tuple(self.random.sample(held, self.random.randint(1, len(held))))
            link.append((again, 0, tuple(self.random.sample(sums, self.random.randint(0, len(sums))))))
        prepared = max(prepared for _, prepared, _ in batch)
        index = self.all[server].shard.index
        self._extend(self.sequencer.report(index, held, self.now, term=term, prepared=prepared, sums=sums))

    def _extend(self, entries: list[m.AnyEntry]) -> None:
        for entry in entries:
            assert entry.position == len(self.log) + 1
            self.log.append(entry)
            for server in self.serving:
                self.links["entry", server.id].append(entry)

    def _entry(self, link: deque[Any], server: int) -> None:
        entry = link.popleft()
        self.answer(self.all[server], entry, self.all[server].shard.process(entry))
        if isinstance(entry, m.Measured):
            self.report(self.all[server], ())

    def answer(self, server: Server, entry: m.AnyEntry, answers: list[tuple[int, m.Answer]]) -> None:
        """Note that a server has processed one more entry, and send its answers."""
        shard = server.shard
        attempts = {ticket.member: ticket.attempt for ticket in tickets_of(entry)}
        assert self._versions.setdefault(shard.position, shard.version) == shard.version
        for member, answer in answers:
            values = {model: shard.staging(member, model).parameters for model in answer.values}
            if self.private:
                values = {model: array.copy() for model, array in values.items()}
            client = self.clients[member]
            if client.call is not None and isinstance(client.call.request, m.Checkpoint):
                self.snapshots[member, answer.number][shard.index] = shard.take_snapshot(member)
            attempt = attempts[member]
            if not client.dead:
                pulled = self.pulled[member, attempt, server.id]
                rows = [(one.table, one.ids, one.rows.copy()) for one in pulled]
                self.links["answer", member, attempt, server.id].append((answer, values, rows))

    def _answer(self, link: deque[Any], member: int, attempt: int, server: int) -> None:
        answer, values, rows = link.popleft()
        client, shard = self.clients[member], self.all[server].shard
        assert attempt <= client.attempt
        if attempt < client.attempt or client.ended:
            return
        if self.private:
            for model, array in values.items():
                mirror = client.call.mirror or client.models[model]
                start, stop = shard.range_of(mirror.layout)
                mirror.parameters[start:stop] = array
        for table, ids, values in rows:
            client.rows.update({(table, int(id)): row for id, row in zip(ids, values, strict=True)})
        client.exchange.received(shard.index, answer)
        if not client.exchange.unanswered():
            self._settle(client)

    def _settle(self, client: Client) -> None:
        client.outstanding = False
        try:
            answer = client.exchange.answer()
        except ProtocolError:
            raise
        except HeadwaterError as error:
            client.outcome = error
        else:
            assert answer.version >= client.version
            client.outcome, client.version = answer, answer.version
            if answer.table is not None:
                client.tables[answer.table] = client.call.request.spec.dim
            if answer.model is not None:
                client.call.mirror.id = answer.model
                client.models[answer.model] = client.call.mirror
        client.quiet = [] if self.private else [array.copy() for array in client.memory()]
        self.links["wake", client.id].append(None)


def refused(action: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a state machine refuses this as too old; anything else it raises is raised."""
    try:
        action(*arguments)
    except RefusedError:
        return True
    return False
