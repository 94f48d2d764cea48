"""Faults put into what servers run are found: each within 200 schedules, by the invariant that it breaks."""

import pytest

from headwater.log.pending import PendingExchanges
from headwater.log.state import LogState
from headwater.machines.coordinator.newcomers import Newcomers
from headwater.machines.coordinator.state import State
from headwater.runtime.server.applier import LogApplier
from headwater.shard.ledger import Ledger
from headwater.shard.shard import Shard
from headwater.spec.sync import Decision, StaleSynchronous
from headwater.testing import Faults, Violation, explore
from headwater.testing.processes.client import Window

MODES = ["sync", "async", "ssp:1", "sync:quorum=2"]
modes = pytest.mark.parametrize("mode", MODES)

LOGS_DIFFER = {"OneOrder", "EqualReplicas", "ConsistentCut"}
VALUES_WRONG = {"ValuesOfTheirVersion", "QuietMemory"}
NOTICED = {"NobodyWaitsForEver", "ProtocolError", "AssertionError", "KeyError"}
"""Servers and members themselves find it impossible, or nothing goes on."""


def found(mode, **fixed):
    """The violation that 200 schedules find; what is printed of it makes it happen again."""
    # Little is left to chance that costs time and shows nothing of these: rules, checkpoints, meetings.
    plain = {"rule": None, "checkpoints": 0, "meets": 0, "readers": 0, **fixed}
    with pytest.raises(Violation) as caught:
        explore(mode, 200, **plain)
    violation = caught.value
    assert violation.schedule is not None
    assert f"run({violation.schedule}" in str(violation)
    return violation


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
    assert found(mode, servers=2).invariant in NOTICED


@modes
def test_an_acknowledgement_before_the_standby_has_the_entry(mode, monkeypatch):
    monkeypatch.setattr(Shard, "safe", property(lambda self: self.prepared))
    assert found(mode).invariant in {"EachUpdateOnce", *LOGS_DIFFER, *NOTICED}


@modes
def test_an_answer_before_all_servers_have_prepared_its_entry(mode, monkeypatch):
    advances = LogApplier._advance

    def hasty(self, term, entry, committed):
        return advances(self, term, entry, max(committed, entry.position if entry is not None else 0))

    monkeypatch.setattr(LogApplier, "_advance", hasty)
    assert found(mode).invariant in {"EachUpdateOnce", *LOGS_DIFFER, *NOTICED}


@modes
def test_a_term_that_is_not_checked(mode, monkeypatch):
    def admits(self, term):
        self.term = term

    monkeypatch.setattr(Shard, "admit", admits)
    assert found(mode).invariant in {*LOGS_DIFFER, *NOTICED}


@modes
def test_a_server_that_goes_on_with_an_older_generation_of_a_window(mode, monkeypatch):
    monkeypatch.setattr(Shard, "replace_staging", lambda *arguments: None)
    assert found(mode, shares=True).invariant in {*VALUES_WRONG, *NOTICED}


@modes
def test_a_member_that_goes_on_in_memory_which_a_former_server_may_write(mode, monkeypatch):
    """It stops in the middle of a pass until its lease is over, and writes the rest while others go on."""
    monkeypatch.setattr(Window, "renew", lambda self: None)
    plain = {"steps": 12, "shares": True, "replicas": 1}
    assert found(mode, faults=Faults(1, 4, 1, 1, coordinator=0), **plain).invariant in VALUES_WRONG


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


def test_a_bound_that_is_not_kept(monkeypatch):
    monkeypatch.setattr(StaleSynchronous, "may_read", lambda *arguments: Decision(True))
    assert found("ssp:1", workers=3, steps=6).invariant == "BoundedStaleness"
