"""A member's connections and exchanges: every transition, without servers."""

import math

import pytest
from members_alone import (
    DEADLINE,
    HEARTBEAT,
    PATIENCE,
    Alone,
    Memory,
    addresses,
    closed,
    pull,
    server,
    welcome,
)

from headwater import messages as m
from headwater.errors import (
    ConfigurationError,
    ConnectionLostError,
    FinishedError,
    HeadwaterError,
    ProtocolError,
    RefusedError,
    RewoundError,
    StalledError,
)
from headwater.machines import client as rules
from headwater.machines import connections
from headwater.machines.actions import Close, Dial, Send
from headwater.machines.client import Asked, Call, Failed, Settled
from headwater.machines.connections import Connected, Frame, Renewal
from headwater.machines.membership import COORDINATOR, Ended


def newcomer(servers=1, role="worker"):
    """Has just been welcomed."""
    alone = Alone(role)
    alone.does(alone.machine.join, 0.0)
    alone.open(COORDINATOR)
    alone.taken()
    return alone.says(welcome(servers, role=role, index=0 if role == "worker" else -1))


def stage(alone):
    return alone.machine.connections.stage


def locate(alone, *ids):
    """It has asked where the servers are: the coordinator says so."""
    assert stage(alone) == "locating"
    assert alone.sent()[-1:] == [m.GetServers()]
    return alone.says(addresses(*(ids or range(100, 100 + alone.machine.servers))))


def failure(alone):
    """Why no further exchange can be made; all connections to servers are closed."""
    (failed,) = alone.events(Failed)
    assert stage(alone) == "apart"
    assert alone.machine.failure is failed.error
    assert alone.machine.call_due is None
    return failed.error


# ── the first connections ───────────────────────────────────────────────────────────────────────


def test_a_newcomer_connects_to_server_after_server_and_says_who_it_is():
    alone = newcomer(servers=2)
    hello = m.Hello(7, "worker", 5, 0, "this one")
    [first] = alone.taken(Dial)
    assert first.member == server(0)
    zero = alone.open(first.tag)
    assert alone.actions[0] == Send(zero, hello)
    [second] = alone.taken(Dial)
    assert second.member == server(1)
    one = alone.open(second.tag, shared=True)
    assert alone.actions[0] == Send(one, hello)
    assert alone.events(Connected) == [Connected()]
    assert alone.machine.connections.links == [zero, one]
    assert alone.machine.shares == [False, True]
    assert alone.machine.call_due is None


def test_a_reader_says_that_it_is_one():
    alone = newcomer(role="observer").connect()
    assert alone.sent() == [m.Hello(7, "observer", 5, 0, "this one")]


def test_a_server_that_is_not_there_is_looked_for_again_with_growing_pauses_and_named():
    alone = newcomer(servers=2)
    pauses, notes = [], []
    for attempt in range(60):
        tag = alone.dials()[-1]
        conn = alone.open(tag)
        alone.fails(alone.dials()[-1], ConnectionLostError("server 1 cannot be reached"))
        assert conn in closed(alone.actions)
        notes += alone.notes()
        pauses.append(alone.machine.call_due - alone.now)
        alone.at(alone.machine.call_due)
        locate(alone)
        assert alone.machine.connections.epoch == attempt + 1
        if alone.now > 1.5 * PATIENCE:
            break
    assert pauses[:3] == pytest.approx([0.01, 0.02, 0.04])
    assert max(pauses) == pytest.approx(connections.LONGEST_PAUSE_S)
    assert notes == ["worker 0: server 1 cannot be reached"]


def test_servers_that_never_come_end_a_newcomer_s_wait_at_the_deadline():
    alone = newcomer()
    while alone.machine.failure is None:
        if stage(alone) == "dialling":
            alone.fails(alone.dials()[-1], ConnectionLostError("server 0 cannot be reached"))
        elif stage(alone) == "locating":
            locate(alone)
        else:
            alone.at(alone.machine.call_due)
    assert alone.now == pytest.approx(DEADLINE)
    error = failure(alone)
    assert isinstance(error, StalledError)
    text = f"connecting to the servers had no answer for {DEADLINE:g} s: server 0 cannot be reached"
    assert str(error) == text


def test_a_server_that_does_not_admit_this_node_fails_it_at_once():
    alone = newcomer()
    refusal = RefusedError("the caller has no token")
    assert failure(alone.fails(alone.dials()[-1], refusal)) is refusal


@pytest.mark.parametrize("refused", [True, False])
def test_a_driver_that_knows_only_why_says_whether_it_was_refused(refused):
    alone = newcomer()
    alone.does(
        lambda: alone.machine.unreachable(alone.dials()[-1], "why", 0.0, refused=refused),
    )
    assert (alone.machine.failure is not None) is refused
    assert stage(alone) == ("apart" if refused else "pausing")


def test_while_a_server_has_nobody_to_take_over_nothing_is_dialled():
    alone = Alone().joined(servers=2).call()
    alone.loses(alone.machine.connections.links[0])
    alone.at(alone.machine.call_due)
    locate(alone, 100)
    assert stage(alone) == "pausing"
    assert alone.dials() == []
    alone.at(alone.machine.call_due)
    locate(alone).connect()
    assert stage(alone) == "connected"


def test_what_was_dialled_for_an_older_attempt_is_closed_or_ignored():
    alone = newcomer(servers=2)
    old = alone.dials()[-1]
    alone.fails(old, ConnectionLostError("x"))
    alone.taken()
    late = alone.open(old)
    assert closed(alone.taken()) == [late]
    alone.fails(old, RefusedError("late"))
    assert alone.taken() == []


# ── connections that are lost ───────────────────────────────────────────────────────────────────


def talking(servers=1, **more):
    """A member that has had an answer over its connections, so that their loss is noticed at once."""
    alone = Alone(more.pop("role", "worker")).joined(servers, **more).call()
    for index in range(servers):
        alone.answer(index)
    alone.taken()
    return alone


def test_a_connection_lost_between_exchanges_drops_all_and_is_made_anew_with_the_next():
    alone = talking(2)
    zero, one = alone.machine.connections.links
    alone.loses(one)
    assert closed(alone.taken()) == [zero, one]
    assert alone.machine.call_due is None
    alone.call()
    locate(alone).connect()
    assert alone.asked.number == 2
    assert alone.machine.connections.epoch == 1


def test_a_dial_of_former_connections_that_succeeds_late_changes_nothing():
    """It once had the outstanding request sent again over the connections of now."""
    alone = talking(2).call()
    alone.loses(alone.machine.connections.links[0])
    locate(alone, 100, 201)
    late = alone.dials()[-1]
    alone.loses(alone.open(late))
    alone.at(alone.now + 1.0)
    locate(alone, 100, 202).connect()
    alone.taken()
    conn = alone.open(late)
    assert closed(alone.actions) == [conn]
    assert alone.events(Asked) == []


def test_an_exchange_is_repeated_with_the_same_number_in_a_later_epoch_and_old_answers_do_not_count():
    alone = talking(2).call()
    alone.answer(0, version=5)
    alone.loses(alone.machine.connections.links[1])
    locate(alone, 100, 201).connect()
    assert [s.message.connection_epoch for s in alone.taken(Send)] == [1, 1]
    assert alone.asked == Asked(
        alone.machine.connections.links, [Frame(m.Pull(2, (index,), -1)) for index in range(2)], 2
    )
    alone.answer(1, version=6)
    assert alone.events(Settled) == []
    alone.answer(0, version=6)
    assert alone.events(Settled) == [Settled(m.Answer(2, 6))]


def test_memory_that_was_given_away_is_renewed_before_any_other_connection_is_made():
    alone = Alone().joined(2, shared=True)
    memory = Memory()
    alone.machine.connections.buffers.append(memory)
    alone.call().taken()
    links = alone.machine.connections.links
    alone.loses(links[0])
    assert alone.taken()[:2] == [Close(links[0]), Close(links[1])]
    alone.at(alone.machine.call_due)
    locate(alone)
    assert [type(action) for action in alone.taken()] == [Renewal, Dial]


def test_memory_that_was_given_in_an_attempt_that_failed_is_renewed_too():
    alone = talking(2).call()
    alone.loses(alone.machine.connections.links[0])
    locate(alone)
    first = alone.dials()[-1]
    alone.open(first)
    alone.fails(alone.dials()[-1], ConnectionLostError("not there"))
    alone.at(alone.machine.call_due)
    alone.says(addresses(100, 101))
    assert Renewal() in alone.events()
    alone.fails(alone.machine.connections._tag(), ConnectionLostError("not there"))
    alone.at(alone.machine.call_due)
    alone.taken()
    alone.says(addresses(100, 101))
    assert alone.events(Renewal) == [], "nobody was given it this time"


def test_every_new_connection_is_told_of_the_memory_and_later_requests_only_of_news():
    alone = Alone().joined(2, shared=True)
    memory = Memory()
    alone.machine.connections.buffers.append(memory)
    alone.call(memory=memory)
    assert [s.message for s in alone.taken(Send)] == [m.Renew(0, None), m.Renew(1, None)]
    for index in range(2):
        alone.answer(index)
    alone.call(memory=memory)
    assert alone.taken(Send) == []
    alone.loses(alone.machine.connections.links[0])
    locate(alone).connect(shared=True)
    offers = [s for s in alone.taken(Send) if isinstance(s.message, m.Renew)]
    assert [s.message.model for s in offers] == [0, 1]
    assert all(s.descriptors == ("memory",) for s in offers)


def test_connections_that_are_lost_before_anything_came_over_them_are_made_after_a_pause():
    alone = talking().call()
    alone.loses(alone.machine.connections.links[0])
    for pause in (0.01, 0.02, 0.04):
        locate(alone).connect()
        alone.loses(alone.machine.connections.links[0])
        assert stage(alone) == "pausing"
        assert alone.machine.call_due - alone.now == pytest.approx(pause)
        alone.taken()
        alone.at(alone.machine.call_due)
    locate(alone).connect().answer()
    alone.call().taken()
    alone.loses(alone.machine.connections.links[0])
    assert stage(alone) == "locating", "the pauses begin anew"


def test_a_coordinator_that_does_not_say_where_the_servers_are_is_not_waited_for():
    alone = talking().call()
    alone.loses(alone.machine.connections.links[0])
    alone.at(connections.LOCATE_S).connect()
    assert stage(alone) == "connected"


def test_servers_are_looked_for_where_they_were_while_the_coordinator_is_away():
    alone = talking(returns=True).call()
    alone.loses(alone.membership.conn)
    alone.loses(alone.machine.connections.links[0])
    assert stage(alone) == "dialling"
    alone.connect()
    assert stage(alone) == "connected"


def test_a_coordinator_that_goes_away_while_it_is_asked_is_not_waited_for():
    alone = talking(returns=True).call()
    alone.loses(alone.machine.connections.links[0])
    assert stage(alone) == "locating"
    alone.loses(alone.membership.conn)
    assert stage(alone) == "dialling"


def test_a_server_that_was_replaced_while_it_hangs_is_found_by_the_addresses_with_a_heartbeat():
    alone = talking(2).call()
    links = alone.machine.connections.links
    alone.at(HEARTBEAT)
    assert m.GetServers() in alone.sent()
    alone.says(addresses(100, 101))
    assert alone.taken() == [], "the same servers"
    alone.says(addresses(100))
    assert alone.taken() == [], "nobody has taken over yet"
    alone.says(addresses(100, 201))
    assert closed(alone.actions) == links
    assert stage(alone) == "dialling"
    alone.connect()
    assert alone.asked.number == 2


def test_servers_that_are_others_between_exchanges_are_connected_to_with_the_next():
    alone = talking()
    alone.says(addresses(200))
    assert [type(action) for action in alone.taken()] == [Close]
    assert stage(alone) == "apart"


# ── an exchange ─────────────────────────────────────────────────────────────────────────────────


def test_an_exchange_sends_to_every_server_and_is_over_when_all_have_answered():
    alone = Alone().joined(2).call()
    frames = [Frame(m.Pull(1, (index,), -1)) for index in range(2)]
    assert alone.events() == [Asked(alone.machine.connections.links, frames, 1)]
    alone.answer(1, version=4)
    assert alone.taken() == []
    alone.answer(0, version=4)
    assert alone.events() == [Settled(m.Answer(1, 4))]
    assert (alone.machine.number, alone.machine.version) == (1, 4)
    assert alone.machine.call_due is None


def test_the_version_of_a_member_never_decreases():
    alone = Alone().joined().call().answer(version=4)
    stop = Call("stop", lambda server, number: Frame(m.Stop(number)))
    alone.does(alone.machine.call, stop, alone.now).answer(version=3)
    assert (len(alone.events(Settled)), alone.machine.version) == (2, 4)


def test_a_request_that_the_servers_refuse_is_over_and_the_next_one_can_be_made():
    alone = Alone().joined().call()
    alone.answer(failure=m.Refused("ConfigurationError", "no such setting"))
    [settled] = alone.events(Settled)
    assert isinstance(settled.error, ConfigurationError)
    assert alone.call().answer(version=2).events(Settled) == [Settled(m.Answer(2, 2))]


def test_waits_that_could_never_end_are_final():
    alone = Alone().joined().call()
    alone.answer(failure=m.Refused("StalledError", "worker 0 waits for worker 1, which waits for it"))
    assert isinstance(failure(alone), StalledError)


def test_answers_that_differ_are_final():
    alone = Alone().joined(2)
    ordered = Call("pull", lambda server, number: Frame(m.Pull(number, (server,), -1, True)))
    alone.does(alone.machine.call, ordered, alone.now).answer(0, version=1).answer(1, version=2)
    assert "servers 0 and 1 answered differently" in str(failure(alone))


def test_an_answer_that_nobody_asked_for_is_final():
    alone = Alone().joined().server_says(0, m.Answer(1, 1))
    error = failure(alone)
    assert isinstance(error, ProtocolError)
    assert "and nothing was asked" in str(error)


def test_an_answer_to_another_exchange_is_final():
    alone = Alone().joined().call().server_says(0, m.Answer(9, 1))
    assert "during exchange 1" in str(failure(alone))


def test_what_a_server_refuses_with_by_name_is_what_the_caller_gets():
    alone = Alone().joined().call().server_says(0, m.Refused("RewoundError", "training begins anew"))
    assert isinstance(failure(alone), RewoundError)


def test_payload_goes_where_the_call_says_or_to_the_models_and_nowhere_for_another_exchange():
    alone = Alone().joined()
    alone.machine.receivers[3] = lambda server: [f"model 3 of server {server}"]
    alone.call()
    answer = m.Answer(1, 1, values=(3,))
    assert alone.machine.place(0, answer) == ["model 3 of server 0"]
    assert alone.machine.place(0, m.Answer(2, 1, values=(3,))) == ()
    alone.answer()
    assert alone.machine.place(0, answer) == ()
    alone.call(place=lambda server, answer: [server, answer.version])
    assert alone.machine.place(1, m.Answer(2, 8)) == [1, 8]


def test_descriptions_and_deeds_are_handed_on_as_they_are():
    alone = Alone().joined(2).call(expects=m.Stored)
    parts = [m.Stored(1, None), m.Stored(1, None, failure=m.Refused("CheckpointError", "full"))]
    for index, part in enumerate(parts):
        alone.server_says(index, part)
    assert alone.events(Settled) == [Settled(parts)]


def test_what_is_begun_takes_no_time_until_it_is_waited_for():
    alone = Alone().joined()
    alone.does(alone.machine.begin, pull(), 0.0)
    assert alone.machine.until is None
    alone.at(3 * DEADLINE)
    assert alone.machine.failure is None
    alone.does(alone.machine.wait, alone.now)
    assert alone.machine.until == alone.now + DEADLINE
    assert alone.answer().events(Settled) == [Settled(m.Answer(1, 1))]
    alone.does(alone.machine.wait, alone.now)
    assert alone.machine.until is None, "there is nothing to wait for"


# ── why it waits ────────────────────────────────────────────────────────────────────────────────


def test_what_servers_say_of_a_wait_is_noted_once_by_the_one_that_knows_best():
    alone = Alone().joined(2).call("step 1")
    alone.server_says(1, m.Waiting(1, "server 1 has the request and waits for server 0"))
    assert alone.notes() == ["worker 0: server 1 has the request and waits for server 0"]
    alone.server_says(0, m.Waiting(1, "step 1 waits for worker 1"))
    assert alone.notes() == ["worker 0: step 1 waits for worker 1"]
    alone.server_says(1, m.Waiting(1, "server 1 has the request and waits for server 0"))
    assert alone.notes() == []


def test_what_servers_say_to_a_reader_is_kept_for_its_error():
    alone = Alone("observer").joined(role="observer", index=-1).call()
    assert alone.server_says(0, m.Waiting(1, "why")).notes() == []


def stalled(alone, until=None):
    alone.at(alone.machine.until if until is None else until)
    error = failure(alone)
    assert isinstance(error, StalledError)
    return str(error)


def test_a_wait_that_passed_the_deadline_names_whom_the_sequencer_named():
    alone = Alone().joined(2).call("step 3").at(DEADLINE - 1)
    alone.server_says(1, m.Waiting(1, "server 1 has the request and waits for server 0"))
    alone.server_says(0, m.Waiting(1, "step 3 waits for worker 1"))
    assert stalled(alone) == f"step 3 had no answer for {DEADLINE:g} s: step 3 waits for worker 1"


def test_the_deadline_that_a_member_was_made_with_is_the_one_it_quotes():
    alone = Alone(deadline=2.5).joined().call("verify")
    assert stalled(alone).startswith("verify had no answer for 2.5 s: ")
    assert alone.now == 2.5


def test_a_server_that_says_nothing_while_the_others_do_is_named_and_they_are_not():
    alone = Alone().joined(3).call().at(DEADLINE - 1)
    for index in (0, 2):
        alone.server_says(index, m.Waiting(1, "pull waits for the log"))
    text = stalled(alone)
    assert "no word from server 1; pull waits for the log" in text


def test_a_server_that_spoke_long_ago_and_not_again_is_named():
    alone = Alone().joined(2).call().at(PATIENCE)
    for index in range(2):
        alone.server_says(index, m.Waiting(1, f"server {index} is asked"))
    while alone.now < DEADLINE - PATIENCE / 2:
        alone.at(alone.now + PATIENCE / 2).server_says(0, m.Waiting(1, "waits for server 1"))
    assert "no word from server 1; waits for server 1" in stalled(alone)


def test_a_server_that_has_answered_is_not_to_blame():
    alone = Alone().joined(3).call().answer(0).answer(2)
    assert stalled(alone).endswith("no word from server 1")


def test_servers_that_all_say_nothing_are_all_named():
    assert stalled(Alone().joined(2).call()).endswith("no word from servers 0, 1")


def test_with_a_deadline_no_longer_than_the_patience_no_server_is_blamed():
    text = stalled(Alone(deadline=PATIENCE).joined(2).call())
    assert "no word from" not in text
    assert text.endswith(
        f"no server has said for whom: they do after patience={PATIENCE:g} s, which is no shorter"
    )


def test_an_absent_coordinator_is_named_beside_the_reason():
    alone = Alone().joined(returns=True).call()
    alone.loses(alone.membership.conn)
    while alone.now < DEADLINE:
        due = alone.machine.due
        alone.at(due)
        if COORDINATOR in alone.dials():
            alone.fails(COORDINATOR, ConnectionLostError("nobody"))
    assert "no word from server 0; the coordinator at tcp:coordinator:7000 is away for 60.0 s" in str(
        alone.machine.failure
    )


def test_a_coordinator_that_says_nothing_of_the_servers_is_named():
    alone = Alone(deadline=1.0).joined().call()
    alone.answer()
    alone.call()
    alone.loses(alone.machine.connections.links[0])
    assert "the coordinator does not say where the servers are" in stalled(alone)


def test_an_exchange_without_a_deadline_waits_as_long_as_it_takes():
    alone = Alone(deadline=math.inf).joined().call().at(1e4)
    assert alone.machine.failure is None
    assert alone.answer().events(Settled) == [Settled(m.Answer(1, 1))]


# ── refusals, and the end ───────────────────────────────────────────────────────────────────────


def test_a_member_that_a_server_refuses_hears_from_the_coordinator_why():
    alone = talking(2).call()
    links = alone.machine.connections.links
    alone.server_says(1, m.Refused("RefusedError", "member 7 is not in the roster"))
    assert closed(alone.taken()) == links
    alone.says(m.Refused("RewoundError", "training begins anew"))
    assert isinstance(failure(alone), RewoundError)


def test_without_a_word_from_the_coordinator_the_server_s_refusal_counts():
    alone = Alone().joined().call().server_says(0, m.Refused("RefusedError", "not in the roster"))
    alone.at(rules.VERDICT_S - 0.1)
    assert alone.machine.failure is None
    assert str(failure(alone.at(rules.VERDICT_S))) == "not in the roster"


def test_a_member_that_is_struck_off_fails_what_is_outstanding():
    alone = talking().call()
    alone.says(m.Refused("RefusedError", "worker 0 was declared dead"))
    assert str(failure(alone)) == "worker 0 was declared dead"


def test_a_member_that_is_struck_off_between_exchanges_fails_the_next():
    alone = talking()
    links = alone.machine.connections.links
    alone.says(m.Refused("ClusterEndedError", "the cluster is closed"))
    assert set(links) <= set(closed(alone.actions))
    assert alone.machine.failure is None
    alone.call()
    assert str(failure(alone)) == "the cluster is closed"


def test_a_coordinator_that_says_what_it_may_not_ends_the_membership():
    alone = talking().call()
    alone.says(m.Acknowledged())
    assert str(failure(alone)) == "the coordinator sent Acknowledged"


def leaving(alone):
    return alone.call("leave", leaves=True)


def test_a_member_that_has_left_already_has_left():
    alone = leaving(talking()).server_says(0, m.Refused("RefusedError", "member 7 has left"))
    assert alone.notes() == ["worker 0 had left already: member 7 has left"]
    alone = leaving(talking()).server_says(0, m.Refused("RefusedError", "member 7 has left"))
    assert alone.events(Settled, Failed) == [Settled(None)]
    alone = leaving(talking()).says(m.Refused("RefusedError", "worker 0 was declared dead"))
    assert alone.events(Settled, Failed) == [Settled(None)]


def test_who_cannot_leave_is_told_why():
    alone = leaving(talking()).says(m.Refused("ClusterEndedError", "the cluster is closed"))
    assert str(failure(alone)) == "the cluster is closed"


def test_leaving_tells_the_coordinator_and_closes_everything():
    alone = leaving(talking()).answer(version=9)
    link, coordinator = alone.machine.connections.links[0], alone.membership.conn
    alone.taken()
    alone.does(alone.machine.leave, True)
    actions = alone.taken()
    assert actions[0] == Send(coordinator, m.Departed(7, True))
    assert closed(actions) == [link, coordinator]


def test_closing_ends_what_is_outstanding_as_if_connections_were_lost():
    alone = talking().call()
    alone.does(alone.machine.close)
    assert isinstance(failure(alone), ConnectionLostError)
    alone.does(alone.machine.close)
    assert alone.events(Failed) == []


def test_an_error_of_the_driver_ends_it():
    alone = talking().call()
    error = ConnectionLostError("pull was interrupted by KeyboardInterrupt")
    alone.does(alone.machine.fail, error)
    assert failure(alone) is error


# ── waiting for the others at the end ───────────────────────────────────────────────────────────


def finishing(**more):
    alone = talking(**more)
    alone.does(alone.machine.finish)
    assert m.Finished(7) in alone.sent()
    assert stage(alone) == "apart"
    return alone


def test_who_has_finished_waits_until_training_has():
    alone = finishing().says(m.Finished())
    [ended] = alone.events(Ended)
    assert isinstance(ended.error, FinishedError)


def test_a_coordinator_that_is_back_is_told_again_who_has_finished():
    alone = finishing(returns=True)
    alone.loses(alone.membership.conn)
    alone.at(1.0)
    conn = alone.open(COORDINATOR)
    alone.taken()
    alone.says(welcome(returns=True), conn)
    assert alone.sent() == [m.Finished(7)]


def test_who_has_finished_does_not_wait_for_ever_for_a_coordinator_that_is_away():
    alone = finishing(returns=True)
    alone.loses(alone.membership.conn)
    while not (ended := alone.events(Ended)):
        alone.at(alone.machine.due)
        if alone.membership.phase == "away" and alone.membership.due is None:
            alone.fails(COORDINATOR, ConnectionLostError("nobody"), nobody=True)
    assert alone.now == pytest.approx(DEADLINE)
    text = "worker 0 has finished, but its coordinator has been away for 60 s"
    assert str(ended[0].error).startswith(text)


# ── everything at every moment ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_at_whatever_moment_it_settles_or_fails_and_never_both(seed):
    import random

    chance = random.Random(seed)
    alone = Alone().joined(2, returns=chance.random() < 0.5)
    alone.call()
    ends = []
    for _ in range(400):
        ends += alone.events(Settled, Failed)
        if ends:
            break
        _anything(alone, chance)
    while not ends and alone.machine.due is not None:
        alone.at(alone.machine.due)
        ends += alone.events(Settled, Failed)
        if alone.membership.phase == "away" and alone.membership.due is None:
            alone.fails(COORDINATOR, ConnectionLostError("nobody"))
        if stage(alone) == "dialling":
            alone.fails(alone.machine.connections._tag(), ConnectionLostError("nobody"))
    assert len(ends) == 1
    assert alone.machine.call_due is None


def _anything(alone, chance):
    machine = alone.machine
    happens = [lambda: alone.at(alone.now + chance.random())]
    for index, link in enumerate(machine.connections.links):
        happens += [
            lambda link=link: alone.loses(link),
            lambda index=index: alone.server_says(index, m.Waiting(machine.number, "why")),
        ]
        if machine._exchange is not None and index in machine._exchange.unanswered():
            happens.append(lambda index=index: alone.answer(index, version=3))
    if alone.membership.conn is not None:
        happens.append(lambda: alone.loses(alone.membership.conn))
        if alone.membership.phase == "member":
            happens += [lambda: alone.says(addresses(100, chance.choice([101, 201])))] * 3
        else:
            happens.append(lambda: alone.says(welcome(2)))
    elif alone.membership.phase == "away" and alone.membership.due is None:
        happens += [lambda: alone.open(COORDINATOR)] * 3
        happens.append(lambda: alone.fails(COORDINATOR, ConnectionLostError("nobody")))
    if stage(alone) == "dialling":
        tag = machine.connections._tag()
        happens += [lambda: alone.open(tag, chance.random() < 0.5)] * 4
        happens.append(lambda: alone.fails(tag, ConnectionLostError("nobody")))
    if chance.random() < 0.01:
        happens = [lambda: alone.says(m.Refused("RefusedError", "declared dead"))]
        if alone.membership.conn is None:
            return
    chance.choice(happens)()
    assert machine.failure is None or isinstance(machine.failure, HeadwaterError)
