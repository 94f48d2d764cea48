"""A follower of a training in this process: what it shows, when, and what it does about what cannot be."""

import io
import os
import threading

import numpy as np
import pytest
from rich.console import Console
from trained import SIZE, trained
from waiting import wait_until

import headwater as hw
from headwater.cli.status import page
from headwater.errors import ClosedError, ConfigurationError, ConnectionLostError, StalledError, UsageError
from headwater.observe.metrics import as_data
from headwater.runtime.inquiry import ask
from headwater.spec.version import Version
from headwater.weights.bfloat16 import to_bfloat16


@pytest.fixture(scope="module")
def training():
    with trained(steps=3) as training:
        training.step(ids=[1, 2, 3])
        yield training


@pytest.fixture(autouse=True)
def servers_have_closed_too(training):
    """The training is in this process, and hears a little later that a follower is gone."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def is_right(view, training):
    """Whether all of the model's first tensor is what it was at the view's version."""
    (value,) = set(view.parameters("net")["w"].tolist())
    return value == training.value(view.version.number)


def test_a_view_is_one_version_of_everything_and_says_which(training):
    with hw.follow(training.address, "net", "users", every=1) as follower:
        version = training.step(ids=[5])
        assert follower.wait(version, deadline=30) == Version(0, version)
        with follower.pin() as view:
            assert view.version == Version(0, version)
            assert is_right(view, training)
            assert view.parameters("net")["w"].shape == (SIZE,)
            assert view.age < 30
            ids = [[1, 2], [5, 99]]
            assert view.rows("users", ids).shape == (2, 2, 2)
            assert np.array_equal(view.rows("users", ids).reshape(-1, 2), training.pull([1, 2, 5, 99]))


def test_a_pinned_view_stays_as_it_is_and_its_arrays_cannot_be_written(training):
    with hw.follow(training.address, every=1) as follower, follower.pin() as view:
        number, rows = view.version.number, view.rows("users", [1])
        for _ in range(5):
            version = training.step(ids=[1])
            follower.wait(version, deadline=30)
        assert view.version.number == number
        assert is_right(view, training)
        assert np.array_equal(view.rows("users", [1]), rows)
        assert view.behind >= 5
        with pytest.raises(ValueError, match="read-only"):
            view.parameters("net")["w"][0] = 1


def test_a_reader_that_keeps_its_pins_makes_its_own_follower_older_and_nobody_elses(training):
    with hw.follow(training.address, every=1) as slow, hw.follow(training.address, every=1) as other:
        first = slow.pin()
        slow.wait(training.step(), deadline=30)
        second = slow.pin()
        version = training.step(3)
        other.wait(version, deadline=30)
        wait_until(lambda: slow.statistics().held_up)
        assert slow.version == second.version
        assert "2 versions pinned" in slow.statistics().reason
        first.close()
        slow.wait(version, deadline=30)
        assert is_right(second, training)
        second.close()
        with pytest.raises(ClosedError, match="is closed: pin another"):
            second.parameters("net")


def test_a_scan_brings_every_row_of_one_version_in_pieces(training):
    with hw.follow(training.address, tables=["users"], models=[], every=1) as follower:
        version = training.step(ids=range(100, 150))
        follower.wait(version, deadline=30)
        with follower.pin() as view:
            parts = list(view.scan("users", batch=16))
            ids = np.concatenate([ids for ids, _ in parts])
            rows = np.concatenate([rows for _, rows in parts])
            assert max(len(ids) for ids, _ in parts) == 16
            assert len(set(ids.tolist())) == len(ids) >= 50
            assert np.array_equal(rows, training.pull(ids))


def test_changes_lead_from_each_version_to_the_next_one_taken(training):
    def toggle(worker, model, table):
        model.push({"b": np.array([0, 1, 0], np.float32)})
        table.delete([1])
        table.push(np.array([7]), np.ones((1, 2), np.float32))
        worker.step()
        return worker.version

    with hw.follow(training.address, every=1) as follower:
        model, rows = {}, {}
        follower.wait(training.step(ids=[1, 2]), deadline=30)
        changes = follower.changes()
        first = next(changes)
        assert first.base is None
        assert first.tables["users"].full
        version = training.do(toggle)
        found = []
        while not found or found[-1].version.number < version:
            found.append(next(changes))
        for change in [first, *found]:
            for run in change.models["net"]:
                model.setdefault(run.tensor, np.zeros(SIZE, np.float32))
                model[run.tensor][run.start : run.start + len(run.values)] = run.values
            for id in change.tables["users"].deleted.tolist():
                rows.pop(id, None)
            rows.update(zip(change.tables["users"].ids.tolist(), change.tables["users"].rows, strict=True))
        assert [(run.tensor, run.start) for change in found for run in change.models["net"]] == [("b", 1)]
        with follower.pin() as view:
            assert np.array_equal(model["w"], view.parameters("net")["w"])
            assert np.array_equal(model["b"][:3], view.parameters("net")["b"])
            (ids, values) = next(view.scan("users"))
            assert rows.keys() == set(ids.tolist())
            assert all(np.array_equal(rows[id], row) for id, row in zip(ids.tolist(), values, strict=True))
        training.do(
            lambda worker, model, table: (model.push({"b": np.array([0, -1, 0], np.float32)}), worker.step())
        )
        changes.close()
        assert follower.statistics().pinned == 0


def test_bfloat16_is_the_cast_of_the_values(training):
    pytest.importorskip("ml_dtypes")

    def odd(worker, model, table):
        model.push({"b": np.array([1 / 3, 1 + 2**-8, 3e38], np.float32)})
        worker.step()
        return model.pull()["b"].copy(), worker.version

    exact, version = training.do(odd)
    with (
        hw.follow(training.address, "net", (), every=1, dtype="bfloat16") as follower,
        follower.pin() as view,
    ):
        assert view.version.number == version
        assert view.parameters("net")["b"].dtype.name == "bfloat16"
        assert np.array_equal(view.parameters("net")["b"].view(np.uint16), to_bfloat16(exact))


# ── how old a version may be ────────────────────────────────────────────────────────────────────


def test_an_old_version_is_confirmed_or_replaced_before_it_is_read(training):
    with hw.follow(training.address, every="1000s", max_age=0.05) as follower:
        with follower.pin() as view:
            assert view.age <= 0.05
        version = training.step()
        threading.Event().wait(0.1)  # older than allowed, whatever the machine does
        with follower.pin(deadline=30) as view:
            assert view.version.number == version


def test_a_version_too_far_behind_is_replaced_before_it_is_read(training):
    with hw.follow(training.address, every="1000s", max_behind=2) as follower:
        shown = follower.version
        training.step(2)
        with follower.pin() as view:
            assert view.version == shown
            assert view.behind == 2
        version = training.step()
        with follower.pin(deadline=30) as view:
            assert view.version.number == version


def test_a_read_that_cannot_be_young_enough_says_why(training):
    with hw.follow(training.address, every="1000s", max_behind=0, pins=1) as follower:
        held = follower.pin()
        training.step()
        with pytest.raises(StalledError, match=r"1 versions behind, max_behind is 0.*1 versions pinned"):
            follower.pin(deadline=2)
        held.close()


def test_waiting_says_what_for(training):
    with hw.follow(training.address, every="1000s") as follower:
        version = training.step()
        assert follower.wait(version, deadline=30).number == version  # asked for, though none is due
        with pytest.raises(StalledError, match=r"version 999999 did not come.*newest version is"):
            follower.wait(999_999, deadline=0.2)


def test_a_follower_takes_no_turn(training):
    """It is no worker: nobody waits for it, and no rank is its."""
    with hw.follow(training.address, every=1):
        training.do(lambda worker, model, table: worker.barrier())
        assert training.do(lambda worker, model, table: worker.sum(of="all", n=1)["n"]) == 1


# ── what cannot be ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"models": ["net", "other"]}, "no model 'other': its models are 'net'"),
        ({"tables": "items"}, "no table 'items': its tables are 'users'"),
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, got 'float64'"),
        ({"every": "soon"}, "every: got 'soon'"),
        ({"pins": 0}, "pins must be an integer ≥ 1"),
        ({"max_behind": -1}, "max_behind must be an integer ≥ 0"),
        ({"max_age": 0}, "max_age must be > 0 seconds"),
        ({"models": (), "tables": ()}, "nothing to follow"),
    ],
)
def test_what_cannot_be_followed_is_told_at_once(training, arguments, told):
    with pytest.raises(ConfigurationError, match=told):
        hw.follow(training.address, **arguments)


def test_nobody_there(tmp_path):
    with pytest.raises(ConnectionLostError):
        hw.follow(f"unix:{tmp_path}/nobody", deadline=5)


def test_unknown_names_in_a_view_are_listed(training):
    with hw.follow(training.address, every=1) as follower, follower.pin() as view:
        with pytest.raises(ConfigurationError, match="no model 'nett' is followed, only 'net'"):
            view.parameters("nett")
        with pytest.raises(ConfigurationError, match="no table 'user' is followed, only 'users'"):
            view.rows("user", [1])
        with pytest.raises(UsageError, match="ids must be integers, got float64"):
            view.rows("users", [1.5])
        with pytest.raises(ConfigurationError, match="batch must be an integer ≥ 1"):
            view.scan("users", batch=0)


def test_a_forked_child_is_told_to_follow_by_itself(training):
    with hw.follow(training.address, every=1) as follower:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no cover - in the child
            try:
                follower.pin()
                told = "pinned"
            except UsageError as error:
                told = str(error)
            os.write(writer, told.encode())
            os._exit(0)
        os.close(writer)
        with open(reader) as pipe:
            assert "call hw.follow here" in pipe.read()
        os.waitpid(child, 0)


def test_what_was_seen_stays_readable_after_the_end_and_the_end_is_told():
    with trained(servers=1, steps=2) as training:
        follower = hw.follow(training.address, every=1)
    with follower:
        with pytest.raises(StalledError, match=r"will not come: .*(closed|finished|ended)"):
            follower.wait(99, deadline=30)
        with follower.pin() as view:
            assert is_right(view, training)
        assert [change.version.number for change in follower.changes()] == [2]
    with pytest.raises(ClosedError, match="the follower is closed"):
        follower.pin()


@pytest.mark.parametrize("lifetime", [{}, {"expiry": hw.AfterSteps(3)}, {"admission": hw.AfterCount(2)}])
def test_rows_are_those_of_a_pull_at_every_version(lifetime):
    chance = np.random.default_rng(5)
    with trained(servers=2, **lifetime) as training:
        training.step()
        with hw.follow(training.address, tables="users", models=(), every=1) as follower:
            for turn in range(25):
                ids = np.unique(chance.integers(0, 12, 3))
                if turn % 6 == 5:
                    training.do(lambda worker, model, table, ids=ids: table.delete(ids))
                    version = training.do(lambda worker, model, table: worker.version)
                else:
                    version = training.step(ids=ids)
                follower.wait(version, deadline=30)
                with follower.pin() as view:
                    assert np.array_equal(view.rows("users", np.arange(14)), training.pull(np.arange(14)))


def test_the_cluster_knows_its_followers_and_forgets_those_that_have_gone(training):
    with hw.follow(training.address, every=1) as follower:
        version = training.step()

        def is_told():
            """It tells now and then, as versions come; one of a former test may be known a moment longer."""
            training.step()
            return [one.version >= version for one in ask(training.address).followers] == [True]

        wait_until(is_told)
        statistics = ask(training.address)
        (one,) = statistics.followers
        assert one.version <= follower.statistics().newest
        assert one.age >= 0
        assert one.installed >= 1
        (node,) = [node for node in statistics.nodes if node.role == "follower"]
        assert node.pid == os.getpid()
        data = as_data(statistics)
        assert data["headwater_followers"] == [{"labels": {}, "value": 1}]
        (age,) = data["headwater_follower_age_seconds"]
        assert (age["labels"], age["value"]) == ({"member": str(one.member)}, statistics.followers[0].age)
        told = io.StringIO()
        Console(file=told, width=100).print(page(statistics))
        assert "follower" in told.getvalue()
    wait_until(lambda: not ask(training.address).followers)
