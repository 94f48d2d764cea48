"""What the log promises with a quorum: rounds wait for no straggler, and what comes late is not applied."""

from clusters import Cluster, FlakyCluster, ReplicatedCluster, model_spec
from counting import BASE, digits, final_count, seeds, servers, some, value_at
from hypothesis import given
from hypothesis import strategies as st
from test_log_replicas import assert_settled, drive, events

from headwater import messages as m
from headwater.spec.rules import SGD

modes = st.builds(
    lambda quorum, grace: f"sync:quorum={quorum}" + (f",grace={grace}" if grace else ""),
    st.integers(1, 4),
    st.sampled_from([0, 0.5]),
)


def counter(steps, clip_norm=None):
    """Take steps that count; return what became of each."""

    def program(me):
        results = []
        yield me.register(model_spec(clip_norm=clip_norm))
        for _ in range(steps):
            me.push(BASE**me.rank)
            answer = yield me.step()
            results.append(answer.result)
            applied = sum(result.applied for result in results)
            assert digits(me.read(), 4)[me.rank] == applied
        yield me.end()
        yield me.leave()
        return results

    return program


def check(cluster, steps):
    """Every step was applied once or reported as late, and values are those of what was applied."""
    values = value_at(cluster)
    applied = digits(final_count(cluster), len(steps))
    late = 0
    for client, taken in zip(cluster.members, steps, strict=True):
        if client.value is None:
            continue  # its last answer was lost on its way out
        assert len(client.value) == taken
        assert sum(result.applied for result in client.value) == applied[client.rank]
        assert all(result.staleness == 0 for result in client.value if result.applied)
        assert all(result.contributors == 0 for result in client.value if not result.applied)
        late += sum(not result.applied for result in client.value)
    entries = [entry for entry in cluster.log if isinstance(entry, m.Late)]
    assert cluster.shards[0].standings.late == len(entries) == sum(steps) - sum(applied)
    assert late <= len(entries)
    assert final_count(cluster) == values[max(values)]


@some
@given(modes, st.lists(st.integers(0, 6), min_size=1, max_size=4), servers, st.booleans(), seeds)
def test_a_step_is_applied_once_or_reported_as_late(mode, steps, count, private, seed):
    cluster = Cluster(mode, workers=len(steps), servers=count, seed=seed, private=private)
    cluster.run(*map(counter, steps))
    check(cluster, steps)


@some
@given(modes, st.lists(st.integers(0, 6), min_size=1, max_size=4), servers, st.booleans(), seeds)
def test_over_lost_connections_too(mode, steps, count, private, seed):
    cluster = FlakyCluster(mode, workers=len(steps), servers=count, seed=seed, private=private, flaky=0.05)
    cluster.run(*map(counter, steps))
    check(cluster, steps)


@some
@given(modes, st.lists(st.integers(0, 6), min_size=1, max_size=4), servers, seeds, events)
def test_over_deaths_of_servers_too(mode, steps, count, seed, events):
    cluster = ReplicatedCluster(mode, workers=len(steps), servers=count, seed=seed)
    for taken in steps:
        cluster.join(counter(taken))
    drive(cluster, events)
    check(cluster, steps)
    assert_settled(cluster)


@some
@given(st.integers(1, 4), st.integers(1, 4), servers, seeds)
def test_a_commit_has_at_least_the_quorum_or_everybody_active(quorum, workers, count, seed):
    cluster = Cluster(f"sync:quorum={quorum}", workers=workers, servers=count, seed=seed)
    cluster.run(*[counter(5)] * workers)
    active: set[int] = set()
    for entry in cluster.log:
        if isinstance(entry, m.Activated):
            active |= set(entry.members)
        elif isinstance(entry, m.Retired):
            active.discard(entry.member)
        elif isinstance(entry, m.Committed):
            assert len(entry.updates) >= min(quorum, len(active))


@some
@given(servers, seeds)
def test_a_grace_without_end_makes_every_round_full(count, seed):
    """Messages take less, so nobody is late."""
    cluster = Cluster("sync:quorum=1,grace=5", workers=3, servers=count, seed=seed)
    results = cluster.run(*[counter(4)] * 3)
    assert all(result.applied and result.contributors == 3 for taken in results for result in taken)


def test_the_settings_of_a_late_step_take_effect():
    def slow(me):
        yield me.register(spec)
        me.freeze(0.5)
        me.push(1)
        answer = yield me.step(settings=[m.Setting(0, -1, {"lr": 8.0})])
        assert not answer.result.applied
        assert me.read() == -1.0
        yield me.leave()

    def quick(me):
        yield me.register(spec)
        me.freeze(0.2)
        me.push(1)
        yield me.step()
        while cluster.shards[0].standings.late == 0:
            yield me.pull()
        me.push(1)
        yield me.step()
        yield me.leave()
        return me.read()

    spec = model_spec(rule=SGD(lr=1.0))
    cluster = Cluster("sync:quorum=1", workers=2, servers=2)
    first = cluster.join(quick)
    cluster.join(slow)
    cluster.run()
    assert first.value == -1.0 - 8.0


@some
@given(st.sampled_from(["sync", "async", "ssp:1"]), servers, seeds)
def test_with_too_few_workers_nothing_is_committed_until_another_joins(mode, count, seed):
    cluster = Cluster(mode, workers=2, servers=count, seed=seed, min_workers=2)
    first, second = cluster.join(counter(6)), cluster.join(counter(6))
    cluster.run(until=lambda: second.steps == 3)
    cluster.kill(second)
    cluster.rest()
    if first.ended:
        return
    version = cluster.shards[0].version
    assert cluster.waits()[first.id] == "training waits: 1 worker present, min_workers is 2"
    cluster.join(counter(2), rank=2)
    cluster.run()
    assert first.ended
    assert cluster.shards[0].version > version
    assert digits(final_count(cluster), 2)[0] == 6
