"""A worker's handle on a table: rows by id, in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import GradientError, UsageError
from headwater.kernels.arrange import Ids
from headwater.spec.rules import Rule
from headwater.spec.schedules import Schedule
from headwater.wire.channel import Outgoing
from headwater.worker.local_table import Array, LocalTable
from headwater.worker.model_spec import as_array
from headwater.worker.rule_state import rows_of
from headwater.worker.table_scan import scan_rows


class Table:
    """A table on the servers, as one worker sees it. Not thread-safe, like its worker.

    Attributes:
        name, dim: as registered.
        local: this worker's side of the table, for adapters.
    """

    def __init__(self, local: LocalTable) -> None:
        self.local = local
        self.name, self.dim = local.name, local.dim
        self._session = local.session
        self._memory = local.buffer

    def pull(self, ids: Any) -> Array:
        """Rows of `ids` (integers of any shape, with repeats): float32[*ids.shape, dim], a new array.

        All of one version; blocks for an exchange, unless `prefetch` brought them. An id without a row has
        its initial value, and nothing is stored for it.

        Raises:
            UsageError: ids that are not integers, or do not fit int64.
            ClosedError: the worker has left.
            StalledError: no answer within the deadline.
        """
        return self.local.read(ids, lambda plan, rows: plan.scatter(rows))[1]

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
        local = self.local
        given, plan = local.plan(ids)
        gradients = self._checked(given.shape, grads)
        if not len(plan.ids):
            return
        self._session.finish()
        stages = self._session.stages
        began = stages.now()
        good = (local.stage_more if local.pushed or local.sums else local.stage_first)(plan, gradients)
        stages.pushed(began)
        if not good:
            local.report_nonfinite(local.nonfinite)

    def discard(self) -> None:
        """Forget what is staged."""
        self.local.discard()

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
        given, plan = self.local.plan(ids)
        self.local.ahead.want(given, plan)

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
        return scan_rows(self._session, self.local.id, self.local.spec, batch)

    def delete(self, ids: Any) -> int:
        """Forget ids: rows, states, counts, and what admission counted; returns how many had a row.

        A version of its own; blocks for an exchange. A later push starts from the initial value.

        Raises:
            UsageError: ids that are not integers, or do not fit int64.
            ClosedError: the worker has left.
        """
        self._session.check_open("delete")
        _, plan = self.local.plan(ids)
        self._session.finish()
        used = self._memory.used
        place = self._memory.take(plan, self.dim)
        try:
            return self._numbers(
                lambda server, number: Outgoing(
                    m.DeleteRows(number, self._memory.part(place, self.local.id, server)),
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
        given, plan = self.local.plan(ids)
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
                    m.AssignRows(
                        number, self._memory.part(place, self.local.id, server), width, state != "reset"
                    ),
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
        self.local.settings.set(None, values)

    def __len__(self) -> int:
        """Rows that exist, on all servers together; blocks for an exchange."""
        self._session.check_open("len")
        return self._numbers(lambda _, number: Outgoing(m.CountRows(number, self.local.id)), "count")

    def __bool__(self) -> bool:
        """True: a table without rows is a table."""
        return True

    @property
    def rule(self) -> Rule:
        """The rule, with the settings that this worker knows to be in force."""
        return self.local.settings.rules[0]

    @property
    def read_version(self) -> int:
        """Version of the rows last pulled; that of the worker before."""
        return self.local.read_version

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────────

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


def _repeated(ids: Ids) -> int:
    """An id that appears twice."""
    unique, counts = np.unique(ids, return_counts=True)
    return int(unique[counts > 1][0])
