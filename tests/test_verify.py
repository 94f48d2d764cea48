"""Are standbys really equal? While training goes on, and where one is not."""

import dataclasses
import functools
import json
import os
import re
import signal
import time

import numpy as np
import pytest
from checkpoints import model, table
from typer.testing import CliRunner

import headwater as hw
from headwater import messages as m
from headwater.cli.app import app
from headwater.shard.digest import digests
from headwater.shard.snapshot import ShardSnapshot


def fit(folder, worker):
    """Train a model that is clipped and a table until the test says stop."""
    net = worker.model("net", {"w": np.zeros((90, 90), np.float32)}, hw.Adam(lr=0.1), clip_norm=1.0)
    rows = worker.table("rows", 3, hw.Adagrad(), initializer=hw.Normal(), admission=hw.AfterCount(2))
    numbers = np.random.default_rng(worker.rank)
    while not (folder / "stop").exists():
        net.push({"w": numbers.standard_normal((90, 90))})
        ids = np.unique(numbers.integers(-500, 500, 40))
        rows.push(ids, numbers.standard_normal((len(ids), 3)))
        worker.step()


def wait_until(cluster, ready, seconds=60):
    until = time.monotonic() + seconds
    while not ready(cluster.statistics()):
        assert time.monotonic() < until, cluster.statistics()
        assert cluster.next_outcome(0.05) is None


def replicated(statistics):
    standbys = [node for node in statistics.nodes if node.role == "standby"]
    return len(standbys) == 2 and not statistics.unreplicated and statistics.version > 20


def command(*arguments):
    return CliRunner().invoke(app, ["verify", *arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize("mode", [pytest.param("sync", marks=pytest.mark.long), "async"])
def test_standbys_are_equal_at_one_entry_while_training_goes_on(mode, tmp_path):
    options = {"engine": "local", "replicas": 1, "patience": 5, "deadline": 60, "output": print}
    with hw.Cluster(workers=2, servers=2, sync=mode, **options) as cluster:
        for rank in range(2):
            cluster.start_worker(rank, functools.partial(fit, tmp_path))
        wait_until(cluster, replicated)
        versions = []
        for _ in range(5):
            found = cluster.verify()
            assert found.equal, found
            assert [(shard.index, shard.parts) for shard in found.shards] == [(0, 13), (1, 13)]
            versions.append(found.version)
            wait_until(cluster, lambda statistics, version=found.version: statistics.version > version)
        assert versions == sorted(set(versions))
        result = command(cluster.address)
        assert result.exit_code == 0, result.output
        assert [line.split() for line in result.output.splitlines()[2:]] == [
            ["0", "equal", "13"],
            ["1", "equal", "13"],
        ]
        (tmp_path / "stop").touch()
        ended = [cluster.next_outcome(30), cluster.next_outcome(30)]
        assert all(outcome is not None and outcome.failure is None for outcome in ended)


def test_while_servers_are_replaced_a_shard_is_equal_or_has_nothing_to_compare(tmp_path):
    options = {"engine": "local", "replicas": 1, "patience": 5, "deadline": 60, "output": print}
    with hw.Cluster(workers=1, servers=2, sync="async", **options) as cluster:
        cluster.start_worker(0, functools.partial(fit, tmp_path))
        wait_until(cluster, replicated)
        for index in (1, 0):
            nodes = cluster.statistics().nodes
            os.kill(next(n.pid for n in nodes if n.role == "server" and n.index == index), signal.SIGKILL)
            until = time.monotonic() + 60
            while not (found := cluster.verify()).equal:
                assert not any(shard.differing for shard in found.shards), found
                assert time.monotonic() < until, cluster.statistics()
                assert cluster.next_outcome(0.05) is None
        (tmp_path / "stop").touch()
        assert cluster.next_outcome(30).failure is None


def corrupt_parameters(shard):
    shard.vectors[0].values[17] += 1


def corrupt_state(shard):
    shard.vectors[0].states["exp_avg_sq"][3] = 7


def corrupt_counts(shard):
    shard.vectors[0].counts[0] += 1


def corrupt_rows(shard):
    ids = shard.tables[0].snapshot().ids
    shard.tables[0].delete(ids[:1], shard.version)


def corrupt_ledger(shard):
    shard._state.ledger.record(99, 1, m.StepResult(1, True, 1, 0))


CORRUPT = [
    (corrupt_parameters, ["model 'net': parameters"]),
    (corrupt_state, ["model 'net': state 'exp_avg_sq'"]),
    (corrupt_counts, ["model 'net': counts and settings"]),
    (corrupt_rows, ["table 'rows': ids", "table 'rows': rows"]),
    (corrupt_ledger, ["ledger"]),
]


@pytest.mark.parametrize(("corrupt", "parts"), CORRUPT, ids=[one.__name__ for one, _ in CORRUPT])
def test_a_standby_that_differs_is_named_with_the_part(corrupt, parts, tmp_path):
    with hw.Cluster(workers=2, servers=2, engine="inline", replicas=1, patience=5, deadline=60) as cluster:
        for rank in range(2):
            cluster.start_worker(rank, functools.partial(fit, tmp_path))
        wait_until(cluster, replicated)
        (tmp_path / "stop").touch()
        for _ in range(2):
            assert cluster.next_outcome(30).failure is None
        assert cluster.verify().equal
        standbys = [one for one in cluster._engine._servers if one.assignment.role == "standby"]
        standby = [one for one in standbys if one.assignment.index == 1][-1]  # one that took another's place
        standby.pump.look(lambda: corrupt(standby.machine.shard))
        good, bad = cluster.verify().shards
        assert good.equal
        assert (bad.index, bad.reason) == (1, "")
        assert list(bad.differing)[: len(parts)] == parts
        result = command(cluster.address)
        assert result.exit_code == 1
        assert "1      differs" in result.output
        for part in parts:
            own, other = re.search(rf"{part} +([0-9a-f]{{32}}) ([0-9a-f]{{32}})\n", result.output).groups()
            assert own != other


def test_a_shard_without_a_standby_is_named():
    with hw.Cluster(workers=1, servers=2, patience=5, deadline=30) as cluster:
        result = command(cluster.address)
        assert result.exit_code == 1
        assert result.output.count("none to compare") == 2
        assert result.output.count("it has no standby") == 2
        found = json.loads(command(cluster.address, "--json").output)
        assert [shard["reason"] for shard in found["shards"]] == ["it has no standby"] * 2


# ── one server ──────────────────────────────────────────────────────────────────────────────────


def snapshot(models=(), tables=()):
    return ShardSnapshot(
        index=1,
        servers=2,
        position=9,
        version=4,
        models=tuple(models),
        changed=(4,) * len(models),
        tables=tuple(tables),
        ledger=(),
        standings=m.LogStateRecord(4, 9, 3, 0, 1, 1, (0,), (), (), ()),
        recorded=m.DataProgress(),
    )


def test_every_array_has_its_part_and_rows_count_as_a_set():
    def differing(models, tables):
        return [one.part for one in digests(snapshot(models, tables)) if plain[one.part] != one.value]

    expiring = functools.partial(table, expiry=m.RuleSpec("AfterSteps", {"steps": 3}))
    plain = {one.part: one.value for one in digests(snapshot([model()], [expiring()]))}
    shuffled = expiring()
    order = np.random.default_rng(3).permutation(len(shuffled.ids))
    arrays = {name: getattr(shuffled, name)[order] for name in ("ids", "counts", "values", "last")}
    states = {name: state[order] for name, state in shuffled.states.items()}
    assert differing([model()], [dataclasses.replace(shuffled, states=states, **arrays)]) == []
    changed = model()
    changed.values[-1] += 1
    assert differing([changed], [expiring()]) == [f"model {changed.spec.name!r}: parameters"]
    changed = expiring()
    changed.values[0, 0] += 1
    assert differing([model()], [changed]) == [f"table {changed.spec.name!r}: rows"]
