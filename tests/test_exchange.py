"""The client's half of an exchange: one answer of each server, all the same."""

import math

import pytest

from headwater import errors
from headwater.machines.exchange import Exchange
from headwater.messages import (
    Acknowledged,
    Answer,
    Compared,
    Description,
    ModelInfo,
    ModelSpec,
    Refused,
    StepResult,
    Stored,
    Waiting,
)

ANSWER = Answer(3, 17, values=(0,), result=StepResult(17, True, 2, 1))


def test_an_exchange_is_over_when_every_server_has_answered():
    exchange = Exchange(3, 3)
    assert exchange.unanswered() == [0, 1, 2]
    assert exchange.received(1, ANSWER)
    assert exchange.unanswered() == [0, 2]
    assert exchange.received(0, ANSWER)
    assert exchange.received(2, ANSWER)
    assert exchange.unanswered() == []
    assert exchange.outcome() == ANSWER


def test_a_word_on_waiting_is_no_answer():
    exchange = Exchange(3, 1)
    assert exchange.words == {}
    assert not exchange.received(0, Waiting(3, "step 5 waits for worker 1"), now=7.0)
    assert exchange.words == {0: (7.0, "step 5 waits for worker 1")}
    assert exchange.unanswered() == [0]


@pytest.mark.parametrize("message", [Answer(2, 1), Waiting(4, ""), Acknowledged()])
def test_what_belongs_to_no_exchange_breaks_the_protocol(message):
    with pytest.raises(errors.ProtocolError, match=r"server 1 sent .* during exchange 3"):
        Exchange(3, 2).received(1, message)


def test_a_second_answer_breaks_the_protocol():
    exchange = Exchange(3, 2)
    exchange.received(0, ANSWER)
    with pytest.raises(errors.ProtocolError, match="server 0 answered exchange 3 twice"):
        exchange.received(0, ANSWER)


def test_answers_that_differ_break_the_protocol_and_name_the_servers():
    exchange = Exchange(3, 3)
    for server, version in enumerate([17, 17, 18]):
        exchange.received(server, Answer(3, version))
    with pytest.raises(errors.ProtocolError, match="servers 0 and 2 answered differently"):
        exchange.outcome()


def test_sums_that_are_not_a_number_are_the_same_on_all_servers():
    exchange = Exchange(3, 2)
    for server in range(2):
        exchange.received(server, Answer(3, 1, sums={"loss": float("nan")}))
    assert math.isnan(exchange.outcome().sums["loss"])


@pytest.mark.parametrize("name", ["RegistrationError", "StalledError", "ConfigurationError"])
def test_a_failure_is_raised_as_the_class_it_names(name):
    exchange = Exchange(3, 2)
    for server in range(2):
        exchange.received(server, Answer(3, 1, failure=Refused(name, "because")))
    with pytest.raises(getattr(errors, name), match="because"):
        exchange.outcome()


@pytest.mark.parametrize("name", ["SystemExit", "WorkerError", "annotations", "named", "Nonsense"])
def test_a_failure_that_names_no_error_of_ours_breaks_the_protocol(name):
    exchange = Exchange(3, 1)
    exchange.received(0, Answer(3, 1, failure=Refused(name, "because")))
    with pytest.raises(errors.ProtocolError, match="because"):
        exchange.outcome()


def test_a_refused_member_hears_why():
    with pytest.raises(errors.RefusedError, match="not in the roster"):
        Exchange(3, 2).received(0, Refused("RefusedError", "member 7 is not in the roster"))


def test_a_description_lists_what_every_server_knows():
    known = [ModelInfo(i, ModelSpec(f"model {i}", (), ())) for i in range(3)]
    exchange = Exchange(1, 3, Description)
    for server, count in enumerate([3, 1, 2]):
        exchange.received(server, Description(1, count, tuple(known[:count])))
    assert exchange.outcome().models == tuple(known[:1])


PARTS = [Stored(1, None), Stored(1, None, failure=Refused("CheckpointError", "the disk is full"))]
DIGESTS = [Compared(1, server, 5, 9, (), None, reason="it has no standby") for server in range(2)]


@pytest.mark.parametrize("parts", [PARTS, DIGESTS], ids=["stored", "compared"])
def test_what_each_server_did_is_told_in_their_order(parts):
    exchange = Exchange(1, 2, type(parts[0]))
    for server in (1, 0):
        exchange.received(server, parts[server])
    assert exchange.outcome() == parts


@pytest.mark.parametrize("expects", [Stored, Compared, Description])
def test_an_answer_to_something_else_breaks_the_protocol(expects):
    with pytest.raises(errors.ProtocolError, match=f"server 0 answered Answer, expected {expects.__name__}"):
        Exchange(3, 1, expects).received(0, ANSWER)
