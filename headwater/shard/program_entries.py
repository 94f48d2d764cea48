"""What entries of workers' programs do on a server: meetings, work on vectors, evaluations.

And where each rank's program is, which steps, meetings and ends say: what it keeps, where it is in its data.
Whatever depends on an entry alone comes out the same on every server, as all of `headwater.shard.state` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headwater import messages as m
from headwater.errors import MeetingError, UsageError
from headwater.log.meetings import describe
from headwater.shard import portion_sums
from headwater.shard.named_vectors import BroughtGradients
from headwater.shard.outstanding import Members
from headwater.shard.vector_work import perform, refusal

if TYPE_CHECKING:
    from headwater.shard.state import Answers, State


class ProgramEntries:
    """Of the server whose state is `state`, and whose members are `members`."""

    def __init__(self, state: State, members: Members) -> None:
        self._state = state
        self._members = members

    # ── entries ─────────────────────────────────────────────────────────────────────────────────

    def met(self, entry: m.Met) -> Answers:
        """Everybody is here: what that comes to, and what the servers do then."""
        requests = [(ticket, self._meet_of(ticket)) for ticket in entry.tickets]
        sums: dict[str, float] = {}
        for _, request in requests:
            for name, value in request.values.items():
                sums[name] = sums.get(name, 0.0) + value
        ranks = tuple(self._rank_of(ticket) for ticket in entry.tickets)
        meeting = requests[0][1].meeting
        gives = {meeting.root} if meeting.root >= 0 else set(ranks) if meeting.kind == "gather" else set()
        data = tuple(
            request.data for rank, (_, request) in zip(ranks, requests, strict=True) if rank in gives
        )
        failure, work = "", requests[0][1].work
        if work is not None:
            self._state.version = entry.version or self._state.version
            failure = self._work(entry, requests, work)
            data = (self._state.vectors[work.model].named.note,) if work.recall else ()
        totals = () if failure else entry.totals
        self._state.programs.record(m.MeetingResult(meeting, ranks, sums, data, totals, failure))
        for ticket, request in requests:
            self.note(ticket, request)
        fields: dict[str, Any] = {"sums": sums, "ranks": ranks, "data": data, "totals": totals}
        if failure:
            fields = {"failure": m.Refused("UsageError", failure)}
        return [
            answer
            for ticket, request in requests
            for answer in self._state.answer(ticket, **fields, **self.read_after(ticket, request))
        ]

    def _work(self, entry: m.Met, requests: Sequence[tuple[m.ExchangeId, m.Meet]], work: m.VectorWork) -> str:
        """Do what a meeting has the servers do with vectors; why that is refused, or ""."""
        if failure := refusal(self._state.vectors, work):
            return failure
        if work.operations:
            perform(self._state.vectors, work, self._state.inputs.gathered(work, requests), entry.version)
        return ""

    def _operate_of(self, ticket: m.ExchangeId) -> m.Operate:
        request = self._state.inputs.request(ticket)
        assert isinstance(request, m.Operate)
        return request

    def operated(self, entry: m.Operated) -> Answers:
        """Work of one worker alone, or an evaluation that is over."""
        self._state.version = entry.version
        request = self._operate_of(entry.source)
        work, plan, portions = request.work, request.plan, self._state.standings.portions
        vector = self._state.vectors[work.model]
        failure = refusal(self._state.vectors, work)
        if plan is not None and plan.out not in vector.named.arrays:
            failure = failure or f"model {vector.spec.name!r}: vector {plan.out!r} is unknown"
        if failure:
            return self._state.answer(entry.source, failure=m.Refused("UsageError", failure))
        sums = None
        if plan is None:
            perform(self._state.vectors, work, BroughtGradients(), entry.version)
        else:
            portion_sums.finish(vector.named, plan.count, plan.out)
            sums = {"loss": portions.total}
        read = self.read_after(entry.source, request)
        return self._state.answer(entry.source, totals=entry.totals, sums=sums, **read)

    def opened(self, entry: m.Opened) -> Answers:
        """What is refused is not done, and said when the evaluation is over."""
        self._state.version = entry.version
        work = self._operate_of(entry.source).work
        portion_sums.begin(self._state.vectors[entry.model].named)
        if not refusal(self._state.vectors, work):
            perform(self._state.vectors, work, BroughtGradients(), entry.version)
        return []

    def counted(self, entry: m.Counted) -> Answers:
        """A portion's result is added."""
        portion = entry.done.portion
        gradient = self._state.inputs.gradient(entry.source, portion.model)
        portion_sums.add(self._state.vectors[portion.model].named, portion, gradient)
        return []

    def handed(self, entry: m.Handed) -> Answers:
        """A worker gets its next portion, or hears that there is none."""
        request = self._state.inputs.request(entry.ticket)
        assert isinstance(request, m.NextPortion)
        values: tuple[int, ...] = ()
        if entry.portion is not None:
            reader = self._members.reader(entry.ticket)
            values = self._state.write(entry.ticket, reader, (request.model,), request.have)
        return self._state.answer(entry.ticket, portion=entry.portion, values=values)

    def read_after(self, ticket: m.ExchangeId, request: m.Meet | m.Operate) -> dict[str, Any]:
        """The values that work on vectors brings, for a member that can be answered here."""
        if request.work is None or not request.work.read:
            return {}
        reader = self._members.reader(ticket)
        return {"values": self._state.write(ticket, reader, (request.work.model,))}

    def _meet_of(self, ticket: m.ExchangeId) -> m.Meet:
        request = self._state.inputs.request(ticket)
        assert isinstance(request, m.Meet)
        return request

    def met_before(self, ticket: m.ExchangeId, meeting: m.Meeting) -> dict[str, Any]:
        """What a meeting that has ended came to, for a rank that runs its program again, or that missed it.

        Raises:
            MeetingError: it was another meeting, or its result is kept no more.
            UsageError: the servers refused its work on vectors.
        """
        rank, result = self._rank_of(ticket), self._state.programs.result(meeting.number)
        if result is None:
            raise MeetingError(
                f"worker {rank} comes to {describe(meeting)} again, but its result is kept no more: "
                f"loop over worker.epochs(n), so that a restarted worker begins at its epoch"
            )
        if result.meeting != meeting:
            who = ", ".join(map(str, result.ranks))
            raise MeetingError(
                f"worker {rank} runs its program again and comes to {describe(meeting)}, where workers {who} "
                f"were in {describe(result.meeting)}: make the same calls in the same order, or loop over "
                f"worker.epochs(n), which begins where the rank was"
            )
        if result.failure:
            raise UsageError(result.failure)
        return {"sums": result.sums, "ranks": result.ranks, "data": result.data, "totals": result.totals}

    # ── programs ────────────────────────────────────────────────────────────────────────────────

    def _rank_of(self, ticket: m.ExchangeId) -> int:
        return self._state.standings.standing(ticket.member).rank

    def note(self, ticket: m.ExchangeId, request: m.Step | m.Meet | m.End | m.Leave) -> None:
        """Where the worker's program is from here on."""
        rank = self._rank_of(ticket)
        self._state.programs.keep(rank, request.kept)
        position = request.position
        if position is None:
            return
        before = self._state.positions.of(rank)
        self._state.positions.record(position)
        if position.loops and (before is None or before.loops != position.loops):
            declared = set(range(self._state.standings.workers)) | self._state.standings.ranks
            last = [self._state.positions.of(one) for one in sorted(declared)]
            self._state.programs.forget_results(one.loops if one is not None else () for one in last)

    def recalled(self, ticket: m.ExchangeId) -> m.Recalled:
        """What the log knows of the worker's rank."""
        rank = self._rank_of(ticket)
        history = self._state.standings.histories[rank]
        return m.Recalled(
            self._state.positions.of(rank),
            history.steps,
            self._state.standings.met,
            history.incarnations > 1,
            self._state.programs.kept(rank),
            self._state.positions.recuts,
        )
