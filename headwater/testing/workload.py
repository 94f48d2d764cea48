"""What members of a simulated run do: steps that count themselves, so values say what they contain.

The model `ledger` has, within each server's range, two elements a rank: a step adds 1 to the first and its
own number to the second. So on every server the elements of a rank say how many of its steps are contained,
and which.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import CheckpointError, ConnectionLostError, RefusedError
from headwater.spec.initializers import Zeros
from headwater.spec.layout import PAGE
from headwater.spec.rules import Accumulate, Rule
from headwater.testing.processes.client import (
    Asked,
    AwaitAnswer,
    Call,
    Client,
    Question,
    Rest,
    SendAhead,
    WriteNow,
)

if TYPE_CHECKING:
    from headwater.testing.following import FollowedRows

LEDGER, TRAINED = 0, 1
"""Ids of the two models."""

ROWS = 0
"""Id of the table that followers read."""

KEYS = 5
"""How many rows of the counting table are counted in by rank."""

Steps = Generator[Asked, Any, Any]


@dataclass(frozen=True)
class Workload:
    """Of `ranks` workers over `servers` servers, `steps` steps each.

    Attributes:
        seed: of gradients and of who does what.
        rule: a second model is trained with it, on gradients that follow from (seed, rank, step).
        clip_norm: the largest norm of a gradient of that model.
        splits: the steps are samples that all workers read together, as the coordinator leases them.
        meets: after this many steps a worker waits in a barrier, once; 0: never.
        checkpoints: after this many steps the first worker has a checkpoint taken; 0: never.
        merge: how gradients of that model become one, as its spec says.
        carries: what came too late for its round goes out with the next step.
        weighted: steps have weights, which follow from (rank, step) and differ within a round.
        outer: gradients of that model are changes after local steps.
        fragments: steps are outer ones, of the two models in turn, and now and then one that is none.
        codec: how these are represented, as that model's spec says.
        followed: a table that steps push to, for followers.
        rows: steps also count themselves in rows of a table, which are read, asked for ahead and deleted.
        keeps: each step has its rank keep something, which the log gives to the next incarnation.
        ahead: every second step is begun before it is waited for.
        verifies: readers have standbys compared with their servers.
        asks: the first worker has a checkpoint written after every second step.
    """

    ranks: int
    servers: int
    steps: int
    seed: int = 0
    rule: Rule | None = None
    clip_norm: float | None = None
    splits: bool = False
    meets: int = 0
    checkpoints: int = 0
    weighted: bool = False
    merge: str | None = None
    carries: bool = False
    outer: bool = False
    fragments: bool = False
    codec: str | None = None
    followed: FollowedRows | None = None
    rows: bool = False
    keeps: bool = False
    ahead: bool = False
    verifies: bool = False
    asks: bool = False

    # ── what is trained ─────────────────────────────────────────────────────────────────────────

    @property
    def block(self) -> int:
        """Elements of each server's range of the ledger."""
        return -(-2 * self.ranks // PAGE) * PAGE

    def ledger(self) -> m.ModelSpec:
        """The model that counts."""
        tensor = m.TensorSpec("count", (self.servers * self.block,), "float32")
        return m.ModelSpec("ledger", (tensor,), (Accumulate().to_spec(),))

    def trained(self, rule: Rule) -> m.ModelSpec:
        """The model that `rule` trains: two tensors, of which the second begins within a server's range."""
        shapes = {"a": (70,), "b": (self.servers * PAGE - 100,)}
        tensors = tuple(m.TensorSpec(name, shape, "float32") for name, shape in shapes.items())
        rules = (rule.to_spec(),)
        return m.ModelSpec(
            "trained", tensors, rules, self.clip_norm, self.merge, self.codec, outer=self.outer
        )

    def gradient(self, rank: int, step: int, name: str, size: int) -> NDArray[np.float32]:
        """Of a tensor of the trained model: float32[size]."""
        random = np.random.default_rng([self.seed, rank, step, ord(name)])
        return random.standard_normal(size, dtype=np.float32)

    def carried(self, rank: int, step: int) -> list[str]:
        """The tensors of the trained model that a step carries."""
        return [["a", "b"], ["b"], ["a"], []][(rank + step) % 4]

    def fill(self, grads: NDArray[np.float32], rank: int, steps: tuple[int, ...], name: str) -> bool:
        """Write what these steps of a worker have for a tensor, added up; False where none carries it."""
        parts = [
            self.gradient(rank, step, name, grads.size).reshape(grads.shape)
            for step in steps
            if name in self.carried(rank, step)
        ]
        for number, part in enumerate(parts):
            grads[...] = grads + part if number else part
        return bool(parts)

    def weight(self, rank: int, step: int) -> float:
        """What a step of the worker counts in a mean; some of a round are equal, some not."""
        return float(1 + (3 * rank + step * step) % 5) if self.weighted else 1.0

    def pace(self, rank: int, step: int) -> m.Pace | None:
        """What a worker says of its local steps; some say nothing."""
        if not self.outer or not (rank + step) % 3:
            return None
        return m.Pace(0.001 * (1 + rank), step % 4, 0.0005)

    def fragment(self, step: int) -> int:
        """The model whose change a step sends, or -1."""
        models = (LEDGER, -1) if self.rule is None else (LEDGER, TRAINED, LEDGER, TRAINED, -1)
        return models[step % len(models)] if self.fragments else -1

    @property
    def counted(self) -> int:
        """Id of the table that counts."""
        return 0 if self.followed is None else ROWS + 1

    def table(self) -> m.TableSpec:
        """The table that counts: a row has a number of steps, and the sum of their numbers."""
        return m.TableSpec("counted", 2, Accumulate().to_spec(), Zeros().to_spec(), 0, None, None)

    def keys(self, rank: int, step: int) -> tuple[int, ...]:
        """The rows in which a step of the worker counts itself."""
        return (rank + step) % KEYS, KEYS + step % 3

    def pushed(self, rank: int, steps: tuple[int, ...]) -> dict[int, tuple[int, int]]:
        """What these steps of a worker add to rows."""
        rows: dict[int, tuple[int, int]] = {}
        for step in steps:
            for key in self.keys(rank, step):
                count, total = rows.get(key, (0, 0))
                rows[key] = count + 1, total + step
        return rows

    def deleted(self, rank: int, step: int) -> tuple[int, ...]:
        """The rows that the worker deletes after this step."""
        return ((2 * rank + step) % KEYS, KEYS + rank % 3) if (rank + step) % 4 == 3 else ()

    # ── what a worker does ──────────────────────────────────────────────────────────────────────

    def program(self, me: Client) -> Steps:
        """Declare the models, take all steps, leave."""
        if self.followed is not None:
            yield me.register_table(self.followed.spec)
        yield me.register(self.ledger())
        if self.rule is not None:
            yield me.register(self.trained(self.rule), value=1.0)
        if self.rows:
            yield me.register_table(self.table())
        if self.keeps:
            yield me.recall()
        if self.splits:
            yield from self._read_splits(me)
        else:
            yield from self._read_part(me)
        yield me.leave()

    def reader(self, me: Client) -> Steps:
        """Read the ledger, as often as a worker takes steps, and leave."""
        while not me.is_declared:
            yield Rest()
        yield me.attach(m.ModelInfo(LEDGER, self.ledger()))
        for pull in range(self.steps):
            yield me.pull(have=me.version if pull % 2 else -1)
            if self.verifies and pull % 2:
                yield me.verify()
                for one in (yield me.compare()):
                    assert one.standby in (None, one.own), f"a standby differs: {one}"
        yield me.leave()

    def _read_part(self, me: Client) -> Steps:
        """A part of its own, from where the log recorded its rank."""
        places = me.recorded.places if me.recorded is not None else ()
        begin = places[0].done if places else 0
        for done in range(begin, self.steps):
            place = m.StaticProgress(0, 1, self.steps, 0, done + 1)
            yield from self._step(me, m.Position(me.rank, 0, (place,)))
            if done + 1 == self.meets:
                yield me.end()
                yield from self._meet(me)
            if done + 1 == self.checkpoints and me.rank == 0:
                yield me.checkpoint()
        yield me.end()

    def _read_splits(self, me: Client) -> Steps:
        """What the coordinator leases, until nothing is left."""
        size = self.steps * self.ranks
        reply = yield me.lease(0, 1, size, 1, 0)
        while isinstance(reply, m.Leased) or not reply.over:
            if isinstance(reply, m.Leased):
                for start in range(reply.span.start, reply.span.stop):
                    span = m.Span(reply.span.epoch, start, start + 1)
                    visit = m.DynamicProgress(0, 1, size, (span,))
                    yield from self._step(me, m.Position(me.rank, 0, (), (visit,)))
                reply = yield me.lease(0, 1, size, 1, 0)
            else:
                yield me.end(
                    m.Position(me.rank, 0)
                )  # whoever may not lead too far does not wait for this one
                reply = yield Question()
        yield me.end(m.Position(me.rank, 1))

    def _fill(self, me: Client, grads: NDArray[np.float32], contained: tuple[int, ...], name: str) -> bool:
        """Stage what these steps have; with a codec the earlier ones are there as its bytes say."""
        if self.codec is None or len(contained) == 1:
            return self.fill(grads, me.rank, contained, name)
        earlier = any(name in self.carried(me.rank, step) for step in contained[:-1])
        kept = grads.copy()
        new = self.fill(grads, me.rank, contained[-1:], name)
        if earlier:
            grads[...] = kept + grads if new else kept
        return earlier or new

    def _step(self, me: Client, position: m.Position) -> Steps:
        step = me.steps + 1
        contained = (*me.late_steps, step)
        counts = me.windows[LEDGER].gradients.reshape(self.servers, self.block)
        counts[:, me.rank] = len(contained)
        counts[:, self.ranks + me.rank] = sum(contained)
        me.carry("count", LEDGER)
        if self.rule is not None:
            for name, grads in me.windows[TRAINED].grads.items():
                if self._fill(me, grads, contained, name):
                    me.carry(name, TRAINED)
        if self.followed is not None:
            me.push_rows(self.followed.pushed(me.rank, step), step, ROWS)
        if self.rows:
            sums = self.pushed(me.rank, contained)
            me.push_rows(list(sums), np.array(list(sums.values()), np.float32), self.counted)
            if step % 2:
                me.prefetch(self.counted, np.array(self.keys(me.rank, step + 1)))
        kept = f"{me.rank} kept {step} of {me.id}".encode() if self.keeps else None
        weight, pace = self.weight(me.rank, step), self.pace(me.rank, step)
        fragment = self.fragment(step)
        call = me.step(position=position, weight=weight, pace=pace, fragment=fragment, kept=kept)
        answer = yield from self._ask(me, call, ahead=step % 2 == 0)
        late = answer.result is not None and not answer.result.applied
        me.late_steps = contained if late and self.carries else ()
        if self.asks and me.rank == 0 and step % 2:
            yield from self._take_checkpoint()
        if self.followed is not None and (ids := self.followed.deleted(me.rank, step)):
            yield me.delete_rows(ROWS, np.array(ids, np.int64))
        if answer.version % 5 == me.rank % 5:
            yield me.pull(have=me.version if answer.version % 2 else -1)
        if self.rows:
            yield from self._look_at_rows(me, step)

    def _ask(self, me: Client, call: Call, ahead: bool) -> Steps:
        """Its answer; where it is asked for `ahead`, after a while."""
        if self.ahead and ahead:
            yield SendAhead(call)
            return (yield AwaitAnswer())
        return (yield call)

    def _take_checkpoint(self) -> Steps:
        """Have one written; a coordinator that is away, or a server that is lost meanwhile, prevents it."""
        try:
            yield WriteNow()
        except (CheckpointError, ConnectionLostError, RefusedError):
            pass

    def _look_at_rows(self, me: Client, step: int) -> Steps:
        """Read more of them than fitted into the member's memory before, and delete some."""
        ids = np.array(self.keys(me.rank, step + 1))
        if step % 2 and not me.read_ahead(self.counted, ids):
            yield me.pull_rows({self.counted: ids})
        if (me.rank + step) % 3 == 0:
            yield from self._ask(me, me.pull_rows({self.counted: np.arange(4 * step)}), ahead=step % 2 == 1)
        gone = self.deleted(me.rank, step)
        if gone:
            yield me.delete_rows(self.counted, np.array(gone))

    def _meet(self, me: Client) -> Steps:
        """All together, once."""
        if self.seed % 2:
            yield me.barrier()
            return
        answer = yield me.sum(x=me.rank + 1.0)
        assert answer.sums == {"x": float(sum(rank + 1 for rank in answer.ranks))}, answer
