"""What the log promises, in closed forms, over whole clusters with deliveries in an order of chance.

Most programs add `BASE ** rank` to every element with each step, so that a value read is a number whose
digits count the steps of each worker that it contains.
"""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import SHAPES, Cluster, model_spec

from headwater import messages as m
from headwater.errors import RegistrationError, StalledError
from headwater.rules import SGD, Accumulate, Adam

BASE = 16
MODES = ["sync", "async", "ssp:0", "ssp:2"]

seeds = st.integers(0, 2**32 - 1)
servers = st.sampled_from([1, 2, 3, 5])
modes = st.sampled_from(MODES)
some = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
few = settings(some, max_examples=10)


def digits(value, workers):
    """How many steps of each worker `value` contains."""
    whole = int(value)
    assert whole == value
    return [whole // BASE**rank % BASE for rank in range(workers)]


def counting(me, steps):
    """Take `steps` steps that count; return what each answer was, as (answer, clock, value)."""
    seen = []
    for _ in range(steps):
        me.push(BASE**me.rank)
        answer = yield me.step()
        seen.append((answer, me.steps, me.read()))
    return seen


def counters(*steps):
    """A program for each: register, take that many counted steps, leave; return what was read."""

    def program(count):
        def run(me):
            yield me.register()
            seen = yield from counting(me, count)
            yield me.end()
            yield me.leave()
            return seen

        return run

    return [program(count) for count in steps]


def value_at(cluster):
    """Version → the value that the log says every element has then."""
    values, value = {0: 0}, 0
    for entry in cluster.log:
        if isinstance(entry, m.Committed):
            value += sum(BASE ** cluster.clients[ticket.member].rank for ticket in entry.updates)
            values[entry.version] = value
    return values


def final(cluster, model=0):
    """The model's vector, put together from all servers."""
    vectors = [shard.vectors[model] for shard in cluster.shards]
    assert len({vector.updates for vector in vectors}) == 1
    whole = np.concatenate([vector.values for vector in vectors])
    return {name: view.copy() for name, view in vectors[0].layout.views(whole).items()}


def final_count(cluster):
    values = {float(x) for view in final(cluster).values() for x in np.unique(view)}
    assert len(values) == 1
    return values.pop()


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
        yield me.register()
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
    cluster.run(until=lambda: all(shard.vectors for shard in cluster.shards))
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
        yield me.register()
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
        yield me.register(value=7)
        if me.rank == 0:
            answer = yield me.assign(a=100, b=200)
            assert answer.version == 1
        yield me.barrier()
        me.push(1)
        yield me.step()
        values = me.models[0].values
        return [set(np.unique(values[name])) for name in ("a", "b", "c", "scalar")]

    cluster = Cluster(mode, workers=2, servers=count, seed=seed, private=private)
    results = cluster.run(program, program)
    assert [{102}, {202}, {9}, {9}] in results
    assert all(before in ({101}, {102}) for before, *_ in results)


@few
@given(modes, servers, st.booleans(), seeds)
def test_a_repeated_step_gets_its_result_again_and_is_not_applied(mode, count, private, seed):
    def program(me):
        yield me.register()
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


def training(carried, steps=5):
    """A program of a worker that in each step carries `carried(rank, step)`."""
    spec = model_spec(rules=(Adam(lr=0.1), Adam(lr=0.01, weight_decay=0.1)), groups={"c": 1, "scalar": 1})

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


def trained(count, workers, seed, private, carried=mixed, mode="sync"):
    cluster = Cluster(mode, workers=workers, servers=count, seed=seed, private=private)
    cluster.run(*[training(carried)] * workers)
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
        return {name: float(me.models[0].values[name].ravel()[0]) for name in "abc"}

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
        return [float(me.models[0].values[name].ravel()[0]) for name in "abc"]

    cluster = Cluster("sync", workers=2, servers=count, seed=seed, private=private)
    assert cluster.run(program, program) == [[-1, -1, -4]] * 2


@few
@given(servers, seeds)
def test_who_is_in_a_round_does_not_depend_on_timing(count, seed):
    """Two phases of batches, uneven in opposite ways, without a barrier between."""

    def program(*phases):
        def run(me):
            yield me.register()
            for steps in phases:
                yield from counting(me, steps)
                yield me.end()
            yield me.leave()

        return run

    cluster = Cluster("sync", workers=3, servers=count, seed=seed)
    cluster.run(program(2, 3), program(5, 1), program(0, 2))
    ranks = [
        [cluster.clients[ticket.member].rank for ticket in entry.updates]
        for entry in cluster.log
        if isinstance(entry, m.Committed)
    ]
    assert ranks == [[0, 1]] * 2 + [[1]] * 3 + [[0, 1, 2], [0, 2], [0]]


@few
@given(modes, servers, seeds)
def test_barriers_sums_and_batches_of_uneven_length_never_hang(mode, count, seed):
    def program(me):
        yield me.register()
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
        yield me.register()
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
                counts[cluster.clients[ticket.member].rank] += 1
        return counts

    done = {}
    cluster = Cluster(f"ssp:{bound}", workers=workers, servers=count, seed=seed)
    cluster.run(*[program] * workers)
    assert committed() == [5] * workers


# ── stop ────────────────────────────────────────────────────────────────────────────────────────


@some
@given(modes, st.integers(1, 3), servers, st.booleans(), seeds)
def test_a_stop_reaches_everybodys_next_step_exactly_once(mode, workers, count, meet, seed):
    def program(me):
        told = []
        yield me.register()
        for step in range(6):
            if step == 3:
                if meet:
                    yield me.barrier()
                if me.rank == 0:
                    yield me.stop()
                yield me.sum()  # nobody is past it before the stop
            answer = yield me.step()
            told.append(answer.stopped)
        yield me.end()
        yield me.leave()
        return told

    cluster = Cluster(mode, workers=workers, servers=count, seed=seed)
    for told in cluster.run(*[program] * workers):
        assert told.count(True) == 1
        assert told.index(True) == 3 if meet or mode == "sync" else told.index(True) <= 3


@few
@given(modes, servers, seeds)
def test_a_stop_is_not_for_batches_that_begin_after_it(mode, count, seed):
    def stopping(me):
        yield me.register()
        yield me.step()
        yield me.end()
        yield me.barrier()
        yield me.step()
        yield me.stop()
        answer = yield me.step()
        assert answer.stopped
        yield me.end()
        yield me.barrier()
        yield me.leave()

    def over(me):
        yield me.register()
        yield me.step()
        yield me.end()
        yield me.barrier()
        yield me.end()
        yield me.barrier()
        answer = yield me.step()
        assert not answer.stopped
        yield me.leave()

    Cluster(mode, workers=2, servers=count, seed=seed).run(stopping, over)


@few
@given(servers, seeds)
def test_a_stop_ends_synchronous_batches_at_one_version(count, seed):
    def program(me):
        yield me.register()
        while True:
            answer = yield me.step()
            if answer.stopped:
                break
            if me.rank == 1 and me.steps == 3:
                yield me.stop()
        yield me.end()
        yield me.leave()
        return answer.version

    cluster = Cluster("sync", workers=3, servers=count, seed=seed)
    assert cluster.run(*[program] * 3) == [4] * 3


# ── registration ────────────────────────────────────────────────────────────────────────────────


@few
@given(modes, servers, st.booleans(), seeds)
def test_the_lowest_rank_supplies_initial_values(mode, count, private, seed):
    def program(me):
        yield me.register(value=10 + me.rank)
        assert me.read() == 10
        second = model_spec("second", {"x": (5,)})
        yield me.register(second, value=20 + me.rank)
        assert me.read(1) == 20

    cluster = Cluster(mode, workers=3, servers=count, seed=seed, private=private)
    cluster.run(program, program, program)
    assert [entry.source.number for entry in cluster.log if isinstance(entry, m.Registered)] == [1, 2]


@few
@given(modes, servers, seeds)
def test_another_model_of_the_same_name_is_refused_on_all_servers(mode, count, seed):
    def program(me):
        shapes = {"a": (3,), "b": (2000,), **({"b": (4000,)} if me.rank == 1 else {})}
        rule = SGD(lr=1.0) if me.rank == 2 else Accumulate()
        try:
            yield me.register(model_spec(shapes=shapes, rule=rule))
        except RegistrationError as error:
            return str(error)
        return ""

    cluster = Cluster(mode, workers=3, servers=count, seed=seed)
    fine, tensors, rule = cluster.run(program, program, program)
    assert fine == ""
    for named in ("'model'", "b float32[2000]", "b float32[4000]"):
        assert named in tensors
    assert "a float32" not in tensors
    for named in ("'model'", "Accumulate", "SGD"):
        assert named in rule


@few
@given(servers, seeds)
def test_the_order_in_which_tensors_are_declared_does_not_matter(count, seed):
    def program(me):
        names = list(SHAPES) if me.rank else list(reversed(SHAPES))
        yield me.register(model_spec(shapes={name: SHAPES[name] for name in names}))
        me.push(2.0, ["b"])
        yield me.step()
        return float(me.models[0].values["b"][0, 0])

    cluster = Cluster("sync", workers=2, servers=count, seed=seed)
    assert cluster.run(program, program) == [4.0, 4.0]


@few
@given(modes, servers, seeds)
def test_nothing_is_committed_before_the_declared_workers_have_joined(mode, count, seed):
    (program,) = counters(2)
    cluster = Cluster(mode, workers=3, servers=count, seed=seed)
    cluster.join(program)
    cluster.join(program)
    while cluster.deliver():
        pass
    assert not any(isinstance(entry, m.Committed) for entry in cluster.log)
    assert cluster.shards[0].version == 0
    waits = set(cluster.sequencer.waits().values())
    assert waits == {"step 1 waits for worker 2 to join"}
    cluster.run(program)
    assert digits(final_count(cluster), 3) == [2, 2, 2]


# ── waits that can never end ────────────────────────────────────────────────────────────────────


@few
@given(modes, servers, seeds)
def test_a_barrier_against_a_sum_fails_both_at_once(mode, count, seed):
    def program(me):
        yield me.register()
        try:
            yield me.barrier() if me.rank == 0 else me.sum(x=1.0)
        except StalledError as error:
            return str(error)
        return "nothing"

    cluster = Cluster(mode, workers=2, servers=count, seed=seed)
    for text in cluster.run(program, program):
        assert "worker 0 waits in barrier" in text
        assert "worker 1 waits in sum" in text


# ── members that come and go ────────────────────────────────────────────────────────────────────


def restless(me):
    """Steps, batches that end, meetings, more steps; how many steps were acknowledged so far is `acked`."""
    yield me.register()
    for _ in range(2):
        for _ in range(3):
            me.push(BASE**me.rank)
            yield me.step()
            me.acked = me.steps
        yield me.end()
        yield me.barrier()
        yield me.sum(x=1.0)
    yield me.leave()


def visiting(me):
    """As many steps, but no meetings: one who joins late would be in another than the rest."""
    yield me.register()
    for _ in range(2):
        for _ in range(3):
            me.push(BASE**me.rank)
            yield me.step()
            me.acked = me.steps
        yield me.end()
    yield me.leave()


@settings(some, max_examples=40)
@given(
    modes,
    servers,
    st.booleans(),
    seeds,
    st.lists(st.tuples(st.integers(0, 150), st.sampled_from(["kill", "join"])), min_size=1, max_size=4),
)
def test_deaths_and_joins_hang_nobody_and_lose_no_acknowledged_update(mode, count, private, seed, events):
    cluster = Cluster(mode, workers=2, servers=count, seed=seed, private=private)
    everyone = [cluster.join(restless), cluster.join(restless)]
    for client in everyone:
        client.acked = 0
    for moment, event in sorted(events):
        while len(cluster.log) < moment // 4 and cluster.deliver():
            pass
        living = [client for client in cluster.clients.values() if not (client.dead or client.ended)]
        if event == "kill" and len(living) > 1:
            cluster.kill(cluster.random.choice(living))
        elif event == "join" and living and len(everyone) < 5:
            rank = len(everyone)
            everyone.append(cluster.join(visiting, rank=rank))
            everyone[-1].acked = 0
    cluster.run()
    if not cluster.shards[0].vectors:
        return
    applied = digits(final_count(cluster), len(everyone))
    for client, count in zip(everyone, applied, strict=True):
        assert count == 6 if client.ended else client.acked <= count <= client.acked + 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("holders", range(4))
def test_a_death_while_its_step_is_held_by_some_servers_leaves_all_or_nothing(mode, holders):
    """Three servers; the step of the one that dies has reached `holders` of them."""
    cluster = Cluster(mode, workers=2, servers=3)
    first, second = (cluster.join(program) for program in counters(2, 2))
    cluster.run(until=lambda: second.steps == 1)
    for i in range(3):
        if i >= holders:
            cluster.links["request", second.id, i].clear()
    while cluster.links["request", second.id, 0] or cluster.links["report", 0]:
        cluster.deliver()
    cluster.kill(second)
    cluster.run()
    assert first.ended
    applied = digits(final_count(cluster), 2)
    assert applied[0] == 2
    assert applied[1] <= (1 if holders == 3 else 0)


@pytest.mark.parametrize("mode", MODES)
def test_a_joiner_takes_the_rank_of_a_dead_worker_and_starts_from_current_values(mode):
    cluster = Cluster(mode, workers=2, servers=2)
    first, second = (cluster.join(program) for program in counters(6, 6))
    cluster.run(until=lambda: second.steps == 4)
    cluster.kill(second)

    def late(me):
        yield me.register(value=1e6)
        seen.append(me.read())
        yield from counting(me, 2)
        yield me.leave()

    seen = []
    joiner = cluster.join(late)
    cluster.run()
    assert joiner.rank == 1
    assert first.ended
    assert digits(seen[0], 2)[1] in (3, 4)
    assert digits(final_count(cluster), 2)[1] == digits(seen[0], 2)[1] + 2


def chaos(seed):
    """A program that does anything in any order; a wait that can never end is its end."""
    actions = ["step"] * 6 + ["turn", "end", "barrier", "sum", "pull", "assign", "stop", "register", "repeat"]

    def program(me):
        random = np.random.default_rng([seed, me.id])
        yield me.register()
        try:
            for action in random.choice(actions, size=12):
                if action == "step":
                    me.push(1, random.permutation(list(SHAPES))[: random.integers(0, 5)])
                    yield me.step(read=bool(random.integers(2)))
                elif action == "assign":
                    yield me.assign(c=float(random.integers(9)))
                elif action == "register":
                    yield me.register(model_spec(f"model {random.integers(2)}", {"x": (9,)}))
                elif action == "repeat":
                    if me.steps:
                        yield me.step(step=me.steps)
                else:
                    yield getattr(me, {"turn": "step"}.get(action, action))()
        except StalledError:
            return me.cluster.kill(me)
        yield me.leave()

    return program


@settings(some, max_examples=40)
@given(modes, servers, st.booleans(), seeds, st.lists(st.sampled_from(["kill", "join"]), max_size=3))
def test_whatever_workers_do_nobody_waits_for_ever_and_servers_agree(mode, count, private, seed, events):
    cluster = Cluster(mode, workers=3, servers=count, seed=seed, private=private)
    for _ in range(3):
        cluster.join(chaos(seed))
    for event in events:
        end = len(cluster.log) + cluster.random.randint(1, 12)
        cluster.run(until=lambda end=end: len(cluster.log) >= end or not any(cluster.links.values()))
        living = [client for client in cluster.clients.values() if not (client.dead or client.ended)]
        if event == "kill" and len(living) > 1:
            cluster.kill(cluster.random.choice(living))
        elif event == "join" and living:
            cluster.join(chaos(seed))
    cluster.run()
    assert not cluster.sequencer.waits()
    for model in cluster.shards[0].vectors:
        final(cluster, model)
