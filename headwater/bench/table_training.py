"""Tables in a cluster: two workers that pull and push a recommender's batches, two servers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import median

import numpy as np

from headwater.bench.figures import Effort, Figure, complain
from headwater.bench.ids import DRAWS, ROWS, UNIQUE, Ids, forever, known_ids, zipf_draws
from headwater.bench.plain import make_meeting, new_meeting_name
from headwater.bench.turns import Times, take_turns
from headwater.driver import run
from headwater.kernels.arrange import arrange
from headwater.messages import TableSpec
from headwater.shard.table import Table
from headwater.spec.initializers import Normal
from headwater.spec.placement import SLOTS
from headwater.spec.rules import Adagrad
from headwater.worker import Worker

_WORKERS = 2
_SERVERS = 2
_BATCHES = 20
_RULE = Adagrad(lr=0.01)
_ASKED = {16: 12.0, 64: 5.0}
"""M rows/s by dim, pulled and pushed ones in all."""


def measure_table_training(effort: Effort) -> list[Figure]:
    """Rows a second of asynchronous training with 2 M rows; up to 4 GB of memory."""
    return [figure for dim in _ASKED for figure in _training(dim, effort)]


def _training(dim: int, effort: Effort) -> list[Figure]:
    train = functools.partial(_train, dim, effort, new_meeting_name())
    result = run(train, workers=_WORKERS, servers=_SERVERS, sync="async", output=complain)
    times: Times = result.values[0][0]
    unique = sum(value[1] for value in result.values)
    rates = {name: 2 * unique / median(seconds) / 1e6 for name, seconds in times.items()}
    asked = _ASKED[dim]
    case, rate, loops = f"table, async, dim {dim}", rates["turn"], rates["loops"]
    return [
        Figure(case, rate, "M rows/s", "its loops alone", loops, rate / loops),
        Figure(case, rate, "M rows/s", "what is asked", asked, rate / asked, 1.0, False),
        Figure(
            f"{case}, prefetched",
            rates["ahead"],
            "M rows/s",
            "its loops alone",
            loops,
            rates["ahead"] / loops,
        ),
    ]


def _train(dim: int, effort: Effort, meeting: str, worker: Worker) -> tuple[Times, float]:
    """Seconds of a batch, and how many different ids a batch has on average."""
    ids = known_ids()
    batches = zipf_draws(np.roll(ids, worker.rank), _BATCHES)
    handle = worker.table("bench", dim, _RULE, initializer=Normal(std=0.01))
    ones = np.ones((DRAWS, dim), dtype=np.float32)
    for start in range(worker.rank * UNIQUE, ROWS, _WORKERS * UNIQUE):
        part = ids[start : start + UNIQUE]
        handle.push(part, ones[: len(part)])
        worker.step()
    meet = make_meeting(meeting, worker.rank, worker.barrier)

    def turn(k: int) -> None:
        handle.pull(batches[k])
        handle.push(batches[k], ones)
        worker.step()

    def ahead(k: int) -> None:
        handle.pull(batches[k])
        handle.prefetch(batches[(k + 1) % _BATCHES])
        handle.push(batches[k], ones)
        worker.step()

    unique = [arrange(batch, 1).ids for batch in batches]
    cases: dict[str, Callable[[], object]] = {
        name: _in_turn(case) for name, case in (("turn", turn), ("ahead", ahead))
    }
    cases["loops"] = _in_turn(_loops(dim, ids, unique))
    times = take_turns(cases, repeats=effort.repeats, rounds=_BATCHES, meet=meet)
    return times, sum(map(len, unique)) / len(unique)


def _in_turn(action: Callable[[int], object]) -> Callable[[], object]:
    turn = forever(_BATCHES)
    return lambda: action(next(turn))


def _loops(dim: int, ids: Ids, batches: list[Ids]) -> Callable[[int], None]:
    """What the servers do with a batch, by a process that has all rows itself and nobody to talk to."""
    spec = TableSpec("bench", dim, _RULE.to_spec(), Normal(std=0.01).to_spec(), 0, None, None)
    table = Table(spec, range(SLOTS))
    ones = np.ones((DRAWS, dim), dtype=np.float32)
    out = np.empty_like(ones)
    for start in range(0, ROWS, UNIQUE):
        part = ids[start : start + UNIQUE]
        table.apply([(part, ones[: len(part)])], 1.0, 1, 0)

    def loops(k: int) -> None:
        batch = batches[k]
        table.pull(batch, out[: len(batch)], 1)
        table.apply([(batch, ones[: len(batch)])], 1.0, 1, 0)

    return loops
