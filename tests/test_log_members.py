"""What the log promises of members: who declares, who is told, who waits, who comes and goes."""

import numpy as np
import pytest
from clusters import SHAPES, Cluster, lose, model_spec
from counting import (
    BASE,
    MODES,
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
)
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from examples import examples
from headwater import messages as m
from headwater.errors import MeetingError, RegistrationError, StalledError
from headwater.spec.rules import SGD, Accumulate

# ── stop ────────────────────────────────────────────────────────────────────────────────────────


@some
@given(modes, st.integers(1, 3), servers, st.booleans(), seeds)
def test_a_stop_reaches_everybodys_next_step_exactly_once(mode, workers, count, meet, seed):
    def program(me):
        told = []
        yield me.register(model_spec())
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
        yield me.register(model_spec())
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
        yield me.register(model_spec())
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
        yield me.register(model_spec())
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


@few
@given(modes, servers, seeds)
def test_a_stop_before_all_have_joined_is_for_those_who_join_later_too(mode, count, seed):
    def early(me):
        yield me.register(model_spec())
        yield me.stop()
        cluster.join(late)
        answer = yield me.step()
        yield me.end()
        yield me.leave()
        return answer.stopped

    def late(me):
        yield me.register(model_spec())
        told = []
        for _ in range(2):
            told.append((yield me.step()).stopped)
        yield me.end()
        yield me.leave()
        return told

    cluster = Cluster(mode, workers=2, servers=count, seed=seed)
    assert cluster.run(early) == [True, [True, False]]


# ── registration ────────────────────────────────────────────────────────────────────────────────


@few
@given(modes, servers, st.booleans(), seeds)
def test_the_lowest_rank_supplies_initial_values(mode, count, private, seed):
    def program(me):
        yield me.register(model_spec(), value=10 + me.rank)
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
        return float(me.windows[0].values["b"][0, 0])

    cluster = Cluster("sync", workers=2, servers=count, seed=seed)
    assert cluster.run(program, program) == [4.0, 4.0]


@few
@given(modes, servers, seeds)
def test_nothing_is_committed_before_the_declared_workers_have_joined(mode, count, seed):
    (program,) = counters(2)
    cluster = Cluster(mode, workers=3, servers=count, seed=seed)
    cluster.join(program)
    cluster.join(program)
    cluster.rest()
    assert not any(isinstance(entry, m.Committed) for entry in cluster.log)
    assert cluster.shards[0].version == 0
    waits = set(cluster.waits().values())
    assert waits == {"step 1 waits for worker 2 to join"}
    cluster.run(program)
    assert digits(final_count(cluster), 3) == [2, 2, 2]


# ── waits that can never end ────────────────────────────────────────────────────────────────────


@few
@given(modes, servers, seeds)
def test_a_barrier_against_a_sum_fails_both_at_once(mode, count, seed):
    def program(me):
        yield me.register(model_spec())
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
    yield me.register(model_spec())
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
    yield me.register(model_spec())
    for _ in range(2):
        for _ in range(3):
            me.push(BASE**me.rank)
            yield me.step()
            me.acked = me.steps
        yield me.end()
    yield me.leave()


@examples(40, suppress_health_check=list(HealthCheck))
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
    cluster.begin()
    for moment, event in sorted(events):
        while len(cluster.log) < moment // 4 and cluster.step():
            pass
        living = [client for client in cluster.members if not (client.dead or client.ended)]
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
            lose(second, cluster.serving[i])
    until = cluster.agenda.now + 0.1
    while second.outstanding and cluster.agenda.now < until and cluster.step():
        pass
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
    cluster.run(until=lambda: cluster.coordinator.book.member(second.id) is None)

    def late(me):
        yield me.register(model_spec(), value=1e6)
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


def chaos(seed, clip_norm=None):
    """A program that does anything in any order; a wait that can never end or a wrong meeting ends it."""
    actions = ["step"] * 6 + ["turn", "end", "barrier", "sum", "pull", "assign", "stop", "register", "repeat"]

    def program(me):
        random = np.random.default_rng([seed, me.id])
        yield me.register(model_spec(clip_norm=clip_norm))
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
        except (StalledError, MeetingError):
            return me.world.kill(me)
        yield me.leave()

    return program


@examples(40, suppress_health_check=list(HealthCheck))
@given(modes, servers, st.booleans(), seeds, st.lists(st.sampled_from(["kill", "join"]), max_size=3))
def test_whatever_workers_do_nobody_waits_for_ever_and_servers_agree(mode, count, private, seed, events):
    cluster = Cluster(mode, workers=3, servers=count, seed=seed, private=private)
    for _ in range(3):
        cluster.join(chaos(seed))
    cluster.begin()
    for event in events:
        cluster.go(cluster.random.randint(1, 12))
        living = [client for client in cluster.members if not (client.dead or client.ended)]
        if event == "kill" and len(living) > 1:
            cluster.kill(cluster.random.choice(living))
        elif event == "join" and living:
            cluster.join(chaos(seed))
    cluster.run()
    assert not cluster.waits()
    for model in cluster.shards[0].vectors:
        final(cluster, model)
