"""The steps of one worker, one after the other: what is staged leaves, and what became of it is noted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headwater import messages as m
from headwater.errors import UsageError
from headwater.machines.row_buffer import RowBuffer
from headwater.runtime.client import Client
from headwater.worker.batches import DataReader
from headwater.worker.model import Model
from headwater.worker.model_spec import check_weight
from headwater.worker.pending_step import PendingStep
from headwater.worker.program import Program
from headwater.worker.progress import WorkerProgress
from headwater.worker.step_exchange import StepExchange
from headwater.worker.table import Table
from headwater.worker.trial import Trial


class WorkerSteps:
    """Of one worker.

    Attributes:
        pace: of local steps, which the next step reports; None where there are none.
        trial: delays and notes each step; None outside of a comparison of modes.
    """

    def __init__(
        self,
        client: Client,
        rows: RowBuffer,
        models: Mapping[str, Model],
        tables: Mapping[str, Table],
        reader: DataReader,
        program: Program,
        progress: WorkerProgress,
    ) -> None:
        self.pace: m.Pace | None = None
        self.trial: Trial | None = None
        self._client = client
        self._rows = rows
        self._models, self._tables = models, tables
        self._reader = reader
        self._program = program
        self._progress = progress
        self._carried_since: int | None = None

    def take(self, read: bool | Sequence[Model], weight: float) -> m.StepResult:
        """As `Worker.step`."""
        client = self._client
        exchange = self._exchange(read, weight)
        position, kept = self._reader.position(), self._program.unsent()
        before = client.waiting
        result, stopped = exchange.take(self._progress.steps + 1, read, position, kept)
        client.stages.end(self._row_of(result), before, client.waiting)
        return self._took(exchange, position, kept, result, stopped)

    def begin(self, read: bool | Sequence[Model], weight: float) -> PendingStep:
        """As `Worker.begin_step`."""
        client = self._client
        exchange = self._exchange(read, weight)
        position, kept = self._reader.position(), self._program.unsent()
        number = self._progress.steps + 1
        pending = PendingStep(client, f"step {number}")

        def arrived(result: m.StepResult, stopped: bool) -> None:
            client.stages.arrived(self._row_of(result), client.waiting)
            pending.arrived(self._took(exchange, position, kept, result, stopped))

        try:
            exchange.begin(number, read, position, kept, arrived)
        except BaseException:
            client.under_way = ""
            raise
        client.stages.sent_off()
        return pending

    def _exchange(self, read: bool | Sequence[Model], weight: float) -> StepExchange:
        """What is staged, taken for a step."""
        if self.trial is not None:
            self.trial.before_step()
        weight = check_weight(weight)
        if not isinstance(read, bool):
            self._check_read(read)
        client, models = self._client, self._models.values()
        client.check_open("step")
        client.finish()
        client.stages.step()
        for model in models if read is True else read or ():
            model.before_read()
        since = self._carried_since
        return StepExchange(client, self._rows, models, self._tables.values(), weight, since, self.pace)

    def _took(
        self,
        exchange: StepExchange,
        position: m.Position | None,
        kept: bytes | None,
        result: m.StepResult,
        stopped: bool,
    ) -> m.StepResult:
        """Note what became of a step."""
        since = self._carried_since = exchange.carried_since
        self._progress.count(result, skipped=exchange.skip, carried=since is not None)
        self._reader.stopped |= stopped
        if result.applied:
            self._reader.applied(position)
            self._program.recorded(kept)
        self._reader.settle()
        self._progress.tell()
        if self.trial is not None:
            self.trial.after_step(result, self._reader.samples)
        return result

    def _row_of(self, result: m.StepResult) -> int:
        """What turns of several workers have in common: their round, or which step of each it is."""
        return result.version if self._client.mode.rounds else self._progress.steps + 1

    def _check_read(self, read: Any) -> None:
        listed = isinstance(read, Sequence | set | frozenset) and not isinstance(read, str | bytes)
        if not listed or any(one not in self._models.values() for one in read):
            known = ", ".join(map(repr, self._models)) or "none"
            raise UsageError(
                f"step: got read={read!r}, expected True, False or a list of this worker's models, which are "
                f"{known}; nothing was sent"
            )
