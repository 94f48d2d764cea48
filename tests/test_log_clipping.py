"""What the log promises of gradients that are clipped: one norm for all servers, whoever fails meanwhile.

`HALVES` is the norm limit that scales a gradient of norm 5 by exactly one half.
"""

import numpy as np
import pytest
from clusters import Cluster, FlakyCluster, ReplicatedCluster, model_spec
from counting import each_mode_and_server, few, final, modes, seeds, servers, some
from hypothesis import example, given
from hypothesis import strategies as st
from test_log import assert_same_bits, mixed, trained, training
from test_log_members import chaos
from test_log_quorum import check, counter
from test_log_quorum import modes as quorums
from test_log_replicas import assert_settled, drive, events

from headwater import messages as m
from headwater.spec.rules import SGD

HALVES = 0.5 * (5 + 1e-6)
NEVER = 1e30


def triples(steps, clip_norm=HALVES):
    """Push (3, 4) with norm 5 in odd steps, (1, 0) with norm 1 in even ones; return what each step became."""

    def program(me):
        results = []
        yield me.register(model_spec(rule=SGD(lr=1.0), clip_norm=clip_norm))
        for step in range(1, steps + 1):
            first, second = (3, 4) if step % 2 else (1, 0)
            a, c = np.zeros(3), np.zeros(4000)
            a[1], c[3999] = first, second
            me.push({"a": a, "c": c}, ["a", "c"])
            answer = yield me.step()
            results.append(answer.result)
        yield me.end()
        yield me.leave()
        return results

    return program


def assert_sums(cluster, odd, even):
    """Elements that both tensors have after that many commits of each kind; nothing else changed."""
    values = final(cluster)
    assert (values["a"][1], values["c"][3999]) == (-1.5 * odd - even, -2.0 * odd)
    assert np.count_nonzero(values["a"]) + np.count_nonzero(values["c"]) == 1 + (odd > 0)


@some
@given(modes, st.integers(1, 3), servers, st.booleans(), seeds)
def test_every_commit_is_clipped_by_its_own_norm(mode, workers, count, private, seed):
    cluster = Cluster(mode, workers=workers, servers=count, seed=seed, private=private)
    results = cluster.run(*[triples(4)] * workers)
    assert_sums(cluster, 2, 2) if mode == "sync" else assert_sums(cluster, 2 * workers, 2 * workers)
    assert [[result.norms for result in taken] for taken in results] == [
        [{"model": 5.0}, {"model": 1.0}] * 2
    ] * workers


@some
@given(st.integers(1, 4), servers, st.booleans(), seeds, st.sampled_from(["sync", "sync:reduce=sum"]))
def test_clipped_training_gives_the_same_bits_for_any_servers_and_order(workers, count, private, seed, mode):
    expected = trained(1, workers, 0, False, mode=mode, clip_norm=0.3)
    assert_same_bits(expected, trained(count, workers, seed, private, mode=mode, clip_norm=0.3))


def test_a_norm_that_is_not_too_large_changes_no_bit():
    assert_same_bits(trained(2, 3, 0, False), trained(2, 3, 0, False, clip_norm=NEVER))
    plain, clipped = trained(2, 3, 0, False), trained(2, 3, 0, False, clip_norm=0.3)
    assert plain["b"].tobytes() != clipped["b"].tobytes()


@some
@given(modes, servers, st.booleans(), seeds)
def test_clipped_steps_count_once_however_often_connections_are_lost(mode, count, private, seed):
    cluster = FlakyCluster(mode, workers=2, servers=count, seed=seed, private=private, flaky=0.05)
    cluster.run(*[triples(4)] * 2)
    assert_sums(cluster, 2, 2) if mode == "sync" else assert_sums(cluster, 4, 4)


@some
@given(st.integers(1, 3), servers, st.booleans(), seeds, events)
def test_deaths_of_servers_leave_no_trace_in_clipped_training(workers, count, private, seed, events):
    cluster = ReplicatedCluster("sync", workers=workers, servers=count, seed=seed, private=private)
    for _ in range(workers):
        cluster.join(training(mixed, clip_norm=0.3))
    drive(cluster, events)
    assert_same_bits(trained(1, workers, 0, False, clip_norm=0.3), final(cluster))
    assert_settled(cluster)


@some
@given(modes, servers, st.booleans(), st.sampled_from([0, 0, 0.05]), seeds, events)
def test_deaths_of_servers_lose_and_double_no_clipped_step(mode, count, private, flaky, seed, events):
    cluster = ReplicatedCluster(mode, workers=2, servers=count, seed=seed, private=private, flaky=flaky)
    for _ in range(2):
        cluster.join(triples(4))
    drive(cluster, events)
    assert_sums(cluster, 2, 2) if mode == "sync" else assert_sums(cluster, 4, 4)
    assert_settled(cluster)


@each_mode_and_server
def test_a_death_at_every_entry_of_a_clipped_run(mode, index):
    """A server dies before and after every norm is known."""
    measured = 0
    for moment in range(1, 20):
        cluster = ReplicatedCluster(mode, workers=2, servers=3, seed=moment)
        for _ in range(2):
            cluster.join(triples(3))
        cluster.run(until=lambda c=cluster, n=moment: len(c.log) >= n and c.is_replicated(index))
        measured += bool(cluster.log) and isinstance(cluster.log[-1], m.Measured)
        assert cluster.kill_server(index)
        cluster.run()
        assert cluster.takeovers == 1
        assert_sums(cluster, 2, 1) if mode == "sync" else assert_sums(cluster, 4, 2)
        assert_settled(cluster)
    assert measured > 0


def unequal(steps):
    """Push a gradient whose norm is 5 · 2^rank · step, and see in the answer that it was this one's."""

    def program(me):
        yield me.register(model_spec(clip_norm=NEVER))
        for step in range(1, steps + 1):
            size = 2**me.rank * step
            a, c = np.zeros(3), np.zeros(4000)
            a[1], c[3999] = 3 * size, 4 * size
            me.push({"a": a, "c": c}, ["a", "c"])
            answer = yield me.step()
            assert answer.result.norms == {"model": 5.0 * size}
        yield me.end()
        yield me.leave()

    return program


@pytest.mark.parametrize("mode", ["async", pytest.param("ssp:1", marks=pytest.mark.long)])
def test_what_was_measured_for_a_lost_sequencer_counts_for_no_other_update(mode):
    """The next one may ask for another worker's norm at the same place of the log."""
    measured = 0
    for moment in range(2, 60):
        cluster = ReplicatedCluster(mode, workers=3, servers=2, seed=moment)
        for _ in range(3):
            cluster.join(unequal(3))
        cluster.run(until=lambda c=cluster, n=moment % 20: len(c.log) >= n and c.is_replicated(0))
        measured += bool(cluster.log) and isinstance(cluster.log[-1], m.Measured)
        assert cluster.kill_server(0)
        cluster.run()
        assert_settled(cluster)
    assert measured > 10


@some
@given(modes, servers, st.booleans(), seeds, st.lists(st.sampled_from(["kill", "join"]), max_size=3))
@example("sync", 2, False, 2405, ["join"])  # everybody waits for each other with a norm already measured
def test_whatever_clipped_workers_do_nobody_waits_for_ever(mode, count, private, seed, events):
    cluster = Cluster(mode, workers=3, servers=count, seed=seed, private=private)
    for _ in range(3):
        cluster.join(chaos(seed, clip_norm=0.5))
    cluster.begin()
    for event in events:
        cluster.go(cluster.random.randint(1, 12))
        living = cluster.living()
        if event == "kill" and len(living) > 1:
            cluster.kill(cluster.random.choice(living))
        elif event == "join" and living:
            cluster.join(chaos(seed, clip_norm=0.5))
    cluster.run()
    assert not cluster.waits()
    final(cluster)


@some
@given(quorums, st.lists(st.integers(0, 6), min_size=1, max_size=4), servers, st.booleans(), seeds)
def test_a_clipped_step_is_applied_once_or_reported_as_late(mode, steps, count, private, seed):
    cluster = Cluster(mode, workers=len(steps), servers=count, seed=seed, private=private)
    cluster.run(*[counter(taken, NEVER) for taken in steps])
    check(cluster, steps)


@few
@given(servers, st.booleans(), seeds)
def test_models_are_clipped_each_by_itself_and_only_where_asked(count, private, seed):
    def program(me):
        yield me.register(model_spec("clipped", {"x": (5000,)}, clip_norm=HALVES))
        yield me.register(model_spec("plain", {"x": (2,)}))
        yield me.register(model_spec("small", {"x": (2,)}, clip_norm=HALVES))
        for model, gradient in enumerate((np.r_[3.0, np.zeros(4998), 4.0], [3.0, 4.0], [1.0, 0.0])):
            me.push({"x": np.array(gradient)}, model=model)
        answer = yield me.step()
        me.push({"x": np.array([3.0, 4.0])}, model=1)
        unclipped = yield me.step()
        return answer.result.norms, unclipped.result.norms

    cluster = Cluster("sync", workers=1, servers=count, seed=seed, private=private)
    ((norms, none),) = cluster.run(program)
    assert norms == {"clipped": 5.0, "small": 1.0}
    assert none == {}
    assert final(cluster, 0)["x"][[0, -1]].tolist() == [1.5, 2.0]
    assert final(cluster, 1)["x"].tolist() == [6.0, 8.0]
    assert final(cluster, 2)["x"].tolist() == [1.0, 0.0]
    assert sum(isinstance(entry, m.Measured) for entry in cluster.log) == 1
