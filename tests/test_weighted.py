"""Steps with weights: what each worker's update counts in the mean of a round."""

import math

import numpy as np
import pytest
from clusters import Cluster, ReplicatedCluster, model_spec
from counting import few, seeds, servers, some
from hypothesis import given
from hypothesis import strategies as st
from plain_merges import weighted_mean, weighted_sum
from test_kernels import addresses, numbers, same_bits

import headwater as hw
from examples import examples
from headwater import messages as m
from headwater.kernels import weigh
from headwater.log.committer import Committer
from headwater.shard.merges import CommitMerges, Merge
from headwater.spec.rules import SGD, Accumulate, Adam
from headwater.testing import Violation, explore

positive = st.floats(1e-3, 1e3)


def carrying(*carries):
    """Steps of which these carry a gradient."""
    return [m.Step(1, 1, 0, (m.Carried(0, b"\1"),) if one else (), (), True) for one in carries]


# ── the arithmetic ──────────────────────────────────────────────────────────────────────────────


@examples(60)
@given(st.integers(0, 3000), st.integers(1, 5), st.sampled_from([0.0, 0.01]), st.integers(0, 2**32))
def test_a_weighted_sum_has_the_bits_of_the_plain_one(n, workers, special, seed):
    generator = np.random.default_rng(seed)
    gradients = [numbers(generator, n, special) for _ in range(workers)]
    weights = generator.random(workers, dtype=np.float32)
    total = np.full(n, np.nan, np.float32)
    weigh(addresses(gradients), weights, total)
    assert same_bits(total, weighted_sum(gradients, weights))


def test_a_weighted_sum_needs_a_weight_for_each_gradient():
    total = np.zeros(4, np.float32)
    for gradients, weights in (([], []), ([np.ones(4, np.float32)], [1, 2])):
        with pytest.raises(ValueError, match="a weight for each"):
            weigh(addresses(gradients), np.array(weights, np.float32), total)


def test_weights_100_and_50_make_2_and_4_to_two_and_two_thirds():
    merge = CommitMerges(carrying(1, 1), (100.0, 50.0), "mean").rows
    gradients = [np.array([2], np.float32), np.array([4], np.float32)]
    total = weighted_sum(gradients, merge.weights_of([0, 1])) / np.float32(merge.divisor)
    assert total == np.float32(2.6666667)


def test_contributors_that_weigh_the_same_are_a_plain_mean():
    for weights in ((), (1.0, 1.0, 1.0), (7.5, 7.5, 7.5)):
        assert CommitMerges(carrying(1, 1, 1), weights, "mean").rows == Merge(3.0)
    assert CommitMerges(carrying(1, 0, 1), (2.0, 9.0, 2.0), "mean").rows == Merge(2.0)  # one carries nothing
    assert CommitMerges(carrying(1, 1), (), "sum").rows == Merge()
    assert CommitMerges(carrying(1, 1), (2.0, 2.0), "sum").rows == Merge(1.0, (2.0, 2.0))
    assert CommitMerges(carrying(0, 0), (2.0, 3.0), "mean").contributors == ()


@given(st.lists(positive, min_size=2, max_size=6), st.integers(-900, 900))
def test_only_the_ratio_of_weights_counts(weights, exponent):
    steps = carrying(*weights)
    scaled = [math.ldexp(weight, exponent) for weight in weights]
    merge = CommitMerges(steps, weights, "mean").rows
    assert CommitMerges(steps, scaled, "mean").rows == merge
    if merge.weights is not None:
        assert 0.5 <= max(merge.weights) < 1, "no weight takes a gradient out of float32's range"
        assert merge.divisor == pytest.approx(sum(weights) / max(weights) * max(merge.weights))


# ── the log ─────────────────────────────────────────────────────────────────────────────────────


def stepper(weights, gradients, spec):
    """Take a step of each weight with each gradient; what it read after each."""

    def program(me):
        seen = []
        yield me.register(spec)
        for weight, gradient in zip(weights, gradients, strict=True):
            me.push(gradient)
            yield me.step(weight=weight)
            seen.append(me.read())
        yield me.leave()
        return seen

    return program


@some
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=1, max_size=4),
    servers,
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_a_round_is_the_weighted_mean_of_its_updates_on_every_number_of_servers(
    weights, count, private, replicated, seed
):
    """Gradients are multiples of the round's total weight: every result is a whole number."""
    spec = model_spec(rule=SGD(lr=1.0))
    totals = [sum(of_round) for of_round in zip(*weights, strict=True)]
    kind = ReplicatedCluster if replicated else Cluster
    cluster = kind("sync", workers=len(weights), servers=count, seed=seed, private=private)
    gradients = [[(rank + 2) * total for total in totals] for rank in range(len(weights))]
    programs = [stepper(*one, spec) for one in zip(weights, gradients, strict=True)]
    expected = -np.cumsum([sum(w[step] * (rank + 2) for rank, w in enumerate(weights)) for step in range(3)])
    for seen in cluster.run(*programs):
        assert seen == expected.tolist()
    entries = [entry for entry in cluster.log if isinstance(entry, m.Committed)]
    for step, entry in enumerate(entries):
        given_weights = tuple(float(w[step]) for w in weights)
        assert entry.weights == (() if set(given_weights) == {1.0} else given_weights)


@few
@given(st.sampled_from(["sync", "sync:quorum=2", "async", "ssp:1"]), seeds)
def test_what_always_adds_up_takes_gradients_as_they_are(mode, seed):
    cluster = Cluster(mode, workers=2, servers=2, seed=seed)
    cluster.run(*[stepper([weight] * 3, [1, 1, 1], model_spec()) for weight in (2, 5)])
    steps = 6 - cluster.shards[0].standings.late
    assert set(cluster.shards[0].vectors[0].values[:3]) == {steps}


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_no_worker_sends_breaks_the_protocol(weight):
    with pytest.raises(hw.errors.ProtocolError, match="a step of weight"):
        Cluster("sync", workers=1, servers=1).run(stepper([weight], [1], model_spec()))


@pytest.mark.parametrize("mode", ["sync", pytest.param("sync:quorum=2", marks=pytest.mark.long)])
def test_weights_of_another_round_are_found(mode, monkeypatch):
    """By the default search: the bits are not those that one process gets."""
    last = {}
    commits = Committer._commit

    def stale(self, steps, measured=None):
        held = [step.held for step in steps]
        before = last.get(self, ())
        last[self] = [one.weight for one in held]
        if len(before) == len(held):
            for step, weight in zip(steps, before, strict=True):
                step.held = m.Held(
                    step.held.member, step.held.number, step.held.kind, step.held.name,
                    step.held.connection_epoch, step.held.measured, weight,
                )  # fmt: skip
        commits(self, steps, measured)

    monkeypatch.setattr(Committer, "_commit", stale)
    with pytest.raises(Violation) as caught:
        explore(mode, 200)
    assert caught.value.invariant == "ValuesOfTheirVersion"
    assert caught.value.schedule.weighted


# ── workers ─────────────────────────────────────────────────────────────────────────────────────

SAMPLES = np.arange(1, 17, dtype=np.float32).reshape(8, 2)
"""Of eight samples the gradient is the sample itself."""


def run(train, **options):
    return hw.run(train, **{"engine": "inline", "patience": 5, "deadline": 60, **options})


def mean_steps(parts, weighted=True):
    """A training function that takes one step with the mean of its part of the samples."""

    def train(worker):
        model = worker.model("net", {"w": np.zeros(2, np.float32)}, hw.SGD(lr=1.0))
        table = worker.table("rows", 2, hw.SGD(lr=1.0))
        part = SAMPLES[parts[worker.rank]]
        model.push({"w": part.mean(axis=0)})
        table.push([5, 10 + worker.rank], np.stack([part.mean(axis=0)] * 2))
        result = worker.step(weight=len(part) if weighted else 1.0)
        assert result.contributors == len(parts)
        rows = table.pull([5, *(10 + rank for rank in range(len(parts)))])
        return model.pull(copy=True)["w"], rows

    return train


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_uneven_batches_weighted_by_samples_are_the_big_batch_to_the_bit(servers):
    uneven = [slice(0, 4), slice(4, 6), slice(6, 8)]
    (whole, _), *_ = run(mean_steps([slice(0, 8)]), workers=1).values
    for values, rows in run(mean_steps(uneven), workers=3, servers=servers).values:
        assert values.tobytes() == whole.tobytes() == (-SAMPLES.mean(axis=0)).tobytes()
        assert rows[0].tobytes() == whole.tobytes()
        for row, part in zip(rows[1:], uneven, strict=True):  # an id that one worker has: its share alone
            assert (row == -SAMPLES[part].sum(axis=0) / 8).all()
    unweighted, _ = run(mean_steps(uneven, weighted=False), workers=3).values[0]
    assert not np.array_equal(unweighted, whole)


def test_a_weight_for_everybody_changes_no_bit():
    def train(weight):
        def work(worker):
            model = worker.model("net", {"w": np.zeros(300, np.float32)}, hw.Adam(lr=0.1))
            random = np.random.default_rng(worker.rank)
            for _ in range(3):
                model.push({"w": random.standard_normal(300, dtype=np.float32)})
                worker.step(**({} if weight is None else {"weight": weight}))
            return model.pull()["w"].tobytes()

        return run(work, workers=3, servers=2).values[0]

    assert train(None) == train(1.0) == train(np.float32(0.3)) == train(10**30)


def test_impossible_weights_are_refused_and_nothing_is_sent():
    def work(worker):
        model = worker.model("net", {"w": np.zeros(1, np.float32)}, hw.SGD(lr=1.0))
        model.push({"w": [1.0]})
        for weight in (-1, float("nan"), float("inf"), True, "2", None):
            with pytest.raises(hw.errors.ConfigurationError, match="must be a finite number ≥ 0"):
                worker.step(weight=weight)
        assert worker.version == 0
        worker.step(weight=np.float64(2))
        return model.pull()["w"].tolist()

    assert run(work, workers=1).values == [[-1.0]]


@pytest.mark.parametrize("sync", ["sync", "async"])
def test_a_weight_of_0_is_an_empty_turn(sync):
    def work(worker):
        model = worker.model("net", {"w": np.zeros(1, np.float32)}, hw.SGD(lr=1.0))
        model.push({"w": [4.0]})
        result = worker.step(weight=worker.rank)
        assert result.contributors == (1 if sync == "sync" else worker.rank)
        worker.barrier()
        worker.step()  # and what was dropped does not come later
        worker.barrier()
        return model.pull(copy=True)["w"].tolist()

    assert run(work, workers=2, sync=sync).values == [[-4.0]] * 2


def test_in_sums_a_weight_multiplies():
    def work(worker):
        model = worker.model("net", {"w": np.zeros(1, np.float32)}, hw.SGD(lr=1.0))
        counts = worker.model("counts", {"n": np.zeros(1, np.float32)}, Accumulate())
        model.push({"w": [1.0]})
        counts.push({"n": [1.0]})
        worker.step(weight=worker.rank + 2)
        return float(model.pull()["w"][0]), float(counts.pull()["n"][0])

    assert run(work, workers=2, sync="sync:reduce=sum").values == [(-5.0, 2.0)] * 2


def test_a_clipped_mean_is_clipped_by_its_weighted_norm():
    def work(worker):
        model = worker.model("net", {"w": np.zeros(2, np.float32)}, hw.SGD(lr=1.0), clip_norm=1.0)
        model.push({"w": [[3.0, 0.0], [0.0, 12.0]][worker.rank]})
        result = worker.step(weight=[2, 1][worker.rank])
        return result.norms["net"], model.pull(copy=True)["w"]

    gradients = [np.array(one, np.float32) for one in ([3, 0], [0, 12])]
    mean = weighted_mean(gradients, [2, 1])
    for norm, values in run(work, workers=2, servers=2).values:
        assert norm == pytest.approx(np.linalg.norm(mean))
        assert values == pytest.approx(-mean / np.linalg.norm(mean), rel=1e-5)


def test_adam_agrees_with_one_process_on_the_weighted_mean():
    rule = Adam(lr=0.1)

    def work(worker):
        model = worker.model("net", {"w": np.zeros(8, np.float32)}, rule)
        random = np.random.default_rng(worker.rank)
        for step in range(5):
            model.push({"w": random.standard_normal(8, dtype=np.float32)})
            worker.step(weight=1 + (worker.rank + step) % 3)
        return model.pull(copy=True)["w"]

    randoms = [np.random.default_rng(rank) for rank in range(3)]

    def alone(worker):
        model = worker.model("net", {"w": np.zeros(8, np.float32)}, rule)
        for step in range(5):
            gradients = [random.standard_normal(8, dtype=np.float32) for random in randoms]
            model.push({"w": weighted_mean(gradients, [1 + (rank + step) % 3 for rank in range(3)])})
            worker.step()
        return model.pull(copy=True)["w"]

    assert run(work, workers=3, servers=2).values[0] == pytest.approx(
        run(alone, workers=1).values[0], rel=1e-6
    )
