"""A node's dealings with the coordinator: every transition, without a coordinator."""

import itertools

import pytest
from members_alone import ADDRESS, DEADLINE, HEARTBEAT, PATIENCE, Alone, addresses, closed, welcome

from headwater import messages as m
from headwater.errors import (
    ConnectionLostError,
    FinishedError,
    ProtocolError,
    RefusedError,
    RewoundError,
    StalledError,
)
from headwater.machines import membership as rules
from headwater.machines.actions import Close, Dial, Send
from headwater.machines.membership import COORDINATOR, Ended, Heard, Joined, Membership, Returned

LOST = ConnectionLostError("no answer")


@pytest.fixture
def alone():
    """Has dialled the coordinator, and sent Join over connection 1."""
    alone = Alone()
    alone.does(alone.machine.join, 0.0)
    assert alone.taken() == [Dial(ADDRESS, COORDINATOR)]
    alone.open(COORDINATOR)
    assert alone.taken() == [Send(1, m.Join("worker", None, 1, "here"))]
    return alone


@pytest.fixture
def member():
    return Alone().joined()


def away(**more):
    """The coordinator has gone without a word, 100 s after the beginning; a call is due."""
    alone = Alone().joined(**more).at(100.0)
    alone.loses(alone.membership.conn)
    assert alone.membership.phase == "away"
    alone.taken()
    return alone


def over(alone):
    """Why it is over; its connection to the coordinator is closed."""
    (ended,) = alone.events(Ended)
    assert alone.membership.phase == "over"
    assert alone.membership.conn is None
    assert alone.membership.due is None
    assert alone.membership.error is ended.error
    return ended.error


# ── joining ─────────────────────────────────────────────────────────────────────────────────────


def test_who_is_welcomed_is_a_member(alone):
    alone.says(welcome())
    assert alone.events(Joined) == [Joined(welcome())]
    assert alone.membership.phase == "member"
    assert alone.membership.name == "worker 0"


def test_a_join_that_waits_says_for_whom_after_the_patience_and_ends_at_the_deadline(alone):
    alone.says(m.JoinWaits("waits for server 0", patience=1.0, deadline=3.0))
    assert alone.at(0.9).notes() == []
    assert alone.at(1.0).notes() == ["worker: cannot join yet: waits for server 0"]
    alone.says(m.Waiting(0, "waits for server 1"))
    assert alone.at(2.5).notes() == ["worker: cannot join yet: waits for server 1"]
    error = over(alone.at(3.0))
    assert isinstance(error, StalledError)
    assert str(error) == "joining had no answer for 3 s: waits for server 1"


def test_a_join_without_any_word_names_the_coordinator_and_has_the_usual_times(alone):
    alone.at(rules.PATIENCE_S)
    assert alone.notes() == [f"worker: cannot join yet: no word from the coordinator at {ADDRESS}"]
    error = over(alone.at(rules.DEADLINE_S))
    assert "no answer for 600 s: no word from the coordinator" in str(error)


def test_who_is_refused_hears_why_in_the_class_that_the_coordinator_names(alone):
    alone.says(m.Refused("RewoundError", "training begins anew"))
    error = over(alone)
    assert isinstance(error, RewoundError)
    assert str(error) == "training begins anew"


def test_a_newcomer_to_a_training_that_has_finished_is_told_so(alone):
    assert isinstance(over(alone.says(m.Finished())), FinishedError)


def test_what_answers_a_join_with_something_else_is_no_coordinator(alone):
    error = over(alone.says(m.Acknowledged()))
    assert isinstance(error, ProtocolError)
    assert "answered Acknowledged" in str(error)


def test_a_coordinator_that_closes_the_connection_does_not_take_anybody_in(alone):
    assert isinstance(over(alone.loses(1)), ConnectionLostError)


def test_a_coordinator_that_cannot_be_reached_fails_the_join_with_the_error_of_the_dial():
    alone = Alone()
    alone.does(alone.machine.join, 0.0).taken()
    refusal = RefusedError("the caller has no token")
    assert over(alone.fails(COORDINATOR, refusal)) is refusal


@pytest.mark.parametrize("refused", [True, False])
def test_a_driver_that_knows_only_why_a_dial_failed_says_whether_it_was_refused(refused):
    membership = Membership(ADDRESS, m.Join("server", 0, 1, "here"))
    membership.join(0.0)
    membership.unreachable(COORDINATOR, "why", 0.0, refused=refused)
    assert type(membership.error) is (RefusedError if refused else ConnectionLostError)
    assert membership.name == "server"


def test_a_connection_that_a_server_got_its_slot_over_is_not_dialled():
    membership = Membership(ADDRESS, m.Join("server", 0, 1, "here"))
    assert membership.join(0.0, dial=False) == []
    assert membership.opened(4, COORDINATOR, 0.0) == [Send(4, m.Join("server", 0, 1, "here"))]


# ── a member ────────────────────────────────────────────────────────────────────────────────────


def test_a_member_lets_itself_be_heard_of_and_asks_where_the_servers_are(member):
    member.at(HEARTBEAT)
    assert member.sent() == [m.GetServers()]
    member.does(member.machine.hang_up).taken()
    assert member.at(2 * HEARTBEAT).sent() == [m.Heartbeat()]


def test_what_a_member_tells_goes_to_the_coordinator(member):
    departed = m.Departed(7)
    assert member.membership.tell(departed) == [Send(1, departed)]


def test_where_servers_are_is_kept_and_anything_else_is_passed_on():
    membership = Membership(ADDRESS, m.Join("server", 0, 1, "here"))
    membership.join(0.0)
    membership.opened(1, COORDINATOR, 0.0)
    membership.received(1, welcome(role="server"), None, 0.0)
    assert membership.received(1, addresses(100), None, 0.0) == []
    assert membership.addresses == addresses(100)
    [told] = membership.received(1, m.Acknowledged(), None, 0.0)
    assert told.event == Heard(m.Acknowledged())


@pytest.mark.parametrize("what", ["received", "closed"])
def test_what_comes_of_an_old_connection_is_nothing(member, what):
    membership = member.membership
    if what == "closed":
        assert membership.closed(99, 0.0) == []
    else:
        assert membership.received(99, m.Refused("RefusedError", "x"), None, 0.0) == []
    assert membership.phase == "member"


def test_a_connection_that_nobody_waits_for_is_closed(member):
    member.open(COORDINATOR)
    assert closed(member.taken()) == [member.conn]


def test_a_member_that_is_struck_off_hears_why(member):
    error = over(member.says(m.Refused("RefusedError", "worker 0 was declared dead")))
    assert str(error) == "worker 0 was declared dead"
    assert member.membership.tell(m.Heartbeat()) == []


def test_leaving_ends_it_once(member):
    member.does(member.membership.leave)
    assert isinstance(over(member), ConnectionLostError)
    assert member.membership.leave() == []


# ── a coordinator that is away ──────────────────────────────────────────────────────────────────


def test_a_coordinator_that_is_gone_without_a_word_is_called_and_is_shown_the_key():
    alone = away()
    assert alone.membership.tell(m.Heartbeat()) == []
    assert alone.membership.beside("", 103.0) == f"waits; the coordinator at {ADDRESS} is away for 3.0 s"
    alone.at(100.0 + rules.FIRST_PAUSE_S)
    assert alone.taken() == [Dial(ADDRESS, COORDINATOR)]
    conn = alone.open(COORDINATOR)
    assert alone.taken() == [Send(conn, m.Rejoin(7, "secret", 3, "this one"))]
    alone.says(welcome(), conn)
    assert alone.membership.phase == "member"
    assert alone.membership.connection == 1
    assert alone.membership.beside("why", 103.0) == "why"
    assert alone.events(Returned) == [Returned()]


def test_a_coordinator_that_is_back_does_not_take_everybody_back():
    alone = away().at(101.0)
    alone.taken()
    conn = alone.open(COORDINATOR)
    error = over(alone.says(m.Refused("RefusedError", "worker 0 was declared dead"), conn))
    assert "declared dead" in str(error)


def next_call(alone):
    """Let time pass until it dials again; how long that took."""
    began = alone.now
    alone.taken()
    while Dial(ADDRESS, COORDINATOR) not in alone.taken():
        alone.at(alone.machine.due)
    return alone.now - began


def test_pauses_between_calls_grow_to_a_second_and_the_first_failure_is_noted():
    alone = away()
    pauses, notes = [next_call(alone)], []
    for _ in range(10):
        alone.fails(COORDINATOR, LOST)
        notes += [action.text for action in alone.actions if hasattr(action, "text")]
        pauses.append(next_call(alone))
    assert notes == ["worker 0: calls the coordinator: no answer"]
    assert pauses[0] <= rules.FIRST_PAUSE_S
    assert all(later < 4.1 * earlier for earlier, later in itertools.pairwise(pauses))
    assert all(rules.LONGEST_PAUSE_S / 2 <= pause <= rules.LONGEST_PAUSE_S for pause in pauses[7:])


def test_members_do_not_all_call_at_one_moment():
    first = {round(next_call(away(id=id)), 6) for id in range(1, 40)}
    assert len(first) > 30


@pytest.mark.parametrize("how", ["silent", "closes", "answers nonsense"])
def test_a_coordinator_that_does_not_answer_a_call_is_called_again(how):
    alone = away()
    next_call(alone)
    conn = alone.open(COORDINATOR)
    alone.taken()
    if how == "silent":
        alone.at(alone.now + rules.ANSWER_S)
        assert closed(alone.actions) == [conn]
    elif how == "closes":
        alone.loses(conn)
    else:
        alone.says(m.Acknowledged(), conn)
        assert closed(alone.actions) == [conn]
    assert alone.membership.phase == "away"
    next_call(alone)
    conn = alone.open(COORDINATOR)
    alone.says(welcome(), conn)
    assert alone.membership.phase == "member"


def test_a_coordinator_without_a_journal_is_gone_with_its_process():
    alone = away()
    next_call(alone)
    error = over(alone.fails(COORDINATOR, ConnectionLostError("connection refused"), nobody=True))
    assert isinstance(error, ConnectionLostError)
    assert str(error) == "the coordinator is gone: connection refused"


def test_a_coordinator_that_does_not_admit_this_node_any_more_is_gone():
    alone = away()
    next_call(alone)
    assert "is gone: another token" in str(over(alone.fails(COORDINATOR, RefusedError("another token"))))


def test_a_coordinator_that_was_not_heard_of_for_the_deadline_is_gone():
    alone = away()
    while alone.now <= 100.0 + DEADLINE:
        assert alone.membership.phase == "away"
        next_call(alone)
        alone.fails(COORDINATOR, LOST)
    assert "is gone: no answer" in str(over(alone))


def test_a_coordinator_with_a_journal_is_waited_for_however_long_it_takes():
    alone = away(returns=True)
    for _ in range(1000):
        next_call(alone)
        alone.fails(COORDINATOR, ConnectionLostError("connection refused"), nobody=True)
    assert alone.now > 100.0 + DEADLINE
    assert alone.membership.phase == "away"


def test_nothing_is_due_before_its_time(member):
    assert member.membership.tick(HEARTBEAT - 0.1) == []
    assert PATIENCE > HEARTBEAT
    assert not any(isinstance(action, Close) for action in member.taken())


def test_a_dial_that_fails_late_changes_nothing(member):
    assert member.membership.unreachable(COORDINATOR, "late", 0.0) == []
    assert member.membership.phase == "member"
