"""What the log promises when servers die: nothing acknowledged is lost or doubled, replicas are equal."""

import numpy as np
import pytest
from clusters import Cluster, ReplicatedCluster, lose, model_spec
from counting import (
    BASE,
    counters,
    counting,
    digits,
    each_mode_and_server,
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
from test_log import assert_same_bits, mixed, trained, training
from test_log_members import chaos

from headwater import messages as m
from headwater.errors import RefusedError
from headwater.shard import Shard
from headwater.shard.digest import digests
from headwater.spec.initializers import Uniform
from headwater.spec.lifetime import AfterCount
from headwater.spec.rules import Adagrad, Adam
from headwater.testing.invariants.digest import digest

EVENTS = ["server", "server", "zombie", "standby"]
events = st.lists(st.tuples(st.integers(1, 10), st.sampled_from(EVENTS)), min_size=1, max_size=4)


def drive(cluster, events):
    """Let things happen, each some entries after the one before."""
    for gap, event in events:
        cluster.go(gap)
        index = cluster.random.randrange(cluster.servers)
        if event in ("server", "zombie"):
            cluster.kill_server(index, zombie=event == "zombie")
        else:
            cluster.kill_standby(index)
    cluster.run()


def assert_settled(cluster):
    """Everybody is at the same position, standbys too, and equal."""
    cluster.settle()
    assert not cluster.waits()
    record = cluster.shards[0].standings.record()
    for server in cluster.serving:
        assert server.shard.standings.record() == record
        standby = cluster.standby(server.index)
        assert standby is not None
        assert digest(standby.shard) == digest(server.shard)
        assert digests(standby.shard.snapshot()) == digests(server.shard.snapshot())


@some
@given(
    modes,
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    servers,
    st.booleans(),
    st.sampled_from([0, 0, 0.05]),
    seeds,
    events,
)
def test_deaths_of_servers_lose_and_double_nothing(mode, steps, count, private, flaky, seed, events):
    cluster = ReplicatedCluster(
        mode, workers=len(steps), servers=count, seed=seed, private=private, flaky=flaky
    )
    for program in counters(*steps):
        cluster.join(program)
    drive(cluster, events)
    values = value_at(cluster)
    for client in cluster.members:
        for answer, clock, value in client.value or ():
            assert value == values[answer.version]
            assert digits(value, len(steps))[client.rank] == clock
    assert digits(final_count(cluster), len(steps)) == steps
    assert_settled(cluster)


@some
@given(st.integers(1, 3), servers, st.booleans(), seeds, events)
def test_deaths_of_servers_leave_no_trace_in_synchronous_training(workers, count, private, seed, events):
    """Adam, tensors carried by some: with replicas, and after deaths, the same bits as without."""
    cluster = ReplicatedCluster("sync", workers=workers, servers=count, seed=seed, private=private)
    for _ in range(workers):
        cluster.join(training(mixed))
    drive(cluster, events)
    assert_same_bits(trained(1, workers, 0, False), final(cluster))
    assert_settled(cluster)


@some
@given(modes, servers, st.booleans(), seeds, events)
def test_whatever_workers_do_while_servers_die_nobody_waits_for_ever(mode, count, private, seed, events):
    cluster = ReplicatedCluster(mode, workers=3, servers=count, seed=seed, private=private)
    for _ in range(3):
        cluster.join(chaos(seed))
    drive(cluster, events)
    assert_settled(cluster)
    for model in cluster.shards[0].vectors:
        final(cluster, model)


@each_mode_and_server
def test_a_death_at_every_entry_of_a_run(mode, index):
    """A server dies after the first entry, after the second, …."""
    for moment in range(1, 16):
        cluster = ReplicatedCluster(mode, workers=2, servers=3, seed=moment)
        for program in counters(2, 3):
            cluster.join(program)
        cluster.run(until=lambda c=cluster, n=moment: len(c.log) >= n and c.is_replicated(index))
        if len(cluster.log) < moment:
            break  # that is all of this run
        assert cluster.kill_server(index)
        cluster.run()
        assert cluster.takeovers == 1
        assert digits(final_count(cluster), 2) == [2, 3]
        assert_settled(cluster)
    assert moment > 9


# ── tables ──────────────────────────────────────────────────────────────────────────────────────


def table_spec(rule, admission=None, seed=7):
    return m.TableSpec(
        "rows", 3, rule.to_spec(), Uniform(-1.0, 1.0).to_spec(), seed, admission and admission.to_spec(), None
    )


def embedding(me):
    """Steps that push and pull rows; what was read last."""
    yield me.register_table(table_spec(Adagrad(lr=0.5), AfterCount(2)))
    for step in range(5):
        ids = [step, 10 + me.rank, 1 << 40, -step]
        me.push_rows(sorted(set(ids)), value=me.rank + step + 0.3)
        me.prefetch(0, np.arange(20))
        yield me.step()
    yield me.end()
    yield me.barrier()
    me.prefetch(0, np.array([*range(-5, 20), 1 << 40]))
    yield me.step()
    yield me.end()
    yield me.leave()
    return {key: row.tobytes() for key, row in me.rows.items()}


@some
@given(servers, st.sampled_from([0, 0.05]), seeds, events)
def test_rows_survive_deaths_of_servers_to_the_bit(count, flaky, seed, events):
    plain = Cluster("sync", workers=2, servers=1)
    expected, _ = plain.run(embedding, embedding)
    cluster = ReplicatedCluster("sync", workers=2, servers=count, seed=seed, flaky=flaky)
    for _ in range(2):
        cluster.join(embedding)
    drive(cluster, events)
    assert_settled(cluster)
    for client in cluster.members:
        assert client.value is None or client.value == expected


# ── snapshots ───────────────────────────────────────────────────────────────────────────────────


@some
@given(modes, servers, st.booleans(), seeds, st.integers(0, 30))
def test_a_shard_that_restores_and_follows_equals_one_that_was_always_there(
    mode, count, private, seed, moment
):
    """At any position, in the middle of anything: the same to the bit at every position after it."""
    cluster = ReplicatedCluster(mode, workers=2, servers=count, seed=seed, private=private)
    for _ in range(2):
        cluster.join(chaos(seed))
    cluster.run(until=lambda: len(cluster.serving) == count)
    cluster.go(moment)
    for index in range(count):
        cluster.kill_standby(index)
    cluster.run()
    assert_settled(cluster)


@few
@given(modes, servers, st.booleans(), st.sampled_from([0, 0.05]), seeds)
def test_a_checkpoint_is_one_position_on_all_servers(mode, count, private, flaky, seed):
    def program(me):
        yield me.register(model_spec())
        yield from counting(me, 3)
        if me.rank == 0:
            answer = yield me.checkpoint()
            asked.append((me.id, me.number, answer.version))
        yield from counting(me, 3)
        yield me.end()
        yield me.leave()

    asked = []
    cluster = ReplicatedCluster(mode, workers=2, servers=count, seed=seed, private=private, flaky=flaky)
    cluster.run(program, program)
    ((member, number, version),) = asked
    taken = [cluster.snapshots[member, number][index] for index in range(count)]
    assert len({one.position for one in taken}) == 1
    assert {one.version for one in taken} == {version}
    values = {float(x) for one in taken for model in one.models for x in np.unique(model.values)}
    contained = digits(max(values), 2)
    assert contained[0] == 3
    assert max(values) == value_at(cluster)[version]
    assert values <= {0.0, max(values)}  # gaps between tensors stay zero
    restored = [Shard.restore(one, "mean") for one in taken]
    assert all(shard.version == version for shard in restored)


# ── terms ───────────────────────────────────────────────────────────────────────────────────────


def test_a_promoted_standby_refuses_its_former_primary():
    primary = Shard(0, 1, "mean")
    snapshot, _ = primary.attach_standby()
    standby = Shard.restore(snapshot, "mean")
    entry = m.Activated(1, ())
    standby.follow(primary.prepare(entry))
    assert standby.prepared == 1
    standby.promote(4)
    with pytest.raises(RefusedError, match="follows the sequencer of term 4"):
        standby.follow(primary.prepare(m.Activated(2, ())))
    with pytest.raises(RefusedError, match="follows term 4 already"):
        standby.promote(4)
    assert standby.recovery(4).closed == (entry,)


def test_an_update_that_is_not_everywhere_is_discarded_and_closed_anew():
    """Server 1 dies with its standby far behind; what only server 0 had prepared is applied once."""
    cluster = ReplicatedCluster("async", workers=1, servers=2)
    (program,) = counters(1)
    cluster.join(program)
    cluster.run(until=lambda: any(member.steps for member in cluster.members) and cluster.is_replicated(1))
    first, second = cluster.serving
    while cluster.shards[0].prepared == cluster.shards[0].position:
        lose(second, cluster.standby(1))
        cluster.step()
    assert cluster.shards[0].version == 0
    lose(first, second)
    assert cluster.kill_server(1)
    cluster.run()
    assert cluster.takeovers == 1
    assert final_count(cluster) == BASE**0


def test_rule_state_travels_with_a_snapshot():
    cluster = ReplicatedCluster("sync", workers=1, servers=2)
    cluster.run(training(lambda rank, step: ["a", "b"]))
    for index in range(2):
        (model,) = cluster.standby(index).shard.snapshot().models
        assert set(model.states) == set(Adam(lr=0.1).states())
        assert model.counts.tolist() == [5, 5, 0, 0, 0]
