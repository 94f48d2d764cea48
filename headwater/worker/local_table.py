"""A worker's side of a table: rows that are staged, rows that came ahead, and the settings of its rule.

`Table` is the user's handle on it; what steps and adapters for frameworks need of a table is here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import NonFiniteError, RegistrationError
from headwater.kernels import finite, stage
from headwater.kernels.ahead import compile_for_table
from headwater.kernels.arrange import Ids, Plan, arrange, as_ids
from headwater.loggers import logger
from headwater.machines.row_buffer import RowBuffer, RowSlice
from headwater.machines.rows_ahead import RowsAhead, same_ids
from headwater.runtime.client import Client
from headwater.spec.codecs import parse_row_codec
from headwater.spec.declaration import table_difference
from headwater.worker.model_spec import NonFinite, check_nonfinite
from headwater.worker.pulls import pull_rows, pull_together
from headwater.worker.row_sums import RowSums
from headwater.worker.rule_settings import RuleSettings

_log = logger("headwater.worker")

Array = NDArray[np.float32]
Used = TypeVar("Used")


class LocalTable:
    """One worker's side of a table. Not thread-safe.

    Attributes:
        name, dim, spec: as registered; id: -1 until servers know it.
        buffer: where ids and rows of this worker's tables lie on their way.
        read_version: version of the rows last pulled; that of the worker before.
        settings: of its rule.
        ahead: rows that came before they were asked for, and which the next step brings.
        pushed, sums: gradients that the next step carries: where they lie, or sums that more is added to.
        gradient_bytes: bytes that the gradients of all steps so far take, without ids.
        nonfinite: what a gradient that is not finite does.
    """

    def __init__(
        self, session: Client, buffer: RowBuffer, spec: m.TableSpec, nonfinite: NonFinite = "raise"
    ) -> None:
        check_nonfinite(nonfinite)
        self.name, self.dim = spec.name, spec.dim
        self.spec = spec
        self.id = -1
        self.session = session
        self.buffer = buffer
        self.nonfinite = nonfinite
        self.read_version = -1
        self.settings = RuleSettings(f"table {spec.name!r}", [spec.rule])
        self.ahead = RowsAhead()
        self.gradient_bytes = 0
        self._planned: deque[tuple[Ids, Plan]] = deque(maxlen=2)
        self.pushed: RowSlice | None = None
        self.sums: RowSums | None = None
        self._codec = parse_row_codec(spec.codec)
        self._skip = False

    # ── reads ───────────────────────────────────────────────────────────────────────────────────────────

    def read(self, ids: Any, use: Callable[[Plan, Array], Used]) -> tuple[Plan, Used]:
        """Pull as `pull` does, without a copy: the plan of `ids`, and what `use(plan, rows)` makes of rows.

        `rows`: float32[u, dim], of each of `plan.ids`, valid during the call only.
        """
        self.session.check_open("pull")
        given = self.asks(ids)
        ahead = self.ahead.take(given, self.session.version)
        if ahead is not None:
            self.read_version = ahead.version
            return ahead.plan, use(ahead.plan, ahead.rows)
        plan = self.planned(given)
        if not len(plan.ids):
            return plan, use(plan, np.empty((0, self.dim), dtype=np.float32))
        made: list[Used] = []
        self.read_version = pull_rows(
            self.session,
            self.buffer,
            [(self, plan)],
            lambda _, rows: made.append(use(plan, rows)),
            f"pull of table {self.name!r}",
        )
        return plan, made[0]

    def asks(self, ids: Any) -> Ids:
        """`ids` as an array, which are about to be read, so that the next step need not bring them."""
        given = as_ids(ids)
        self.ahead.asked(given)
        return given

    def bring(self, wanted: Sequence[tuple[LocalTable, Any]]) -> None:
        """Have rows of this worker's tables ready for reads of the same ids that follow: in one exchange.

        `wanted`: tables, each as often as need be, with ids. All rows are of one version. Raises as `pull`.
        """
        self.session.check_open("pull")
        asked = [(table, table.asks(ids).copy()) for table, ids in wanted]
        for (table, _), ahead in zip(asked, pull_together(self.session, self.buffer, asked), strict=True):
            table.ahead.put(ahead)

    def plan(self, ids: Any) -> tuple[Ids, Plan]:
        """Ids as an array, and their plan: remembered for this batch and the one asked for ahead."""
        given = as_ids(ids)
        for known in self._planned:
            if same_ids(known[0], given):
                return known
        given = given.copy()
        self._planned.append((given, arrange(given, len(self.session.channels))))
        return self._planned[-1]

    def planned(self, given: Ids) -> Plan:
        """The plan of ids."""
        return self.plan(given)[1]

    # ── staged gradients ────────────────────────────────────────────────────────────────────────────────

    def stage_first(self, plan: Plan, gradients: Array) -> bool:
        """Stage gradients, the only ones so far; False where they are not finite, and nothing is staged."""
        used = self.buffer.used
        place = self.buffer.take(plan, self.dim)
        plan.combine(gradients, self.buffer.rows(place))
        if self.nonfinite != "off" and not finite(self.buffer.rows(place).reshape(-1)):
            self.buffer.reset(used)
            return False
        self.pushed = place
        return True

    def stage_more(self, plan: Plan, gradients: Array) -> bool:
        """Add to what is staged; False where a sum would not be finite, and nothing is added."""
        by_id = np.empty((len(plan.ids), self.dim), dtype=np.float32)
        plan.combine(gradients, by_id)
        return self._summed().add(plan.ids, by_id, tested=self.nonfinite != "off")

    def write(self, parts: Sequence[tuple[Plan, Array]]) -> tuple[RowSlice, bool]:
        """Put gradients where `carry` stages them from, and say whether what would be sent is finite.

        `parts`: plans that `read` gave, each with float32[u, dim], a gradient for each of its ids.
        """
        self.session.finish()
        if len(parts) > 1:
            place = self._united([plan.ids for plan, _ in parts], [gradients for _, gradients in parts])
            is_finite = finite(self.buffer.rows(place).reshape(-1))
        else:
            [(plan, gradients)] = parts
            place = self.buffer.take(plan, self.dim)
            is_finite = stage(gradients.reshape(-1), self.buffer.rows(place).reshape(-1), False)
        if is_finite and (self.pushed or self.sums):
            is_finite = self._summed().would_be_finite(place.plan.ids, self.buffer.rows(place))
        return place, is_finite

    def ordered(self, sums: RowSums) -> tuple[Plan, Array]:
        """Sums as a part for `write`."""
        plan = arrange(sums.ids, len(self.session.channels))
        rows = np.empty((len(plan.ids), self.dim), dtype=np.float32)
        plan.combine(sums.rows, rows)
        return plan, rows

    def carry(self, place: RowSlice) -> None:
        """The next step carries what `write` put there, and what was pushed before."""
        if self.pushed or self.sums:
            self._summed().add(place.plan.ids, self.buffer.rows(place), tested=False)
        else:
            self.pushed = place

    def discard(self) -> None:
        """Forget what is staged."""
        self.pushed = self.sums = None

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

    # ── a step ──────────────────────────────────────────────────────────────────────────────────────────

    def take_staged(self) -> tuple[RowSlice | None, RowSlice | None, m.TableSetting | None, bool]:
        """What the next step pushes and brings, its settings, and whether it must be an empty turn."""
        pushed, skip = self._placed(), self._skip
        plan = self.ahead.leaves()
        wanted = None if plan is None else self.buffer.take(plan, self.dim)
        governs = self.settings.governs
        settings = [m.TableSetting(self.id, values, governs) for _, values in self.settings.take()]
        self.discard()
        self._skip = False
        return pushed, wanted, settings[0] if settings else None, skip

    def keep_staged(self, place: RowSlice) -> None:
        """Have the next step push these again, with what is pushed until then: they came too late."""
        self.sums = RowSums(self.dim)
        self.sums.add(place.plan.ids, self.buffer.rows(place), tested=False)

    def encode(self, place: RowSlice) -> list[NDArray[np.uint8]]:
        """What the table's codec makes of rows that a step pushes, for each server; empty without one.

        The rows are afterwards what these bytes stand for.
        """
        codec = self._codec
        coded = [] if codec is None else self.buffer.encode(place, codec)
        plain = 4 * self.dim * len(place.plan.ids)
        self.gradient_bytes += sum(len(data) for data in coded) if coded else plain
        return coded

    def brought(self, place: RowSlice) -> None:
        """Note that a step brought the rows that `prefetch` wanted."""
        self.ahead.brought(place.plan, self.buffer.rows(place).copy(), self.session.version)

    # ── registration ────────────────────────────────────────────────────────────────────────────────────

    def register(self) -> None:
        """Declare the table, or join one that exists; blocks for an exchange."""
        compile_for_table(coded=self.spec.codec is not None, kept=False)
        answer = self.session.ask(
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
        self.nonfinite = nonfinite

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────

    def _summed(self) -> RowSums:
        """What is staged, as sums to which more can be added."""
        if self.sums is None:
            self.sums = RowSums(self.dim)
        if self.pushed is not None:
            self.sums.add(self.pushed.plan.ids, self.buffer.rows(self.pushed), tested=False)
            self.pushed = None
        return self.sums

    def _placed(self) -> RowSlice | None:
        """What is staged, where servers read it."""
        if not self.sums:
            return self.pushed
        plan = arrange(self.sums.ids, len(self.session.channels))
        place = self.buffer.take(plan, self.dim)
        plan.combine(self.sums.rows, self.buffer.rows(place))
        return place

    def _united(self, ids: Sequence[Ids], gradients: Sequence[Array]) -> RowSlice:
        """One place with the sum of several lists of gradients."""
        place = self.buffer.take(arrange(np.concatenate(ids), len(self.session.channels)), self.dim)
        place.plan.combine(np.concatenate(gradients), self.buffer.rows(place))
        return place
