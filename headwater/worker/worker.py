"""A worker: joins a cluster, registers models, takes steps; the user's side of everything."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.data.event_stream import Stream
from headwater.errors import HeadwaterError
from headwater.machines.row_buffer import RowBuffer
from headwater.runtime.client import Client
from headwater.runtime.inquiry import take_checkpoint
from headwater.spec.initializers import Initializer, Zeros
from headwater.spec.lifetime import AfterCount, Expiry
from headwater.spec.rules import Rule
from headwater.spec.sync import Mode
from headwater.spec.user_settings import unpack
from headwater.wire.scratch import Scratch
from headwater.wire.security import PLAIN, Security
from headwater.worker.batches import Batches, DataReader, Splits, StreamBatches
from headwater.worker.local_model import LocalModel
from headwater.worker.local_table import LocalTable
from headwater.worker.logged import numbers_of
from headwater.worker.meetings import Gathered, Meetings, Sums
from headwater.worker.model import Model
from headwater.worker.model_spec import (
    Group,
    NonFinite,
    check_merge,
    specify,
    specify_table,
)
from headwater.worker.pending_step import PendingStep
from headwater.worker.plan import SplitKind, count_of, plan_of
from headwater.worker.program import Epochs, Program
from headwater.worker.progress import WorkerProgress, WorkerStatistics
from headwater.worker.pulls import pull_together
from headwater.worker.registrations import Registrations
from headwater.worker.step_exchange import OuterStep
from headwater.worker.stream_part import stream_plan_of
from headwater.worker.table import Table
from headwater.worker.trial import Trial
from headwater.worker.vectors import Vectors
from headwater.worker.worker_steps import WorkerSteps

_ZEROS = Zeros()


class Worker:
    """A member of a cluster that computes gradients. A context manager: leaving is part of the protocol.

    Not thread-safe; used by one thread at a time.

    Attributes:
        rank: which worker this is, from 0.
        workers: how many were declared.
        settings: what `run(settings=…)` was given.
        address, security: of the coordinator, and how this worker speaks to it.
        stages: the clock of this worker's turns, for adapters that stage gradients themselves.
    """

    def __init__(
        self, address: str, rank: int | None = None, *, security: Security = PLAIN, cluster: str = ""
    ) -> None:
        session = self._session = Client(address, "worker", rank, security=security, cluster=cluster)
        self.address, self.security = address, security
        welcome = session.welcome
        self.rank = welcome.member.index
        self.workers = welcome.workers
        self.stages = session.stages
        self.stages.exchange = lambda: (welcome.member.id, session.machine.number)
        self.settings = unpack(welcome.settings)
        self._registered = Registrations()
        self._rows = RowBuffer(session.machine, Scratch(shared=any(session.shares)))
        recalled = session.ask(m.Recall, "recall").recalled
        assert recalled is not None
        self._program = Program(recalled)
        self._feed = DataReader(session, self._program, recalled.position, recalled.recuts)
        self._progress = WorkerProgress(session, self._feed, self._registered)
        before, after = self._progress.tell_before_wait, self._registered.outdate
        self._meetings = Meetings(session, self._program, self._feed, before, after)
        self._steps = WorkerSteps(
            session, self._rows, self._registered, self._feed, self._program, self._progress
        )

    @property
    def version(self) -> int:
        """Version of the last answer; never decreases."""
        return self._session.version

    @property
    def cluster(self) -> str:
        """The identity of the cluster: what a later job runs at the same address has another."""
        return self._session.welcome.cluster

    @property
    def generation(self) -> int:
        """How often training began anew from a checkpoint; versions count within a generation."""
        return self._session.welcome.generation

    @property
    def sync(self) -> str:
        """The cluster's mode as text, such as "sync" or "ssp:3"."""
        return str(self._session.mode)

    @property
    def mode(self) -> Mode:
        """The cluster's mode as an object; what it means for a worker is in its properties."""
        return self._session.mode

    @property
    def outer(self) -> OuterStep | None:
        """What the next step is, where it is an outer one; set by the adapters for local steps."""
        return self._steps.outer

    @outer.setter
    def outer(self, outer: OuterStep) -> None:
        self._steps.outer = outer

    @property
    def trial(self) -> Trial | None:
        """What delays and notes this worker's steps; None outside of a comparison of modes."""
        return self._steps.trial

    @trial.setter
    def trial(self, trial: Trial | None) -> None:
        self._steps.trial = trial

    @property
    def told(self) -> m.Progress | None:
        """What the coordinator was told last; None before the first time. From any thread."""
        return self._progress.told

    # ── models and tables ───────────────────────────────────────────────────────────────────────

    def model(
        self,
        name: str,
        params: Mapping[str, Any],
        rule: Rule,
        *,
        groups: Sequence[Group] = (),
        clip_norm: float | None = None,
        merge: str | None = None,
        codec: str | None = None,
        values_codec: str | None = None,
        outer: bool = False,
        aliases: Mapping[str, str] = MappingProxyType({}),
        nonfinite: NonFinite = "raise",
    ) -> Model:
        """Register a model, or join the one that has this name; blocks until the lowest rank declared it.

        The lowest active rank's `params` (name → array of float32, float16 or bfloat16) are the initial
        values. `groups` give tensors a rule of their own with other settings. A later call with the same
        name and tensors returns the same object: the model goes on with the values that it has, and the new
        call's settings are in force from the next step on, as with `Model.set`.

        With `clip_norm` the gradient of each commit, of all tensors together and as the rule would get it,
        is scaled down on the servers where its 2-norm is larger: g ← g · min(1, clip_norm / (norm + 1e-6)),
        as `torch.nn.utils.clip_grad_norm_` does. `StepResult.norms` has the norms of before. It costs a pass
        over the gradients and one exchange more between servers.

        `merge`: how the gradients of one commit become the one that the rule gets: "mean", "sum", "rda" (by
        tensor, the weighted mean of the lengths in the direction of the weighted sum of unit vectors),
        "median" or "trimmed:F" (element by element, the F largest and F smallest left out); None: as the
        mode's `reduce` says. "rda" costs a pass over each pair of gradients and one exchange more between
        servers; `StepResult.norms` then has the norm of the result.

        `codec`: how gradients are represented on their way to the servers: "bf16", "fp16", "int8" (by 256,
        the largest magnitude / 127), "q4" (sign and 3-bit exponent), "topk:FRACTION", "2bit:THRESHOLD",
        "1bit:THRESHOLD" (MXNet's); None: as they are. It changes results in the same way whether bytes travel
        or not. What is lost is kept by this worker, in memory of the model's size, and added to the next
        gradient of that tensor; one that is started again begins with nothing kept. `values_codec`: how
        values are represented that workers read, "bf16" or "fp16"; the servers keep them in float32.

        `outer`: its gradients are changes after local steps, as an `OuterOptimizer` sends them. In a commit
        only workers that carry the model contribute to it, and `StepResult.correlations` has how alike its
        change and the one before are. It costs servers memory of the model's size, some passes over the
        gradients of a commit and one exchange more between servers.

        `aliases`: other name → tensor, for results and checkpoints to have the tensor under both.

        Raises:
            ConfigurationError: an impossible `clip_norm`, `merge` or codec, or a merge that needs more
                contributors than the cluster has workers.
            RegistrationError: not a model, or another one than already registered; names both. A model
                registered before stays as it was.
        """
        self._session.check_open("model")
        check_merge(merge, self.workers)
        how = clip_norm, merge, aliases, codec, values_codec, outer
        spec, initial = specify(name, params, rule, groups, *how)
        known = self._registered.models.get(name)
        if known is not None:
            known.local.redeclare(spec, nonfinite)
            known.local.warn_of_unused(initial)
            return known
        local = LocalModel(self._session, spec, params, nonfinite)
        local.register(initial)
        model = Model(local, Vectors(local, self._meetings))
        self._registered.add_model(model)
        self.stages.begin(self._session.waiting)
        return model

    def table(
        self,
        name: str,
        dim: int,
        rule: Rule,
        *,
        initializer: Initializer = _ZEROS,
        seed: int = 0,
        admission: AfterCount | None = None,
        expiry: Expiry | None = None,
        codec: str | None = None,
        nonfinite: NonFinite = "raise",
    ) -> Table:
        """Register a table, or join the one that has this name; blocks for an exchange.

        A table maps any int64 to a row of float32[dim]. A row comes into being with the first gradient for
        its id that `admission` lets in, from the value that `initializer` gives for (seed, id, column), and
        ends as `expiry` says. A later call with the same name and the same table returns the same object, and
        its rule's settings are in force from the next step on, as with `Table.set`.

        `codec`: how gradients of rows are represented, "bf16", "fp16" or "int8" (a scale for each row);
        nothing is kept of what they lose.

        Raises:
            RegistrationError: not a table, or another one than already registered; names both.
            ConfigurationError: an impossible `codec`.
        """
        self._session.check_open("table")
        spec = specify_table(name, dim, rule, initializer, seed, admission, expiry, codec)
        known = self._registered.tables.get(name)
        if known is not None:
            known.local.redeclare(spec, nonfinite)
            return known
        table = Table(LocalTable(self._session, self._rows, spec, nonfinite))
        table.local.register()
        self._registered.add_table(table)
        self.stages.begin(self._session.waiting)
        return table

    @property
    def models(self) -> Mapping[str, Model]:
        """The models that this worker has registered, by name."""
        return MappingProxyType(self._registered.models)

    def pull(self, ids: Mapping[Table, Any]) -> dict[Table, NDArray[np.float32]]:
        """Rows of several tables in one exchange: for each table float32[*ids.shape, dim], a new array.

        As `Table.pull`, but all rows are of one version, and it costs one exchange whatever the number of
        tables; none where `prefetch` brought all of them.

        Args:
            ids: for each of this worker's tables integers of any shape, with repeats.

        Raises:
            UsageError: not a mapping of this worker's tables, or ids that are not integers, or do not fit
                int64; nothing was sent.
            ClosedError: the worker has left.
            StalledError: no answer within the deadline.
        """
        self._session.check_open("pull")
        self._registered.check_tables(ids)
        wanted = [(table.local, table.local.asks(given)) for table, given in ids.items()]
        brought = pull_together(self._session, self._rows, wanted)
        return {table: one.plan.scatter(one.rows) for table, one in zip(ids, brought, strict=True)}

    # ── the turn ────────────────────────────────────────────────────────────────────────────────

    def step(self, *, read: bool | Sequence[Model] = True, weight: float = 1.0) -> m.StepResult:
        """End the turn: what was pushed leaves as one update; blocks as the mode says.

        With `read` the values of all this worker's models, or of the given ones, are those of the answer
        afterwards. With nothing pushed it is this worker's turn all the same.

        `weight`: what this update counts in a mean over several workers, such as the samples or tokens that
        it was computed from: Σ weight · gradient / Σ weight, of models and of tables alike; the entry of the
        log records it. Only the ratio of weights counts. With `reduce="sum"` gradients are multiplied by it;
        rules that always add up (`Accumulate`) ignore it. A weight of 0 drops what was pushed: an empty turn,
        which is not divided by.

        A step that came too late for its round is answered with `applied=False` and current values. Under
        `late=carry` its gradients stay staged and go out with the next step, which adds what is pushed until
        then: as two pushes before one step do, with that step's weight. `Model.discard` forgets them.

        Raises:
            ConfigurationError: `weight` is negative, not finite or no number; nothing was sent.
            UsageError: `read` is neither a yes or no nor models of this worker; nothing was sent.
            StalledError: no answer within the deadline; names whom it waited for; final for this worker.
            ClosedError: the worker has left.
        """
        models = read if isinstance(read, bool) else self._registered.read_by_step(read)
        return self._steps.take(models, weight)

    def begin_step(self, *, read: bool | Sequence[Model] = True, weight: float = 1.0) -> PendingStep:
        """As `step`, but return once it is sent: its result, and the values that it reads, come later.

        One at a time; what may be done meanwhile: see `PendingStep`. Views that `pull` or a step gave are
        written while it is under way.

        Raises:
            ConfigurationError: `weight` is negative, not finite or no number; nothing was sent.
            UsageError: the step before it is still under way.
            ClosedError: the worker has left.
        """
        models = read if isinstance(read, bool) else self._registered.read_by_step(read)
        return self._steps.begin(models, weight)

    # ── data ────────────────────────────────────────────────────────────────────────────────────

    def batches(
        self,
        dataset: Any,
        batch_size: int,
        *,
        epochs: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        splits: SplitKind | None = None,
        drop_last: bool = False,
        linger: float = 0.2,
    ) -> Batches | StreamBatches:
        """This worker's batches; they end when there are none left for it, or after `stop`.

        `dataset`: an array, a tuple of arrays, anything with `__len__` and `__getitem__`, or `Files`.
        The order depends on (seed, epoch) alone. With static splits, the default of synchronous mode,
        each declared worker has a part of its own, the same on every run. With dynamic splits, the
        default of the other modes, workers lease what is left: the faster one reads more, and what a
        dead one left is read by the others. All workers must then make the same calls in the same
        order, and the end may wait for another's last batch.

        `drop_last`: all batches have `batch_size` samples. A static part then has as many of them as every
        other worker's; what does not fill one is read by nobody.

        `dataset` may also be a stream (`hw.data.Tail`, `hw.data.RedisStream`, or an object like them), each
        of whose partitions one worker reads; a batch is then a mapping from field to array, and has fewer
        events where no more came for `linger` seconds. The log records offsets as it records positions. A
        worker whose endless stream is idle hears of `stop` with its next step.

        A restarted worker goes on where the log recorded it: after the last batch that a step followed. From
        its last batch on, rounds do not wait for this worker until it steps again. Only the end of the data,
        `stop` and `close()` of what is returned end it. A loop that is left by `break` is over once the
        worker goes on, with its next step or meeting; a loop that is left by an exception is not over.

        Raises:
            ConfigurationError: impossible arguments; with dynamic splits, others call it differently.
            DataError: a file cannot be read; names file and row.
            StalledError: no split within the deadline; names who holds the last ones.
        """
        self._session.check_open("batches")
        if isinstance(dataset, Stream):
            ordered = epochs != 1 or shuffle or drop_last or splits is not None
            return self._feed.events(stream_plan_of(dataset, batch_size, linger, ordered=ordered))
        rounds, splits = self.mode.rounds, self._splits(splits)
        plan = plan_of(dataset, batch_size, epochs, shuffle, seed, splits, rounds=rounds, drop_last=drop_last)
        return self._feed.batches(plan, dataset)

    def splits(
        self,
        dataset: Any,
        *,
        epochs: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        batch_size: int = 1,
        splits: SplitKind | None = None,
    ) -> Splits:
        """What this worker is to read, for a loader of one's own: int64[n] indices, split by split.

        `dataset`: as for `batches`, or a plain number of samples; `batch_size`: splits are multiples of
        it, but for the last of an epoch. Everything else is as for `batches`; a static part comes as
        one split an epoch. A split is done with the first step after the next one was asked for.
        """
        self._session.check_open("splits")
        splits = self._splits(splits)
        plan = plan_of(dataset, batch_size, epochs, shuffle, seed, splits, rounds=self.mode.rounds)
        return self._feed.splits(plan)

    def _splits(self, asked: SplitKind | None) -> SplitKind | None:
        """In a comparison of modes the data may have to come in the same order in all of them."""
        return asked if self.trial is None else self.trial.splits(asked)

    # ── its place in the program ────────────────────────────────────────────────────────────────

    def epochs(self, count: int) -> Epochs:
        """The epochs 0, 1, … `count` - 1, from the one on at which this rank was; an iterator.

        A worker that is started again, or resumed, begins with the epoch in which it was: its calls of
        `batches` and its meetings are those of that epoch. What stands before the loop is run again.

        Raises:
            ConfigurationError: not a whole number ≥ 0.
        """
        self._session.check_open("epochs")
        return Epochs(self._program, self._feed, count_of("epochs", "count", count, 0))

    def keep(self, **state: Any) -> None:
        """Keep plain data and arrays for this rank, beside what it keeps already; does not block.

        They travel with the next step (or meeting, or end of `batches`) and live in the log from then on: in
        replicas and checkpoints, as of exactly that step. `kept` has them after a restart, rewind or resume.

        Raises:
            UsageError: something else than plain data and arrays, or more than 4 MiB in all; nothing changed.
        """
        self._session.check_open("keep")
        self._program.keep(state)

    @property
    def kept(self) -> dict[str, Any]:
        """What this rank keeps, as copies of the caller's own; empty before anything was kept."""
        return self._program.kept

    @property
    def restarted(self) -> bool:
        """Whether an earlier incarnation of this rank took part: before a restart, a rewind or a resume."""
        return self._program.restarted

    @property
    def steps(self) -> int:
        """Steps of this rank, over all its incarnations."""
        return self._program.steps_before + self._progress.steps

    # ── together with the others ────────────────────────────────────────────────────────────────

    def barrier(self) -> None:
        """Block until every worker of the cluster is at this barrier, or has left.

        Barriers, sums, gathers and broadcasts are meetings. The meetings of a program are counted: one that
        has ended gives a restarted worker the result that it gave everybody.

        Raises:
            StalledError: it could never end, because another worker waits in something else or at another
                place of its program; names both. Or the deadline passed.
            MeetingError: this program runs again, and came to another meeting the first time.
        """
        self._meetings.barrier()

    def sum(self, *, of: m.Attendance = "present", **scalars: float) -> Sums:
        """Add scalars over all workers, in rank order; blocks like `barrier` until all have called it.

        The result's `contributors` says how many workers there were, its `ranks` which. `of="all"` waits for
        a declared worker that is gone until it is back, and fails where one has finished.

        Raises:
            UsageError: not a number; nothing was sent. MeetingError, StalledError: as `barrier`.
        """
        return self._meetings.sum(scalars, of)

    def gather(self, *, of: m.Attendance = "present", **arrays: Any) -> Gathered:
        """Everybody's arrays by name, as lists in rank order; blocks like `barrier` until all have called it.

        Every worker passes the same names; shapes and dtypes may differ. The arrays are the caller's own.
        `contributors`, `ranks` and `of`: as for `sum`.

        Raises:
            UsageError: not arrays of numbers; nothing was sent. MeetingError, StalledError: as `barrier`.
        """
        return self._meetings.gather(arrays, of)

    def broadcast(self, value: Any, *, root: int = 0) -> Any:
        """What worker `root` passed, in every worker; blocks like `barrier` until all have called it.

        `value`: plain data (numbers, texts, bytes, None, lists, tuples, dicts) and arrays; what other workers
        pass is ignored. Waits for `root` where that is gone until it is back.

        Raises:
            UsageError: something else; nothing was sent. MeetingError, StalledError: as `barrier`.
        """
        return self._meetings.broadcast(value, root)

    def checkpoint(self) -> str:
        """Have the cluster write a checkpoint of now, and return its path; blocks until it is on disk.

        Others go on meanwhile. It holds the steps that have been taken: what is pushed or kept since this
        worker's last step is not in it.

        Raises:
            ConfigurationError: the cluster has no directory for checkpoints.
            CheckpointError: it cannot be written.
            StalledError: it is not on disk within the deadline.
            ConnectionLostError: the coordinator is away.
        """
        self._session.check_open("checkpoint")
        deadline = self._session.welcome.deadline
        return take_checkpoint(self.address, f"worker {self.rank}", deadline, self.security)

    def stop(self) -> None:
        """End everybody's `batches` after their next step; blocks for an exchange."""
        self._session.check_open("stop")
        self._session.ask(m.Stop, "stop")

    def log(self, **metrics: float) -> None:
        """Show these numbers in the worker's line of `headwater run`, and keep them for `RunResult.history`
        and the sinks of `log_to`, with the step and version of now; costs no exchange.

        NaN and infinity are numbers too. A worker may use 100 names of up to 100 characters; further ones are
        counted, and dropped with one warning.

        Raises:
            UsageError: not a number; nothing was logged.
        """
        numbers = numbers_of(metrics)
        self._progress.logged.add(numbers, self.steps, self.version, time.monotonic())
        if self.trial is not None:
            self.trial.logged(numbers, self._feed.samples)

    def statistics(self) -> WorkerStatistics:
        """A snapshot of this worker's counters."""
        return self._progress.statistics()

    # ── the end ─────────────────────────────────────────────────────────────────────────────────

    def leave(self) -> None:
        """Leave the cluster, having done all that there was to do; idempotent.

        Arrays and tensors got from it stay valid. A `with` block that ends with an error leaves too, but
        another worker may then take this one's place.
        """
        self._depart(finished=True)

    def dismiss(self, code: int) -> None:
        """Have calls of this worker raise SystemExit(code), from the next one on, until it leaves.

        The call under way is finished. Does not block; from any thread, and from a signal's handler.
        """
        self._session.dismissed = code

    def finish(self) -> None:
        """Leave as `leave` does, but stay a member until all declared workers have finished; blocks for that.

        Training may begin anew from a checkpoint until that last moment, and then needs this worker too.
        For clusters whose coordinator was started by `headwater serve`.

        Raises:
            RewoundError: training begins anew: make a new Worker, and train again.
            ConnectionLostError: the cluster was closed before, or its coordinator is away for too long.
            SystemExit: this worker was dismissed.
        """
        try:
            if self._session.usable():
                self._leave_log(finished=True)
                self._progress.tell(now=True)
                self._session.wait_for_others()
        finally:
            self._close()

    def _depart(self, finished: bool) -> None:
        self._session.dismissed = None
        try:
            if self._session.usable():
                self._leave_log(finished)
                self._progress.tell(now=True)
                self._session.depart(finished)
        finally:
            self._close()

    def _leave_log(self, finished: bool) -> None:
        """Only whoever has finished says where its program is: an error may have come anywhere."""
        if finished:
            self._program.settle(self._feed)
        position = self._feed.resting(leaving=True) if finished else None
        kept = self._program.unsent() if finished else None
        if finished:
            self._feed.settle()
        self._session.leave_log(lambda number: m.Leave(number, finished, position, kept))

    def _close(self) -> None:
        self._session.close()
        self._rows.release()
        self._registered.release()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._depart(finished=error is None)
        except HeadwaterError:
            if error is None:
                raise
