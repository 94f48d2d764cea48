"""The modes as decisions, and as the text a user writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.clocks import Clocks
from headwater.errors import ConfigurationError
from headwater.sync import Asynchronous, StaleSynchronous, Synchronous, parse_sync

MODES = {
    "sync": Synchronous(),
    "sync:reduce=sum": Synchronous(reduce="sum"),
    "async": Asynchronous(),
    "ssp:0": StaleSynchronous(0),
    "ssp:12": StaleSynchronous(12),
}


@pytest.mark.parametrize("text", MODES)
def test_a_mode_and_its_text_are_inverses(text):
    assert parse_sync(text) == MODES[text]
    assert str(MODES[text]) == text
    assert parse_sync(MODES[text]) is MODES[text]


@pytest.mark.parametrize(
    "text", ["", "asynchronous", "ssp", "ssp:", "ssp:-1", "ssp:1.5", "sync:2", "async:1", 3]
)
def test_what_is_no_mode_is_refused_with_the_valid_forms(text):
    with pytest.raises(ConfigurationError, match="'ssp:N'"):
        parse_sync(text)


@pytest.mark.parametrize("bound", [-1, 1.0, True, "3"])
def test_a_bound_is_a_whole_number_from_0(bound):
    with pytest.raises(ConfigurationError, match="≥ 0"):
        StaleSynchronous(bound)


def test_only_mean_and_sum_reduce():
    with pytest.raises(ConfigurationError, match="'max'"):
        Synchronous(reduce="max")


def test_a_round_needs_every_active_update_and_says_how_many_there_are():
    assert not Synchronous().may_commit(1, 3)
    assert Synchronous().may_commit(1, 3).reason == "1 of 3 updates of this round have arrived"
    assert Synchronous().may_commit(3, 3)
    for mode in (Asynchronous(), StaleSynchronous(0)):
        assert mode.may_commit(1, 3)


@given(st.integers(0, 9), st.integers(0, 99), st.integers(0, 20))
def test_a_lead_is_allowed_up_to_the_bound(bound, slowest, lead):
    decision = StaleSynchronous(bound).may_read(slowest + lead, slowest)
    assert bool(decision) == (lead <= bound)
    assert decision.reason == (
        "" if decision else f"leads the slowest worker by {lead} steps, allowed {bound}"
    )
    assert Asynchronous().may_read(slowest + lead, slowest)
    assert Synchronous().may_read(slowest + lead, slowest)


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "advance"]), st.integers(0, 30)), max_size=60))
def test_clocks_are_a_multiset_that_knows_its_smallest(changes):
    clocks, plain = Clocks(), []
    for change, number in changes:
        if change == "add":
            clocks.add(number)
            plain.append(number)
        elif plain:
            clock = plain.pop(number % len(plain))
            getattr(clocks, change)(clock)
            plain += [clock + 1] * (change == "advance")
        assert len(clocks) == len(plain)
        assert clocks.slowest == min(plain, default=0)
