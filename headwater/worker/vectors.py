"""A worker's handle on the vectors beside a model's parameters: they stay on the servers.

Every call is a meeting (`Worker.barrier`): all workers of the cluster make the same calls in the same order,
each is done once, and a program that runs again gets what it was given the first time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from headwater import messages as m
from headwater.errors import UsageError
from headwater.machines.connections import Frame
from headwater.spec.amounts import shown, text
from headwater.worker.local_model import LocalModel
from headwater.worker.meetings import Meetings

Terms: TypeAlias = Mapping[str, float]

_encode = msgspec.msgpack.Encoder().encode
_TOLD = 3
"""Operations that are named where workers wait at different places."""


class Vectors:
    """Of one model: float32 vectors of its layout, by name; "parameters" are the model's values themselves.

    Everything is done on all servers
    or on none, as one entry of the log; it is in checkpoints, and standbys have it.
    """

    def __init__(self, model: LocalModel, meetings: Meetings) -> None:
        self._model = model
        self._meetings = meetings

    # ── the user's calls; each blocks until all workers have made it ────────────────────────────

    def create(self, *names: str, value: float = 0.0) -> None:
        """New vectors, whose elements are `value`.

        Raises:
            UsageError: there is one of that name; nothing was done. Or the name is no text.
            StalledError, MeetingError: as `Worker.barrier`, here and below.
        """
        number = _finite("value", value)
        self.run(
            [made for name in names for made in (m.CreateVector(_name(name)), m.FillVector(name, number))]
        )

    def free(self, *names: str) -> None:
        """Forget vectors.

        Raises:
            UsageError: there is none of that name; nothing was done.
        """
        self.run([m.FreeVector(_name(name)) for name in names])

    def fill(self, name: str, value: float) -> None:
        """Set all elements to `value`.

        Raises:
            UsageError: there is no such vector, or `value` is not a finite number.
        """
        self.run([m.FillVector(_name(name), _finite("value", value))])

    def copy(self, source: str, out: str) -> None:
        """Set `out` to what `source` is.

        Raises:
            UsageError: there is no such vector.
        """
        self.combine(out, {_name(source): 1.0})

    def combine(self, out: str, terms: Terms) -> None:
        """out = Σ coefficient · vector, for `terms` {name: coefficient}; `out` may be among them.

        Products and sums are float64, the result is rounded to float32 once.

        Raises:
            UsageError: there is no such vector, or a coefficient is not a finite number; nothing was done.
        """
        self.combine_all([(out, terms)])

    def combine_all(self, combinations: Iterable[tuple[str, Terms]]) -> None:
        """Several combinations as one entry and one pass over memory, in their order.

        Raises:
            UsageError: as `combine`; none was done.
        """
        pairs = _pairs("combine_all", combinations, "pairs of a name and {name: coefficient}")
        self.run([combination(out, terms) for out, terms in pairs])

    def dots(self, pairs: Iterable[tuple[str, str]]) -> list[float]:
        """Inner products of pairs of vectors, in one pass over memory.

        Summed in float64 over fixed blocks of elements in a fixed order: the same bits for any number of
        servers.

        Raises:
            UsageError: there is no such vector.
        """
        named = [(_name(a), _name(b)) for a, b in _pairs("dots", pairs, "pairs of names")]
        return list(self.run((), [m.Reduction("dot", a, b) for a, b in named]).totals)

    def sizes(self, name: str) -> tuple[float, float]:
        """(largest magnitude, sum of magnitudes) of a vector, as `dots` has sums.

        Raises:
            UsageError: there is no such vector.
        """
        largest, total = self.run(
            (), [m.Reduction("largest", _name(name)), m.Reduction("total", name)]
        ).totals
        return largest, total

    # ── for optimizers ──────────────────────────────────────────────────────────────────────────

    def run(
        self,
        operations: Sequence[m.VectorOperation],
        reductions: Sequence[m.Reduction] = (),
        *,
        values: Mapping[str, float] | None = None,
        weight: float = 1.0,
        read: bool = False,
        recall: bool = False,
        of: m.Attendance = "present",
    ) -> m.Answer:
        """All operations in order, then all reductions, as one meeting; blocks until all workers are there.

        `values` are added up over the workers, into the answer's `sums`. Where gradients are gathered, those
        of all tensors lie in the model's window. With `read` the model's window has its values afterwards;
        with `recall` the answer's data has the note that is kept.
        """
        model = self._model
        work = m.VectorWork(model.id, tuple(operations), tuple(reductions), read, recall)
        kind: m.MeetingKind = "operate" if operations else "measure"
        digest = hashlib.blake2b(_encode(work), digest_size=6).hexdigest()
        names = (f"model {model.name!r}", _told(work), digest)

        def frame(meet: m.Meet, server: int) -> Frame:
            return model.buffer.meet(msgspec.structs.replace(meet, work=work, weight=weight), server)

        answer = self._meetings.operate(kind, names, of, dict(values or {}), frame)
        if read:
            model.written()
        elif any(_writes(one) for one in operations):
            model.outdated()
        return answer


def combination(out: str, terms: Terms) -> m.CombineVectors:
    """The operation that makes `out` of `terms`. Raises UsageError."""
    if not isinstance(terms, Mapping):
        raise UsageError(f"combine: got terms {shown(terms)}, expected {{name: coefficient}}")
    pairs = tuple((_name(name), _finite(f"the coefficient of {name!r}", c)) for name, c in terms.items())
    return m.CombineVectors(_name(out), pairs)


def _writes(one: m.VectorOperation) -> bool:
    if isinstance(one, m.FillVector):
        return one.name == "parameters"
    return isinstance(one, m.CombineVectors | m.GatherGradients) and one.out == "parameters"


def _name(name: Any) -> str:
    return text("the name of a vector", name, UsageError)


def _finite(what: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{what} is {shown(value)}, expected a number; nothing was done") from error
    if not math.isfinite(number):
        raise UsageError(f"{what} is {number}, expected a finite number; nothing was done")
    return number


def _pairs(what: str, given: Any, expected: str) -> list[tuple[Any, Any]]:
    """What a call takes as pairs. Raises UsageError."""
    try:
        return [(one, other) for one, other in given]
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what}: got {shown(given)}, expected {expected}; nothing was done") from error


def _told(work: m.VectorWork) -> str:
    """What is done, in a few words."""
    done = [_words(one) for one in work.operations]
    done += [" ".join(filter(None, (one.kind, one.one, one.other))) for one in work.reductions]
    more = f" and {len(done) - _TOLD} more" if len(done) > _TOLD else ""
    return ", ".join(done[:_TOLD]) + more or "read"


def _words(one: m.VectorOperation) -> str:
    if isinstance(one, m.CreateVector):
        return f"create {one.name}"
    if isinstance(one, m.FreeVector):
        return f"free {one.name}"
    if isinstance(one, m.GatherGradients):
        return f"gradients into {one.out}"
    if isinstance(one, m.FillVector):
        return f"fill {one.name}"
    return f"combine {one.out}" if isinstance(one, m.CombineVectors) else "keep a note"
