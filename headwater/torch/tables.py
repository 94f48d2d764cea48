"""The tables of a module, as its optimizer sees them: which gradients a step sends, and which settings.

Invariants:
- Each table is one group of the optimizer, after those of the parameters, whatever its number of modules.
- A gradient is sent once. Until it is, `discard` forgets it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from headwater.errors import UsageError
from headwater.kernels.arrange import Plan
from headwater.machines.row_buffer import RowSlice
from headwater.spec.rules import from_spec
from headwater.torch.embedding import Array, Collected, TableModule
from headwater.torch.groups import ParameterGroup
from headwater.worker.model_spec import NonFinite
from headwater.worker.row_sums import RowSums
from headwater.worker.table import Table


class _TrainedTable:
    """One table and the modules that look up in it, which collect in one place from here on.

    `accrued`: gradients that steps on the local copy hold back for the next push.
    """

    def __init__(self, table: Table, modules: Sequence[TableModule]) -> None:
        self.table = table
        self.collected = Collected()
        self.accrued = RowSums(table.dim)
        table.local.settings.governs = True
        self.group = ParameterGroup([], from_spec(table.local.spec.rule), None)
        if table.local.settings.first is not None:
            self.group.joined(table.local.settings)
        self._modules = modules
        for module in modules:
            self.collected.merge(module.collected)
            module.collected = self.collected

    def check(self) -> None:
        if any(module.collected is not self.collected for module in self._modules):
            raise UsageError(
                f"an Embedding of table {self.table.name!r} belongs to another DistributedOptimizer now: "
                f"step that one, or make separate modules, which may share the table"
            )

    def parts(self) -> list[tuple[Plan, Array]]:
        """What is collected."""
        return [(plan, gradients) for plan, gradients in self.collected.parts() if len(plan.ids)]

    def held_back(self) -> list[tuple[Plan, Array]]:
        """What is accrued."""
        return [self.table.local.ordered(self.accrued)] if self.accrued else []

    def sums(self) -> RowSums:
        """What is collected, summed by id."""
        sums = RowSums(self.table.dim)
        for plan, gradients in self.parts():
            sums.add(plan.ids, gradients, tested=False)
        return sums


class TrainedTables:
    """All tables of `module.modules()`."""

    def __init__(self, module: torch.nn.Module) -> None:
        modules: dict[Table, list[TableModule]] = {}
        for one in module.modules():
            if isinstance(one, TableModule):
                modules.setdefault(one.table, []).append(one)
        self._tables = [_TrainedTable(table, users) for table, users in modules.items()]
        self._written: list[tuple[Table, RowSlice]] = []

    def __len__(self) -> int:
        return len(self._tables)

    # ── groups ──────────────────────────────────────────────────────────────────────────────────

    def groups(self, defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A torch group for each table: its rule's settings, and `defaults` that schedulers look for."""
        return [
            {
                "params": one.collected.rows,
                "param_names": [],
                **defaults,
                **one.group.shown,
                "table": one.table.name,
            }
            for one in self._tables
        ]

    def parameter_groups(self) -> list[ParameterGroup]:
        """The group of each table."""
        return [one.group for one in self._tables]

    def send_settings(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Have the next step carry what somebody changed in the groups."""
        for one, group in zip(self._tables, groups, strict=True):
            changes = one.group.take_changes(group, one.table.local.settings, f"table {one.table.name!r}")
            if changes:
                one.table.set(**changes)

    def show_settings(self, groups: Sequence[dict[str, Any]]) -> None:
        """Show what is in force in the groups."""
        for one, group in zip(self._tables, groups, strict=True):
            one.table.local.settings.first = None
            one.group.arrived(group, one.table.local.settings, f"table {one.table.name!r}")

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Without the collected gradients in the groups, which saved groups do not have."""
        kept = []
        for one in self._tables:
            aside = Collected()
            aside.merge(one.collected)
            kept.append(aside)
        try:
            yield
        finally:
            for one, aside in zip(self._tables, kept, strict=True):
                one.collected.merge(aside)

    # ── gradients ───────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Refuse to go on with modules of another optimizer; raises UsageError."""
        for one in self._tables:
            one.check()

    def unscale(self, inverse: float) -> None:
        """Multiply what is collected."""
        for one in self._tables:
            for rows in one.collected.rows:
                if rows.grad is not None:
                    rows.grad.mul_(inverse)

    def discard(self) -> None:
        """Forget what is collected."""
        for one in self._tables:
            one.collected.clear()

    def not_finite(self) -> list[Table]:
        """The tables for which NaN or infinity is collected."""
        sums = [(one, one.sums()) for one in self._tables]
        return [one.table for one, sum in sums if not one.accrued.would_be_finite(sum.ids, sum.rows)]

    def accrue(self) -> None:
        """Hold what is collected back for a later `write`, out of reach of `discard`."""
        for one in self._tables:
            sum = one.sums()
            one.accrued.add(sum.ids, sum.rows, tested=False)
            one.collected.clear()

    @property
    def accrued(self) -> bool:
        """Whether anything is held back."""
        return any(one.accrued for one in self._tables)

    def write(self, accrued: bool = False) -> list[Table]:
        """Put what is collected, or what is held back, where `carry` takes it from.

        Returns the tables for which that is not finite.
        """
        bad = []
        self._written = []
        for one in self._tables:
            parts = one.held_back() if accrued else one.parts()
            if parts:
                place, is_finite = one.table.local.write(parts)
                self._written.append((one.table, place))
                if not is_finite:
                    bad.append(one.table)
        return bad

    def carry(self, accrued: bool = False) -> bool:
        """The next step carries what was written, which is then forgotten; whether it is anything."""
        for table, place in self._written:
            table.local.carry(place)
        carried, self._written = bool(self._written), []
        for one in self._tables:
            if accrued:
                one.accrued = RowSums(one.table.dim)
            else:
                one.collected.clear()
        return carried

    def skip(self) -> None:
        """Make the next step an empty turn, and forget what is collected."""
        self.discard()
        for one in self._tables[:1]:
            one.table.local.skip()


def report_nonfinite(tables: Sequence[Table], nonfinite: NonFinite) -> None:
    """As `LocalTable.report_nonfinite`, of the first of these tables, if there is one."""
    for table in tables[:1]:
        table.local.report_nonfinite(nonfinite)
