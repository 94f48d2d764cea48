"""Programs whose result counts itself, over whole clusters, and what is common to tests of the log.

Most add `BASE ** rank` to every element with each step, so that a value read is a number whose digits
count the steps of each worker that it contains.
"""

import numpy as np
import pytest
from clusters import model_spec
from hypothesis import HealthCheck
from hypothesis import strategies as st

from examples import examples
from headwater import messages as m

BASE = 16
MODES = ["sync", "async", "ssp:0", "ssp:2"]

seeds = st.integers(0, 2**32 - 1)
servers = st.sampled_from([1, 2, 3, 5])
modes = st.sampled_from(MODES)
some = examples(25, suppress_health_check=list(HealthCheck))
few = examples(10, suppress_health_check=list(HealthCheck))
each_mode_and_server = pytest.mark.parametrize(
    ("mode", "index"),
    [
        pytest.param(mode, index, marks=() if index == usual else pytest.mark.long)
        for mode, usual in zip(MODES, (0, 0, 2, 1), strict=True)
        for index in range(3)
    ],
)
"""Of three servers; one of each mode without `--long`. Server 0 hosts the sequencer."""


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
            yield me.register(model_spec())
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
            value += sum(BASE ** cluster.member(ticket.member).rank for ticket in entry.updates)
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
