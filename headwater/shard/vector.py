"""A server's range of one model: parameters, the rule's state, and the passes over them.

Invariants:
- What happens to an element depends on its tensor's history alone, never on where a range is cut.
- A tensor that no update carries is not touched; one that some carry is divided by all contributors.
- State lies in parallel vectors; the gaps between tensors stay zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import msgspec
import numpy as np
from numpy.typing import NDArray

from headwater.kernels import add_up, copy_out, dense, middle, weigh
from headwater.kernels.fused import Update as Kernel
from headwater.log.norms import scale
from headwater.messages import ModelSpec, ModelStatistics, ProgramWrite, VectorWork
from headwater.shard.governed import GovernedRules
from headwater.shard.last_change import NAME as LAST_CHANGE
from headwater.shard.last_change import LastChange
from headwater.shard.layers import scaled
from headwater.shard.merges import PLAIN, Merge
from headwater.shard.named_vectors import BroughtGradients, NamedVectors
from headwater.shard.pattern import Pattern, addresses
from headwater.shard.snapshot import ModelSnapshot
from headwater.shard.staging import Array, Staging, Update
from headwater.shard.writes import Writes
from headwater.spec.layout import Layout
from headwater.spec.rules import Rule, evaluated

CHUNK = 1 << 15
"""Elements merged before the rule gets them, where that is no plain sum: few enough to stay in cache."""


class Vector:
    """The range [start, stop) of a model's vector on one server.

    Attributes:
        values: float32[stop - start].
        counts: int64[tensors], updates of each tensor.
        updates: commits that touched this model, which schedules are evaluated at.
        changed: version of the last change.
        clip_norm: the largest norm that the gradient of a commit may have; None: any.
        governed: its rules, by parameter group.
        named: vectors beside the values.
        last: the last commit's change, of a model whose gradients are such; None of others.
    """

    def __init__(self, spec: ModelSpec, start: int, stop: int, initial: Array, version: int) -> None:
        self.spec = spec
        self.layout = Layout(spec.tensors)
        self.start, self.stop = start, stop
        self.values = np.array(initial, dtype=np.float32)
        self.updates = 0
        self.changed = version
        self.governed = GovernedRules(spec.rules)
        self._writes = Writes(f"model {spec.name!r}")
        self.last = LastChange(stop - start) if spec.outer else None
        self.states = self._initial_states()
        self.named = NamedVectors(start, self._tensors_here())
        self.counts = np.zeros(len(self.layout.tensors), dtype=np.int64)
        first = int(np.searchsorted(self.layout.stops, start, side="right"))
        last = int(np.searchsorted(self.layout.starts, stop, side="left"))
        self._here = slice(first, max(first, last))
        self._ratios: Mapping[int, float] = {}
        self._pattern: Pattern | None = None  # of the last update
        self._kernels: dict[int, tuple[Rule, Kernel, list[Array]]] = {}  # by parameter group

    def _tensors_here(self) -> list[tuple[int, int]]:
        """Where elements of tensors are in this range, without the gaps."""
        bounds = zip(self.layout.starts.tolist(), self.layout.stops.tolist(), strict=True)
        cut = [(max(low, self.start) - self.start, min(high, self.stop) - self.start) for low, high in bounds]
        return [(low, high) for low, high in cut if low < high]

    def _initial_states(self) -> dict[str, Array]:
        states: dict[str, Array] = {}
        for group, rule in enumerate(self.rules):
            for name, value in rule.states().items():
                vector = states.setdefault(name, np.zeros_like(self.values))
                for low, high in self.layout.runs(self.layout.groups == group, self.start, self.stop):
                    vector[low - self.start : high - self.start] = value
        return states

    @property
    def clip_norm(self) -> float | None:
        return self.spec.clip_norm

    @property
    def by_lengths(self) -> bool:
        """Whether its gradients are merged by their lengths."""
        return self.spec.merge == "rda"

    @property
    def is_measured(self) -> bool:
        """Whether its gradients must be measured on all servers before they are applied."""
        return self.by_lengths or self.clip_norm is not None or self.spec.outer or self.layerwise

    @property
    def layerwise(self) -> bool:
        """Whether its rule scales each tensor's step by how large that is over all servers."""
        return self.rules[0].layerwise

    @property
    def rules(self) -> list[Rule]:
        """The rule of each parameter group."""
        return self.governed.rules

    def declared(self, spec: ModelSpec) -> str:
        """A member declares this model, which is no other one; what a person should know of it, or "".

        After a resume the first declaration says how gradients are merged, clipped and represented, and which
        settings are new.

        Raises:
            RegistrationError: a new setting needs other states. Nothing changed.
        """
        resumed = self.governed.resumed
        told = self.governed.declare(f"model {spec.name!r}", spec.rules)
        changed = [] if not told else [told]
        for what in ("merge", "clip_norm", "codec", "values_codec"):
            before, now = getattr(self.spec, what), getattr(spec, what)
            if resumed and before != now:
                changed.insert(0, f"{what} was {before} in the checkpoint and is {now} from now on")
        if resumed:
            fields = {what: getattr(spec, what) for what in ("merge", "clip_norm", "codec", "values_codec")}
            self.spec = msgspec.structs.replace(self.spec, **fields)
        return "; ".join(changed)

    def apply(
        self,
        updates: Sequence[Update],
        merge: Merge,
        answers: Sequence[Staging],
        version: int,
        norm: float | None = None,
        ratios: Mapping[int, float] = MappingProxyType({}),
    ) -> None:
        """Apply what `merge` makes of `updates`, in the given order; write all values to `answers`.

        `norm`: of that gradient over all servers, where it is to be clipped. `ratios`: by tensor, what a
        layerwise rule's step is multiplied by. Every piece of memory is read and written once; blocks for one
        pass over the range.
        """
        self.governed.begin()
        self._ratios = ratios
        merge = self.own_merge(merge)
        pattern = self._pattern_of(
            [update.carried for update in updates], merge.scales is not None or self.layerwise
        )
        self.counts[pattern.touched] += 1
        over = self._clipped(merge.divisor, norm)
        gradients = [update.staging.gradients_at for update in updates]
        places = pattern.places(gradients, [staging.parameters_at for staging in answers])
        room = room_for(merge)
        for segment, (starts, out) in zip(pattern.segments, places, strict=True):
            low, high, here, tensor, carriers = segment
            if not carriers:
                copy_out(self.values[here], out)
                continue
            if merge.is_sum:
                if self.last is not None:
                    self.last.note(here, starts)
                self._run(tensor, starts, over, here, out)
                continue
            for piece, merged in self.merged(updates, merge, tensor, low, high, room):
                if self.last is not None:
                    self.last.note(piece, merged)
                there = addresses([staging.parameters_at for staging in answers], piece.start)
                self._run(tensor, merged, over, piece, there)
        self.updates += 1
        self.changed = version

    def _pattern_of(self, carried: Sequence[NDArray[np.bool_]], each_tensor: bool) -> Pattern:
        pattern = self._pattern
        if each_tensor or pattern is None or not pattern.is_of(carried):
            cuts = list(self.segments(np.stack(carried), each_tensor))
            pattern = Pattern(carried, cuts, self.start)
            self._pattern = None if each_tensor else pattern
        return pattern

    def _run(
        self,
        tensor: int,
        gradients: NDArray[np.int64],
        divisor: float,
        here: slice,
        answers: NDArray[np.int64],
    ) -> None:
        """One pass of the rule of `tensor` over a piece of the range, whose tensors are all alike."""
        group = int(self.layout.groups[tensor])
        rule = self.rules[group]
        known = self._kernels.get(group)
        if known is None or known[0] is not rule:
            known = rule, dense(rule), [self.states[name] for name in rule.states()]
            self._kernels[group] = known
        _, kernel, vectors = known
        scalars = rule.scalars(self.updates, int(self.counts[tensor]))
        if rule.layerwise:
            scalars = scaled(scalars, self._ratios.get(tensor, 1.0))
        states = tuple([vector[here] for vector in vectors])
        kernel(gradients, divisor, self.values[here], states, scalars, answers)

    def check(self, touched: NDArray[np.bool_]) -> None:
        """Refuse an update of these tensors, bool[tensors], that a rule cannot be run for.

        Raises:
            ConfigurationError: a user's rule has no scalars for it, on every server alike.
        """
        counts = zip(self.layout.groups[touched].tolist(), self.counts[touched].tolist(), strict=True)
        for group, count in sorted(set(counts)):
            evaluated(self.rules[group], self.updates, count + 1)

    def own_merge(self, merge: Merge) -> Merge:
        """As this model merges: all groups have one kind of rule, which may take every gradient as it is."""
        return PLAIN if self.rules[0].always_sum else merge

    def merged(
        self, updates: Sequence[Update], merge: Merge, tensor: int, low: int, high: int, room: Array
    ) -> Iterator[tuple[slice, NDArray[np.int64]]]:
        """Addresses of gradients whose plain sum is the merged one, for each piece [low, high) is cut into.

        Yields the piece within this range, and the addresses, which may point into `room`. Empty where no
        update carries the tensor.
        """
        by = [update for update in updates if update.carried[tensor]]
        starts = [update.staging.gradients_at for update in by]
        if not by:
            return
        if merge.is_sum:
            here = slice(low - self.start, high - self.start)
            yield here, addresses(starts, here.start)
            return
        weights = merge.weights_of([update.place for update in by], tensor)
        for begin in range(low, high, CHUNK):
            here = slice(begin - self.start, min(begin + CHUNK, high) - self.start)
            merged = room[: here.stop - here.start]
            if weights is not None:
                weigh(addresses(starts, here.start), weights, merged)
            elif merge.middle is not None:
                contributors, left_out = merge.middle
                middle(addresses(starts, here.start), contributors - len(by), left_out, merged)
            yield here, addresses([merged.ctypes.data], 0)

    def _clipped(self, divisor: float, norm: float | None) -> float:
        """What the sum is divided by to be clipped too: with no norm too large, the same to the bit."""
        if norm is None or self.clip_norm is None:
            return divisor
        factor = scale(self.clip_norm, norm)
        return divisor / factor if factor else math.inf

    def reduce(self, updates: Sequence[Update], merge: Merge, out: Array) -> None:
        """Write what `merge` makes of `updates`, but for its divisor, to `out`, float32[stop - start].

        Applying `out` alone by `merge.summed()`, as an update that carries what any of them did, gives the
        same bits as applying them all. What nobody carries is left as it is. Blocks for one pass over the
        range.
        """
        merge = self.own_merge(merge)
        carried = np.stack([update.carried for update in updates])
        room = room_for(merge)
        for low, high, tensor in self.segments(carried, merge.scales is not None):
            for here, gradients in self.merged(updates, merge, tensor, low, high, room):
                add_up(gradients, out[here])

    def segments(
        self, carried: NDArray[np.bool_], each_tensor: bool = False
    ) -> Iterator[tuple[int, int, int]]:
        """Cut the range where who carries, the parameter group or the count changes, or at each tensor.

        Yields (first element, one past the last, a tensor of the segment).
        """
        here = self._here
        if here.start == here.stop:
            if self.stop > self.start:
                yield self.start, self.stop, max(here.start - 1, 0)
            return
        keys = np.vstack([carried[:, here], self.layout.groups[here], self.counts[here]])
        if each_tensor:
            keys = np.vstack([keys, np.arange(here.start, here.stop)])
        firsts = here.start + np.flatnonzero((keys[:, 1:] != keys[:, :-1]).any(axis=0)) + 1
        bounds = [self.start, *(int(self.layout.starts[i]) for i in firsts), self.stop]
        for low, high, tensor in zip(bounds[:-1], bounds[1:], [here.start, *map(int, firsts)], strict=True):
            if low < high:
                yield low, high, tensor

    def write(self, answers: Sequence[Staging]) -> None:
        """Write all values to `answers`."""
        copy_out(self.values, addresses([staging.parameters_at for staging in answers], 0))

    def assign(self, source: Staging, carried: NDArray[np.bool_], version: int) -> None:
        """Take the carried tensors' values from `source.parameters`; the rule's state stays."""
        for low, high in self.layout.runs(carried, self.start, self.stop):
            here = slice(low - self.start, high - self.start)
            self.values[here] = source.parameters[here]
        self.changed = version

    def admits(self, kind: str, written: ProgramWrite, member: int) -> bool:
        """Whether to take what a program wrote; False where it is there already. Raises UsageError."""
        return self._writes.admit(kind, written, member, self.updates)

    def load_state(
        self, states: Array, carried: NDArray[np.bool_], counts: Sequence[int], updates: int, version: int
    ) -> None:
        """Take the carried tensors' states, this range of each one after the other, and their counts.

        `updates`: what the model has had from now on, -1 for those that it has had.
        """
        parts = states.reshape(len(self.states), -1) if self.states else ()
        for low, high in self.layout.runs(carried, self.start, self.stop):
            here = slice(low - self.start, high - self.start)
            for state, part in zip(self.states.values(), parts, strict=True):
                state[here] = part[here]
        self.counts[carried] = np.array(counts, dtype=np.int64)[carried]
        self._pattern = None  # neighbours may differ now
        if updates >= 0:
            self._writes.counted_anew(self.updates, updates)
            self.updates = updates
        self.changed = version

    def perform(self, work: VectorWork, gathered: BroughtGradients, version: int) -> None:
        """Do what was checked to the values and the named vectors; blocks for a pass over those."""
        self.named.perform(work, self.values, gathered)
        self.changed = version

    def arrays(self) -> list[Array]:
        """All that are as long as the range."""
        return [self.values, *self._all_states().values(), *self.named.arrays.values()]

    def _all_states(self) -> dict[str, Array]:
        """The rule's, and the last change where it is kept."""
        return self.states if self.last is None else {**self.states, LAST_CHANGE: self.last.array}

    def snapshot(self, copy: Callable[[Array], Array] = np.copy) -> ModelSnapshot:
        """A copy of all of it but `changed`; `restore` is the inverse. `copy` makes those of large arrays."""
        return ModelSnapshot(
            spec=self.spec,
            rules=self.governed.specs,
            start=self.start,
            stop=self.stop,
            values=copy(self.values),
            states={name: copy(state) for name, state in self._all_states().items()},
            counts=self.counts.copy(),
            updates=self.updates,
            program=msgspec.structs.replace(
                self.governed.record(),
                written=self._writes.records(),
                vectors=tuple(self.named.arrays),
                note=self.named.note,
            ),
            vectors=tuple(copy(array) for array in self.named.arrays.values()),
        )

    @classmethod
    def restore(cls, snapshot: ModelSnapshot, changed: int) -> Vector:
        """The range that `snapshot` was made of, last changed in version `changed`; copies the arrays."""
        vector = cls(snapshot.spec, snapshot.start, snapshot.stop, snapshot.values, changed)
        vector.governed.restore(snapshot.rules, snapshot.program)
        vector._writes = Writes(f"model {snapshot.spec.name!r}", snapshot.program.written)
        for name, state in vector._all_states().items():
            state[:] = snapshot.states[name]
        vector.counts[:] = snapshot.counts
        vector.updates = snapshot.updates
        vector.named.note = snapshot.program.note
        for vector_name, array in zip(snapshot.program.vectors, snapshot.vectors, strict=True):
            vector.named.arrays[vector_name] = array.copy()
        return vector

    def statistics(self) -> ModelStatistics:
        """Sizes in bytes of this range; `tensors` and `elements` of the whole model."""
        return ModelStatistics(
            name=self.spec.name,
            rule=self.rules[0].name,
            tensors=len(self.layout.tensors),
            elements=self.layout.counted(),
            updates=self.updates,
            resident=self.values.nbytes * len(self.arrays()),
        )


def room_for(merge: Merge) -> Array:
    """Memory for a piece of a merged gradient, before anything has changed."""
    return np.empty(0 if merge.is_sum else CHUNK, dtype=np.float32)
