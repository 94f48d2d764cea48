"""Faults put into what servers run are found: each within 200 schedules, by the invariant that it breaks."""

import dataclasses
from collections import deque

import numpy as np
import pytest
from msgspec.structs import replace

from headwater import messages as m
from headwater.log.pending import PendingExchanges
from headwater.log.portions import Portions
from headwater.log.positions import Positions
from headwater.log.programs import Programs
from headwater.log.state import LogState
from headwater.log.waits import Waits
from headwater.machines.actions import Close, Dial, Send
from headwater.machines.applier import LogApplier
from headwater.machines.coordinator.newcomers import Newcomers
from headwater.machines.coordinator.state import State
from headwater.machines.coordinator.trace_collection import TraceCollection
from headwater.machines.current_read import CurrentRead
from headwater.machines.exchange import Exchange
from headwater.machines.log_host import SequencerMachine
from headwater.machines.log_link import ReportLink
from headwater.machines.own_standby import OwnStandby
from headwater.machines.read_lease import ReadLease
from headwater.machines.rows_ahead import RowsAhead
from headwater.machines.server import ServerMachine
from headwater.machines.standby_link import StandbyLink
from headwater.machines.standby_receiver import StandbyReceiver
from headwater.shard.ledger import Ledger
from headwater.shard.shard import Shard
from headwater.shard.table import Table
from headwater.shard.vector import Vector
from headwater.spec.rules import Adam
from headwater.spec.sync import Decision, StaleSynchronous, Synchronous
from headwater.testing import Faults, Violation, explore, run
from headwater.testing.faults import Partition
from headwater.testing.processes.memory import ScratchArray, WindowArrays
from headwater.testing.schedule import Schedule, random_schedule

MODES = [
    "async",
    *(pytest.param(mode, marks=pytest.mark.long) for mode in ("sync", "ssp:1", "sync:quorum=2")),
]
modes = pytest.mark.parametrize("mode", MODES)

LOGS_DIFFER = {"OneOrder", "EqualReplicas", "ConsistentCut"}
VALUES_WRONG = {"ValuesOfTheirVersion", "QuietMemory"}
NOTICED = {"NobodyWaitsForEver", "ProtocolError", "AssertionError", "KeyError"}
"""Servers and members themselves find it impossible, or nothing goes on."""


@pytest.fixture(autouse=True)
def _shrinks(long):
    """Only with --long is what was found shrunk, which takes most of the time."""
    SHRINKS[:] = [long]


SHRINKS = [False]


def found(mode, **fixed):
    """The violation that 200 schedules find; what is printed of it makes it happen again."""
    # Little is left to chance that costs time and shows nothing of these: rules, checkpoints, meetings.
    plain = {"rule": None, "checkpoints": 0, "meets": 0, "readers": 0, "rewinds": 0, "traces": 0, **fixed}
    if SHRINKS == [False]:
        violation = found_by_default(mode, **plain)
    else:
        with pytest.raises(Violation) as caught:
            explore(mode, 200, **plain)
        violation = caught.value
    assert violation.schedule is not None
    assert f"run({violation.schedule}" in str(violation)
    return violation


def found_by_default(mode, faults=None, **fixed):
    """As `found`, with whatever chance says of all else; it is not shrunk."""
    for seed in range(200):
        try:
            run(random_schedule(mode, seed, faults or Faults(), **fixed))
        except Violation as violation:
            return violation
    raise AssertionError("none of 200 schedules finds it")


@modes
def test_a_ledger_that_forgets_doubles_updates(mode, monkeypatch):
    def forgets(self, ticket):
        standing = self.standing(ticket.member)
        if standing.phase == "active":
            self.clocks.advance(standing.clock)
        standing.clock += 1

    def records(self, member, step, result):
        account = self._account(member)
        account.step, account.result = step, result

    monkeypatch.setattr(Ledger, "is_repeat", lambda self, member, step: False)
    monkeypatch.setattr(Ledger, "record", records)
    monkeypatch.setattr(Ledger, "last_number", lambda self, member: 0)
    monkeypatch.setattr(LogState, "_finished_step", forgets)
    monkeypatch.setattr(LogState, "_answered_step", lambda self, ticket: None)
    assert found(mode).invariant == "EachUpdateOnce"


@modes
def test_an_entry_that_is_written_before_one_server_holds_its_exchange(mode, monkeypatch):
    holds = PendingExchanges.hold

    def early(self, seat, server, held):
        if server != self.servers - 1:
            holds(self, seat, self.servers - 1, held)
        return holds(self, seat, server, held)

    monkeypatch.setattr(PendingExchanges, "hold", early)
    assert found(mode, servers=2).invariant in {*NOTICED, *VALUES_WRONG}


@modes
def test_an_acknowledgement_before_the_standby_has_the_entry(mode, monkeypatch):
    monkeypatch.setattr(Shard, "safe", property(lambda self: self.prepared))
    assert found(mode).invariant in {"EachUpdateOnce", *LOGS_DIFFER, *NOTICED}


@modes
def test_an_answer_before_all_servers_have_prepared_its_entry(mode, monkeypatch):
    puts = LogApplier.put

    def hasty(self, entries):
        last = entries.entries[-1].position if entries.entries else 0
        puts(self, m.Entries(entries.entries, entries.term, max(entries.committed, last)))

    monkeypatch.setattr(LogApplier, "put", hasty)
    assert found(mode).invariant in {"EachUpdateOnce", *LOGS_DIFFER, *NOTICED}


@modes
def test_a_term_that_is_not_checked_where_connections_of_former_ones_go_on(mode, monkeypatch):
    takes_over, takes_roster = ServerMachine._take_over, ReportLink.take_roster
    begins = SequencerMachine._roster

    def admits(self, term):
        self.term = term

    def follows_on(self, term, own):
        former = self._receiver
        actions = takes_over(self, term, own)
        self._receiver = former
        return [action for action in actions if not isinstance(action, Close)]

    def listens_on(self, roster):
        former = self.conn
        actions = takes_roster(self, roster)
        self.conn = self.conn or former
        return [action for action in actions if not isinstance(action, Close)]

    def speaks_on(self, roster, now):
        return [action for action in begins(self, roster, now) if not isinstance(action, Close)]

    monkeypatch.setattr(Shard, "admit", admits)
    monkeypatch.setattr(ServerMachine, "_take_over", follows_on)
    monkeypatch.setattr(ReportLink, "take_roster", listens_on)
    monkeypatch.setattr(SequencerMachine, "_roster", speaks_on)
    assert found(mode).invariant in {*LOGS_DIFFER, *NOTICED}


@modes
def test_a_server_that_goes_on_with_an_older_generation_of_a_window(mode, monkeypatch):
    monkeypatch.setattr(Shard, "replace_staging", lambda *arguments: None)
    assert found(mode, shares=True).invariant in {*VALUES_WRONG, *NOTICED}


@modes
def test_a_member_that_goes_on_in_memory_which_a_former_server_may_write(mode, monkeypatch):
    """It stops in the middle of a pass until its lease is over, and writes the rest while others go on."""
    monkeypatch.setattr(WindowArrays, "renew", lambda self: None)
    assert found_by_default(mode, shares=True, replicas=1).invariant in VALUES_WRONG


@pytest.mark.long
def test_a_member_whose_rows_come_to_memory_that_a_former_server_may_write(monkeypatch):
    """As above. Rows are read at once, so it shows only where the rest is written in few moments."""
    monkeypatch.setattr(ScratchArray, "renew", lambda self: None)
    often = {"steps": 12, "shares": True, "replicas": 1, "rows": True}
    violation = found("sync", faults=Faults(1, 4, 1, 1, coordinator=0), **often)
    assert violation.invariant in {*VALUES_WRONG, "RowsOfTheirVersion"}


@modes
def test_a_server_that_begins_twice_with_the_same_standby_which_follows_both(mode, monkeypatch):
    """Rosters come while it is dialled. Promoted as what lags, it lacks what it had acknowledged."""
    takes, opened = OwnStandby.take_roster, OwnStandby.opened
    follows = ServerMachine._follow

    def dials_again(self, roster, now):
        actions = takes(self, roster, now)
        if self._dialling and not any(isinstance(action, Dial) for action in actions):
            actions.append(self._dial(self._member))
        return actions

    def begins_again(self, conn, dialled, hello, now):
        self._dialling = self._dialling or dialled == f"standby {self._member and self._member.id}"
        return opened(self, conn, dialled, hello, now)

    def follows_both(self, conn):
        follows(self, conn)
        vars(self).setdefault("both", {})[conn] = self._receiver
        return []

    def either(self, conn):
        return vars(self).get("both", {}).get(conn) if self.role == "standby" else None

    monkeypatch.setattr(OwnStandby, "take_roster", dials_again)
    monkeypatch.setattr(OwnStandby, "opened", begins_again)
    monkeypatch.setattr(ServerMachine, "_follow", follows_both)
    monkeypatch.setattr(ServerMachine, "_receiver_of", either)
    assert found_by_default(mode).invariant in {"EachUpdateOnce", *LOGS_DIFFER, *NOTICED}


@modes
def test_a_chunk_that_is_used_again_when_only_one_of_both_is_through(mode, monkeypatch):
    gives = StandbyLink.acknowledged

    def early(self, message, applied):
        gives(self, message, applied)
        while self._loans and self._loans[0][0] <= max(self.applied, applied):
            self._give_back(self._loans.popleft()[1])

    monkeypatch.setattr(StandbyLink, "acknowledged", early)
    assert found_by_default(mode).invariant in {*VALUES_WRONG, *LOGS_DIFFER}


@modes
def test_a_standby_that_claims_to_have_applied_what_it_only_has(mode, monkeypatch):
    def claims(self, shard):
        return Send(self.conn, m.AppendAck(shard.term, shard.prepared, shard.prepared))

    monkeypatch.setattr(StandbyReceiver, "_acknowledge", claims)
    assert found_by_default(mode).invariant in {*VALUES_WRONG, *LOGS_DIFFER}


@modes
def test_a_lease_that_begins_with_the_join_and_not_with_the_welcome(mode, monkeypatch):
    """A server that waits for the others sends no heartbeats yet, and is declared dead."""
    enters = Newcomers._enter

    def hasty(self, conn, joining):
        before = self._state.book.term
        enters(self, conn, joining)
        newest = self._state.book.member(self._state.book._next - 1)
        if self._state.book.term > before:
            self._state.book.heard(newest.id, self._state.now)

    monkeypatch.setattr(Newcomers, "_enter", hasty)
    assert found(mode).invariant in NOTICED


@modes
def test_a_message_that_leaves_before_what_it_shows_is_persisted(mode, monkeypatch):
    """The coordinator dies in between: the next one knows nothing of a member that the servers know."""

    def hasty(self, action):
        self._out.append(action)

    monkeypatch.setattr(State, "emit", hasty)
    assert found(mode).invariant in {"EachUpdateOnce", "EverySample", *LOGS_DIFFER, *NOTICED}


def test_a_read_whose_answers_are_of_several_versions(monkeypatch):
    outcome = Exchange.outcome

    def newest(self):
        answers = self._answers
        if self.versions() is None or any(answer.result is not None for answer in answers):
            return outcome(self)
        return max(answers, key=lambda answer: answer.version)

    monkeypatch.setattr(CurrentRead, "agree", lambda *arguments: True)
    monkeypatch.setattr(Exchange, "outcome", newest)
    assert found("async", servers=2, readers=1).invariant in {"ValuesOfTheirVersion", "CurrentAnswers"}


def test_a_server_that_was_replaced_and_still_reads_for_members(monkeypatch):
    """The reader and it are parted from everybody else, whose version goes on."""
    monkeypatch.setattr(ReadLease, "holds", lambda self, now: True)
    parted = (Partition(0.2, ("server 0", "reader 0"), 0.9),)
    fixed = {"servers": 1, "replicas": 1, "readers": 1, "steps": 60, "faults": parted}
    schedules = (Schedule("async", seed=seed, **fixed) for seed in range(200))
    with pytest.raises(Violation) as caught:
        deque(map(run, schedules), maxlen=0)
    assert caught.value.invariant == "CurrentAnswers"


def test_a_bound_that_is_not_kept(monkeypatch):
    monkeypatch.setattr(StaleSynchronous, "may_read", lambda *arguments: Decision(True))
    assert found("ssp:1", workers=3, steps=6).invariant == "BoundedStaleness"


# ── each of the other invariants notices what no other does ─────────────────────────────────────


def noticed(mode, **fixed):
    """The invariant that notices something though nothing goes wrong but what was planted."""
    return found(mode, faults=Faults(0, 0, 0, 0), **fixed).invariant


@modes
def test_a_step_that_is_said_to_be_staler_than_it_is(mode, monkeypatch):
    records = Ledger.record

    def stale(self, member, step, result):
        records(self, member, step, replace(result, staleness=result.staleness + 1))

    monkeypatch.setattr(Ledger, "record", stale)
    assert noticed(mode) == "GrowingVersions"


@modes
def test_a_wait_of_which_nobody_is_told_why(mode, monkeypatch):
    monkeypatch.setattr(Waits, "why", lambda self, exchange: "")
    assert noticed(mode, workers=3) == "NamedWaits"


@pytest.mark.parametrize("mode", ["sync", "sync:quorum=2"])
def test_a_round_that_is_closed_before_all_that_it_needs_are_there(mode, monkeypatch):
    needed = Synchronous.needed
    monkeypatch.setattr(Synchronous, "needed", lambda self, active: max(1, needed(self, active) - 1))
    assert noticed(mode, workers=3) == ("CompleteRounds" if mode == "sync" else "QuorumRounds")


def test_a_late_step_that_is_said_to_have_contributed(monkeypatch):
    records = Ledger.record

    def contributes(self, member, step, result):
        records(self, member, step, result if result.applied else replace(result, contributors=1))

    monkeypatch.setattr(Ledger, "record", contributes)
    assert noticed("sync:quorum=1", workers=3) == "LateUpdatesAreNowhere"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_position_in_the_data_that_is_not_recorded(mode, monkeypatch):
    records = Positions.record

    def forgets(self, position):
        if position.rank != 0:
            records(self, position)

    monkeypatch.setattr(Positions, "record", forgets)
    assert noticed(mode, workers=2, splits=False) == "EverySample"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_rows_that_are_not_deleted(mode, monkeypatch):
    monkeypatch.setattr(Table, "delete", lambda self, ids, step: 0)
    assert noticed(mode, rows=True, workers=2, steps=6) == "RowsOfTheirVersion"


def test_rows_that_came_ahead_and_are_read_after_a_later_answer(monkeypatch, long):
    """Others have pushed to them meanwhile, or deleted them."""
    monkeypatch.setattr(
        RowsAhead, "find", lambda self, given, version: self._there[0] if self._there else None
    )
    fixed = {} if long else {"rows": True, "workers": 3}
    assert found_by_default("async", **fixed).invariant == "RowsOfTheirVersion"


def test_a_portion_that_counts_for_everybody_who_computes_it(monkeypatch):
    """Copies of the last ones are computed by several; the asker notices, or the log says it twice."""
    monkeypatch.setattr(Portions, "counts", lambda self, done: done.portion.round == self.round)
    assert found_by_default("async", program="portions").invariant in {"EachPortionOnce", *NOTICED}


def test_a_standby_that_begins_without_what_is_in_the_vectors(monkeypatch):
    """Its bits differ; or it takes over, and workers read other numbers."""
    restores = Vector.restore.__func__

    def forgets(cls, snapshot, changed):
        empty = tuple(np.zeros_like(vector) for vector in snapshot.vectors)
        return restores(cls, dataclasses.replace(snapshot, vectors=empty), changed)

    monkeypatch.setattr(Vector, "restore", classmethod(forgets))
    assert found_by_default("async", program="vectors").invariant in {"EqualReplicas", *NOTICED}


def test_a_trace_of_which_parts_come_twice(monkeypatch, long):
    passes = TraceCollection._pass_on

    def twice(self, chunk):
        passes(self, chunk)
        passes(self, chunk)

    monkeypatch.setattr(TraceCollection, "_pass_on", twice)
    assert found_by_default("async", **({} if long else {"traces": 1})).invariant == "TracesEnd"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_what_a_rank_keeps_that_is_lost_with_it(mode, monkeypatch):
    monkeypatch.setattr(Programs, "keep", lambda self, rank, state: None)
    assert found(mode, keeps=True).invariant == "KeptIsKnown"


def test_a_standby_that_is_compared_at_another_entry_than_its_server(monkeypatch):
    applied = StandbyReceiver.applied

    def early(self):
        self._asked = deque(position - 1 for position in self._asked)
        return applied(self)

    monkeypatch.setattr(StandbyReceiver, "applied", early)
    violation = found("async", readers=1, verifies=True, replicas=1, faults=Faults(0, 0, 0, 0))
    assert violation.invariant in NOTICED


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_checkpoint_without_the_state_of_the_rule(mode, monkeypatch):
    restores = Vector.restore.__func__

    def forgets(cls, snapshot, changed):
        vector = restores(cls, snapshot, changed)
        for state in vector.states.values():
            state[:] = 0
        return vector

    monkeypatch.setattr(Vector, "restore", classmethod(forgets))
    assert noticed(mode, rule=Adam(), checkpoints=2, replicas=1) == "ConsistentCut"
