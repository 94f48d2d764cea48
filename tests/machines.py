"""A whole cluster of state machines in one thread: no sockets, no clock, delivery in an order of chance.

Links are FIFO; which of them delivers next is the seed's choice, and some links are slow. A client is
a generator: it yields the calls that its methods make and is sent (or thrown) what came of each.

What is checked on every delivery, whatever a test is about:
- all servers process the same log, and are at one version at each position of it;
- all servers give one answer to an exchange (`Exchange.answer`), and a member's versions never decrease;
- a server touches a member's memory only to answer the member's outstanding exchange;
- whoever waits can be told for whom; at the end nobody waits.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headwater import messages as m
from headwater.errors import HeadwaterError, ProtocolError, UsageError
from headwater.exchange import Exchange
from headwater.layout import Layout
from headwater.roster import RosterBook
from headwater.rules import Accumulate, Rule
from headwater.sequencer import Sequencer
from headwater.shard import Shard, Staging
from headwater.sync import parse_sync

Program = Callable[["Client"], Generator[Any, Any, Any]]

SHAPES = {"a": (3,), "b": (20, 75), "c": (4000,), "empty": (0, 4), "scalar": ()}
"""Six pages: five servers have some each, and no tensor but `a` starts where a range does."""


def model_spec(name="model", shapes=None, rule: Rule | None = None, rules=(), groups=None) -> m.ModelSpec:
    rules = rules or (rule or Accumulate(),)
    tensors = [
        m.TensorSpec(tensor, tuple(shape), "float32", (groups or {}).get(tensor, 0))
        for tensor, shape in (shapes or SHAPES).items()
    ]
    return m.ModelSpec(name, tuple(tensors), tuple(rule.to_spec() for rule in rules))


@dataclass
class Mirror:
    """A model as one client sees it: its window, or its own arrays when values travel as payload."""

    spec: m.ModelSpec
    layout: Layout
    gradients: np.ndarray
    parameters: np.ndarray
    id: int = -1

    def __post_init__(self):
        self.grads = self.layout.views(self.gradients)
        self.values = self.layout.views(self.parameters)


@dataclass
class Call:
    """One exchange: the request, and for each server what travels or is mapped with it."""

    request: Any
    mirror: Mirror | None = None
    carried: dict[int, np.ndarray] = field(default_factory=dict)


class Client:
    """One member: its rank, its counters, and the calls it can make."""

    def __init__(self, cluster: Cluster, member: m.Member, program: Program) -> None:
        self.cluster = cluster
        self.id, self.rank = member.id, member.index
        self.number = self.steps = self.version = 0
        self.models: dict[int, Mirror] = {}
        self.staged: dict[int, set[str]] = {}
        self.call: Call | None = None
        self.exchange: Exchange | None = None
        self.program = program(self)
        self.outcome: Any = None
        self.value: Any = None
        self.ended = self.dead = False
        self.quiet: list[np.ndarray] = []

    # ── calls to yield ──────────────────────────────────────────────────────────────────────────

    def register(self, spec: m.ModelSpec | None = None, value: float = 0.0) -> Call:
        spec = spec or model_spec()
        mirror = self._mirror(spec)
        for view in mirror.values.values():
            view[...] = value
        return Call(m.Register(self._next(), spec, self._window()), mirror)

    def attach(self, info: m.ModelInfo) -> Call:
        return Call(m.Attach(self._next(), info.model, self._window()), self._mirror(info.spec))

    def step(self, *, read=True, settings=(), step=None) -> Call:
        """What was pushed leaves; `step` other than the next one is a repeat, or an error."""
        if step is None:
            self.steps += 1
        carried = {id: self.models[id].layout.mask(names) for id, names in self.staged.items()}
        self.staged = {}
        request = m.Step(
            self._next(),
            step or self.steps,
            self.version,
            tuple(m.Carried(id, mask) for id, mask in carried.items()),
            tuple(settings),
            read,
        )
        return Call(request, None, {id: self.models[id].gradients for id in carried})

    def pull(self, *models: int, have=-1) -> Call:
        return Call(m.Pull(self._next(), models or tuple(self.models), have))

    def assign(self, model: int = 0, **values: float) -> Call:
        mirror = self.models[model]
        for name, value in values.items():
            mirror.values[name][...] = value
        carried = m.Carried(model, mirror.layout.mask(values))
        return Call(m.Assign(self._next(), carried), None, {model: mirror.parameters})

    def barrier(self) -> Call:
        return Call(m.Meet(self._next(), "barrier", {}))

    def sum(self, **values: float) -> Call:
        return Call(m.Meet(self._next(), "sum", values))

    def end(self) -> Call:
        return Call(m.End(self._next()))

    def stop(self) -> Call:
        return Call(m.Stop(self._next()))

    def leave(self) -> Call:
        return Call(m.Leave(self._next()))

    # ── what a program does between calls ───────────────────────────────────────────────────────

    def push(self, value: float | np.ndarray, names=None, model: int = 0) -> None:
        """Stage `value` for the named tensors (all by default)."""
        mirror = self.models[model]
        for name in mirror.layout.index if names is None else names:
            mirror.grads[name][...] = value if np.isscalar(value) else value[name]
            self.staged.setdefault(model, set()).add(name)

    def read(self, model: int = 0) -> float:
        """The one value that all elements of a model have, on every server."""
        values = {float(x) for view in self.models[model].values.values() for x in np.unique(view)}
        assert len(values) == 1, f"client {self.rank} reads a mixture of {sorted(values)[:5]}"
        return values.pop()

    def _mirror(self, spec: m.ModelSpec) -> Mirror:
        layout = Layout(spec.tensors)
        return Mirror(spec, layout, *(np.zeros(layout.elements, np.float32) for _ in range(2)))

    def _window(self) -> m.WindowSpec | None:
        return None if self.cluster.private else m.WindowSpec(0, 0)

    def _next(self) -> int:
        self.number += 1
        return self.number


class Cluster:
    """`workers` declared workers, `servers` servers; `private`: values travel instead of being shared.

    Attributes:
        log: the entries, in order.
        clients: all there ever were.
    """

    def __init__(self, mode: str, *, workers: int, servers: int, seed: int = 0, private: bool = False):
        self.random = random.Random(seed)
        self.private = private
        self.servers = range(servers)
        self.sync = parse_sync(mode)
        self.book = RosterBook(workers, servers)
        self.sequencer = Sequencer(servers, self.sync)
        self.shards = [Shard(i, servers, self.sync.reduce) for i in self.servers]
        self.log: list[m.AnyEntry] = []
        self.clients: dict[int, Client] = {}
        self.links: dict[tuple[Any, ...], deque[Any]] = defaultdict(deque)
        self._speeds: dict[tuple[Any, ...], float] = {}
        self._versions: dict[int, int] = {}
        for i in self.servers:
            self.book.join(m.Join("server", i, 0, "here"))

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
        for i in self.servers:
            sent = self.links["request", client.id, i]
            while sent and self.random.random() < 0.5:
                sent.pop()
            self.links["answer", client.id, i].clear()
        self.links["wake", client.id].clear()
        self.links["roster",].append((self.book.view(), None))

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
            assert deliveries < 100_000, f"no end in sight: {self.sequencer.waits()}"
        waiting = {c.rank: c.call for c in self.clients.values() if not (c.ended or c.dead)}
        assert until() or not waiting, f"{waiting} wait for ever: {self.sequencer.waits()}"
        return [client.value for client in self.clients.values()]

    def deliver(self) -> bool:
        """Deliver one message of one link; False when there is none."""
        links = [link for link, messages in self.links.items() if messages]
        if not links:
            return False
        for link in links:
            if link not in self._speeds:
                self._speeds[link] = self.random.choice((0.02, 0.3, 1.0))
        kind, *where = self.random.choices(links, [self._speeds[link] for link in links])[0]
        getattr(self, f"_{kind}")(self.links[kind, *where], *where)
        if self.random.random() < 0.1:
            assert all(self.sequencer.waits().values())
        return True

    # ── deliveries ──────────────────────────────────────────────────────────────────────────────

    def _roster(self, link: deque[Any]) -> None:
        roster, joined = link.popleft()
        self._extend(self.sequencer.roster(roster))
        if joined is not None and not joined.dead:
            self.links["wake", joined.id].append(None)

    def _wake(self, link: deque[Any], member: int) -> None:
        """The member computes until its next call."""
        link.popleft()
        client = self.clients[member]
        for before, now in zip(client.quiet, _memory(client), strict=False):
            assert np.array_equal(before, now, equal_nan=True), "memory was touched outside an exchange"
        try:
            if isinstance(client.outcome, HeadwaterError):
                call = client.program.throw(client.outcome)
            else:
                call = client.program.send(client.outcome)
        except StopIteration as stop:
            client.value, client.ended = stop.value, True
            if isinstance(getattr(client.call, "request", None), m.Leave):
                self.book.remove(member)
                self.links["roster",].append((self.book.view(), None))
            return
        client.call, client.exchange = call, Exchange(call.request.number, len(self.servers))
        for i in self.servers:
            self.links["request", member, i].append((call, self._payload(call, i)))

    def _payload(self, call: Call, server: int) -> dict[int, np.ndarray]:
        if not self.private:
            return {}
        if isinstance(call.request, m.Register):
            start, stop = self.shards[server].range_of(call.mirror.layout)
            return {-1: call.mirror.parameters[start:stop].copy()}
        return {id: array.copy() for id, array in call.carried.items()}

    def _request(self, link: deque[Any], member: int, server: int) -> None:
        call, payload = link.popleft()
        shard, client = self.shards[server], self.clients[member]
        try:
            staging = self._staging(shard, call, payload)
            self._receive(shard, member, call.request, payload)
            held = shard.hold(member, call.request, staging)
        except UsageError as error:
            refused = m.Refused(type(error).__name__, str(error))
            answer = m.Answer(call.request.number, shard.version, failure=refused)
            self.links["answer", member, server].append((answer, {}))
        except ProtocolError:
            if not client.dead:  # what a dead member sent may come after its end was decided
                raise
        else:
            self.links["report", server].append(held)

    def _staging(self, shard: Shard, call: Call, payload: dict[int, np.ndarray]) -> Staging | None:
        if not isinstance(call.request, m.Register | m.Attach):
            return None
        start, stop = shard.range_of(call.mirror.layout)
        if self.private:
            private = payload.get(-1, np.zeros(stop - start, np.float32))
            return Staging(private, private)
        return Staging(call.mirror.gradients[start:stop], call.mirror.parameters[start:stop])

    def _receive(self, shard: Shard, member: int, request: Any, payload: dict[int, np.ndarray]) -> None:
        """Put what came as payload into the private buffer, runs of carried tensors only."""
        carried = [request.carried] if isinstance(request, m.Assign) else getattr(request, "carried", ())
        for one in carried if payload else ():
            vector, staging = shard.vectors[one.model], shard.staging(member, one.model)
            mask = vector.layout.unmask(one.tensors)
            for low, high in vector.layout.runs(mask, vector.start, vector.stop):
                here = slice(low - vector.start, high - vector.start)
                staging.gradients[here] = payload[one.model][low:high]

    def _report(self, link: deque[Any], server: int) -> None:
        held = [link.popleft() for _ in range(self.random.randint(1, len(link)))]
        self._extend(self.sequencer.report(server, held))

    def _extend(self, entries: list[m.AnyEntry]) -> None:
        for entry in entries:
            assert entry.position == len(self.log) + 1
            self.log.append(entry)
            for i in self.servers:
                self.links["entry", i].append(entry)

    def _entry(self, link: deque[Any], server: int) -> None:
        shard, entry = self.shards[server], link.popleft()
        answers = shard.process(entry)
        assert self._versions.setdefault(entry.position, shard.version) == shard.version
        for member, answer in answers:
            values = {model: shard.staging(member, model).parameters for model in answer.values}
            if self.private:
                values = {model: array.copy() for model, array in values.items()}
            if not self.clients[member].dead:
                self.links["answer", member, server].append((answer, values))

    def _answer(self, link: deque[Any], member: int, server: int) -> None:
        answer, values = link.popleft()
        client = self.clients[member]
        if self.private:
            for model, array in values.items():
                mirror = client.call.mirror or client.models[model]
                start, stop = self.shards[server].range_of(mirror.layout)
                mirror.parameters[start:stop] = array
        client.exchange.received(server, answer)
        if not client.exchange.unanswered():
            self._settle(client)

    def _settle(self, client: Client) -> None:
        try:
            answer = client.exchange.answer()
        except ProtocolError:
            raise
        except HeadwaterError as error:
            client.outcome = error
        else:
            assert answer.version >= client.version
            client.outcome, client.version = answer, answer.version
            if answer.model is not None:
                client.call.mirror.id = answer.model
                client.models[answer.model] = client.call.mirror
        client.quiet = [] if self.private else [array.copy() for array in _memory(client)]
        self.links["wake", client.id].append(None)


def _memory(client: Client) -> list[np.ndarray]:
    return [array for model in client.models.values() for array in (model.gradients, model.parameters)]
