"""What the log promises when connections break and exchanges are repeated, at any message."""

import numpy as np
from clusters import FlakyCluster, model_spec
from counting import (
    BASE,
    counters,
    digits,
    few,
    final,
    final_count,
    modes,
    seeds,
    servers,
    some,
    value_at,
)
from hypothesis import given
from hypothesis import strategies as st
from test_log import assert_same_bits, trained, training
from test_log_members import chaos

flakiness = st.sampled_from([0.01, 0.05, 0.15])


@some
@given(modes, st.lists(st.integers(0, 6), min_size=1, max_size=4), servers, st.booleans(), flakiness, seeds)
def test_lost_connections_lose_and_double_nothing(mode, steps, count, private, flaky, seed):
    cluster = FlakyCluster(mode, workers=len(steps), servers=count, seed=seed, private=private, flaky=flaky)
    results = cluster.run(*counters(*steps))
    values = value_at(cluster)
    for rank, seen in enumerate(results):
        for answer, clock, value in seen or ():
            assert value == values[answer.version]
            assert digits(value, len(steps))[rank] == clock
    assert digits(final_count(cluster), len(steps)) == steps


@some
@given(st.integers(1, 4), servers, st.booleans(), flakiness, seeds)
def test_lost_connections_leave_no_trace_in_synchronous_training(workers, count, private, flaky, seed):
    cluster = FlakyCluster("sync", workers=workers, servers=count, seed=seed, private=private, flaky=flaky)
    cluster.run(*[training(lambda rank, step: ["a", "c"] if rank % 2 else ["b"])] * workers)
    expected = trained(1, workers, 0, False, carried=lambda rank, step: ["a", "c"] if rank % 2 else ["b"])
    assert_same_bits(expected, final(cluster))


@some
@given(modes, servers, st.booleans(), flakiness, seeds)
def test_a_repeat_gets_the_original_result_and_a_version_not_older(mode, count, private, flaky, seed):
    def program(me):
        yield me.register(model_spec())
        for _ in range(4):
            before = me.version
            me.push(BASE**me.rank)
            answer = yield me.step()
            assert before < answer.result.version <= answer.version
            assert answer.result.applied
            assert digits(me.read(), 2)[me.rank] == me.steps
        yield me.end()
        answer = yield me.sum(x=1.0)
        assert answer.sums == {"x": 2.0}
        yield me.pull()
        assert digits(me.read(), 2) == [4, 4]
        yield me.leave()

    cluster = FlakyCluster(mode, workers=2, servers=count, seed=seed, private=private, flaky=flaky)
    cluster.run(program, program)


@few
@given(modes, servers, st.booleans(), flakiness, seeds)
def test_every_stop_is_told_once_however_often_it_is_repeated(mode, count, private, flaky, seed):
    def program(me):
        told = 0
        yield me.register(model_spec())
        for step in range(4):
            if step == 2:
                yield me.barrier()
                if me.rank == 0:
                    yield me.stop()
                yield me.sum()
            answer = yield me.step()
            told += answer.stopped
        yield me.end()
        yield me.leave()
        return told

    cluster = FlakyCluster(mode, workers=3, servers=count, seed=seed, private=private, flaky=flaky)
    cluster.run(*[program] * 3)
    assert {client.value for client in cluster.members} <= {1, None}  # None: lost while it left


@some
@given(
    modes, servers, st.booleans(), flakiness, seeds, st.lists(st.sampled_from(["kill", "join"]), max_size=3)
)
def test_whatever_workers_do_over_lost_connections_nobody_waits_for_ever(
    mode, count, private, flaky, seed, events
):
    cluster = FlakyCluster(mode, workers=3, servers=count, seed=seed, private=private, flaky=flaky)
    for _ in range(3):
        cluster.join(chaos(seed))
    cluster.begin()
    for event in events:
        cluster.go(cluster.random.randint(1, 12))
        if event == "kill" and len(cluster.living()) > 1:
            cluster.kill(cluster.random.choice(cluster.living()))
        elif event == "join" and cluster.living():
            cluster.join(chaos(seed))
    cluster.run()
    assert not cluster.waits()
    records = [shard.standings.record() for shard in cluster.shards]
    assert records == records[:1] * count
    for model in cluster.shards[0].vectors:
        final(cluster, model)


@few
@given(modes, servers, st.booleans(), seeds)
def test_a_reader_that_loses_connections_gets_one_version_all_the_same(mode, count, private, seed):
    def reader(me):
        for _ in range(4):
            yield me.attach(model_info)
            seen.append((me.version, me.read()))
            yield me.pull()
            seen.append((me.version, me.read()))
        yield me.leave()

    from headwater import messages as m

    model_info = m.ModelInfo(0, model_spec())
    seen = []
    cluster = FlakyCluster(mode, workers=2, servers=count, seed=seed, private=private)
    for program in counters(5, 5):
        cluster.join(program)
    cluster.run(until=lambda: cluster.shards and all(shard.vectors for shard in cluster.shards))
    cluster.join(reader, role="observer")
    cluster.flaky = 0.1
    cluster.run()
    values = value_at(cluster)
    assert len(seen) == 8
    assert all(value == values[version] for version, value in seen)


@few
@given(st.booleans(), seeds)
def test_the_state_of_a_rule_is_read_again_when_its_answer_was_lost(private, seed):
    def program(me):
        yield me.register(model_spec())
        for _ in range(3):
            me.push(np.float32(1))
            yield me.step()
            answer = yield me.state()
            assert answer.counts == (me.steps,) * 5
        yield me.leave()

    FlakyCluster("sync", workers=1, servers=2, seed=seed, private=private, flaky=0.1).run(program)
