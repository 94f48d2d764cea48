"""For every version of a run: a view, a checkpoint and the same run with other servers are equal."""

import numpy as np
import pytest

import headwater as hw

SIZE, IDS = 700, 40


def by_id(ids, rows):
    return {int(id): row.tobytes() for id, row in zip(ids, rows, strict=True)}


def run(folder, steps, servers):
    """version → what a view had, which is what the checkpoint of that version has."""
    addresses, seen = [], {}

    def train(worker):
        chance = np.random.default_rng(worker.rank)
        values = np.linspace(-1, 1, SIZE, dtype=np.float32)
        model = worker.model("net", {"w": values}, hw.Adam(lr=1e-3))
        table = worker.table("users", 3, hw.Adagrad(lr=0.1), initializer=hw.Uniform(-1.0, 1.0), seed=3)
        worker.barrier()
        follower = hw.follow(addresses[0], "net", "users", every=1) if worker.rank == 0 else None
        for step in range(steps):
            model.push({"w": chance.normal(size=SIZE).astype(np.float32)})
            ids = np.unique(chance.integers(0, IDS, 5))
            table.push(ids, chance.normal(size=(len(ids), 3)).astype(np.float32))
            worker.step()
            if follower is not None:  # the other one waits for the next round
                look(follower, worker, step)
        if follower is not None:
            follower.close()

    def look(follower, worker, step):
        follower.wait(worker.version, deadline=60)
        with follower.pin() as view:
            assert view.version.number == worker.version == step + 1
            rows = by_id(*next(view.scan("users")))
            seen[worker.version] = view.parameters("net")["w"].tobytes(), rows
        saved = hw.load_checkpoint(worker.checkpoint())
        assert saved["net"]["w"].tobytes() == seen[worker.version][0]
        assert by_id(saved["users"]["ids"], saved["users"]["values"]) == rows

    options = {"workers": 2, "servers": servers, "sync": "sync", "engine": "inline", "deadline": 120}
    hw.run(train, checkpoint=folder, every=10**6, started=addresses.append, **options)
    return seen


@pytest.mark.parametrize("steps", [6, pytest.param(200, marks=pytest.mark.long)])
def test_every_version_is_that_of_its_checkpoint_and_of_a_second_run(tmp_path, steps):
    first = run(tmp_path / "first", steps, servers=2)
    assert first.keys() == set(range(1, steps + 1))
    assert run(tmp_path / "second", steps, servers=3) == first
