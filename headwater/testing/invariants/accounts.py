"""What the members' steps add up to, as the log says.

`Accounts` reads the log for itself, by the meaning of its entries; of what is tested it shares only the
arithmetic of a rule on one vector, in one piece.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater import messages as m
from headwater.log.measures import trust
from headwater.log.norms import Node, norm, total
from headwater.log.rda import coefficients
from headwater.shard.gradient_sums import pair_products, squares, step_lengths
from headwater.shard.merges import Merge
from headwater.shard.snapshot import ModelSnapshot
from headwater.shard.staging import Staging, Update
from headwater.shard.vector import Vector
from headwater.testing.processes.client import Floats
from headwater.testing.workload import Workload

if TYPE_CHECKING:
    from headwater.testing.world import World


@dataclass(frozen=True)
class Saved:
    """What the steps added up to at one version, for a generation that begins with it.

    `taken`: how many were applied; `lost`: whether any was late; `trained`: the trained model, if there.
    """

    version: int = 0
    counts: Floats | None = None
    rows: dict[int, tuple[int, int]] = field(default_factory=dict)
    keeps: dict[int, bytes] = field(default_factory=dict)
    taken: int = 0
    lost: bool = False
    trained: ModelSnapshot | None = None


class Accounts:
    """The log of a generation of a run of `workload`, entry by entry, from what was `saved` on.

    Attributes:
        position: of the last entry read.
        counts: float32[2 × ranks]: what the ledger must say.
        at: version → counts then, of the last `kept` versions; trained: the same of the trained model.
        applied, late: (member, step) → version.
        clocks: of the active members.
        rows: version → what the rows of the table say, by id; of those that were deleted nothing.
        recalled: by (member, number of the exchange), what its rank had kept whenever that was served.
        requests: by (member, number of the exchange), what was asked.
        saved: what a later generation may begin with, by the version of the checkpoint.
    """

    def __init__(self, world: World, workload: Workload, begins: Saved = Saved(), kept: int = 4096) -> None:
        self.world = world
        self.workload = workload
        self.position = 0
        self.version = begins.version
        self.counts = np.zeros(2 * workload.ranks, np.float32) if begins.counts is None else begins.counts
        self.at: dict[int, Floats] = {self.version: self.counts}
        self.trained: dict[int, Floats] = {}
        self.applied: dict[tuple[int, int], int] = {}
        self.late: dict[tuple[int, int], int] = {}
        self.steps: dict[tuple[int, int], int] = {}
        self.decided: dict[int, int] = {}
        self.clocks: dict[int, int] = {}
        self.rows: dict[int, dict[int, tuple[int, int]]] = {self.version: begins.rows}
        self.recalled: defaultdict[tuple[int, int], set[bytes]] = defaultdict(set)
        self.requests: dict[tuple[int, int], m.Request | m.Compare | m.Store] = {}
        self.saved: dict[int, Saved] = {}
        self._begins = begins
        self._kept = kept
        self._keeps = dict(begins.keeps)
        self._carried: dict[int, tuple[int, ...]] = {}
        self._vector = None if begins.trained is None else Vector.restore(begins.trained, self.version)
        if self._vector is not None:
            self.trained[self.version] = self._vector.values.copy()
        self._phases: dict[type, Callable[[Any], None]] = {
            m.Activated: self._activated,
            m.Retired: lambda entry: self._inactive(entry.member),
            m.Stalled: lambda entry: self._inactive(*(ticket.member for ticket in entry.tickets)),
            m.Met: lambda entry: self.clocks.update({ticket.member: 0 for ticket in entry.tickets}),
            m.Committed: self._committed,
            m.Registered: self._registered,
            m.Assigned: self._assigned,
            m.Late: self._came_late,
            m.Served: self._served,
            m.Checkpointed: self._checkpointed,
        }

    def read(self, entry: m.AnyEntry) -> bool:
        """Take the next entry; False where it is known."""
        if entry.position <= self.position:
            return False
        self.position = entry.position
        read = self._phases.get(type(entry))
        if read is not None:
            read(entry)
        return True

    @property
    def taken(self) -> int:
        """How many steps were applied, those before the checkpoint that this began with included."""
        return self._begins.taken + len(self.applied)

    @property
    def lost(self) -> bool:
        """Whether a step came too late."""
        return self._begins.lost or bool(self.late)

    def step_of(self, ticket: m.ExchangeId) -> tuple[int, int]:
        """The member and its step that an entry names."""
        return ticket.member, self.steps[ticket.member, ticket.number]

    def rank_of(self, member: int) -> int:
        """Of the member."""
        return self.world.member(member).rank

    def _activated(self, entry: m.Activated) -> None:
        for member in entry.members:
            self.clocks[member] = entry.clock

    def _inactive(self, *members: int) -> None:
        for member in members:
            self.clocks.pop(member, None)

    def _assigned(self, entry: m.Assigned) -> None:
        deleted = self.requests[entry.source.member, entry.source.number]
        rows = dict(self.rows[self.version])
        if isinstance(deleted, m.DeleteRows) and deleted.rows.table == self.workload.counted:
            rank, step = self._rank_and_step(entry.source)
            for key in self.workload.deleted(rank, step):
                rows.pop(key, None)
        self.rows[entry.version] = rows
        self._reached(entry.version)

    def _committed(self, entry: m.Committed) -> None:
        self.counts = self.counts.copy()
        rows = self.rows[entry.version] = dict(self.rows[self.version])
        for ticket in entry.updates:
            member, step = self.step_of(ticket)
            rank = self.rank_of(member)
            self.counts[rank] += len(self._contained(member, step))
            self.counts[self.workload.ranks + rank] += sum(self._contained(member, step))
            if self.workload.rows:
                for key, (count, total) in self.workload.pushed(rank, self._contained(member, step)).items():
                    before = rows.get(key, (0, 0))
                    rows[key] = before[0] + count, before[1] + total
            request = self.requests[ticket.member, ticket.number]
            if isinstance(request, m.Step) and request.kept is not None:
                self._keeps[rank] = request.kept
            self.applied.setdefault((member, step), entry.version)
            if member in self.clocks:
                self.clocks[member] += 1
        self._train(entry)
        for ticket in entry.updates:
            self._carried.pop(ticket.member, None)
        self._reached(entry.version)

    def _served(self, entry: m.Served) -> None:
        if entry.kind == "recall":
            ticket = entry.ticket
            kept = self._keeps.get(self.rank_of(ticket.member), b"")
            self.recalled[ticket.member, ticket.number].add(kept)

    def _checkpointed(self, entry: m.Checkpointed) -> None:
        vector = self._vector
        self.saved[self.version] = Saved(
            self.version,
            self.counts,
            self.rows[self.version],
            dict(self._keeps),
            self.taken,
            self.lost,
            None if vector is None else vector.snapshot(),
        )

    def _came_late(self, entry: m.Late) -> None:
        member, step = self.step_of(entry.ticket)
        self.late[member, step] = self.version
        if self.workload.carries:
            self._carried[member] = self._contained(member, step)

    def _contained(self, member: int, step: int) -> tuple[int, ...]:
        """The steps whose gradients a step brings: those before it that came too late are carried over."""
        return (*self._carried.get(member, ()), step)

    def _reached(self, version: int) -> None:
        self.version = version
        self.at[version] = self.counts
        self.at.pop(version - self._kept, None)
        self.rows.pop(version - self._kept, None)
        if self._vector is not None:
            self.trained[version] = self._vector.values.copy()
            self.trained.pop(version - self._kept, None)

    # ── the trained model, in one piece ─────────────────────────────────────────────────────────

    def _registered(self, entry: m.Registered) -> None:
        rule = self.workload.rule
        if rule is not None and entry.name == "trained" and self._vector is None:
            spec = self.workload.trained(rule)
            initial = Vector(spec, 0, 0, np.zeros(0, np.float32), 0)
            values = np.zeros(initial.layout.elements, np.float32)
            for view in initial.layout.views(values).values():
                view[...] = 1.0
            self._vector = Vector(spec, 0, len(values), values, self.version)
            self.trained[self.version] = self._vector.values.copy()

    def _train(self, entry: m.Committed) -> None:
        vector = self._vector
        if vector is None:
            return
        updates = [
            update
            for place, ticket in enumerate(entry.updates)
            if (update := self._update(vector, ticket, place)) is not None
        ]
        if updates:
            weights = tuple(self.workload.weight(*self._rank_and_step(ticket)) for ticket in entry.updates)
            merge, whole = self._merge(vector, updates, weights)
            if self.workload.clip_norm is not None and whole is None:
                whole = norm(squares(vector, updates, merge))
            vector.apply(updates, merge, [], entry.version, whole, self._ratios(vector, updates, merge))

    def _rank_and_step(self, ticket: m.ExchangeId) -> tuple[int, int]:
        member, step = self.step_of(ticket)
        return self.rank_of(member), step

    def _merge(
        self, vector: Vector, updates: list[Update], weights: tuple[float, ...]
    ) -> tuple[Merge, float | None]:
        """How these are combined, by the weights that their members gave, whatever the entry says of them.

        Every step contributes, since all count in the ledger; to changes after local steps those alone that
        carry some. The second is the norm of the result, where that follows.
        """
        kind = self.workload.merge or self.world.sync.reduce
        if kind == "sum":
            return Merge(1.0, weights), None
        places = [update.place for update in updates] if self.workload.outer else range(len(weights))
        counted = [weights[place] for place in places]
        if kind == "median" or kind.startswith("trimmed"):
            most = (len(counted) - 1) // 2
            return Merge(middle=(len(counted), most if kind == "median" else min(1, most))), None
        if kind == "rda":
            return self._by_lengths(vector, updates, weights, places)
        equal = len(set(counted)) == 1
        return Merge(float(len(counted))) if equal else Merge(sum(counted), weights), None

    def _ratios(self, vector: Vector, updates: list[Update], merge: Merge) -> dict[int, float]:
        if not vector.layerwise:
            return {}
        nodes: defaultdict[tuple[int, int], list[Node]] = defaultdict(list)
        for tensor, what, node in step_lengths(vector, updates, merge):
            nodes[tensor, what].append(node)
        tensors = {tensor for tensor, _ in nodes}
        return {one: trust(total(nodes[one, -1]), total(nodes[one, -2])) for one in tensors}

    def _by_lengths(
        self, vector: Vector, updates: list[Update], weights: tuple[float, ...], places: Sequence[int]
    ) -> tuple[Merge, float]:
        products: defaultdict[int, dict[tuple[int, int], float]] = defaultdict(dict)
        for tensor, one, other, (_, _, value) in pair_products(vector, updates, places):
            products[tensor][one, other] = value
        scales: dict[int, tuple[float, ...]] = {}
        squared = 0.0
        for tensor in sorted(products):
            factors, length = coefficients(products[tensor], {place: weights[place] for place in places})
            scales[tensor] = tuple(factors.get(place, 0.0) for place in range(len(weights)))
            squared += length * length
        return Merge(scales=scales), math.sqrt(squared)

    def _update(self, vector: Vector, ticket: m.ExchangeId, place: int) -> Update | None:
        member, step = self.step_of(ticket)
        gradients = np.zeros(vector.layout.elements, np.float32)
        names = [
            name
            for name, view in vector.layout.views(gradients).items()
            if self.workload.fill(view, self.rank_of(member), self._contained(member, step), name)
        ]
        if not names:
            return None
        if vector.spec.codec is not None:  # what it said when it made the step's bytes, once
            gradients = self.world.member(member).said[step].copy()
        return Update(Staging(gradients, gradients), vector.layout.unmask(vector.layout.mask(names)), place)

    # ── what values must be ─────────────────────────────────────────────────────────────────────

    def difference(self, values: Floats, version: int) -> str:
        """What is wrong with blocks of the ledger; "" when nothing is, or nobody knows any more."""
        expected = self.at.get(version)
        if expected is None:
            return ""
        blocks = values.reshape(-1, self.workload.block)[:, : len(expected)]
        if (blocks == expected).all():
            return ""
        ranks = self.workload.ranks
        return (
            f"at version {version} the log has {expected[:ranks].astype(int).tolist()} steps of the workers "
            f"with numbers that add up to {expected[ranks:].astype(int).tolist()}, "
            f"its values {[block.astype(int).tolist() for block in blocks]}"
        )
