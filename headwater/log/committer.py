"""Commits: which ready steps become one entry, when, and when their workers may have their answers.

The mode decides all three; what it decides is carried out here. The other half of the sequencer, whose theory
of operation is in `headwater.log.sequencer`.

Invariants:
- A step is committed at most once, and only while it is READY.
- What is measured of gradients is measured of exactly the steps which the commit has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from headwater import messages as m
from headwater.errors import ConfigurationError
from headwater.log.measures import NOT_MEASURED, MeasuredGradients
from headwater.log.pending import COMMITTED, READY, PendingExchange, ReadySteps, by_rank, ids, weights_of
from headwater.log.writer import LogWriter
from headwater.spec.sync import Commits, Mode, ReadyStep, Wait


class Committer:
    """Commits for a sequencer, under one mode.

    `enough` says whether there are workers enough to train; `committed` is called after each commit.

    Attributes:
        due: when the mode wants to be asked again though nothing has arrived; None: not.
        reason: why the mode commits nothing yet; "" where it was not asked or has nothing to say.
    """

    def __init__(
        self, writer: LogWriter, mode: Mode, *, enough: Callable[[], bool], committed: Callable[[], None]
    ) -> None:
        self.due: float | None = None
        self.reason = ""
        self._writer = writer
        self._state, self._pending = writer.state, writer.pending
        self._mode = mode
        self._enough = enough
        self._committed = committed
        self._ready = ReadySteps(writer.pending, writer.state)
        self._slowest = 0

    # ── steps that every server holds ───────────────────────────────────────────────────────────

    def admit(self, step: PendingExchange) -> None:
        """Have an active worker's step committed in time, or tell it that it is late.

        A change after local steps is relative to what its worker was given last, however long ago that was:
        a mode that carries late steps has it count in the fragment's open round.
        """
        carried = step.fragment >= 0 and self._mode.late == "carry"
        if carried or (counts := self._mode.may_count(step.missed)):
            self._pending.move(step, READY)
        else:
            self._writer.write(m.Late(self._writer.next, step.id, counts.reason, step.fragment))
            self._writer.done(step)

    def recovered(self, step: PendingExchange) -> None:
        """A step is in the log already: the sequencer that wrote it was lost before it answered."""
        self._pending.move(step, COMMITTED)
        self._release(step)

    # ── commits ─────────────────────────────────────────────────────────────────────────────────

    def commit_ready(self, now: float) -> None:
        """Commit what the mode chooses, until it waits for something."""
        self.due, self.reason = None, ""
        while len(self._ready) and self._enough():
            choice = self._mode.next(self._ready, now)
            if isinstance(choice, Wait):
                self.due, self.reason = choice.due, choice.reason
                return
            closed = [self._close(steps) for steps in self._chosen(choice)]
            if not any(closed):
                return  # servers are asked for norms

    def _chosen(self, choice: Commits) -> list[list[PendingExchange]]:
        """The groups that the mode chose, each in rank order.

        Raises:
            ConfigurationError: the mode chose what it was not asked about, or a step twice, or nothing.
        """
        ready = {step for group in choice.groups for step in group if _is_ready(step)}
        if not ready or not all(choice.groups) or len(ready) != sum(map(len, choice.groups)):
            raise ConfigurationError(
                f"mode {self._mode}: next() chose {choice.groups!r}: choose at least one group, in each "
                f"group at least one of the pending steps, and no step twice"
            )
        return [by_rank(cast(tuple[PendingExchange, ...], group)) for group in choice.groups]

    def _close(self, steps: list[PendingExchange]) -> bool:
        """Commit these, once what must be measured of their gradients is known. Whether it did."""
        if not any(step.held is not None and step.held.measured for step in steps):
            self._commit(steps)
            return True
        measures = self._writer.measures
        if not measures.under_way(steps, self._state.version):
            self._writer.write(m.Measured(self._writer.next, ids(steps), weights_of(steps)))
            measures.begin(steps, self._state.position, self._state.version)
        measured = measures.result(steps)
        if measured is not None:
            self._commit(steps, measured)
        return measured is not None

    def _commit(self, steps: list[PendingExchange], measured: MeasuredGradients | None = None) -> None:
        """Commit these as one update; those are answered with it whose answers the mode does not withhold."""
        clocks = [step.state.clock for step in steps]
        slowest = self._state.clocks.slowest_after(clocks)
        may_read = self._mode.may_read
        answered = [step for step, clock in zip(steps, clocks, strict=True) if may_read(clock + 1, slowest)]
        updates, version = ids(steps), self._state.version + 1
        told = updates if len(answered) == len(steps) else ids(answered)
        found = measured or NOT_MEASURED
        self._writer.write(
            m.Committed(
                *(self._writer.next, version, updates, told, found.norms, weights_of(steps), found.scales),
                *(found.correlations, found.ratios, self._fragments(steps)),
            )
        )
        for step in answered:
            self._writer.done(step)
        if told is not updates:
            self._withhold(steps)
        self._committed()

    def _fragments(self, steps: list[PendingExchange]) -> tuple[int, ...]:
        """Of each of these; empty where nobody can have missed a commit of one."""
        found = tuple([step.fragment for step in steps]) if self._mode.leaves_out else ()
        return found if any(fragment >= 0 for fragment in found) else ()

    def _withhold(self, steps: list[PendingExchange]) -> None:
        """Those of them that were committed and not answered wait for their answers."""
        for step in steps:
            if step.stage is READY:
                self._writer.measures.forget(step)
                self._pending.move(step, COMMITTED)

    # ── answers that were withheld ──────────────────────────────────────────────────────────────

    def release(self) -> None:
        """Answer those whose lead the others have caught up with."""
        slowest = self._state.clocks.slowest
        if slowest != self._slowest:
            self._slowest = slowest
            for step in self._pending.at(COMMITTED):
                self._release(step)

    def _release(self, step: PendingExchange) -> None:
        if self._mode.may_read(step.clock, self._state.clocks.slowest):
            self._writer.write(m.Served(self._writer.next, step.id, "step"))
            self._writer.done(step)


def _is_ready(step: ReadyStep) -> bool:
    """Whether a mode may choose this: one of those that it was asked about."""
    return isinstance(step, PendingExchange) and step.stage is READY
