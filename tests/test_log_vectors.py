"""What the log promises of vectors: work is done once, on all servers or none, whoever dies."""

import pytest
from clusters import Cluster, FlakyCluster, ReplicatedCluster
from counting import modes, seeds, servers
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from test_log_replicas import assert_settled, drive

from examples import examples
from headwater.testing.vector_program import VectorProgram

TURNS = 14

several = examples(4, suppress_health_check=list(HealthCheck))


def assert_equal(cluster, workers):
    """All servers have the vectors that every worker knows of, and the same bits in standbys."""
    values = [member.value for member in cluster.members if member.value is not None]
    assert len(values) == workers
    for shard in cluster.shards:
        named = shard.vectors[0].named
        assert set(named.arrays) | {"parameters"} == set(values[0])


@several
@given(modes, servers, st.integers(1, 4), seeds, st.sampled_from([0.0, 0.05]), st.booleans())
def test_work_on_vectors_comes_to_what_one_process_makes_of_it(mode, count, workers, seed, flaky, private):
    program = VectorProgram(workers, count, TURNS, seed).program
    cluster = FlakyCluster(mode, workers=workers, servers=count, seed=seed, flaky=flaky, private=private)
    cluster.run(*[program] * workers)
    assert_equal(cluster, workers)


@several
@given(modes, servers, seeds, st.lists(st.integers(1, 25), min_size=1, max_size=3))
def test_workers_that_die_come_back_to_the_same_numbers(mode, count, seed, gaps):
    program = VectorProgram(3, count, TURNS, seed).program
    cluster = Cluster(mode, workers=3, servers=count, seed=seed, restarts=program)
    for _ in range(3):
        cluster.join(program)
    cluster.begin()
    for gap in gaps:
        cluster.go(gap)
        if living := cluster.living():
            cluster.kill(cluster.random.choice(living))
    cluster.run()
    assert_equal(cluster, 3)


@several
@given(
    modes,
    servers,
    seeds,
    st.lists(
        st.tuples(st.integers(1, 12), st.sampled_from(["server", "zombie", "standby"])),
        min_size=1,
        max_size=4,
    ),
)
def test_standbys_have_the_vectors_and_take_over_in_the_middle_of_work(mode, count, seed, events):
    program = VectorProgram(2, count, TURNS, seed).program
    cluster = ReplicatedCluster(mode, workers=2, servers=count, seed=seed)
    for _ in range(2):
        cluster.join(program)
    cluster.begin()
    drive(cluster, events)
    assert_equal(cluster, 2)
    assert_settled(cluster)


@pytest.mark.parametrize("count", [1, 3])
def test_the_bits_of_vectors_are_those_of_one_server(count):
    program = VectorProgram(3, 3, TURNS, 5)
    cluster = Cluster("sync", workers=3, servers=count, seed=1)
    cluster.run(*[program.program] * 3)
    assert_equal(cluster, 3)
