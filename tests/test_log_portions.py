"""What the log promises of evaluations in portions: each counts once, whoever computes, copies or dies."""

from clusters import Cluster, FlakyCluster, ReplicatedCluster
from counting import modes, seeds, servers
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from test_log_replicas import assert_settled, drive

from examples import examples
from headwater import messages as m
from headwater.log.portions import Portions
from headwater.testing.portion_program import PortionProgram

ROUNDS, PORTIONS = 3, 7

several = examples(4, suppress_health_check=list(HealthCheck))


def counted(cluster):
    """Portions as the log counts them, by round."""
    found = {}
    for entry in cluster.log:
        if isinstance(entry, m.Counted):
            found.setdefault(entry.done.portion.round, []).append(entry.done.portion.index)
    return found


def assert_each_once(cluster, rounds=ROUNDS, portions=PORTIONS):
    assert {round: sorted(indices) for round, indices in counted(cluster).items()} == {
        round: list(range(portions)) for round in range(1, rounds + 1)
    }


@several
@given(modes, servers, st.integers(1, 4), seeds, st.sampled_from([0.0, 0.05]), st.booleans(), st.booleans())
def test_each_portion_counts_once(mode, count, workers, seed, flaky, private, backup):
    program = PortionProgram(workers + 1, count, ROUNDS, PORTIONS, seed, backup).program
    cluster = FlakyCluster(mode, workers=workers + 1, servers=count, seed=seed, flaky=flaky, private=private)
    cluster.run(*[program] * (workers + 1))
    assert_each_once(cluster)


@several
@given(modes, servers, seeds, st.lists(st.integers(1, 20), min_size=1, max_size=4), st.booleans())
def test_workers_may_come_and_go(mode, count, seed, gaps, backup):
    program = PortionProgram(4, count, ROUNDS, PORTIONS, seed, backup).program
    cluster = Cluster(mode, workers=4, servers=count, seed=seed, restarts=program)
    for _ in range(4):
        cluster.join(program)
    cluster.begin()
    for gap in gaps:
        cluster.go(gap)
        computing = [one for one in cluster.living() if one.rank in (0, 1, 2)]
        if computing:
            cluster.kill(cluster.random.choice(computing))
    cluster.run()
    assert_each_once(cluster)


@several
@given(
    modes,
    servers,
    seeds,
    st.lists(
        st.tuples(st.integers(1, 15), st.sampled_from(["server", "zombie", "standby"])),
        min_size=1,
        max_size=4,
    ),
)
def test_standbys_take_over_in_the_middle_of_an_evaluation(mode, count, seed, events):
    program = PortionProgram(3, count, ROUNDS, PORTIONS, seed).program
    cluster = ReplicatedCluster(mode, workers=3, servers=count, seed=seed)
    for _ in range(3):
        cluster.join(program)
    cluster.begin()
    drive(cluster, events)
    assert_each_once(cluster)
    assert_settled(cluster)


# ── who gets what ───────────────────────────────────────────────────────────────────────────────


def opened(count, backup=True):
    portions = Portions()
    portions.open((9, 1), m.PortionPlan("g", count, backup), 0)
    return portions


def take(portions, member):
    portion = portions.next_for(member)
    if portion is not None:
        portions.hand(member, portion)
    return None if portion is None else portion.index


def bring(portions, index, round=1, loss=1.0):
    done = m.PortionResult(m.Portion(round, index, portions.count, 0), loss)
    first = portions.counts(done)
    if first:
        portions.add(done)
    return first


def test_what_nobody_computes_is_handed_out_first_then_copies_of_what_the_fewest_do():
    portions = opened(4)
    assert [take(portions, member) for member in (1, 2, 3)] == [0, 1, 2]
    assert bring(portions, 0)
    assert take(portions, 1) == 3
    assert bring(portions, 1)
    assert take(portions, 2) == 2  # a copy of member 3's
    assert bring(portions, 3)
    assert take(portions, 1) == 2
    assert bring(portions, 2)
    assert not bring(portions, 2, loss=5.0)  # the others' copies count for nothing
    assert (portions.complete, portions.total, take(portions, 1)) == (True, 4.0, None)


def test_without_backup_nobody_computes_what_another_does():
    portions = opened(2, backup=False)
    assert [take(portions, member) for member in (1, 2, 3)] == [0, 1, None]


def test_what_a_dead_member_was_computing_goes_back_first():
    portions = opened(9)
    assert [take(portions, member) for member in (1, 2, 3)] == [0, 1, 2]
    portions.gone(2)
    assert [take(portions, 4), take(portions, 5)] == [1, 3]


def test_a_result_of_an_evaluation_that_is_over_counts_for_nothing():
    portions = opened(2)
    portions.open((9, 2), m.PortionPlan("g", 2, True), 0)
    assert not bring(portions, 0, round=1)
    assert bring(portions, 0, round=2)
    assert not bring(portions, 5, round=2)


def test_when_whoever_asks_is_gone_there_is_nothing_to_come():
    portions = opened(2)
    take(portions, 1)
    portions.gone(9)
    assert (portions.over, take(portions, 2)) == (True, None)


def test_they_are_what_their_record_says():
    portions = opened(5)
    for member in (1, 2, 3):
        take(portions, member)
    bring(portions, 1, loss=2.5)
    again = Portions(portions.record())
    assert again.record() == portions.record()
    assert [take(again, 4), take(again, 5)] == [take(portions, 4), take(portions, 5)] == [3, 4]
