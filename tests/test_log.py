"""What the log promises of values, in closed forms, with deliveries in an order of chance."""

import math

import numpy as np
from clusters import SHAPES, Cluster, model_spec
from counting import (
    BASE,
    counters,
    counting,
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

from headwater import messages as m
from headwater.spec.rules import SGD, Adam

# ── every mode ──────────────────────────────────────────────────────────────────────────────────


@some
@given(modes, st.lists(st.integers(0, 6), min_size=1, max_size=4), servers, st.booleans(), seeds)
def test_every_answer_is_the_state_of_its_version_on_all_servers(mode, steps, count, private, seed):
    cluster = Cluster(mode, workers=len(steps), servers=count, seed=seed, private=private)
    results = cluster.run(*counters(*steps))
    values = value_at(cluster)
    for rank, seen in enumerate(results):
        for answer, clock, value in seen:
            assert value == values[answer.version]
            assert digits(value, len(steps))[rank] == clock  # all its own, each once
    assert digits(final_count(cluster), len(steps)) == steps


@some
@given(modes, st.integers(1, 4), servers, st.booleans(), seeds)
def test_versions_grow_by_one_and_staleness_counts_the_commits_between(mode, workers, count, private, seed):
    def program(me):
        versions = []
        yield me.register(model_spec())
        for _ in range(4):
            before = me.version
            me.push(1)
            answer = yield me.step()
            assert answer.result.staleness == answer.result.version - 1 - before
            assert before < answer.result.version <= answer.version
            versions.append(answer.result.version)
        yield me.end()
        yield me.leave()
        return versions

    cluster = Cluster(mode, workers=workers, servers=count, seed=seed, private=private)
    results = cluster.run(*[program] * workers)
    committed = [entry.version for entry in cluster.log if isinstance(entry, m.Committed)]
    assert committed == list(range(1, len(committed) + 1))
    if mode == "sync":
        assert results == [[1, 2, 3, 4]] * workers
    else:
        assert sorted(version for result in results for version in result) == committed


@some
@given(modes, st.integers(1, 3), servers, st.booleans(), seeds)
def test_a_reader_gets_one_version_and_disturbs_nobody(mode, workers, count, private, seed):
    def reader(me):
        for _ in range(3):
            answer = yield me.attach(m.ModelInfo(0, model_spec()))
            seen.append((answer.version, me.read()))
            answer = yield me.pull()
            seen.append((answer.version, me.read()))
            answer = yield me.pull(have=me.version)
            seen.append((answer.version, me.read()))
            assert answer.version == me.version
        yield me.leave()

    seen = []
    cluster = Cluster(mode, workers=workers, servers=count, seed=seed, private=private)
    for program in counters(*[5] * workers):
        cluster.join(program)
    cluster.run(until=lambda: cluster.shards and all(shard.vectors for shard in cluster.shards))
    cluster.join(reader, role="observer")
    cluster.run()
    values = value_at(cluster)
    for version, value in seen:
        assert value == values[version]
    assert seen == sorted(seen)
    assert digits(final_count(cluster), workers) == [5] * workers


@few
@given(modes, servers, st.booleans(), seeds)
def test_an_empty_turn_reads_what_the_others_pushed_meanwhile(mode, count, private, seed):
    def program(me):
        yield me.register(model_spec())
        yield me.register(model_spec("second", {"x": (5,)}))
        if me.rank == 0:
            for model in (0, 1):
                me.push(5, model=model)
                yield me.step()
        yield me.barrier()
        yield me.step()
        return [me.read(0), me.read(1)]

    cluster = Cluster(mode, workers=2, servers=count, seed=seed, private=private)
    assert cluster.run(*[program] * 2) == [[5, 5]] * 2


@few
@given(modes, servers, st.booleans(), seeds)
def test_an_assignment_is_a_version_of_its_own_and_keeps_the_rest(mode, count, private, seed):
    def program(me):
        yield me.register(model_spec(), value=7)
        if me.rank == 0:
            answer = yield me.assign(a=100, b=200)
            assert answer.version == 1
        yield me.barrier()
        me.push(1)
        yield me.step()
        values = me.windows[0].values
        return [set(np.unique(values[name])) for name in ("a", "b", "c", "scalar")]

    cluster = Cluster(mode, workers=2, servers=count, seed=seed, private=private)
    results = cluster.run(program, program)
    assert [{102}, {202}, {9}, {9}] in results
    assert all(before in ({101}, {102}) for before, *_ in results)


@few
@given(modes, servers, st.booleans(), seeds)
def test_a_repeated_step_gets_its_result_again_and_is_not_applied(mode, count, private, seed):
    def program(me):
        yield me.register(model_spec())
        for _ in range(3):
            me.push(BASE**me.rank)
            first = yield me.step()
            me.push(BASE**me.rank)
            again = yield me.step(step=me.steps)
            assert again.result == first.result
            assert again.version >= first.version
            assert digits(me.read(), 2)[me.rank] == me.steps
        yield me.leave()

    cluster = Cluster(mode, workers=2, servers=count, seed=seed, private=private)
    cluster.run(program, program)
    assert digits(final_count(cluster), 2) == [3, 3]


@few
@given(modes, servers, seeds)
def test_a_sum_adds_in_rank_order_on_every_server(mode, count, seed):
    def program(me):
        part = [1e16, 1.0, -1e16][me.rank]
        answer = yield me.sum(loss=part, count=1.0, broken=math.nan)
        return answer.sums

    cluster = Cluster(mode, workers=3, servers=count, seed=seed)
    for sums in cluster.run(program, program, program):
        assert sums["loss"] == 1e16 + 1.0 - 1e16
        assert sums["count"] == 3
        assert math.isnan(sums["broken"])


# ── synchronous ─────────────────────────────────────────────────────────────────────────────────


def gradient(rank, step, name):
    shape = SHAPES[name]
    seed = [rank, step, sum(map(ord, name))]
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def training(carried, steps=5, clip_norm=None):
    """A program of a worker that in each step carries `carried(rank, step)`."""
    rules = (Adam(lr=0.1), Adam(lr=0.01, weight_decay=0.1))
    spec = model_spec(rules=rules, groups={"c": 1, "scalar": 1}, clip_norm=clip_norm)

    def program(me):
        yield me.register(spec, value=me.rank + 1)
        for step in range(1, steps + 1):
            names = carried(me.rank, step)
            if names:
                me.push({name: gradient(me.rank, step, name) for name in names}, names)
            yield me.step()
        yield me.end()
        yield me.leave()

    return program


def mixed(rank, step):
    """Everything, half of it, or an empty turn, by turns; never `scalar` in step 3."""
    names = [set(SHAPES), {"a", "c"}, set(), {"b", "scalar"}][(rank + step) % 4]
    return sorted(names - ({"scalar"} if step == 3 else set()))


def trained(count, workers, seed, private, carried=mixed, mode="sync", clip_norm=None):
    cluster = Cluster(mode, workers=workers, servers=count, seed=seed, private=private)
    cluster.run(*[training(carried, clip_norm=clip_norm)] * workers)
    return final(cluster)


def assert_same_bits(one, other):
    for name in one:
        assert one[name].tobytes() == other[name].tobytes(), name


@some
@given(st.integers(1, 4), servers, st.booleans(), seeds, st.sampled_from(["sync", "sync:reduce=sum"]))
def test_synchronous_training_gives_the_same_bits_for_any_servers_and_order(
    workers, count, private, seed, mode
):
    expected = trained(1, workers, 0, False, mode=mode)
    assert_same_bits(expected, trained(count, workers, seed, private, mode=mode))


@few
@given(servers, st.booleans(), seeds)
def test_a_tensor_that_nobody_carries_keeps_value_state_and_count(count, private, seed):
    """Steps without `b` leave no trace in it: the same bits as if they had not been."""

    def sometimes(rank, step):
        return ["a"] if step in (2, 3) else ["a", "b"]

    spec = model_spec(rule=Adam(lr=0.1))

    def program(steps):
        def run(me):
            yield me.register(spec)
            for step in steps:
                me.push({name: gradient(me.rank, step, name) for name in "ab"}, sometimes(me.rank, step))
                yield me.step()
            yield me.leave()

        return run

    one = Cluster("sync", workers=2, servers=count, seed=seed, private=private)
    one.run(*[program([1, 2, 3, 4, 5])] * 2)
    other = Cluster("sync", workers=2, servers=1)
    other.run(*[program([1, 4, 5])] * 2)
    assert final(one)["b"].tobytes() == final(other)["b"].tobytes()
    assert final(one)["a"].tobytes() != final(other)["a"].tobytes()
    assert not final(one)["c"].any()


@few
@given(servers, st.booleans(), seeds)
def test_gradients_are_divided_by_all_contributors_and_empty_turns_are_none(count, private, seed):
    pushes = [{"a": 6, "b": 6}, {"a": 12}, {}]

    def program(me):
        yield me.register(model_spec(rule=SGD(lr=1.0)))
        for name, value in pushes[me.rank].items():
            me.push(value, [name])
        answer = yield me.step()
        assert answer.result == m.StepResult(1, True, 2, 0)
        answer = yield me.step()  # nobody carries anything
        assert answer.result == m.StepResult(2, True, 0, 0)
        return {name: float(me.windows[0].values[name].ravel()[0]) for name in "abc"}

    cluster = Cluster("sync", workers=3, servers=count, seed=seed, private=private)
    assert cluster.run(*[program] * 3) == [{"a": -9, "b": -3, "c": 0}] * 3
    assert {shard.vectors[0].updates for shard in cluster.shards} == {1}


@few
@given(servers, st.booleans(), seeds)
def test_the_lowest_ranks_settings_win(count, private, seed):
    def program(me):
        yield me.register(model_spec(rules=(SGD(lr=0.0), SGD(lr=0.0)), groups={"c": 1}))
        me.push(1)
        setting = [
            m.Setting(0, -1, {"lr": 1.0}),
            m.Setting(0, -1, {"lr": 64.0}),
            m.Setting(0, 1, {"lr": 4.0}),
        ]
        yield me.step(settings=[setting[me.rank]] if me.rank else [setting[0], setting[2]])
        return [float(me.windows[0].values[name].ravel()[0]) for name in "abc"]

    cluster = Cluster("sync", workers=2, servers=count, seed=seed, private=private)
    assert cluster.run(program, program) == [[-1, -1, -4]] * 2


@few
@given(servers, seeds)
def test_who_is_in_a_round_does_not_depend_on_timing(count, seed):
    """Two phases of batches, uneven in opposite ways, without a barrier between."""

    def program(*phases):
        def run(me):
            yield me.register(model_spec())
            for steps in phases:
                yield from counting(me, steps)
                yield me.end()
            yield me.leave()

        return run

    cluster = Cluster("sync", workers=3, servers=count, seed=seed)
    cluster.run(program(2, 3), program(5, 1), program(0, 2))
    ranks = [
        [cluster.member(ticket.member).rank for ticket in entry.updates]
        for entry in cluster.log
        if isinstance(entry, m.Committed)
    ]
    assert ranks == [[0, 1]] * 2 + [[1]] * 3 + [[0, 1, 2], [0, 2], [0]]


@few
@given(modes, servers, seeds)
def test_barriers_sums_and_batches_of_uneven_length_never_hang(mode, count, seed):
    def program(me):
        yield me.register(model_spec())
        for epoch in range(3):
            yield from counting(me, (me.rank + epoch) % 3)
            yield me.end()
            answer = yield me.sum(steps=float(me.steps))
            if me.rank == epoch:
                yield me.pull()
            yield me.barrier()
        yield me.leave()
        return answer.sums["steps"]

    cluster = Cluster(mode, workers=3, servers=count, seed=seed)
    assert cluster.run(*[program] * 3) == [9.0] * 3
    assert digits(final_count(cluster), 3) == [3, 3, 3]


# ── asynchronous, bounded staleness ─────────────────────────────────────────────────────────────


@some
@given(st.integers(0, 3), st.integers(2, 4), servers, st.booleans(), seeds)
def test_what_a_worker_reads_lacks_at_most_the_bound_of_each_other(bound, workers, count, private, seed):
    steps = 6
    cluster = Cluster(f"ssp:{bound}", workers=workers, servers=count, seed=seed, private=private)
    for rank, seen in enumerate(cluster.run(*counters(*[steps] * workers))):
        for _, clock, value in seen:
            contained = digits(value, workers)
            assert contained[rank] == clock
            assert min(contained) >= clock - bound


@some
@given(st.integers(0, 2), st.integers(2, 4), servers, seeds)
def test_no_worker_that_computes_leads_by_more_than_the_bound(bound, workers, count, seed):
    """Leads are counted in commits, the moment a step is over for its worker."""

    def program(me):
        yield me.register(model_spec())
        for _ in range(5):
            yield me.step()
            done[me.rank] = me.steps
            assert me.steps - min(committed()) <= bound
        yield me.end()
        done[me.rank] = math.inf
        yield me.leave()

    def committed():
        counts = [0] * workers
        for entry in cluster.log:
            for ticket in entry.updates if isinstance(entry, m.Committed) else ():
                counts[cluster.member(ticket.member).rank] += 1
        return counts

    done = {}
    cluster = Cluster(f"ssp:{bound}", workers=workers, servers=count, seed=seed)
    cluster.run(*[program] * workers)
    assert committed() == [5] * workers
