"""One question to the coordinator: which split does this worker read next?"""

import pytest
from members_alone import DEADLINE, PATIENCE, Alone, welcome

from headwater import messages as m
from headwater.errors import (
    ConfigurationError,
    ConnectionLostError,
    ProtocolError,
    RefusedError,
    StalledError,
)
from headwater.machines.membership import COORDINATOR
from headwater.machines.split_request import SplitAnswer


def lease(number):
    return m.Lease(number, 0, 1, 100, False, 0, 10, 0)


def leased(number, start=0):
    return m.Leased(number, m.Span(0, start, start + 10), 10, 100)


def waiting(number, reason="worker 1 has the last split"):
    return m.Unleased(number, False, reason)


@pytest.fixture
def alone():
    return Alone().joined(returns=True)


def ask(alone):
    request = lease(alone.machine.splits.next_number)
    alone.does(alone.machine.next_split, request, alone.now)
    return request


def replies(alone):
    return [event.reply for event in alone.events(SplitAnswer)]


def test_requests_are_numbered_and_each_has_one_answer(alone):
    for number in (1, 2, 3):
        assert ask(alone) == lease(number)
        assert alone.sent() == [lease(number)]
        assert replies(alone.says(leased(number))) == [leased(number)]
        alone.machine.splits.taken()
        assert alone.machine.splits.due is None


def test_an_answer_to_an_older_request_is_never_taken(alone):
    """Else a split is lost, or read twice."""
    ask(alone)
    alone.says(m.Unleased(1, True, "", m.Refused("ConfigurationError", "others call it differently")))
    alone.machine.splits.taken()
    ask(alone)
    alone.taken()
    assert replies(alone.says(leased(1))) == []
    assert replies(alone.says(leased(2, start=10))) == [leased(2, start=10)]
    assert replies(alone.says(leased(2, start=10))) == [], "nothing is asked any more"


def test_a_request_whose_answer_nobody_took_is_made_again_with_its_number(alone):
    ask(alone)
    assert replies(alone.says(leased(1))) == [leased(1)]
    assert ask(alone).number == 1
    assert replies(alone.says(leased(1))) == [leased(1)]
    alone.machine.splits.taken()
    assert ask(alone).number == 2


def test_who_must_wait_for_others_has_another_answer_later_however_often_the_reason_changes(alone):
    ask(alone)
    assert replies(alone.says(waiting(1, "worker 1 has it"))) == [waiting(1, "worker 1 has it")]
    assert replies(alone.says(waiting(1, "worker 2 has it"))) == [waiting(1, "worker 2 has it")]
    assert alone.at(PATIENCE).notes() == ["worker 0: worker 2 has it"]
    assert replies(alone.says(m.Unleased(1, True, "read"))) == [m.Unleased(1, True, "read")]


def test_a_wait_for_a_split_ends_at_the_deadline_and_names_who_holds_the_rest(alone):
    ask(alone)
    alone.says(waiting(1)).taken()
    alone.at(DEADLINE)
    [error] = replies(alone)
    assert isinstance(error, StalledError)
    assert str(error) == f"no split for {DEADLINE:g} s: worker 1 has the last split"


def test_a_coordinator_that_says_nothing_is_waited_for_until_the_deadline(alone):
    ask(alone)
    assert alone.at(PATIENCE).notes() == ["worker 0: waits for a split"]
    alone.at(DEADLINE)
    assert "no word of why" in str(replies(alone)[0])


def test_an_impossible_request_is_refused_with_the_coordinator_s_reason(alone):
    ask(alone)
    failure = m.Refused("ConfigurationError", "worker 1 calls it with size 50")
    [error] = replies(alone.says(m.Unleased(1, True, "", failure)))
    assert isinstance(error, ConfigurationError)
    ask(alone)
    [error] = replies(alone.says(m.Unleased(1, True, "", m.Refused("Nonsense", "x"))))
    assert isinstance(error, ProtocolError)


def test_a_coordinator_that_was_away_is_asked_again_once(alone):
    ask(alone)
    alone.loses(alone.membership.conn)
    alone.at(1.0)
    conn = alone.open(COORDINATOR)
    alone.taken()
    alone.says(welcome(returns=True), conn)
    assert alone.sent() == [lease(1)]
    assert alone.machine.splits.returned() == []
    assert replies(alone.says(leased(1))) == [leased(1)]
    assert alone.machine.splits.returned() == [], "nothing is asked any more"


def test_what_is_asked_while_the_coordinator_is_away_is_asked_when_it_is_back(alone):
    alone.loses(alone.membership.conn)
    ask(alone)
    assert alone.sent() == []
    alone.at(1.0)
    conn = alone.open(COORDINATOR)
    alone.taken()
    alone.says(welcome(returns=True), conn)
    assert alone.sent() == [lease(1)]


def test_a_membership_that_ends_ends_the_wait(alone):
    ask(alone)
    alone.says(m.Refused("RefusedError", "worker 0 was declared dead"))
    [error] = replies(alone)
    assert isinstance(error, RefusedError)
    ask(alone)
    assert replies(alone) == [error]


def test_a_coordinator_that_is_gone_ends_the_wait():
    alone = Alone().joined()
    ask(alone)
    alone.loses(alone.membership.conn)
    alone.at(1.0)
    alone.fails(COORDINATOR, ConnectionLostError("connection refused"), nobody=True)
    assert isinstance(replies(alone)[0], ConnectionLostError)
