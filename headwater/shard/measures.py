"""What a server has measured of gradients, for commits that need it.

Invariant: sums stay until their exchanges are over, for they may have to be reported again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headwater import messages as m
from headwater.log.measures import LARGEST
from headwater.shard.gradient_sums import likenesses, pair_products, squares, step_lengths
from headwater.shard.merges import CommitMerges
from headwater.shard.named_vectors import BroughtGradients
from headwater.shard.outstanding import Members
from headwater.shard.replica import LiveInputs
from headwater.shard.vector import Vector
from headwater.shard.vector_work import reduce
from headwater.spec.sync import Reduce


class Measures:
    """Of the models of one server; reads members' memory, changes nothing."""

    def __init__(
        self, vectors: Mapping[int, Vector], members: Members, live: LiveInputs, reduce: Reduce
    ) -> None:
        self._vectors = vectors
        self._members = members
        self._live = live
        self._reduce = reduce
        self._kept: dict[m.Measured, m.Sums] = {}
        self._new: list[m.Sums] = []

    def needed(self, step: m.Step) -> bool:
        """Whether its gradients must be measured before they are applied."""
        return any(self._vectors[one.model].is_measured and any(one.tensors) for one in step.carried)

    def follows(self, entry: m.Measured) -> bool:
        """Whether what an entry asks for depends on values as entries before it leave those: reductions of
        vectors, the directions of steps, how alike changes are."""
        if not self._members.holds(entry.updates[0]):
            return False
        request = self._live.request(entry.updates[0])
        if isinstance(request, m.Meet | m.Operate):
            return True
        held = (ticket for ticket in entry.updates if self._members.holds(ticket))
        return any(self.depends_on_models(self._live.step(ticket)) for ticket in held)

    def measure(self, entry: m.Measured) -> None:
        """Sum up what an entry asks for; blocks for a pass over what that reads, or for several."""
        if isinstance(self._live.request(entry.updates[0]), m.Meet | m.Operate):
            self._reduce_vectors(entry)
        else:
            self._measure_gradients(entry)

    def _reduce_vectors(self, entry: m.Measured) -> None:
        request = self._live.request(entry.updates[0])
        assert isinstance(request, m.Meet | m.Operate)
        work, brought = request.work, BroughtGradients()
        assert work is not None
        if work.gathers:
            brought = self._live.gathered(
                work, [(ticket, self._live.meet(ticket)) for ticket in entry.updates]
            )
        self._keep(
            entry,
            [
                m.Sum(work.model, *node, LARGEST if one.kind == "largest" else -1, number, number)
                for one, number, node in reduce(self._vectors, work, brought)
            ],
        )

    def depends_on_models(self, step: m.Step) -> bool:
        """Whether what is measured of them is of the models' values or last changes too."""
        return any(
            (self._vectors[one.model].layerwise or self._vectors[one.model].last is not None)
            and any(one.tensors)
            for one in step.carried
        )

    def _measure_gradients(self, entry: m.Measured) -> None:
        steps = [(ticket, self._live.step(ticket)) for ticket in entry.updates]
        merges = CommitMerges([step for _, step in steps], entry.weights, self._reduce)
        parts: list[m.Sum] = []
        for model, vector in self._vectors.items():
            updates = self._live.updates(model, vector, steps) if vector.is_measured else []
            if updates and vector.by_lengths:
                contributors = merges.contributors_of(model, vector.spec)
                products = pair_products(vector, updates, contributors, len(steps))
                parts += [m.Sum(model, *node, tensor, *pair) for tensor, *pair, node in products]
            elif updates and (vector.clip_norm is not None or vector.last is not None):
                nodes = squares(vector, updates, merges.of(model, vector.spec))
                parts += [m.Sum(model, *node) for node in nodes]
                if vector.last is not None:
                    alike = likenesses(vector, updates, merges.of(model, vector.spec))
                    parts += [m.Sum(model, *node, -1, *pair) for *pair, node in alike]
            if updates and vector.layerwise:
                directed = step_lengths(vector, updates, merges.of(model, vector.spec))
                parts += [m.Sum(model, *node, tensor, what, what) for tensor, what, node in directed]
        self._keep(entry, parts)

    def _keep(self, entry: m.Measured, parts: Sequence[m.Sum]) -> None:
        self._forget_answered()
        sums = self._kept[entry] = m.Sums(entry.position, tuple(parts))
        self._new.append(sums)

    def _forget_answered(self) -> None:
        over = [one for one in self._kept if not all(self._members.holds(ticket) for ticket in one.updates)]
        for entry in over:
            del self._kept[entry]

    @property
    def has_new(self) -> bool:
        """Whether anything was measured since it was taken last."""
        return bool(self._new)

    def take_new(self) -> list[m.Sums]:
        """What was measured since the last call."""
        new, self._new = self._new, []
        return new

    def all(self) -> tuple[m.Sums, ...]:
        """Of everything that was measured and is not over."""
        self._forget_answered()
        return tuple(self._kept.values())

    def clear(self) -> None:
        """Another sequencer will ask anew."""
        self._kept.clear()
        self._new.clear()
