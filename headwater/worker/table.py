"""A worker's handle on a table: rows by id, in and out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import GradientError, NonFiniteError, RegistrationError, UsageError
from headwater.kernels import finite, stage
from headwater.kernels.arrange import Ids, Plan, arrange, as_ids
from headwater.machines.row_buffer import RowBuffer, RowSlice
from headwater.runtime.client import Client
from headwater.spec.codecs import parse_row_codec
from headwater.spec.declaration import table_difference
from headwater.spec.rules import Rule
from headwater.spec.schedules import Schedule
from headwater.wire.channel import Outgoing
from headwater.worker.model_spec import NonFinite, as_array, check_nonfinite
from headwater.worker.pulls import Ahead, RowsAhead, pull_rows, pull_together, same_ids
from headwater.worker.row_sums import RowSums
from headwater.worker.rule_settings import RuleSettings
from headwater.worker.rule_state import rows_of
from headwater.worker.table_scan import scan_rows

_log = logging.getLogger("headwater.worker")

Array = NDArray[np.float32]
Used = TypeVar("Used")


class Table:
    """A table on the servers, as one worker sees it. Not thread-safe, like its worker.

    Attributes:
        name, dim: as registered.
        read_version: version of the rows last pulled; that of the worker before.
        settings: of its rule.
        ahead: rows that came before they were asked for.
        gradient_bytes: that the gradients of all steps so far take, as they are represented, without ids.
    """

    def __init__(
        self, session: Client, memory: RowBuffer, spec: m.TableSpec, nonfinite: NonFinite = "raise"
    ) -> None:
        check_nonfinite(nonfinite)
        self.name, self.dim = spec.name, spec.dim
        self.spec = spec
        self.id = -1
        self.read_version = -1
        self._session = session
        self._memory = memory
        self._nonfinite = nonfinite
        self._planned: deque[tuple[Ids, Plan]] = deque(maxlen=2)
        self._pushed: RowSlice | None = None
        self._sums: RowSums | None = None
        self.settings = RuleSettings(f"table {spec.name!r}", [spec.rule])
        self._codec = parse_row_codec(spec.codec)
        self.gradient_bytes = 0
        self._skip = False
        self._wanted: tuple[Ids, Plan] | None = None
        self.ahead = RowsAhead(session)

    # ── the user's calls ────────────────────────────────────────────────────────────────────────

    def pull(self, ids: Any) -> Array:
        """Rows of `ids` (integers of any shape, with repeats): float32[*ids.shape, dim], a new array.

        All of one version; blocks for an exchange, unless `prefetch` brought them. An id without a row has
        its initial value, and nothing is stored for it.

        Raises:
            UsageError: ids that are not integers, or do not fit int64.
            ClosedError: the worker has left.
            StalledError: no answer within the deadline.
        """
        return self.read(ids, lambda plan, rows: plan.scatter(rows))[1]

    def push(self, ids: Any, grads: Any) -> None:
        """Stage gradients of rows for the next `step`; what is pushed for an id before it adds up.

        Args:
            ids: integers of any shape, with repeats.
            grads: float32[*ids.shape, dim], or anything with `__dlpack__` or `__array__`; copied.

        Does not block. All or nothing: on an error nothing is staged.

        Raises:
            UsageError: ids that are not integers, or do not fit int64.
            GradientError: another shape or dtype; says what was expected.
            NonFiniteError: NaN or infinity, or a sum that is, with `nonfinite="raise"`.
            ClosedError: the worker has left.
        """
        self._session.check_open("push")
        given, plan = self._plan(ids)
        gradients = self._checked(given.shape, grads)
        if not len(plan.ids):
            return
        self._session.finish()
        stages = self._session.stages
        began = stages.now()
        good = (self._push_again if self._pushed or self._sums else self._push_first)(plan, gradients)
        stages.pushed(began)
        if not good:
            self.report_nonfinite(self._nonfinite)

    def prefetch(self, ids: Any) -> None:
        """Have the rows of `ids` ready for the `pull` of the same ids that follows the next `step`.

        They come with the answer of that step, in every mode, and are of its version: the step is contained,
        and they are exactly what a pull would give that is answered at that version. What others `assign` or
        `delete` later is not in them. Where the worker has had another answer meanwhile, of a later version,
        the pull asks anew. Does not block. Another call replaces what an earlier one asked for; pulls of
        other ids are not affected.

        Raises:
            UsageError: ids that are not integers, or do not fit int64.
            ClosedError: the worker has left.
        """
        self._session.check_open("prefetch")
        given, plan = self._plan(ids)
        self.ahead.clear()
        self._wanted = (given, plan) if len(plan.ids) else None

    def scan(self, batch: int = 65_536) -> Iterator[tuple[NDArray[np.int64], Array]]:
        """All rows as of one version: int64[n] ids and float32[n, dim], `batch` at a time, new arrays.

        What was pushed and not stepped is not in them, nor are rows that have expired. Blocks for two
        exchanges at the first piece, and keeps a copy of all rows until the last.

        Raises:
            ConfigurationError: `batch` is below 1.
            ClosedError: the worker has left.
            StalledError: no answer within the deadline.
        """
        self._session.check_open("scan")
        return scan_rows(self._session, self.id, self.spec, batch)

    def delete(self, ids: Any) -> int:
        """Forget ids: rows, states, counts, and what admission counted; returns how many had a row.

        A version of its own; blocks for an exchange. A later push starts from the initial value.

        Raises:
            UsageError: ids that are not integers, or do not fit int64.
            ClosedError: the worker has left.
        """
        self._session.check_open("delete")
        _, plan = self._plan(ids)
        self._session.finish()
        used = self._memory.used
        place = self._memory.take(plan, self.dim)
        try:
            return self._numbers(
                lambda server, number: Outgoing(
                    m.DeleteRows(number, self._memory.part(place, self.id, server)),
                    self._memory.outgoing(place, server, rows=False),
                ),
                "delete",
            )
        finally:
            self._memory.reset(used)

    def assign(self, ids: Any, rows: Any, state: Literal["reset"] | Mapping[str, Any] = "reset") -> None:
        """Set rows, a version of its own; blocks for an exchange. Pretrained rows may go under any rule.

        Ids without a row get one, whatever admission says; expiry counts from here on.

        Args:
            ids: integers of any shape, each once.
            rows: float32[*ids.shape, dim], or anything with `__dlpack__` or `__array__`; copied.
            state: of the rule. "reset": as before a row's first update, which the next one then is. Or each
                of its states by name, float32[*ids.shape, dim] (with one float a row [*ids.shape]), and under
                "step" how many updates rows have had, an integer or integers of the ids' shape, 1 by default.

        Raises:
            UsageError: ids that are not integers, do not fit int64, or appear twice.
            GradientError: another shape or dtype, an unknown or a missing state; says what was expected.
            ClosedError: the worker has left.
        """
        self._session.check_open("assign")
        given, plan = self._plan(ids)
        if len(plan.ids) < given.size:
            raise UsageError(
                f"table {self.name!r}: assign takes each id once, {_repeated(given)} is there twice"
            )
        values = rows_of(f"table {self.name!r}", given.shape, self.dim, self.rule, rows, state)
        if not len(plan.ids):
            return
        self._session.finish()
        used, width = self._memory.used, values.shape[1]
        place = self._memory.take(plan, width)
        try:
            plan.combine(values, self._memory.rows(place))
            self._session.call(
                lambda server, number: Outgoing(
                    m.AssignRows(number, self._memory.part(place, self.id, server), width, state != "reset"),
                    self._memory.outgoing(place, server, rows=True),
                ),
                f"assign rows of table {self.name!r}",
                memory=self._memory,
            )
        finally:
            self._memory.reset(used)

    def set(self, **values: float | Schedule) -> None:
        """Change settings of the rule, such as `lr`, with the next `step` that this worker makes.

        Numbers of any kind, NumPy's too; a schedule for `lr`.

        Raises:
            ConfigurationError: the rule has no such setting, or an impossible value.
        """
        self.settings.set(None, values)

    def __len__(self) -> int:
        """Rows that exist, on all servers together; blocks for an exchange."""
        self._session.check_open("len")
        return self._numbers(lambda _, number: Outgoing(m.CountRows(number, self.id)), "count")

    def __bool__(self) -> bool:
        """True: a table without rows is a table."""
        return True

    @property
    def rule(self) -> Rule:
        """The rule, with the settings that this worker knows to be in force."""
        return self.settings.rules[0]

    # ── for adapters ────────────────────────────────────────────────────────────────────────────

    def read(self, ids: Any, use: Callable[[Plan, Array], Used]) -> tuple[Plan, Used]:
        """Pull as `pull` does, without a copy: the plan of `ids`, and what `use(plan, rows)` makes of rows.

        `rows`: float32[u, dim], of each of `plan.ids`, valid during the call only.
        """
        self._session.check_open("pull")
        given = self.asks(ids)
        ahead = self.ahead.take(given)
        if ahead is not None:
            self.read_version = ahead.version
            return ahead.plan, use(ahead.plan, ahead.rows)
        plan = self.planned(given)
        if not len(plan.ids):
            return plan, use(plan, np.empty((0, self.dim), dtype=np.float32))
        made: list[Used] = []
        self.read_version = pull_rows(
            self._session,
            self._memory,
            [(self, plan)],
            lambda _, rows: made.append(use(plan, rows)),
            f"pull of table {self.name!r}",
        )
        return plan, made[0]

    def asks(self, ids: Any) -> Ids:
        """`ids` as an array, which are about to be read, so that the next step need not bring them."""
        given = as_ids(ids)
        if self._wanted is not None and same_ids(self._wanted[0], given):
            self._wanted = None
        return given

    def bring(self, wanted: Sequence[tuple[Table, Any]]) -> None:
        """Have rows of this worker's tables ready for reads of the same ids that follow: in one exchange.

        `wanted`: tables, each as often as need be, with ids. All rows are of one version. Raises as `pull`.
        """
        self._session.check_open("pull")
        asked = [(table, table.asks(ids).copy()) for table, ids in wanted]
        for (table, _), ahead in zip(asked, pull_together(self._session, self._memory, asked), strict=True):
            table.ahead.put(ahead)

    def planned(self, given: Ids) -> Plan:
        """The plan of ids."""
        return self._plan(given)[1]

    def write(self, parts: Sequence[tuple[Plan, Array]]) -> tuple[RowSlice, bool]:
        """Put gradients where `carry` stages them from, and say whether what would be sent is finite.

        `parts`: plans that `read` gave, each with float32[u, dim], a gradient for each of its ids.
        """
        self._session.finish()
        if len(parts) > 1:
            place = self._united([plan.ids for plan, _ in parts], [gradients for _, gradients in parts])
            is_finite = finite(self._memory.rows(place).reshape(-1))
        else:
            [(plan, gradients)] = parts
            place = self._memory.take(plan, self.dim)
            is_finite = stage(gradients.reshape(-1), self._memory.rows(place).reshape(-1), False)
        if is_finite and (self._pushed or self._sums):
            is_finite = self._summed().would_be_finite(place.plan.ids, self._memory.rows(place))
        return place, is_finite

    def ordered(self, sums: RowSums) -> tuple[Plan, Array]:
        """Sums as a part for `write`."""
        plan = arrange(sums.ids, len(self._session.channels))
        rows = np.empty((len(plan.ids), self.dim), dtype=np.float32)
        plan.combine(sums.rows, rows)
        return plan, rows

    def carry(self, place: RowSlice) -> None:
        """The next step carries what `write` put there, and what was pushed before."""
        if self._pushed or self._sums:
            self._summed().add(place.plan.ids, self._memory.rows(place), tested=False)
        else:
            self._pushed = place

    def skip(self) -> None:
        """Make the next step an empty turn: a gradient was not finite."""
        self._skip = True

    def report_nonfinite(self, nonfinite: NonFinite) -> None:
        """A gradient is not finite: with `nonfinite="skip"` the next step is an empty turn.

        Raises:
            NonFiniteError: with any other.
        """
        if nonfinite == "skip":
            self._skip = True
            return
        raise NonFiniteError(
            f"gradients of table {self.name!r} hold NaN or infinity: nothing was staged and the turn was not "
            f"taken; pass nonfinite='skip' to make such a step an empty turn"
        )

    # ── for the worker ──────────────────────────────────────────────────────────────────────────

    def register(self) -> None:
        """Declare the table, or join one that exists; blocks for an exchange."""
        answer = self._session.ask(
            lambda number: m.RegisterTable(number, self.spec), f"register table {self.name!r}"
        )
        assert answer.table is not None
        self.id = answer.table
        for rules in answer.rules:
            self.settings.arrived(rules, joined=True)
        if answer.notice:
            _log.warning("table %r: %s", self.name, answer.notice)

    def redeclare(self, spec: m.TableSpec, nonfinite: NonFinite) -> None:
        """The program declares the table again: it goes on, with the new settings.

        Raises:
            RegistrationError: it is another table; names both. Nothing changed.
        """
        check_nonfinite(nonfinite)
        if unlike := table_difference(self.spec, spec):
            raise RegistrationError(unlike)
        self.settings.redeclare([spec.rule])
        self._nonfinite = nonfinite

    def take_staged(self) -> tuple[RowSlice | None, RowSlice | None, m.TableSetting | None, bool]:
        """What the next step pushes and brings, its settings, and whether it must be an empty turn."""
        pushed, skip = self._placed(), self._skip
        wanted = None if self._wanted is None else self._memory.take(self._wanted[1], self.dim)
        governs = self.settings.governs
        settings = [m.TableSetting(self.id, values, governs) for _, values in self.settings.take()]
        self.discard()
        self.ahead.clear()
        self._skip = False
        return pushed, wanted, settings[0] if settings else None, skip

    def keep_staged(self, place: RowSlice) -> None:
        """Have the next step push these again, with what is pushed until then: they came too late."""
        self._sums = RowSums(self.dim)
        self._sums.add(place.plan.ids, self._memory.rows(place), tested=False)

    def encode(self, place: RowSlice) -> list[NDArray[np.uint8]]:
        """What the table's codec makes of rows that a step pushes, for each server; empty without one.

        The rows are afterwards what these bytes stand for.
        """
        codec = self._codec
        coded = [] if codec is None else self._memory.encode(place, codec)
        plain = 4 * self.dim * len(place.plan.ids)
        self.gradient_bytes += sum(len(data) for data in coded) if coded else plain
        return coded

    def brought(self, place: RowSlice) -> None:
        """Note that a step brought the rows that `prefetch` wanted."""
        assert self._wanted is not None
        (given, _), self._wanted = self._wanted, None
        self.ahead.put(Ahead(place.plan, given, self._memory.rows(place).copy(), self._session.version))

    def discard(self) -> None:
        """Forget what is staged."""
        self._pushed = self._sums = None

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _plan(self, ids: Any) -> tuple[Ids, Plan]:
        """The ids as an array, and their plan: remembered for this batch and the one asked for ahead."""
        given = as_ids(ids)
        for known in self._planned:
            if same_ids(known[0], given):
                return known
        given = given.copy()
        self._planned.append((given, arrange(given, len(self._session.channels))))
        return self._planned[-1]

    def _numbers(self, outgoing: Callable[[int, int], Outgoing], what: str) -> int:
        """The sum of a number that each server answers with."""
        numbers = np.zeros(len(self._session.channels), dtype=np.int64)
        self._session.call(
            outgoing,
            f"{what} of table {self.name!r}",
            lambda server, _: [numbers[server : server + 1]],
            memory=self._memory,
        )
        return int(numbers.sum())

    def _checked(self, shape: tuple[int, ...], grads: Any) -> Array:
        array = as_array(f"gradients of table {self.name!r}", grads)
        if array.shape != (*shape, self.dim):
            raise GradientError(
                f"table {self.name!r} takes gradients of shape {(*shape, self.dim)} for ids of shape "
                f"{shape}, got {array.shape}"
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold is found with all that is not finite
            return np.ascontiguousarray(array, dtype=np.float32).reshape(-1, self.dim)

    def _push_first(self, plan: Plan, gradients: Array) -> bool:
        """Stage gradients, the only ones so far; False where they are not finite, and nothing is staged."""
        used = self._memory.used
        place = self._memory.take(plan, self.dim)
        plan.combine(gradients, self._memory.rows(place))
        if self._nonfinite != "off" and not finite(self._memory.rows(place).reshape(-1)):
            self._memory.reset(used)
            return False
        self._pushed = place
        return True

    def _push_again(self, plan: Plan, gradients: Array) -> bool:
        """Add to what is staged; False where a sum would not be finite, and nothing is added."""
        by_id = np.empty((len(plan.ids), self.dim), dtype=np.float32)
        plan.combine(gradients, by_id)
        return self._summed().add(plan.ids, by_id, tested=self._nonfinite != "off")

    def _summed(self) -> RowSums:
        """What is staged, as sums to which more can be added."""
        if self._sums is None:
            self._sums = RowSums(self.dim)
        if self._pushed is not None:
            self._sums.add(self._pushed.plan.ids, self._memory.rows(self._pushed), tested=False)
            self._pushed = None
        return self._sums

    def _placed(self) -> RowSlice | None:
        """What is staged, where servers read it."""
        if not self._sums:
            return self._pushed
        plan = arrange(self._sums.ids, len(self._session.channels))
        place = self._memory.take(plan, self.dim)
        plan.combine(self._sums.rows, self._memory.rows(place))
        return place

    def _united(self, ids: Sequence[Ids], gradients: Sequence[Array]) -> RowSlice:
        """One place with the sum of several lists of gradients."""
        place = self._memory.take(arrange(np.concatenate(ids), len(self._session.channels)), self.dim)
        place.plan.combine(np.concatenate(gradients), self._memory.rows(place))
        return place


def _repeated(ids: Ids) -> int:
    """An id that appears twice."""
    unique, counts = np.unique(ids, return_counts=True)
    return int(unique[counts > 1][0])
