"""Simulated clusters whose servers come by themselves and begin anew from checkpoints: what is checked.

Each planted fault is found within 200 schedules, with whatever chance says of all else.
"""

from dataclasses import replace

import pytest

from headwater import messages as m
from headwater.machines.checkpoint_plan import CheckpointPlan
from headwater.machines.coordinator.newcomers import Newcomers
from headwater.machines.roster import RosterBook
from headwater.shard import resumed
from headwater.testing import Crash, Faults, Violation, explore, generations, run, simulate
from headwater.testing.processes import disk
from headwater.testing.schedule import random_schedule

MODES = ["async", *(pytest.param(mode, marks=pytest.mark.long) for mode in ("sync", "ssp:1"))]
modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
def found(long):
    """Returns the violation that 200 schedules find; it is not shrunk. Without --long all of them have what
    chance seldom gives, which costs less time."""

    def search(mode, **seldom):
        fixed = {} if long else seldom
        for seed in range(200):
            try:
                run(random_schedule(mode, seed, Faults(), **fixed))
            except Violation as violation:
                return violation
        raise AssertionError("none of 200 schedules finds it")

    return search


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["sync", "async", "ssp:1", "sync:quorum=2,grace=0.002"])
def test_no_schedule_that_begins_anew_breaks_an_invariant(mode, long, seed_base):
    explore(mode, 500 if long else 3, seed=seed_base, rewinds=2)
    explore(mode, 500 if long else 3, seed=seed_base, spares=1)


def test_a_lost_server_brings_everybody_back_to_the_last_checkpoint():
    crash = Crash(0.3, "server 1")
    result = simulate("async", workers=2, steps=12, rewinds=2, faults=(crash,), trace=True, seed=3)
    assert result.faults == (crash,)
    assert result.rewinds == 1
    told = [text for _, text in result.trace]
    assert any("training begins anew from the last checkpoint" in text for text in told)
    assert any("server 0, from simulated://checkpoints/g000-v0000000" in text for text in told)
    assert result.version == 24


def test_a_spare_takes_the_place_of_a_standby_that_took_over():
    crash = Crash(0.1, "server 0")
    result = simulate("sync", steps=12, replicas=1, spares=1, faults=(crash,), trace=True)
    told = [text for _, text in result.trace]
    over = next(number for number, text in enumerate(told) if "takes over" in text)
    assert any("standby 0, from nothing" in text for text in told[over:])
    assert result.faults == (crash,)
    assert (result.rewinds, result.version) == (0, 12)


def test_a_checkpoint_on_demand_is_on_disk_when_it_is_told_of():
    result = simulate("async", workers=2, steps=4, rewinds=100, asks=True, trace=True)
    told = [text for _, text in result.trace if "is told of simulated://checkpoints" in text]
    assert len(told) == 2


@modes
def test_a_generation_that_forgets_where_the_ranks_were_in_their_data(mode, monkeypatch, found):
    begins = resumed.resumed

    def forgets(index, servers, kept, models, tables):
        return begins(index, servers, replace(kept, recorded=m.DataProgress()), models, tables)

    monkeypatch.setattr(disk, "resumed", forgets)
    assert found(mode, rewinds=1).invariant == "EverySample"


@modes
def test_a_generation_that_begins_with_less_than_the_newest_checkpoint(mode, monkeypatch, found):
    monkeypatch.setattr(generations, "own_since", lambda resumes, first: first + 1)
    assert found(mode, rewinds=1).invariant == "NewestCheckpoint"


@modes
def test_a_checkpoint_that_is_said_to_be_written_and_is_of_before(mode, monkeypatch, found):
    monkeypatch.setattr(CheckpointPlan, "wants", lambda self, generation, version: self.written[0] < 0)
    assert found(mode, rewinds=1).invariant == "NewestCheckpoint"


@modes
def test_members_of_a_former_generation_that_are_taken_back(mode, monkeypatch, found):
    begins = RosterBook.begin_anew

    def keeps(self):
        members = begins(self)
        self.generation -= 1
        return members

    monkeypatch.setattr(RosterBook, "begin_anew", keeps)
    assert found(mode, rewinds=1).invariant in {"NewestCheckpoint", "OneOrder", "EverySample"}


@modes
def test_spares_that_are_asked_only_while_the_cluster_forms(mode, monkeypatch, found):
    invites = Newcomers.invite

    def once(self):
        if self._state.stage == "forming":
            invites(self)

    monkeypatch.setattr(Newcomers, "invite", once)
    assert found(mode, spares=1, replicas=1).invariant in {"NoPlaceStaysEmpty", "NobodyWaitsForEver"}
