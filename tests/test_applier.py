"""One server's way through the log, and what of it the sequencer is told."""

import pytest
from server_desks import member, roster

from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.machines.actions import BESIDE, Close, Pause, Resume, Send
from headwater.machines.applier import LogApplier, Progress
from headwater.machines.log_host import SequencerMachine
from headwater.machines.log_link import Policy, ReportLink, joined
from headwater.machines.standby_link import StandbyLink
from headwater.shard import Shard
from headwater.spec.sync import parse_sync
from headwater.testing.processes.memory import SharedArrays


def entry(position):
    return m.Activated(position, ())


def entries(*positions, term=3, committed=0):
    return m.Entries(tuple(map(entry, positions)), term, committed)


def applier(*, replicated=True, agreed=True):
    """In term 3."""
    made = LogApplier(Shard(0, 1, "mean"), replicated=replicated)
    made.recovery(3)
    if agreed:
        made.agree(m.StartTerm(3, 0))
    return made


def followed(made):
    """Have a standby, which has acknowledged its snapshot."""
    standby = StandbyLink(member(9, "standby"), 4, SharedArrays(True))
    made.attach(standby)
    assert made.acknowledged(standby, m.AppendAck(3, made.shard.position, made.shard.position))
    return standby


def advance(made):
    actions = []
    while made.busy:
        made.advance(actions)
    return actions


# ── prepared, then committed ────────────────────────────────────────────────────────────────────


def test_what_arrives_is_prepared_at_once_and_applied_one_by_one_when_it_is_committed():
    made = applier()
    made.put(entries(1, 2, 3))
    advance(made)
    assert (made.shard.position, made.shard.prepared) == (0, 3)
    made.put(entries(committed=2))
    made.advance([])
    for position in (1, 2):
        made.advance([])
        assert made.shard.position == position
    assert not made.busy


def test_without_standbys_what_is_written_is_applied():
    made = applier(replicated=False)
    made.put(entries(1, 2))
    made.put(entries(committed=2))
    advance(made)
    assert made.shard.position == 2
    assert made.progress() == Progress(3, 0)


def test_entries_of_a_former_sequencer_are_nothing():
    made = applier()
    made.put(entries(1, term=2))
    advance(made)
    assert made.shard.prepared == 0


def test_what_does_not_continue_the_log_is_refused():
    made = applier()
    made.put(entries(2))
    with pytest.raises(ProtocolError, match="entry 2 after 0"):
        made.advance([])


# ── what counts as prepared ─────────────────────────────────────────────────────────────────────


def test_a_new_sequencers_word_is_something_to_report():
    made = applier(agreed=False)
    assert not made.moved
    made.agree(m.StartTerm(3, 0))
    assert made.moved
    assert made.progress() == Progress(3, 0)
    assert not made.moved


def test_until_a_new_sequencer_has_said_what_stands_only_what_is_applied_counts():
    made = applier()
    made.put(entries(1, 2))
    made.put(entries(committed=1))
    advance(made)
    assert made.progress().prepared == 2
    made.recovery(5)
    assert not made.serving
    assert made.progress() == Progress(5, 1)
    made.agree(m.StartTerm(5, 2))
    assert not made.serving, "members may have seen entry 2"
    made.put(entries(term=5, committed=2))
    advance(made)
    assert made.serving
    assert made.progress() == Progress(5, 2)


def test_what_a_new_sequencer_discards_is_not_reported_as_prepared_any_more():
    made = applier()
    made.put(entries(1, 2, 3))
    advance(made)
    assert made.progress() == Progress(3, 3)
    made.recovery(5)
    made.agree(m.StartTerm(5, 1))
    assert made.progress() == Progress(5, 1)
    made.put(entries(2, term=5))
    advance(made)
    assert made.progress() == Progress(5, 2)


def test_what_a_needed_standby_does_not_have_is_not_prepared():
    made = applier()
    standby = followed(made)
    made.put(entries(1, 2))
    advance(made)
    assert made.progress().prepared == 0
    made.acknowledged(standby, m.AppendAck(3, 1, 0))
    assert made.progress().prepared == 1


def test_what_a_lost_standby_lacked_counts_once_the_roster_names_it_no_more():
    made = applier()
    standby = followed(made)
    made.put(entries(1))
    advance(made)
    standby.end()
    assert made.progress().prepared == 0
    made.detach()
    assert made.moved
    assert made.progress().prepared == 1


def test_a_standby_that_catches_up_holds_back_nothing_and_is_caught_up_once_it_has_what_was_reported():
    made = applier()
    made.put(entries(1))
    advance(made)
    assert made.progress().prepared == 1
    standby = StandbyLink(member(9, "standby"), 4, SharedArrays(True))
    made.attach(standby)
    made.put(entries(2))
    advance(made)
    assert made.progress().prepared == 2, "nothing waits for it yet"
    assert not made.acknowledged(standby, m.AppendAck(3, 1, 0)), "it lacks entry 2, which was reported"
    assert made.acknowledged(standby, m.AppendAck(3, 2, 0))
    assert not made.acknowledged(standby, m.AppendAck(3, 2, 0)), "it has caught up once"


def test_what_a_former_standby_acknowledges_is_nothing():
    made = applier()
    former = followed(made)
    made.detach()
    assert not made.acknowledged(former, m.AppendAck(3, 9, 9))


# ── reports ─────────────────────────────────────────────────────────────────────────────────────

HELD = m.Held(5, 1, "pull")


def link(made, index=0):
    reports = ReportLink(made, index, 1)
    reports.take_roster(roster(3, member(1, "server"), since=3))
    return reports


def test_what_was_prepared_in_another_term_is_not_reported():
    made = applier()
    reports = link(made)
    made.put(entries(1))
    advance(made)
    made.shard.admit(4)  # a newer sequencer is known, whose roster has not come
    assert reports.report((HELD,)) == [Send(BESIDE, m.Reports(0, (HELD,), 3))]


def test_what_was_said_is_not_said_again():
    made = applier()
    reports = link(made)
    made.put(entries(1))
    advance(made)
    assert reports.report() == [Send(BESIDE, m.Reports(0, (), 3, 1))]
    assert reports.report() == []
    assert reports.report((HELD,)) == [Send(BESIDE, m.Reports(0, (HELD,), 3, 1))]


def test_without_a_connection_nothing_is_said_since_a_connection_begins_with_all_of_it():
    made = applier()
    reports = ReportLink(made, 1, 2)
    assert reports.report((HELD,)) == []
    assert reports.explain() == []


def test_messages_are_joined_in_their_order_where_that_says_the_same():
    assert joined(entries(1, 2, committed=1), entries(3, committed=2)) == entries(1, 2, 3, committed=2)
    assert joined(entries(1), entries(2, term=4)) is None
    one, other = m.Reports(1, (HELD,), 3, 7), m.Reports(1, (m.Held(6, 1, "pull"),), 3, 5, (m.Sums(4, ()),))
    assert joined(one, other) == m.Reports(1, (HELD, m.Held(6, 1, "pull")), 3, 7, (m.Sums(4, ()),))
    assert joined(m.AppendAck(3, 5, 1), m.AppendAck(3, 5, 2)) == m.AppendAck(3, 5, 2)
    assert joined(m.AppendAck(3, 5, 1), m.AppendAck(4, 5, 2)) is None
    assert joined(entries(1), m.Acknowledged()) is None


# ── the sequencer's end ─────────────────────────────────────────────────────────────────────────


def sequencer(servers=2, mode="async"):
    return SequencerMachine(servers, Policy(parse_sync(mode)), patience=10.0)


def recovery(server, term=3, **fields):
    shard = Shard(server, 2, "mean")
    shard.term = shard.agreed_term = fields.pop("agreed", 0)
    return shard.recovery(term)


SERVERS = [member(1, "server"), member(2, "server", 1)]


def sent(actions, kind):
    return [action for action in actions if isinstance(action, Send) and isinstance(action.message, kind)]


def begun():
    """A sequencer of two servers in term 3, the other one's connection being number 7."""
    machine = sequencer()
    machine.received(BESIDE, roster(3, *SERVERS, since=3), None, 0.0)
    machine.received(BESIDE, recovery(0), None, 0.0)
    machine.opened(7, "1", 0.0)
    actions = machine.received(7, recovery(1), None, 0.0)
    assert [action.conn for action in sent(actions, m.StartTerm)] == [BESIDE, 7]
    return machine


def test_it_begins_when_every_server_has_said_where_it_is_and_counts_what_was_held_before():
    machine = sequencer(1)
    machine.received(BESIDE, roster(3, SERVERS[0], member(5), since=3), None, 0.0)
    assert machine.received(BESIDE, m.Reports(0, (HELD,), 3), None, 0.0) == []
    assert machine.reasons().otherwise == "the log begins anew when server 0 has said how far it is"
    actions = machine.received(BESIDE, recovery(0), None, 0.0)
    written = [entry for action in sent(actions, m.Entries) for entry in action.message.entries]
    assert [type(one) for one in written] == [m.Enrolled, m.Activated, m.Served]


def test_entries_go_to_every_server_and_to_the_one_beside_last():
    machine = begun()
    actions = machine.received(BESIDE, roster(4, *SERVERS, member(5), since=3), None, 0.0)
    assert [action.conn for action in sent(actions, m.Entries)] == [7, BESIDE]


def test_a_server_that_connects_anew_is_sent_what_it_lacks():
    machine = begun()
    machine.received(BESIDE, roster(4, *SERVERS, member(5), since=3), None, 0.0)
    machine.opened(8, "1", 0.0)
    actions = machine.received(8, recovery(1, agreed=3), None, 0.0)
    assert actions[0] == Close(7, "server 1 has connected anew")
    ((conn, message, *_),) = sent(actions, m.Entries)
    assert (conn, [one.position for one in message.entries]) == (8, [1, 2])
    machine.closed(8, 0.0)
    machine.opened(9, "1", 0.0)
    (first, second) = machine.received(9, recovery(1), None, 0.0)
    assert (first.message, len(second.message.entries)) == (m.StartTerm(3, 0), 2)


def test_a_server_of_a_later_term_waits_for_the_roster():
    machine = begun()
    machine.opened(8, "1", 0.0)
    assert machine.received(8, recovery(1, 5), None, 0.0) == [Pause(8)]
    actions = machine.received(BESIDE, roster(5, *SERVERS, since=5), None, 1.0)
    assert actions[0] == Close(7, "another term of the log has begun")
    assert Resume(8) in actions
    assert machine.due is None


def test_a_server_whose_roster_does_not_come_is_let_go_with_the_reason():
    machine = begun()
    machine.opened(8, "1", 0.0)
    machine.received(8, recovery(1, 5), None, 0.0)
    assert machine.due == 10
    _, close = machine.tick(10.0)
    assert (close.conn, close.why) == (8, "no roster of term 5 came here, in which server 1 is")
    assert machine.due is None
    machine.received(8, recovery(1, 6), None, 10.0)
    machine.closed(8, 11.0)
    assert machine.tick(30.0) == []


def test_who_waited_for_a_roster_and_missed_its_term_is_let_go():
    machine = begun()
    machine.opened(8, "1", 0.0)
    machine.received(8, recovery(1, 5), None, 0.0)
    assert Close(8, "server 1 is in term 5, expected 6") in machine.received(
        BESIDE, roster(6, *SERVERS, since=6), None, 1.0
    )
    machine.opened(9, "1", 0.0)
    machine.received(9, recovery(1, 8), None, 0.0)
    assert Resume(9) not in machine.received(BESIDE, roster(7, *SERVERS, since=7), None, 1.0)
    assert Resume(9) in machine.received(BESIDE, roster(8, *SERVERS, since=8), None, 1.0)


def test_reports_to_a_former_sequencer_are_nothing():
    assert begun().received(7, m.Reports(1, (HELD,), 2), None, 0.0) == []


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (m.Reports(0, (), 3), "server 1 speaks as server 0"),
        (m.Reports(1, (), 4), "reports in term 4, it is 3"),
        (roster(4, *SERVERS, since=4), "sent the sequencer Roster"),
    ],
    ids=["as another", "later term", "roster"],
)
def test_what_a_server_must_not_say_is_refused(message, why):
    with pytest.raises(ProtocolError, match=why):
        begun().received(7, message, None, 0.0)


def test_before_there_is_a_roster_everybody_waits_for_that():
    machine = sequencer()
    (told,) = machine.received(BESIDE, m.Explain(), None, 0.0)
    assert told.message.otherwise == "there is no roster yet"
    machine.received(BESIDE, roster(2, SERVERS[0]), None, 0.0)
    assert machine.received(9, m.Explain(), None, 0.0) == [], "a connection that it does not know"
