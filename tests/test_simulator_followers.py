"""Followers in simulated clusters: what they show is right, and planted faults are found."""

from dataclasses import replace

import numpy as np
import pytest

from headwater.machines.follower import FollowerMachine
from headwater.shard.table import Table
from headwater.shard.table_copy import TableCopy
from headwater.shard.touched import Touched
from headwater.spec.version import Version
from headwater.testing import Faults, Violation, explore

MODES = ["sync", "async", "ssp:1", "sync:quorum=1"]


@pytest.mark.parametrize("mode", MODES)
def test_no_random_schedule_shows_a_follower_anything_but_versions(mode, request):
    long = request.config.getoption("--long")
    found = explore(mode, 500 if long else 6, followers=2, seed=0 if long else 300)
    assert found.schedules == (500 if long else 6)


def noticed(mode="async", schedules=200, **fixed):
    """The invariant that notices something though nothing goes wrong but what was planted."""
    plain = {"rule": None, "checkpoints": 0, "meets": 0, "readers": 0, "followers": 1, "merge": None, **fixed}
    with pytest.raises(Violation) as caught:
        explore(mode, schedules, faults=Faults(0, 0, 0, 0, 0), **plain)
    return caught.value.invariant


VIEWS = "ViewsOfTheirVersion"


def test_a_version_that_is_shown_before_it_is_complete(monkeypatch):
    begins = FollowerMachine.begin

    def hasty(self):
        fill = begins(self)
        if fill is not None and self.current is not None:
            fill.slot.version = Version(self.generation, self.shown.number + 1)
            self.current = fill.slot
        return fill

    monkeypatch.setattr(FollowerMachine, "begin", hasty)
    assert noticed() == VIEWS


def test_changes_that_are_applied_to_another_version_than_theirs(monkeypatch):
    """What has changed since the version after the one that a copy is of."""
    after = Touched.after
    monkeypatch.setattr(Touched, "after", lambda self, version: after(self, version + 1))
    assert noticed(steps=6) == VIEWS


def test_deletes_that_are_left_out(monkeypatch):
    cuts = Table.cut
    monkeypatch.setattr(
        Table, "cut", lambda self, have, step: replace(cuts(self, have, step), deleted=np.empty(0, np.int64))
    )
    assert noticed(steps=6) == VIEWS


def test_rows_that_expire_and_stay(monkeypatch):
    monkeypatch.setattr(TableCopy, "_drop_expired", lambda self, version: None)
    assert noticed(steps=6) == VIEWS


def test_a_copy_that_is_filled_while_it_is_pinned(monkeypatch):
    def takes_any(self, slot):
        return slot is not self.current and slot is not self._complete

    monkeypatch.setattr(FollowerMachine, "_may_fill", takes_any)
    monkeypatch.setattr(FollowerMachine, "held_up", property(lambda self: self._complete is not None))
    assert noticed(steps=8) == VIEWS
