"""The modes as decisions, and as the text a user writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.errors import ConfigurationError
from headwater.log.clocks import Clocks
from headwater.spec.sync import Asynchronous, StaleSynchronous, Synchronous, parse_sync

MODES = {
    "sync": Synchronous(),
    "sync:reduce=sum": Synchronous(reduce="sum"),
    "sync:quorum=3": Synchronous(quorum=3),
    "sync:quorum=3,grace=0.5": Synchronous(quorum=3, grace_s=0.5),
    "sync:quorum=1,grace=2,reduce=sum": Synchronous(quorum=1, grace_s=2, reduce="sum"),
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
    "text",
    [
        *["", "asynchronous", "ssp", "ssp:", "ssp:-1", "ssp:1.5", "sync:2", "async:1", 3],
        *[
            "sync:quorum",
            "sync:quorum=x",
            "sync:quorum=1,quorum=2",
            "sync:grace=now",
            "sync:reduce=max",
            "sync:k=2",
        ],
    ],
)
def test_what_is_no_mode_is_refused_with_the_valid_forms(text):
    with pytest.raises(ConfigurationError, match="'ssp:N'"):
        parse_sync(text)


@pytest.mark.parametrize("bound", [-1, 1.0, True, "3"])
def test_a_bound_is_a_whole_number_from_0(bound):
    with pytest.raises(ConfigurationError, match="≥ 0"):
        StaleSynchronous(bound)


@pytest.mark.parametrize("quorum", [0, -1, 1.0, True, "3"])
def test_a_quorum_is_a_whole_number_from_1(quorum):
    with pytest.raises(ConfigurationError, match="≥ 1"):
        Synchronous(quorum=quorum)


@pytest.mark.parametrize("grace", [-0.1, float("nan"), float("inf"), True, "1"])
def test_a_grace_is_seconds_from_0(grace):
    with pytest.raises(ConfigurationError, match="grace_s must be seconds ≥ 0"):
        Synchronous(quorum=2, grace_s=grace)


def test_a_grace_without_a_quorum_is_refused():
    with pytest.raises(ConfigurationError, match="without a quorum"):
        parse_sync("sync:grace=1")


def test_only_mean_and_sum_reduce():
    with pytest.raises(ConfigurationError, match="'max'"):
        Synchronous(reduce="max")


def test_a_round_needs_every_active_update_and_says_how_many_there_are():
    assert not Synchronous().may_commit(1, 3)
    assert Synchronous().may_commit(1, 3).reason == "1 of 3 updates of this round have arrived"
    assert Synchronous().may_commit(3, 3)
    for mode in (Asynchronous(), StaleSynchronous(0)):
        assert mode.may_commit(1, 3)


def test_a_round_with_a_quorum_waits_for_it_then_for_the_grace_or_everybody():
    mode = Synchronous(quorum=2, grace_s=0.5)
    assert mode.may_commit(1, 4, over=True).reason == "1 of 2 updates of this round have arrived"
    assert mode.may_commit(2, 4).reason == "the round stays open for the other 2 for 0.5 s"
    assert mode.may_commit(2, 4, over=True)
    assert mode.may_commit(4, 4)
    assert mode.may_commit(1, 1)  # never more than there are


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
        if plain:
            assert clocks.slowest_after(plain[0]) == min([plain[0] + 1, *plain[1:]])
        assert len(clocks) == len(plain)
        assert clocks.slowest == min(plain, default=0)
