"""The modes as decisions, and as the text a user writes."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modes import Pairs, Step, Steps, steps

from headwater.errors import ConfigurationError
from headwater.log.clocks import Clocks
from headwater.messages import Pace
from headwater.spec.registry import load_rules, register
from headwater.spec.slack import grace
from headwater.spec.sync import (
    Asynchronous,
    Commits,
    Decision,
    Mode,
    StaleSynchronous,
    Synchronous,
    Wait,
    parse_sync,
)

MODES = {
    "sync": Synchronous(),
    "sync:reduce=sum": Synchronous(reduce="sum"),
    "sync:quorum=3": Synchronous(quorum=3),
    "sync:quorum=3,grace=0.5": Synchronous(quorum=3, grace_s=0.5),
    "sync:quorum=1,grace=2,reduce=sum": Synchronous(quorum=1, grace_s=2, reduce="sum"),
    "sync:quorum=2,grace=slack": Synchronous(quorum=2, grace_s="slack"),
    "sync:quorum=2,grace=slack,late=carry,cap=3": Synchronous(2, "slack", late="carry", cap_s=3),
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
    with pytest.raises(
        ConfigurationError, match=r"ssp: bound(=-1 is impossible: pass bound ≥ 0 steps| must be)"
    ):
        StaleSynchronous(bound)


@pytest.mark.parametrize("quorum", [0, -1, 1.0, True, "3"])
def test_a_quorum_is_a_whole_number_from_1(quorum):
    with pytest.raises(ConfigurationError, match=r"sync: quorum(=.* ≥ 1| must be a whole number or None)"):
        Synchronous(quorum=quorum)


@pytest.mark.parametrize("grace", [-0.1, float("nan"), float("inf"), True, "1"])
def test_a_grace_is_seconds_from_0(grace):
    with pytest.raises(ConfigurationError, match=r"grace_s(=.* ≥ 0 seconds| must be a finite number)"):
        Synchronous(quorum=2, grace_s=grace)


def test_a_grace_without_a_quorum_is_refused():
    with pytest.raises(ConfigurationError, match="without a quorum"):
        parse_sync("sync:grace=1")
    with pytest.raises(ConfigurationError, match="grace_s=slack without a quorum"):
        parse_sync("sync:grace=slack")
    with pytest.raises(ConfigurationError, match="cap_s=3 is for grace='slack'"):
        parse_sync("sync:quorum=2,cap=3")


def test_only_mean_and_sum_reduce():
    with pytest.raises(ConfigurationError, match="'max'"):
        Synchronous(reduce="max")


def test_a_round_needs_every_active_update_and_says_how_many_there_are():
    mode = Synchronous()
    assert mode.next(steps(1, 3), 99.0) == Wait("1 of 3 updates of this round have arrived")
    everybody = steps(3, 3)
    assert mode.next(everybody, 0.0) == Commits((tuple(everybody),))
    assert mode.may_count(missed=5)  # nobody is late for a round that waits for everybody


def test_without_rounds_each_update_is_a_commit_at_once():
    for mode in (Asynchronous(), StaleSynchronous(0)):
        assert mode.next(some := steps(2, 3), 0.0) == Commits(tuple((step,) for step in some))
        assert mode.may_count(missed=5)


def test_a_round_with_a_quorum_waits_for_it_then_for_the_grace_or_everybody():
    mode = Synchronous(quorum=2, grace_s=0.5)
    assert mode.next(steps(1, 4), 99.0) == Wait("1 of 2 updates of this round have arrived")
    three = steps(3, 4, since=[7.0, 9.0, 8.0])  # the quorum was there at 8
    assert mode.next(three, 8.4) == Wait("the round stays open for the other 1 for 0.5 s", due=8.5)
    assert mode.next(three, 8.5) == Commits((tuple(three),))
    for full in (steps(4, 4), steps(1, 1)):  # never more than there are
        assert mode.next(full, 0.0) == Commits((tuple(full),))


def test_the_slack_is_what_local_steps_leave_of_the_time_for_the_quorum_and_for_synchronising():
    """Two steps of 1 s under way, half a second for the quorum, 0.3 to synchronise: 0.8 · 1.2 s."""
    pace = Pace(step_s=1.0, overlap=2, sync_s=0.3)
    seconds, why = grace([(pace, 0.5)], cap_s=10.0)
    assert seconds == pytest.approx(0.96)
    assert (
        why == "0.8 of the slack 1.2 s = 2 local steps of 1 s − 0.5 s for the quorum − 0.3 s to synchronise"
    )
    assert grace([(pace, 2.0)], 10.0)[0] == 0.0, "it waits already"
    assert grace([(pace, 0.5)], 0.25)[0] == 0.25, "no longer than the cap"
    assert grace([(None, 0.5)], 10.0)[0] == 10.0, "nobody knows, so the cap"
    assert grace([], 10.0)[1] == "nobody has said how long a local step takes, so for all of cap=10 s"
    hasty = Pace(step_s=0.5, overlap=2, sync_s=0.3)
    assert grace([(pace, 0.5), (hasty, 0.0), (None, 0.5)], 10.0)[0] == pytest.approx(0.56), (
        "the first to wait"
    )


def test_a_round_under_slack_stays_open_for_what_its_own_quorum_can_spare():
    mode = Synchronous(quorum=2, grace_s="slack", cap_s=5)
    paces = [Pace(1.0, 2, 0.3), Pace(1.0, 3, 0.3), None]
    three = Steps(4, [Step(rank, since=7.0 + rank / 2, pace=pace) for rank, pace in enumerate(paces)])
    wait = mode.next(three, 8.0)
    assert wait.due == pytest.approx(7.5 + 0.96)
    assert wait.reason.startswith(
        "the round stays open for the other 1 for 0.96 s: 0.8 of the slack 1.2 s = "
    )
    assert mode.next(three, wait.due) == Commits((tuple(three),))
    assert mode.next(steps(2, 3), 1.0).due == 5.0


def test_with_a_quorum_a_step_counts_for_the_round_that_its_worker_saw_open():
    mode = Synchronous(quorum=2)
    assert mode.may_count(missed=0)
    assert mode.may_count(missed=1).reason == "its round was closed without it, 1 commit ago"
    assert mode.may_count(missed=2).reason == "its round was closed without it, 2 commits ago"


@given(st.integers(0, 9), st.integers(0, 99), st.integers(0, 20))
def test_a_lead_is_allowed_up_to_the_bound(bound, slowest, lead):
    decision = StaleSynchronous(bound).may_read(slowest + lead, slowest)
    assert bool(decision) == (lead <= bound)
    assert decision.reason == (
        "" if decision else f"leads the slowest worker by {lead} steps, allowed {bound}"
    )
    assert Asynchronous().may_read(slowest + lead, slowest)
    assert Synchronous().may_read(slowest + lead, slowest)


# ── modes of a user's own ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Fading(Mode):
    """Has a setting of every kind."""

    free: int
    rate: float = 0.5
    loud: bool = False
    label: str = "none"
    limit: int | None = None
    wait_s: float = 1.0

    def may_read(self, clock, slowest):
        return Decision(clock < self.free, "not free any more")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """What a test registers is unknown again after it."""
    monkeypatch.setattr(Mode.registry, "_classes", dict(Mode.registry._classes))


def test_a_mode_of_ones_own_travels_as_its_name_and_settings():
    register(Fading)
    for mode, text in {
        Fading(3): "Fading:free=3",
        Fading(3, 0.25, True, "a b", 7, 2.0): "Fading:free=3,rate=0.25,loud=True,label=a b,limit=7,wait=2",
        Fading(0, 1e-300): "Fading:free=0,rate=1e-300",
    }.items():
        assert str(mode) == text
        assert parse_sync(text) == mode
        assert parse_sync(mode) is mode
    assert parse_sync("Fading:3") == Fading(3)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Fading", "needs free"),
        ("Fading:free=x", "free must be a whole number, got 'x'"),
        ("Fading:1,2", "'2' is no setting"),
        ("Fading:1,free=2", "repeated"),
        ("Fading:1,loud=yes", "loud must be True or False"),
        ("Fading:1,speed=2", "'speed=2' is no setting"),
    ],
)
def test_impossible_settings_of_ones_own_mode_are_refused_with_its_form(text, why):
    register(Fading)
    with pytest.raises(ConfigurationError, match=f"{why}.*expected .*'Fading:free=…,rate=…"):
        parse_sync(text)


def test_a_mode_that_no_other_process_could_know_is_refused():
    with pytest.raises(ConfigurationError, match=r"Fading is not registered.*@headwater\.register"):
        parse_sync(Fading(3))
    with pytest.raises(ConfigurationError, match="expected 'sync'"):
        parse_sync("Fading:free=3")


def test_a_mode_has_a_name_of_its_own_and_possible_properties():
    @dataclass(frozen=True)
    class sync(Mode):
        pass

    @dataclass(frozen=True)
    class Products(Mode):
        reduce = "product"

    with pytest.raises(ConfigurationError, match="has the name of a mode of headwater"):
        register(sync)
    with pytest.raises(ConfigurationError, match="'mean' or 'sum'"):
        Products()


def test_a_module_of_modes_is_loaded_by_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_waits.py").write_text(
        "from dataclasses import dataclass\n"
        "from headwater import Mode, register\n"
        "@register\n"
        "@dataclass(frozen=True)\n"
        "class Lazy(Mode):\n"
        "    by: int = 1\n"
    )
    load_rules("my_waits")
    assert str(parse_sync("Lazy:by=2")) == "Lazy:by=2"


def test_what_a_mode_means_is_asked_by_its_properties():
    assert Synchronous().rounds
    assert not Asynchronous().rounds
    assert not StaleSynchronous(1).rounds
    assert Synchronous(quorum=2, reduce="sum").reduce == "sum"
    assert Pairs().rounds


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
            done = number % len(plain) + 1
            after = [clock + 1 for clock in plain[:done]] + plain[done:]
            assert clocks.slowest_after(plain[:done]) == min(after)
        assert len(clocks) == len(plain)
        assert clocks.slowest == min(plain, default=0)


# ── outer steps ─────────────────────────────────────────────────────────────────────────────────


def outer(rank, fragment=0, missed=0, since=0.0, pace=None):
    return Step(rank, missed=missed, since=since, pace=pace, fragment=fragment)


def test_a_change_from_older_values_is_in_the_round_but_not_in_its_quorum():
    mode = Synchronous(quorum=2, late="carry")
    fresh, stale, other = outer(0), outer(1, missed=3), outer(2)
    some = Steps(4, [fresh, stale], {0: 3})
    assert mode.next(some, 9.0) == Wait(
        "2 of 2 updates of this round have arrived, 1 of 2 that began from the last one"
    )
    assert mode.next(Steps(4, [fresh, stale, other], {0: 3}), 9.0) == Commits(((fresh, stale, other),))


def test_where_fewer_than_the_quorum_have_the_last_values_the_others_fill_it():
    mode = Synchronous(quorum=3, late="carry")
    one, two, three = outer(0), outer(1, missed=1), outer(2, missed=2)
    assert isinstance(mode.next(Steps(4, [one, two], {0: 1}), 9.0), Wait), "a round has its quorum still"
    assert mode.next(Steps(4, [one, two, three], {0: 1}), 9.0) == Commits(((one, two, three),))
    lost = Steps(4, [two, three, outer(3, missed=1)], {0: 0})  # all who had them are gone
    assert mode.next(lost, 9.0) == Commits((tuple(lost),))


def test_fragments_have_rounds_of_their_own_and_steps_that_are_none_too():
    mode = Synchronous(quorum=2, late="carry")
    apart = [outer(0, 0), outer(1, 1), outer(2, 1), Step(3)]
    assert mode.next(Steps(5, apart, {0: 5, 1: 5}), 0.0) == Commits(((apart[1], apart[2]),))
    waits = mode.next(Steps(5, [apart[0], apart[1], apart[3]], {0: 5, 1: 5}), 0.0)
    assert waits.reason.count("1 of 2 updates of this round have arrived") == 3


def test_where_everybody_waits_in_another_fragment_the_largest_round_goes_first():
    mode = Synchronous(quorum=3, grace_s=5.0, late="carry")
    first, early, late = outer(0, 1, since=1.0), outer(1, 0, since=3.0), outer(2, 2, missed=4, since=2.0)
    assert mode.next(Steps(3, [first, early, late], {0: 3, 1: 3, 2: 2}), 3.0) == Commits(((first,),))
    pair = outer(3, 2, since=3.0)
    everybody = Steps(4, [first, early, late, pair], {0: 4, 1: 4, 2: 3})
    assert mode.next(everybody, 3.0) == Commits(((late, pair),))


def test_grace_is_counted_from_the_quorum_of_those_that_count():
    mode = Synchronous(quorum=2, grace_s=2.0, late="carry")
    some = Steps(4, [outer(0, since=5.0), outer(1, missed=1, since=9.0), outer(2, since=6.0)], {0: 3})
    assert mode.next(some, 7.0) == Wait("the round stays open for the other 1 for 2 s", 8.0)
    assert mode.next(some, 8.0) == Commits((tuple(some),))
