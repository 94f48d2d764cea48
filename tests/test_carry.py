"""Late steps whose gradients go out with the next one: nothing is dropped, nothing is counted twice."""

import threading

import numpy as np
import pytest

import headwater as hw
from headwater import messages as m
from headwater.errors import ConfigurationError
from headwater.log.pending import PendingExchange
from headwater.shard.merges import PLAIN
from headwater.shard.state import State
from headwater.spec.sync import Synchronous, parse_sync
from headwater.testing import Violation, explore, simulate
from headwater.testing.invariants.accounts import Accounts

CARRY = "sync:quorum=1,late=carry"


def run(train, **options):
    return hw.run(train, **{"engine": "inline", "patience": 5, "deadline": 60, **options})


def test_carrying_is_part_of_the_modes_text_and_needs_a_quorum():
    assert parse_sync("sync:quorum=2,late=carry") == Synchronous(quorum=2, late="carry")
    assert str(Synchronous(quorum=2, late="carry")) == "sync:quorum=2,late=carry"
    with pytest.raises(ConfigurationError, match="late=carry without a quorum"):
        parse_sync("sync:late=carry")
    with pytest.raises(ConfigurationError, match="late must be 'drop' or 'carry', got 'keep'"):
        parse_sync("sync:quorum=2,late=keep")


def late_once(sync, after_late):
    """Rank 1 is late with gradients of 10, and then does what `after_late` says; returns rank 1's values."""
    closed = threading.Event()

    def work(worker):
        model = worker.model(
            "net", {"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)}, hw.SGD(lr=1.0)
        )
        table = worker.table("rows", 1, hw.SGD(lr=1.0))
        worker.barrier()  # rank 1's last answer is from before the round that rank 0 closes
        if worker.rank == 0:
            worker.step()
            closed.set()
            worker.barrier()
            return None
        assert closed.wait(30)
        model.push({"a": [10.0, 20.0]})
        table.push([7, 8], [[10.0], [20.0]])
        result = worker.step(weight=5)
        assert not result.applied
        assert result.reason == "its round was closed without it, 1 commit ago"
        assert model.pull(copy=True)["a"].tolist() == [0, 0], "the answer has current values"
        seen = after_late(worker, model, table)
        worker.barrier()
        return seen

    return run(work, workers=2, servers=2, sync=sync).values[1]


def again(worker, model, table):
    model.push({"a": [1.0, 2.0], "b": [3.0]})
    table.push([8, 9], [[1.0], [2.0]])
    first = worker.step()
    second = worker.step()
    assert (first.applied, first.contributors, second.contributors) == (True, 1, 0)
    values = model.pull(copy=True)
    return values["a"].tolist(), values["b"].tolist(), table.pull([7, 8, 9]).ravel().tolist(), first.staleness


def test_what_came_too_late_goes_out_with_the_next_step_once():
    assert late_once(CARRY, again) == ([-11.0, -22.0], [-3.0], [-10.0, -21.0, -2.0], 1)
    assert late_once("sync:quorum=1", again) == ([-1.0, -2.0], [-3.0], [0.0, -1.0, -2.0], 0)


def test_what_came_too_late_may_be_forgotten():
    def forget(worker, model, table):
        model.discard()
        table.discard()
        return again(worker, model, table)

    assert late_once(CARRY, forget)[:3] == ([-1.0, -2.0], [-3.0], [0.0, -1.0, -2.0])


def test_a_distributed_optimizer_that_cannot_carry_refuses():
    torch = pytest.importorskip("torch")

    def work(worker):
        with pytest.raises(ConfigurationError, match="cannot carry late ones over"):
            hw.torch.DistributedOptimizer(worker, torch.nn.Linear(1, 1), hw.SGD(lr=1.0))

    run(work, workers=1, sync=CARRY)


# ── simulated ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "mode", [CARRY, pytest.param("sync:quorum=2,grace=0.002,late=carry", marks=pytest.mark.long)]
)
def test_no_random_schedule_loses_or_doubles_what_is_carried(mode, long):
    schedules = 60 if long else 20
    assert explore(mode, schedules, workers=3).schedules == schedules
    results = [simulate(mode, workers=3, seed=seed) for seed in range(5)]
    if mode == CARRY:
        assert any(isinstance(entry, m.Late) for result in results for entry in result.log)


@pytest.mark.parametrize(
    "mode", ["sync:quorum=2,late=carry", pytest.param("sync:quorum=2,grace=0.002", marks=pytest.mark.long)]
)
def test_no_random_schedule_loses_or_doubles_changes_of_fragments(mode):
    assert explore(mode, 25, workers=3, fragments=True).schedules == 25


def test_a_quorum_that_counts_changes_from_older_values_is_found(monkeypatch):
    """Rounds would follow each other faster than anybody makes local steps."""
    monkeypatch.setattr(PendingExchange, "missed", property(lambda self: 0))
    with pytest.raises(Violation, match="QuorumRounds"):
        explore("sync:quorum=2,late=carry", 200, workers=3, fragments=True, steps=6)


def test_a_carried_change_that_is_counted_twice_is_found(monkeypatch):
    """The server applies a late step's gradients, and the worker sends them again."""
    late = State._late

    def applies(self, entry):
        steps = [(entry.ticket, self._step_of(entry.ticket))]
        for model, vector in self.vectors.items():
            updates = self.inputs.updates(model, vector, steps)
            if updates:
                vector.apply(updates, PLAIN, [], self.version)
        return late(self, entry)

    monkeypatch.setattr(State, "_late", applies)
    with pytest.raises(Violation) as caught:
        explore(CARRY, 200)
    assert caught.value.invariant in {"ValuesOfTheirVersion", "EqualReplicas"}


def test_a_carried_change_that_is_forgotten_is_found(monkeypatch):
    """By accounts that carry it, with members that do not."""
    carried = Accounts._came_late

    def carries(self, entry):
        carried(self, entry)
        member, step = self.step_of(entry.ticket)
        self._carried[member] = self._contained(member, step)

    monkeypatch.setattr(Accounts, "_came_late", carries)
    with pytest.raises(Violation, match="ValuesOfTheirVersion"):
        explore("sync:quorum=1", 200, workers=3)
