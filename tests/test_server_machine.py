"""What a server decides about who is there, event by event: no process, no thread, no clock."""

import numpy as np
import pytest
from server_desks import SPEC, Desk, member, roster, step

from headwater import messages as m
from headwater.errors import ConnectionLostError
from headwater.machines.log_link import AGAIN_S
from headwater.machines.server import CannotGoOn


def refused(desk, conn):
    """With what whoever came over a connection was sent away."""
    assert conn in desk.closed
    return desk.sent[conn][-1]


# ── who is there ────────────────────────────────────────────────────────────────────────────────


def test_who_comes_before_this_server_has_joined_waits_for_that():
    desk = Desk()
    conn = desk.hello(role="coordinator")
    assert desk.paused == {conn}
    desk.joins()
    assert not desk.paused
    desk.says(conn, m.Ask(), request=7)
    assert isinstance(desk.last(conn), m.ServerStatistics)
    assert desk.requests[conn] == 7


def test_a_member_of_a_term_that_is_not_known_yet_waits_for_its_roster():
    desk = Desk(sequencer="sync").joins().takes(2)
    conn = desk.hello(5, term=3)
    assert desk.paused == {conn}
    desk.takes(3, member(5))
    assert not desk.paused
    assert desk.machine.served(conn).member.id == 5


def test_a_member_of_a_term_that_does_not_come_is_let_go_with_the_reason():
    desk = Desk(sequencer="sync").joins().takes(2)
    conn = desk.hello(5, term=3)
    desk.passes(9.9)
    assert conn not in desk.closed
    desk.passes(0.2)
    assert desk.closed[conn] == "this server knows term 2, the Hello is of term 3, for 10 s"
    assert conn not in desk.sent, "it asks the coordinator again, and is not refused"


def test_who_says_nothing_is_let_go():
    desk = Desk()
    conn = desk.connects()
    desk.passes(10)
    assert desk.closed[conn] == "it did not say who is there, for 10 s"


def test_whoever_does_not_say_hello_breaks_the_protocol():
    desk = Desk().joins()
    conn = desk.connects()
    desk.says(conn, m.Leave(1))
    assert desk.closed[conn] == "first message was Leave, expected Hello"
    other = desk.connects()
    desk.says(other, m.Leave(1), given=["memory"])
    assert "came with a descriptor, expected none" in desk.closed[other]
    third = desk.connects()
    desk.says(third, m.Leave(1), buffers=[np.zeros(3)])
    assert desk.closed[third] == "Leave with a payload of 24 bytes, expected none"


def test_a_stranger_who_asks_is_told_and_let_go():
    desk = Desk(sequencer="sync").serves(5)
    conn = desk.connects()
    desk.says(conn, m.Ask())
    assert desk.last(conn).term == 2
    assert desk.closed[conn] == ""


def test_members_of_another_cluster_are_refused():
    desk = Desk(sequencer="sync").serves(5)
    conn = desk.hello(5, term=2, cluster="c0")
    assert refused(desk, conn) == m.Refused("RefusedError", "this server is of cluster c1, not c0")


def test_who_is_in_no_roster_is_refused():
    desk = Desk(sequencer="sync").serves(5)
    assert "is not in the roster of term 2" in refused(desk, desk.hello(6, term=2)).reason


def test_a_standby_serves_no_members():
    desk = Desk(role="standby", replicated=True).joins().takes(2, member(9, "server"), member(5))
    assert "came to a standby" in refused(desk, desk.hello(5, term=2)).reason


def test_a_member_waits_until_all_that_members_may_have_seen_is_applied_here():
    desk = Desk()  # whose sequencer says nothing yet
    desk.serves(5)
    conn = desk.hello(5, term=2)
    assert desk.paused == {conn}
    desk.do(desk.machine.received(0, m.StartTerm(1, 0), None, desk.now))
    assert not desk.paused


def test_a_member_that_is_not_served_in_time_is_let_go():
    desk = Desk()
    desk.serves(5)
    conn = desk.hello(5, term=2)
    desk.passes(10)
    assert desk.closed[conn] == "server 0 does not serve members yet, for 10 s"


def test_a_members_newer_connection_is_served_when_the_older_one_has_ended():
    """The older one's thread may still be in the member's memory."""
    desk = Desk(sequencer="sync").serves(5)
    older = desk.hello(5, term=2)
    newer = desk.hello(5, term=2, epoch=1)
    assert desk.closed == {older: "member 5 has connected anew"}
    assert desk.paused == {newer}
    desk.ends(older)
    assert not desk.paused
    assert desk.machine.served(newer).connection_epoch == 1


def test_of_two_connections_of_one_epoch_the_second_is_refused():
    desk = Desk(sequencer="sync").serves(5)
    first = desk.hello(5, term=2)
    assert "is connected to this server already" in refused(desk, desk.hello(5, term=2)).reason
    assert first not in desk.closed


def test_a_member_that_left_is_refused_though_the_roster_has_it_still():
    desk = Desk(sequencer="sync").serves(5)
    conn = desk.hello(5, term=2)
    desk.says(conn, m.Leave(1))
    desk.ends(conn)
    assert "has left or was retired" in refused(desk, desk.hello(5, term=2, epoch=1)).reason


@pytest.mark.parametrize(
    ("index", "role", "sender", "why"),
    [
        (0, "server", 55, "member 55 is no server in term 2"),
        (1, "server", 80, "server 0 wants to report to server 1"),
        (1, "server", 1, "member 1 takes server 1 for its standby"),
        (0, "standby", 81, "server 1 wants to report to standby 0"),
    ],
)
def test_servers_that_have_nothing_to_say_here_are_let_go(index, role, sender, why):
    desk = Desk(index, 2, role)
    desk.joins().takes(2, *([member(9, "server", 0)] if role == "standby" else []))
    assert desk.closed[desk.hello(sender, "server", term=2)] == why


def test_another_server_is_handed_over_to_the_sequencer_also_when_it_came_too_early():
    desk = Desk(0, 2, sequencer="sync").joins()
    early = desk.hello(81, "server", term=2)
    assert desk.paused == {early}
    desk.takes(2)
    assert desk.handed == {early: "1"}
    assert not desk.paused
    assert desk.handed[desk.hello(81, "server", term=2)] == "1"


# ── rosters ─────────────────────────────────────────────────────────────────────────────────────


def test_an_older_roster_that_comes_later_changes_nothing():
    desk = Desk(sequencer="sync").joins().takes(4, member(5), member(6, index=1))
    desk.takes(3, member(5))
    assert [type(message) for message in desk.sent[desk.coordinator()]] == [m.Acknowledged] * 2
    assert desk.machine.served(desk.hello(6, term=4)).member.id == 6


def test_a_roster_is_acknowledged_after_the_sequencer_was_told():
    """Else a member could be welcomed whom nobody expects."""
    desk = Desk()
    desk.joins()
    actions = desk.machine.received(desk.coordinator(), roster(2, member(1, "server")), None, 0.0)
    assert [type(action.message) for action in actions] == [m.Roster, m.Recovery, m.Acknowledged]


def test_the_coordinator_says_nothing_but_rosters_and_questions():
    desk = Desk().joins()
    conn = desk.coordinator()
    desk.says(conn, m.Heartbeat())
    assert desk.closed[conn] == "the coordinator sent Heartbeat"


def test_a_node_that_is_in_no_roster_takes_part_in_nothing():
    desk = Desk(sequencer="sync").joins()
    desk.says(desk.coordinator(), roster(2, member(7, "server")))
    assert desk.machine.log.term == 0


# ── the log's connections ───────────────────────────────────────────────────────────────────────


def connected():
    """Server 1 of 2, connected to the sequencer."""
    desk = Desk(1, 2).joins().takes(2)
    assert [(to.index, tag) for to, tag in desk.dialled] == [(0, "log 1")]
    conn = desk.connects("log 1")
    assert [type(message) for message in desk.sent[conn]] == [m.Hello, m.Recovery]
    return desk, conn


def test_a_server_whose_connection_to_the_log_is_lost_connects_again_and_says_where_it_is():
    desk, conn = connected()
    desk.ends(conn)
    desk.passes(AGAIN_S)
    assert [tag for _, tag in desk.dialled] == ["log 1"] * 2
    desk.do(desk.machine.unreachable("log 1", "nobody listens", desk.now))
    desk.passes(AGAIN_S)
    assert [tag for _, tag in desk.dialled] == ["log 1"] * 3
    again = desk.connects("log 1")
    assert isinstance(desk.last(again), m.Recovery)


def test_with_a_new_term_the_connection_to_the_former_sequencer_ends():
    desk, conn = connected()
    desk.takes(3, member(90, "server"), since=3)
    assert desk.closed[conn] == "another sequencer writes the log now"
    assert desk.dialled[-1][1] == "log 3"
    late = desk.connects("log 1")
    assert late in desk.closed
    desk.do(desk.machine.unreachable("log 1", "nobody listens", desk.now))
    assert desk.machine.due is None or desk.machine.due > desk.now + AGAIN_S


def test_a_server_that_is_not_admitted_to_the_log_cannot_go_on():
    desk = Desk(1, 2).joins().takes(2)
    desk.do(desk.machine.unreachable("log 1", "wrong token", desk.now, refused=True))
    assert desk.told == [CannotGoOn("it is not admitted to the log: wrong token")]


@pytest.mark.parametrize(
    "messages",
    [[m.Acknowledged()], [m.StartTerm(1, 0), m.Entries((m.Activated(1, ()),), 1), m.StartTerm(2, 0)]],
    ids=["strange", "discards what is applied"],
)
def test_a_log_that_cannot_be_followed_ends_the_server(messages):
    desk, conn = connected()
    for message in messages:
        desk.says(conn, message)
    ((event),) = desk.told
    assert event.why.startswith("it cannot follow the log: ")


# ── what a person sees ──────────────────────────────────────────────────────────────────────────


def test_statistics_say_for_what_members_wait_as_the_sequencer_knows():
    desk = Desk(sequencer="sync")
    (one, _), _ = desk.trains(5, 6)
    desk.says(one, step(2))
    desk.says(desk.coordinator(), m.Ask())
    told = desk.last(desk.coordinator())
    assert (told.member, told.role, told.index, told.exchanges) == (1, "server", 0, 3)
    assert [model.name for model in told.models] == ["model"]
    assert "worker 1" in told.waits[5]


def test_answers_leave_in_the_order_of_the_questions():
    desk = Desk()  # whose sequencer says nothing yet
    desk.serves(5)
    conn, stranger = desk.coordinator(), desk.connects()
    desk.says(conn, m.Ask())
    desk.says(stranger, m.Ask())
    assert desk.paused == {conn, stranger}
    assert [type(message) for message in desk.sent[0]].count(m.Explain) == 1
    desk.do(desk.machine.received(0, m.Reasons({5: "it waits"}, ""), None, desk.now))
    assert desk.last(conn).waits == desk.last(stranger).waits == {5: "it waits"}
    assert not desk.paused - {stranger}
    assert stranger in desk.closed


def test_who_asks_and_goes_is_forgotten():
    desk = Desk()
    desk.serves(5)
    stranger = desk.connects()
    desk.says(stranger, m.Ask())
    desk.ends(stranger)
    desk.do(desk.machine.received(0, m.Reasons({}, ""), None, desk.now))
    assert stranger not in desk.sent


def test_a_member_that_waits_is_told_why_again_and_again():
    desk = Desk(sequencer="sync")
    (one, _), _ = desk.trains(5, 6)
    desk.says(one, step(2))
    desk.passes(9.9)
    assert not isinstance(desk.last(one), m.Waiting)
    for _ in range(2):
        desk.passes(10)
        assert desk.sent[one][-1].number == 2
        assert "worker 1" in desk.sent[one][-1].reason
    assert sum(isinstance(message, m.Waiting) for message in desk.sent[one]) == 2


def test_a_member_of_a_server_without_the_log_is_told_so():
    desk, conn = connected()
    desk.takes(3, member(5))
    desk.says(conn, m.StartTerm(1, 0))
    one = desk.hello(5, term=3)
    desk.says(one, m.Pull(1, (), -1, True))
    assert isinstance(desk.last(conn), m.Reports)
    desk.passes(10)
    assert isinstance(desk.last(conn), m.Explain)
    desk.passes(10)
    assert desk.last(one).reason == "server 1 has the request and waits for server 0"
    desk.says(conn, m.Reasons({}, "server 0 is processing it"))
    desk.ends(conn)
    desk.passes(10)
    assert desk.last(one).reason.endswith("waits for server 0: it lost the connection to server 0")


def test_whether_a_server_is_of_use():
    desk = Desk(sequencer="sync").serves(5)
    assert not desk.machine.of_use
    conn = desk.hello(5, term=2)
    assert desk.machine.of_use
    desk.ends(conn)
    assert not desk.machine.of_use


# ── members that break the protocol ─────────────────────────────────────────────────────────────


def test_what_breaks_the_protocol_is_told_to_a_member_before_it_is_cut_off():
    desk = Desk(sequencer="sync").serves(5)
    conn = desk.hello(5, term=2)
    desk.says(conn, m.Pull(1, (3,), -1))
    assert refused(desk, conn).error == "ProtocolError"
    assert "named model 3" in refused(desk, conn).reason


def test_a_member_whose_connection_broke_is_told_nothing():
    desk = Desk(sequencer="sync").serves(5)
    conn = desk.hello(5, term=2)
    desk.do(desk.machine.failed(conn, ConnectionLostError("it broke"), desk.now))
    assert conn in desk.closed
    assert conn not in desk.sent


def test_what_comes_over_a_connection_that_was_let_go_is_nothing():
    desk = Desk(sequencer="sync").serves(5)
    assert desk.machine.received(99, m.Register(1, SPEC, None), None, desk.now) == []
