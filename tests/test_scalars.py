"""The scalars of rows that differ in their count of updates."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from small_tables import spec

from examples import examples
from headwater.shard.scalars import Scalars
from headwater.shard.table import Table
from headwater.spec.placement import SLOTS
from headwater.spec.rules import Adam


@dataclass(frozen=True)
class Counted(Adam):
    """Adam that notes for which counts it was asked."""

    asked: ClassVar[list[int]] = []

    def scalars(self, updates, count):
        self.asked.append(count)
        return Adam.scalars(self, updates, count)


@examples(50)
@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12), min_size=1, max_size=8))
def test_each_count_is_computed_once_and_only_when_a_row_has_it(updates):
    rule = Counted(lr=0.1)
    scalars = Scalars(rule)
    Counted.asked.clear()
    for counts in updates:
        lines, which = scalars.look_up(0, np.array(counts, dtype=np.int32))
        for count, place in zip(counts, which.tolist(), strict=True):
            if count:
                expected = np.array(Adam.scalars(rule, 0, count), dtype=np.float32)
                assert np.array_equal(lines[place], expected)
    assert len(Counted.asked) == len(set(Counted.asked))
    assert set(Counted.asked) <= {count for counts in updates for count in counts}


def test_a_rate_that_changes_each_step_costs_the_same_after_many_steps(monkeypatch):
    table = Table(spec(Adam(lr=0.1), dim=1), range(SLOTS))
    calls, original = [], Adam.scalars

    def scalars(self, updates, count):
        calls.append(count)
        return original(self, updates, count)

    monkeypatch.setattr(Adam, "scalars", scalars)
    ids, gradient = np.array([7], dtype=np.int64), np.ones((1, 1), dtype=np.float32)
    costs = []
    for step in range(1, 301):
        calls.clear()
        table.set({"lr": 0.1 / step})
        table.apply([(ids, gradient)], 1.0, step, step - 1)
        costs.append(len(calls))
    assert max(costs) <= 3
