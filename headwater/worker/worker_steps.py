"""The steps of one worker, one after the other: what is staged leaves, and what became of it is noted."""

from __future__ import annotations

from collections.abc import Sequence

from headwater import messages as m
from headwater.machines.row_buffer import RowBuffer
from headwater.runtime.client import Client
from headwater.worker.batches import DataReader
from headwater.worker.local_model import LocalModel
from headwater.worker.model_spec import check_weight
from headwater.worker.pending_step import PendingStep
from headwater.worker.program import Program
from headwater.worker.progress import WorkerProgress
from headwater.worker.registrations import Registrations
from headwater.worker.step_exchange import OuterStep, StepExchange
from headwater.worker.trial import Trial


class WorkerSteps:
    """Takes the steps of one worker.

    Attributes:
        outer: what the next step is, where it is an outer one; None again once it is sent.
        trial: delays and notes each step; None outside of a comparison of modes.
    """

    def __init__(
        self,
        client: Client,
        rows: RowBuffer,
        registered: Registrations,
        reader: DataReader,
        program: Program,
        progress: WorkerProgress,
    ) -> None:
        self.outer: OuterStep | None = None
        self.trial: Trial | None = None
        self._client = client
        self._rows = rows
        self._models, self._tables = registered.local_models, registered.local_tables
        self._reader = reader
        self._program = program
        self._progress = progress
        self._carried_since: int | None = None

    def take(self, read: bool | Sequence[LocalModel], weight: float) -> m.StepResult:
        """Do what `Worker.step` says."""
        client = self._client
        exchange = self._exchange(read, weight)
        position, kept = self._reader.position(), self._program.unsent()
        before = client.waiting
        result, stopped = exchange.take(self._progress.steps + 1, read, position, kept)
        client.stages.end(self._row_of(result), before, client.waiting)
        return self._took(exchange, position, kept, result, stopped)

    def begin(self, read: bool | Sequence[LocalModel], weight: float) -> PendingStep:
        """Do what `Worker.begin_step` says."""
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

    def _exchange(self, read: bool | Sequence[LocalModel], weight: float) -> StepExchange:
        """What is staged, taken for a step."""
        if self.trial is not None:
            self.trial.before_step()
        weight = check_weight(weight)
        client, models = self._client, self._models
        client.check_open("step")
        client.finish()
        client.stages.step()
        for model in models if read is True else read or ():
            model.before_read()
        since, outer = self._carried_since, self.outer
        self.outer = None
        return StepExchange(client, self._rows, models, self._tables, weight, since, outer)

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
