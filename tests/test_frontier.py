"""The frontier names the rank and the stage that everybody waits for, and its parts add up."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.machines.frontier import ClockOffsets, Frontier
from headwater.messages import TurnBlock
from headwater.runtime.stage_clock import StageClock
from headwater.spec.stages import STAGES


class Cluster:
    """Workers in virtual time: each has a real StageClock, and a round ends for all when the last has sent.

    `sleeps`: (rank, stage) → nanoseconds more in each turn.
    """

    def __init__(self, ranks, sleeps, noise, seed):
        self.random = random.Random(seed)
        self.sleeps, self.noise = sleeps, noise
        self.times = [self.random.randrange(1000) for _ in range(ranks)]
        self.clocks = [StageClock(lambda rank=rank: self.times[rank]) for rank in range(ranks)]
        self.first = max(self.times)

    def spend(self, rank, stage, nanoseconds):
        extra = self.sleeps.get((rank, stage), 0)
        self.times[rank] += nanoseconds + extra + self.random.randrange(self.noise)

    def round(self, version):
        for rank, clock in enumerate(self.clocks):
            began, waited = clock.now(), 0.0
            self.spend(rank, "data", 10_000)
            clock.read(began, waited)
            self.spend(rank, "compute", 100_000)
            clock.step()
            self.spend(rank, "push", 5_000)
            clock.sent = clock.now()
        committed = max(self.times)
        for rank, clock in enumerate(self.clocks):
            self.times[rank] = committed
            self.spend(rank, "wait", 2_000)
            clock.answered = clock.now()
            self.spend(rank, "pull", 3_000)
            clock.end(version, 0.0, 0.0)


def started(ranks):
    frontier = Frontier()
    for rank in range(ranks):
        frontier.joined(rank)
    return frontier


@pytest.mark.parametrize("seed", range(50))
def test_a_planted_sleep_is_named_first(seed):
    rng = random.Random(1000 + seed)
    ranks = rng.choice([2, 3, 4, 8])
    planted = rng.randrange(ranks), rng.choice(STAGES)
    cluster = Cluster(ranks, {planted: 150_000}, noise=2_000, seed=seed)
    frontier = started(ranks)
    for version in range(1, 41):
        cluster.round(version)
        if version % rng.choice([1, 3, 7]) == 0 or version == 40:
            for rank in rng.sample(range(ranks), ranks):
                frontier.take(rank, cluster.clocks[rank].news())
    for rank in range(ranks):
        frontier.gone(rank)
    first = max(frontier.exposed, key=frontier.exposed.get)
    assert (first[0], STAGES[first[1]]) == planted
    assert frontier.exposed[first] > 0.5 * 40 * 150_000
    assert frontier.rows == 40
    # Exactly: the parts, the whole, and the time that passed from the last one's start to the last one's end.
    assert sum(frontier.exposed.values()) == frontier.total == max(cluster.times) - cluster.first


@given(
    st.lists(
        st.lists(st.tuples(*[st.integers(0, 1000)] * len(STAGES)), min_size=1, max_size=4),
        min_size=1,
        max_size=20,
    ),
    st.integers(0, 3),
)
def test_parts_add_up_to_the_time_of_each_step_whatever_the_times(rounds, size):
    frontier, ends = started(4), [0] * 4
    for version, turns in enumerate(rounds):
        before, parts = frontier.total, sum(frontier.exposed.values())
        assert before == parts
        for rank, stages in enumerate(turns):
            ends[rank] += sum(stages)
            frontier.take(rank, [TurnBlock(version >> size, size, 1, ends[rank], stages)])
    for rank in range(4):
        frontier.gone(rank)
    assert frontier.total == sum(frontier.exposed.values())
    assert frontier.total <= max(ends)


def test_a_rank_that_reports_nothing_more_is_not_waited_for():
    frontier = started(2)
    stages = (0, 10, 0, 0, 0)
    frontier.take(0, [TurnBlock(0, 0, 1, 10, stages)])
    frontier.take(1, [TurnBlock(key, 0, 1, 10 * key + 10, stages) for key in range(600)])
    assert frontier.rows > 300, "a rank that hangs holds up 256 rows at most"
    frontier.gone(0)
    assert frontier.rows == 599
    frontier.gone(1)
    assert frontier.rows == 600


def test_rows_of_different_length_are_brought_together():
    frontier = started(2)
    stages = (0, 10, 0, 0, 0)
    frontier.take(0, [TurnBlock(key, 0, 1, 10 * key + 10, stages) for key in range(8)])
    frontier.take(1, [TurnBlock(0, 3, 8, 80, (0, 80, 0, 0, 0)), TurnBlock(1, 3, 1, 90, stages)])
    frontier.take(0, [TurnBlock(8, 0, 1, 90, stages)])
    frontier.gone(0)
    frontier.gone(1)
    assert frontier.rows == 2
    assert frontier.total == 90


def test_a_new_generation_begins_anew_and_keeps_what_was_counted():
    frontier = Frontier()
    for generation in range(2):
        offset = 1_000_000 * generation
        for key in range(3):
            frontier.take(0, [TurnBlock(key, 0, 1, offset + 10 * key + 10, (0, 10, 0, 0, 0))])
        frontier.begin_anew()
    assert frontier.total == 60, "the time between generations is nobody's"


def test_clocks_of_one_machine_are_one_and_of_others_are_told_by_the_quickest_report():
    clocks = ClockOffsets()
    assert clocks.heard("here", 1_000_000_000, 5.0) == 4_000_000_000
    assert clocks.heard("here", 2_000_000_000, 5.5) == 3_500_000_000
    assert clocks.heard("here", 3_000_000_000, 7.5) == 3_500_000_000, "this one was under way for longer"
    assert clocks.heard("there", 0, 9.0) == 9_000_000_000


# ── the clock of one worker ─────────────────────────────────────────────────────────────────────


def test_every_nanosecond_of_a_worker_belongs_to_one_stage_of_one_turn():
    cluster = Cluster(3, {}, noise=50_000, seed=3)
    starts = list(cluster.times)
    for version in range(1, 101):
        cluster.round(version)
    for rank, clock in enumerate(cluster.clocks):
        blocks = clock.news()
        assert sum(block.turns for block in blocks) == 100
        assert sum(sum(block.stages) for block in blocks) == cluster.times[rank] - starts[rank]
        assert sum(histogram.count for histogram in clock.stages().values()) == 500
        assert clock.news() == ()


def test_many_turns_are_told_in_few_rows():
    cluster = Cluster(1, {}, noise=10, seed=0)
    for version in range(1, 5001):
        cluster.round(version)
    blocks = cluster.clocks[0].news()
    assert len(blocks) <= 64
    assert sum(block.turns for block in blocks) == 5000
    assert len({block.key for block in blocks}) == len(blocks)


def test_exchanges_of_its_own_are_pulls_and_those_of_reading_are_data():
    times = [0]
    clock = StageClock(lambda: times[0])
    waiting = 0.0
    times[0] += 30  # an exchange in the middle of a turn
    waiting += 30e-9
    began, before = clock.now(), waiting
    times[0] += 20  # data, 5 of it in an exchange
    waiting += 5e-9
    clock.read(began, waiting - before)
    clock.step()
    before = waiting
    times[0] += 7
    clock.sent = times[0]
    times[0] += 100
    clock.answered = times[0]
    waiting += 107e-9
    clock.end(1, before, waiting)
    (block,) = clock.news()
    assert dict(zip(STAGES, block.stages, strict=True)) == {
        "data": 20,
        "compute": 0,
        "push": 7,
        "wait": 100,
        "pull": 30,
    }


def test_a_step_in_the_background_counts_what_is_waited_for_alone():
    times = [0]
    clock = StageClock(lambda: times[0])
    clock.step()
    times[0] += 5
    clock.sent_off()
    times[0] += 50  # computing meanwhile
    times[0] += 40
    clock.arrived(1, 40e-9)
    (block,) = clock.news()
    assert dict(zip(STAGES, block.stages, strict=True)) == {
        "data": 0,
        "compute": 50,
        "push": 5,
        "wait": 40,
        "pull": 0,
    }


def test_of_two_that_are_last_at_once_it_is_the_one_that_led():
    frontier = started(2)
    frontier.take(0, [TurnBlock(0, 0, 1, 10, (0, 10, 0, 0, 0)), TurnBlock(1, 0, 1, 40, (0, 0, 0, 30, 0))])
    frontier.take(1, [TurnBlock(0, 0, 1, 20, (0, 20, 0, 0, 0)), TurnBlock(1, 0, 1, 40, (0, 0, 0, 20, 0))])
    frontier.gone(0)
    frontier.gone(1)
    assert frontier.exposed == {(1, STAGES.index("compute")): 20, (1, STAGES.index("wait")): 20}
