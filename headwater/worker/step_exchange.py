"""One turn of a worker: what its models and tables have staged leaves as one step, in one exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from headwater import messages as m
from headwater.machines.row_buffer import RowBuffer, RowSlice
from headwater.runtime.client import Client
from headwater.wire.channel import Outgoing
from headwater.worker.local_model import LocalModel
from headwater.worker.local_table import LocalTable


@dataclass(frozen=True, slots=True)
class OuterStep:
    """Makes a step an outer one: it sends the change of model `fragment`, after local steps of this pace."""

    fragment: int
    pace: m.Pace | None


class StepExchange:
    """Takes what is staged; nothing may be under way in the session.

    `weight`: what its gradients count in a mean; with 0 they are dropped, and it is an empty turn. `since`:
    the version that those were computed on which came too late before, and are sent again. `outer`: where it
    is an outer step.

    Attributes:
        skip: whether it is an empty turn because a gradient was not finite.
        carried_since: as `since`, for the next step; None where nothing is kept for it.
    """

    def __init__(
        self,
        session: Client,
        memory: RowBuffer,
        models: Iterable[LocalModel],
        tables: Iterable[LocalTable],
        weight: float = 1.0,
        since: int | None = None,
        outer: OuterStep | None = None,
    ) -> None:
        self._outer = outer
        self._session = session
        self._memory = memory
        self._models = list(models)
        staged = {model: model.take_staged() for model in self._models}
        self._tables = list(tables)
        rows = {table: table.take_staged() for table in self._tables}
        self.skip = any([skip for _, _, skip in staged.values()] + [skip for *_, skip in rows.values()])
        self._carried: dict[LocalModel, m.Carried] = {}
        self._pushed: dict[LocalTable, RowSlice] = {}
        self._weight = weight or 1.0
        self._since = since
        self.carried_since: int | None = None
        self._sent_of = -1
        self._known: tuple[tuple[int, int], ...] = ()
        self._known_tables: tuple[tuple[int, int], ...] = ()
        if weight and not self.skip:
            self._carried = {
                model: carried for model, (carried, _, _) in staged.items() if carried is not None
            }
            self._pushed = {table: place for table, (place, *_) in rows.items() if place is not None}
        for model, carried in self._carried.items():
            model.buffer.take(carried.tensors)
        self._coded_rows = {table: table.encode(place) for table, place in self._pushed.items()}
        self._pulled = {table: place for table, (_, place, *_) in rows.items() if place is not None}
        self._settings = tuple([setting for _, settings, _ in staged.values() for setting in settings])
        self._position: m.Position | None = None
        self._kept: bytes | None = None
        self._table_settings = tuple([setting for *_, setting, _ in rows.values() if setting is not None])

    def take(
        self, step: int, read: bool | Sequence[LocalModel], position: m.Position | None, kept: bytes | None
    ) -> tuple[m.StepResult, bool]:
        """Make it step number `step`; blocks as the mode says. What became of it, and whether batches end.

        `position`: where the worker is in its data then; `kept`: what its program keeps from then on, if that
        has changed.
        """
        self._begin(position, kept)
        ids = read if isinstance(read, bool) else tuple(model.id for model in read)
        answer: m.Answer = self._session.call(
            lambda server, number: self._outgoing(server, number, step, ids),
            f"step {step}",
            self._places,
            memory=self._memory,
        )
        return self._answered(answer, read)

    def begin(
        self,
        step: int,
        read: bool | Sequence[LocalModel],
        position: m.Position | None,
        kept: bytes | None,
        arrived: Callable[[m.StepResult, bool], None],
    ) -> None:
        """As `take`, but does not block for the answer: `arrived` is told once that is taken."""
        self._begin(position, kept)
        ids = read if isinstance(read, bool) else tuple(model.id for model in read)
        self._session.begin(
            lambda server, number: self._outgoing(server, number, step, ids),
            f"step {step}",
            self._places,
            lambda answer: arrived(*self._answered(answer, read)),
            memory=self._memory,
        )

    def _begin(self, position: m.Position | None, kept: bytes | None) -> None:
        self._position, self._kept = position, kept
        self._sent_of = self._seen()
        self._known = tuple([(model.id, model.settings.known) for model in self._models])
        self._known_tables = tuple([(table.id, table.settings.known) for table in self._tables])

    def _answered(self, answer: m.Answer, read: bool | Sequence[LocalModel]) -> tuple[m.StepResult, bool]:
        """What became of it, and whether batches end."""
        assert answer.result is not None
        self._told(answer.rules)
        if not answer.result.applied and self._session.mode.late == "carry":
            self._keep(self._sent_of)
        for table, place in self._pulled.items():
            table.brought(place)
        self._memory.reset()
        for model in self._models:
            model.took = answer.result.applied and model in self._carried
            if read is True or (not isinstance(read, bool) and model in read):
                model.written()
            else:
                model.outdated()
        return answer.result, answer.stopped

    def _keep(self, seen: int) -> None:
        """It came too late, and the mode has its gradients go out with the next step."""
        if self._carried or self._pushed:
            self.carried_since = seen
        for model, carried in self._carried.items():
            model.keep_staged(carried)
        for table, place in self._pushed.items():
            table.keep_staged(place)

    def _told(self, rules: Iterable[m.RulesInForce]) -> None:
        """Take over the settings in force that this worker did not know."""
        for one in rules:
            models = (model.settings for model in self._models if model.id == one.model)
            tables = (table.settings for table in self._tables if table.id == one.table)
            for settings in (*models, *tables):
                settings.arrived(one)

    def _outgoing(self, server: int, number: int, step: int, read: bool | tuple[int, ...]) -> Outgoing:
        payload = [model.buffer.staged(c.tensors, server) for model, c in self._carried.items()]
        coded = [model.buffer.coded(server) for model in self._carried]
        message = m.Step(
            number,
            step,
            self._sent_of,
            tuple(self._carried.values()),
            self._settings,
            read,
            tuple([run for runs, _ in payload for run in runs]),
            self._parts(self._pushed, server),
            self._parts(self._pulled, server),
            self._table_settings,
            self._position,
            self._weight,
            known=self._known,
            known_tables=self._known_tables,
            kept=self._kept,
            coded=tuple([piece for pieces, _ in coded for piece in pieces]),
            pace=self._outer.pace if self._outer is not None else None,
            fragment=self._outer.fragment if self._outer is not None else -1,
        )
        arrays: list[Any] = [array for _, arrays in (*payload, *coded) for array in arrays]
        for table, place in self._pushed.items():
            arrays += self._memory.outgoing(place, server, rows=True, coded=self._coded_rows[table])
        for place in self._pulled.values():
            arrays += self._memory.outgoing(place, server, rows=False)
        return Outgoing(message, arrays)

    def _seen(self) -> int:
        """The oldest version that gradients of this turn were computed on."""
        versions = [model.read_version for model in self._carried]
        versions += [table.read_version for table in self._pushed]
        if self._since is not None:
            versions.append(self._since)
        return min([version for version in versions if version >= 0], default=self._session.version)

    def _parts(self, places: dict[LocalTable, RowSlice], server: int) -> tuple[m.Rows, ...]:
        if not places:
            return ()
        return tuple([self._memory.part(place, table.id, server) for table, place in places.items()])

    def _places(self, server: int, answer: m.Answer) -> Sequence[Any]:
        values = self._session.machine.values(server, answer)
        return [*values, *self._memory.incoming(list(self._pulled.values()), server)]
