"""A shard and its parts alone: the ledger, a range of a vector, and requests that are refused."""

import numpy as np
import pytest
from clusters import model_spec
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from headwater import messages as m
from headwater.errors import ConfigurationError, ProtocolError, RefusedError, RegistrationError
from headwater.shard import Shard, Staging, Vector
from headwater.shard.copies import Copies, found
from headwater.shard.ledger import Ledger
from headwater.shard.merges import Merge
from headwater.shard.staging import Update
from headwater.spec.layout import PAGE, Layout
from headwater.spec.rules import SGD, Accumulate, Adam, Assign

RESULT = m.StepResult(5, True, 1, 0)


# ── the ledger ──────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 6)), max_size=40))
def test_a_ledger_takes_the_next_step_knows_the_last_and_refuses_all_others(steps):
    ledger, last = Ledger(), {}
    for member, step in steps:
        if step == last.get(member, 0) + 1:
            assert not ledger.is_repeat(member, step)
            result = m.StepResult(step, True, member, 0)
            ledger.record(member, step, result)
            last[member] = step
        elif step == last.get(member, 0) != 0:
            assert ledger.is_repeat(member, step)
            assert ledger.result(member) == m.StepResult(step, True, member, 0)
        else:
            with pytest.raises(ProtocolError, match=f"sent step {step} after step {last.get(member, 0)}"):
                ledger.is_repeat(member, step)


def test_a_ledger_forgets_who_is_gone():
    ledger = Ledger()
    ledger.record(1, 1, RESULT)
    ledger.forget(1)
    ledger.forget(2)
    assert not ledger.is_repeat(1, 1)


# ── a range of a vector ─────────────────────────────────────────────────────────────────────────

shapes = st.sampled_from([(), (0,), (3,), (16,), (700,), (33, 40), (2500,)])
models = st.lists(st.tuples(shapes, st.integers(0, 1)), min_size=1, max_size=8)


def spec_of(drawn, rules):
    names = {f"t{i}": shape for i, (shape, _) in enumerate(drawn)}
    return model_spec(
        shapes=names, rules=rules, groups={f"t{i}": group for i, (_, group) in enumerate(drawn)}
    )


def vectors(spec, servers, initial):
    return [Vector(spec, *cut, initial[slice(*cut)], 0) for cut in Layout(spec.tensors).cut(servers)]


@st.composite
def carried_of(draw, tensors):
    return np.array(draw(st.lists(st.booleans(), min_size=tensors, max_size=tensors)))


@given(models, st.integers(1, 4), st.integers(1, 3), st.data())
def test_segments_partition_a_range_and_are_uniform(drawn, servers, workers, data):
    spec = spec_of(drawn, (SGD(lr=1.0), SGD(lr=2.0)))
    layout = Layout(spec.tensors)
    carried = np.stack([data.draw(carried_of(len(drawn))) for _ in range(workers)])
    counts = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(drawn), max_size=len(drawn))))
    for vector in vectors(spec, servers, np.zeros(layout.elements, np.float32)):
        vector.counts[:] = counts
        segments = list(vector.segments(carried))
        bounds = [vector.start, *(high for _, high, _ in segments)]
        assert [low for low, _, _ in segments] == bounds[:-1]
        assert bounds[-1] == vector.stop
        for low, high, tensor in segments:
            assert low < high
            for i in range(len(drawn)):
                if max(low, layout.starts[i]) < min(high, layout.stops[i]):
                    assert (carried[:, i] == carried[:, tensor]).all()
                    assert layout.groups[i] == layout.groups[tensor]
                    assert counts[i] == counts[tensor]


def staged(private, vector, gradients):
    """A member's memory for a range: one private buffer, or two places of a window."""
    here = gradients[vector.start : vector.stop].copy()
    return Staging(here, here if private else np.zeros_like(here))


@examples(60)
@given(models, st.integers(1, 5), st.integers(1, 3), st.booleans(), st.booleans(), st.data())
def test_apply_touches_what_is_carried_alone_and_answers_with_all(
    drawn, servers, workers, private, mean, data
):
    """`lr` 1 in group 0, 2 in group 1; whole numbers, and divisors that are powers of two."""
    spec = spec_of(drawn, (SGD(lr=1.0), SGD(lr=2.0)))
    layout = Layout(spec.tensors)
    initial = np.zeros(layout.elements, np.float32)
    for i, view in enumerate(layout.views(initial).values()):
        view[...] = 100 * i
    gradients = np.zeros((workers, layout.elements), np.float32)
    for worker in range(workers):
        for i, view in enumerate(layout.views(gradients[worker]).values()):
            view[...] = 8 * (worker + 1) + i
    carried = np.stack([data.draw(carried_of(len(drawn))) for _ in range(workers)])
    carried[0, data.draw(st.integers(0, len(drawn) - 1))] = True
    divisor = 4 if mean else 1
    expected = initial.copy()
    for i, (view, tensor) in enumerate(zip(layout.views(expected).values(), layout.tensors, strict=True)):
        total = sum(8 * (worker + 1) + i for worker in range(workers) if carried[worker, i])
        view -= (1 + tensor.group) * total / divisor
    for vector in vectors(spec, servers, initial):
        stagings = [staged(private, vector, one) for one in gradients]
        reader = staged(private, vector, initial)
        updates = [Update(staging, mask) for staging, mask in zip(stagings, carried, strict=True)]
        vector.apply(updates, Merge(divisor), [*stagings, reader], 7)
        for array in [vector.values, reader.parameters, *(staging.parameters for staging in stagings)]:
            assert np.array_equal(array, expected[vector.start : vector.stop])
        assert (vector.updates, vector.changed) == (1, 7)


@examples(40)
@given(models, st.integers(1, 3), st.integers(1, 2), st.data())
def test_steps_of_any_patterns_one_after_the_other_are_as_if_each_were_the_first_of_its_pattern(
    drawn, servers, workers, data
):
    """Adam's bias correction shows whose counts were taken; states that are loaded make neighbours differ."""
    spec = spec_of(drawn, (Adam(lr=1.0), Adam(lr=2.0)))
    layout = Layout(spec.tensors)
    tensors = len(drawn)
    masks = [np.stack([data.draw(carried_of(tensors)) for _ in range(workers)]) for _ in range(2)]
    program = data.draw(st.lists(st.sampled_from(["one", "other", "load"]), min_size=2, max_size=6))
    both = [vectors(spec, servers, np.zeros(layout.elements, np.float32)) for _ in range(2)]
    for vector, plain in zip(*both, strict=True):
        ranges = np.arange(vector.stop - vector.start, dtype=np.float32) % 7
        stagings = [Staging(ranges + 1 + k, np.zeros_like(ranges)) for k in range(workers)]
        for version, what in enumerate(program, 1):
            if what == "load":
                states, counts = np.tile(ranges, 2), list(range(tensors))
                for one in (vector, plain):
                    one.load_state(states, masks[1].any(axis=0), counts, 5, version)
                continue
            carried = masks[what == "other"]
            if not carried.any():
                continue
            updates = [Update(one, mask) for one, mask in zip(stagings, carried, strict=True)]
            vector.apply(updates, Merge(workers), stagings, version)
            plain._pattern = None
            plain.apply(updates, Merge(workers), [], version)
            assert (vector.counts == plain.counts).all()
            assert vector.values.tobytes() == plain.values.tobytes()
            assert all(one.parameters.tobytes() == plain.values.tobytes() for one in stagings)


@pytest.mark.parametrize(("rule", "value"), [(Accumulate(), 1 + 12), (Assign(), 12 / 2)])
def test_accumulate_always_sums_and_assign_takes_the_mean(rule, value):
    spec = model_spec(shapes={"x": (5,)}, rule=rule)
    (vector,) = vectors(spec, 1, np.ones(PAGE, np.float32))
    members = [staged(True, vector, np.full(PAGE, gradient, np.float32)) for gradient in (4, 8)]
    vector.apply([Update(member, np.array([True])) for member in members], Merge(2), [], 1)
    assert (vector.values[:5] == value).all()


def test_gaps_stay_zero_under_a_rule_with_state():
    spec = spec_of([((3,), 0), ((700,), 1), ((5,), 0)], (Adam(lr=0.1, weight_decay=0.1), Adam(lr=0.2)))
    layout = Layout(spec.tensors)
    initial, gradients = (np.zeros(layout.elements, np.float32) for _ in range(2))
    for view in [*layout.views(initial).values(), *layout.views(gradients).values()]:
        view[...] = 1
    (vector,) = vectors(spec, 1, initial)
    for version in range(1, 4):
        update = Update(staged(False, vector, gradients), np.array([True, version > 1, False]))
        vector.apply([update], Merge(1), [], version)
    assert np.count_nonzero(vector.values) == 708
    assert all(np.count_nonzero(state) == 3 + 5 for state in vector.states.values())
    assert vector.counts.tolist() == [3, 2, 0]


def test_an_assignment_takes_the_carried_tensors_and_keeps_the_state():
    spec = model_spec(shapes={"a": (3,), "b": (2000,)}, rule=Adam())
    for vector in vectors(spec, 3, np.ones(3 * PAGE, np.float32)):
        vector.states["exp_avg"][:] = 5
        source = Staging(vector.values, np.full_like(vector.values, 9))
        vector.assign(source, np.array([False, True]), 4)
        whole = np.ones(3 * PAGE)
        whole[16 : 16 + 2000] = 9
        assert (
            vector.values[: 2016 - vector.start] == whole[vector.start : vector.stop][: 2016 - vector.start]
        ).all()
        assert (vector.states["exp_avg"] == 5).all()
        assert (vector.changed, vector.updates) == (4, 0)


def test_statistics_count_the_elements_of_the_tensors_and_the_bytes_that_lie_here():
    spec = model_spec(shapes={"a": (3,), "b": (2000,)}, rule=Adam())
    vector = vectors(spec, 2, np.zeros(2 * PAGE, np.float32))[0]
    assert vector.statistics() == m.ModelStatistics("model", "Adam", 2, 2003, 0, 3 * 4 * PAGE)


# ── requests ────────────────────────────────────────────────────────────────────────────────────

SPEC = model_spec(shapes={"a": (3,), "b": (7,)}, rules=(SGD(lr=1.0),))


@pytest.fixture
def shard():
    """With model 0, which member 1 has registered."""
    one = Shard(0, 1, "mean")
    one.hold(1, m.Register(1, SPEC, None), memory())
    one.process(m.Registered(1, m.ExchangeId(1, 1)))
    return one


def memory():
    return Staging(*(np.zeros(PAGE, np.float32) for _ in range(2)))


def step(carried=(), settings=(), step=1):
    return m.Step(2, step, 0, tuple(m.Carried(*one) for one in carried), tuple(settings), True)


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (step(step=2), "step 2 after step 0: expected 1"),
        (step(step=0), "step 0 after step 0"),
        (step([(1, b"\1")]), r"model 1, but has registered only \[0\]"),
        (step([(0, b"\1"), (0, b"\2")]), "carries a model twice"),
        (step([(0, b"\1\0")]), "2 bytes for 2 tensors: expected 1"),
        (step([(0, b"")]), "0 bytes for 2 tensors: expected 1"),
        (step([(0, b"\4")]), "more than the 2 tensors"),
        (step(settings=[m.Setting(3, 0, {})]), "model 3"),
        (step(settings=[m.Setting(0, 1, {})]), "parameter group 1 does not exist, there are 1"),
        (step(settings=[m.Setting(0, -2, {})]), "parameter group -2"),
        (m.Pull(2, (0, 5), -1), "model 5"),
        (m.Assign(2, m.Carried(5, b"\1")), "model 5"),
        (m.Assign(2, m.Carried(0, b"\x80")), "more than the 2 tensors"),
        (m.ReadState(2, 5), "model 5"),
        (m.Attach(2, 5, None), r"no model 5, known are \[0\]"),
    ],
)
def test_a_request_that_breaks_the_protocol_is_not_held(shard, request_, text):
    with pytest.raises(ProtocolError, match=text):
        shard.hold(1, request_)
    shard.hold(1, step([(0, b"\1")]))


def test_what_an_outstanding_exchange_brought_is_values_for_an_assignment_and_gradients_else(shard):
    staging = memory()
    shard.replace_staging(1, 0, staging, 0)
    assert shard.staged(1, 0) is staging.gradients
    shard.hold(1, m.Assign(2, m.Carried(0, b"\1")))
    assert shard.staged(1, 0) is staging.parameters
    shard.process(m.Assigned(2, 1, m.ExchangeId(1, 2)))
    shard.hold(1, m.Step(3, 1, 1, (m.Carried(0, b"\1"),), (), True))
    assert shard.staged(1, 0) is staging.gradients


def test_a_member_has_one_exchange_at_a_time(shard):
    shard.hold(1, step())
    with pytest.raises(ProtocolError, match="sent 3 before 2 was answered"):
        shard.hold(1, m.Pull(3, (0,), -1))
    ((member, answer),) = shard.process(m.Committed(2, 1, (m.ExchangeId(1, 2),), (m.ExchangeId(1, 2),)))
    assert (member, answer.number) == (1, 2)
    shard.hold(1, m.Pull(3, (0,), -1))


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        (m.ModelSpec("m", (), (SGD(lr=1.0).to_spec(),)), RegistrationError, "at least one tensor"),
        (m.ModelSpec("m", SPEC.tensors, ()), RegistrationError, "rules for 0"),
        (model_spec(groups={"a": 1}), RegistrationError, r"groups \[0, 1\], but there are rules for 1"),
        (m.ModelSpec("m", SPEC.tensors, (m.RuleSpec("Nonsense", {}),)), ConfigurationError, "--rules"),
        (m.ModelSpec("m", SPEC.tensors, (m.RuleSpec("SGD", {"lr": -1.0}),)), ConfigurationError, "lr"),
    ],
)
def test_an_impossible_model_is_refused_and_not_held(shard, spec, error, text):
    with pytest.raises(error, match=text):
        shard.hold(2, m.Register(1, spec, None), memory())
    assert shard.hold(2, m.Register(1, SPEC, None), memory()) == m.Held(2, 1, "register", "model")


def test_an_impossible_setting_is_refused_and_the_turn_not_taken(shard):
    for values in ({"lr": -1.0}, {"nonsense": 1.0}, {"momentum": 0.9}):
        with pytest.raises(ConfigurationError):
            shard.hold(1, step(settings=[m.Setting(0, -1, values)]))
    assert shard.hold(1, step()).kind == "step"


def test_a_pull_of_what_has_not_changed_writes_nothing(shard):
    shard.hold(1, m.Pull(2, (0,), 0))
    shard.staging(1, 0).parameters[:] = 77
    ((_, answer),) = shard.process(m.Served(2, m.ExchangeId(1, 2)))
    assert answer == m.Answer(2, 0)
    assert (shard.staging(1, 0).parameters == 77).all()
    shard.hold(1, m.Pull(3, (0,), -1))
    ((_, answer),) = shard.process(m.Served(3, m.ExchangeId(1, 3)))
    assert answer == m.Answer(3, 0, values=(0,))
    assert (shard.staging(1, 0).parameters == 0).all()


def test_states_are_copied_as_of_the_answer_and_taken_once():
    shard = Shard(0, 1, "mean")
    shard.hold(1, m.Register(1, model_spec(shapes={"a": (3,), "b": (7,)}, rule=Adam()), None), memory())
    shard.process(m.Registered(1, m.ExchangeId(1, 1)))
    shard.hold(1, m.ReadState(2, 0))
    ((_, answer),) = shard.process(m.Served(2, m.ExchangeId(1, 2)))
    assert (answer.states, answer.counts) == (("exp_avg", "exp_avg_sq"), (0, 0))
    assert answer.rules == (m.RulesInForce(model=0, rules=(Adam().to_spec(),)),)
    shard.staging(1, 0).gradients[:3] = 1
    shard.hold(1, m.Step(3, 1, 0, (m.Carried(0, b"\1"),), (), True))
    shard.process(m.Committed(3, 1, (m.ExchangeId(1, 3),), (m.ExchangeId(1, 3),)))
    assert not any(state.any() for state in shard.take_copies(1))
    assert shard.take_copies(1) == []
    shard.hold(1, m.ReadState(4, 0))
    ((_, answer),) = shard.process(m.Served(4, m.ExchangeId(1, 4)))
    assert answer.counts == (1, 0)
    assert [np.count_nonzero(state[:16]) for state in shard.take_copies(1)] == [3, 3]


def test_a_step_that_asks_for_no_values_gets_none(shard):
    shard.hold(1, m.Step(2, 1, 0, (), (), False))
    shard.staging(1, 0).parameters[:] = 77
    ((_, answer),) = shard.process(m.Committed(2, 1, (m.ExchangeId(1, 2),), (m.ExchangeId(1, 2),)))
    assert answer == m.Answer(2, 1, result=m.StepResult(1, True, 0, 0))
    assert (shard.staging(1, 0).parameters == 77).all()


def test_one_that_is_retired_while_it_waits_is_told_that_no_answer_follows_and_is_refused():
    shard = Shard(0, 1, "mean")
    shard.process(m.Enrolled(1, 2, (m.Newcomer(1, 0), m.Newcomer(2, 1))))
    shard.hold(1, m.Register(1, SPEC, None), memory())
    assert shard.process(m.Retired(2, 1, True, "it died")) == [(1, None)]
    assert shard.process(m.Retired(3, 2, True, "it died too")) == []
    with pytest.raises(RefusedError, match="member 1 has left or was retired"):
        shard.staging(1, 0)


def test_a_thread_that_receives_for_a_member_while_it_is_retired_finds_it_gone(monkeypatch):
    """At every moment the member has its memory, or is known to be gone."""
    shard = Shard(0, 1, "mean")
    shard.process(m.Enrolled(1, 1, (m.Newcomer(1, 0),)))
    shard.hold(1, m.Register(1, SPEC, None), memory())
    shard.process(m.Registered(2, m.ExchangeId(1, 1)))
    forget, seen = shard._members.forget, []

    def forget_and_look(member):
        forgotten = forget(member)
        with pytest.raises(RefusedError, match="has left or was retired"):
            shard.staging(1, 0)
        seen.append(member)
        return forgotten

    monkeypatch.setattr(shard._members, "forget", forget_and_look)
    shard.process(m.Retired(3, 1, True, "it died"))
    assert seen == [1]


def test_what_a_gone_member_had_is_forgotten(shard):
    shard.hold(1, step())
    shard.process(m.Retired(2, 1, True, "it died"))
    with pytest.raises(ProtocolError, match="has registered only"):
        shard.staging(1, 0)
    assert shard.describe(4) == m.Description(4, 0, (m.ModelInfo(0, SPEC),))


def test_entries_are_processed_in_order_and_once(shard):
    for position in (1, 3):
        with pytest.raises(ProtocolError, match=f"entry {position} after 1"):
            shard.process(m.Activated(position, (1,)))


# ── snapshots ───────────────────────────────────────────────────────────────────────────────────


def test_copies_are_made_in_memory_that_was_given_back_and_in_no_other():
    copies, arrays = Copies(), [np.arange(5, dtype=np.float32), np.ones(5, np.float32)]
    copies.take_back([copies.copy(array) for array in arrays])
    assert not copies.begun
    assert not any(copies._free.values())
    copies.take_back(found(copies.expect(arrays)))
    first = [copies.copy(array) for array in arrays]
    second = copies.copy(arrays[0])
    assert [one.tolist() for one in (*first, second)] == [[0, 1, 2, 3, 4], [1] * 5, [0, 1, 2, 3, 4]]
    assert not any(np.shares_memory(one, second) for one in (*first, *arrays))
    copies.take_back(first)
    again = [copies.copy(array) for array in reversed(arrays)]
    assert [one.tolist() for one in again] == [[1] * 5, [0, 1, 2, 3, 4]]
    assert {one.ctypes.data for one in again} == {one.ctypes.data for one in first}
    assert second.tolist() == [0, 1, 2, 3, 4]
    copies.take_back([*again, second])
    assert [len(kept) for kept in copies._free.values()] == [2]  # not more than are needed


def test_memory_is_kept_for_checkpoints_and_not_for_who_asks_once(shard):
    shard.process(m.Enrolled(2, 2, (m.Newcomer(2, -1),)))
    shard.hold(2, m.Verify(1))
    shard.process(m.Served(3, m.ExchangeId(2, 1), "verify"))
    once = shard.take_snapshot(2).models[0].arrays()
    assert shard.expect_snapshots() == [len(array) for array in once]
    shard.provide(found(map(len, once)))
    assert shard.expect_snapshots() == []
    kept = []
    for number in (2, 3):
        shard.hold(2, m.Checkpoint(number))
        shard.process(m.Served(number + 2, m.ExchangeId(2, number), "checkpoint"))
        arrays = shard.take_snapshot(2).models[0].arrays()
        shard.provide(arrays)
        kept.append({array.ctypes.data for array in arrays})
    assert kept[0] == kept[1]
