"""A mode of a user's own in real clusters: what the page on it shows, under every engine."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import headwater as hw
from headwater.spec.sync import Mode, parse_sync

PAGE = Path(__file__).parent.parent / "docs" / "testing.md"
COUNTS = {"steps": np.zeros(2, np.float32)}


@pytest.fixture
def my_modes(tmp_path, monkeypatch):
    """The module of the page, importable, and unknown again afterwards; its folder."""
    monkeypatch.setattr(Mode.registry, "_classes", dict(Mode.registry._classes))
    monkeypatch.delitem(sys.modules, "my_modes", raising=False)
    codes = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (code,) = [one for one in codes if "@register" in one]
    (tmp_path / "my_modes.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def train(worker):
    """After each of five steps, how many steps of each rank the answer has."""
    model = worker.model("counts", {"steps": np.zeros(2, np.float32)}, hw.Accumulate())
    seen = []
    for _ in range(5):
        model.push({"steps": np.eye(2, dtype=np.float32)[worker.rank]})
        worker.step()
        seen.append(model.parameters["steps"].tolist())
    return seen


@pytest.mark.parametrize("engine", ["inline", "local"])
def test_a_mode_of_ones_own_trains(engine, my_modes):
    result = hw.run(
        train, workers=2, servers=2, engine=engine, sync="Converging:free=3", rules=["my_modes"], deadline=60
    )
    assert result.statistics.sync == "Converging:free=3"
    for rank, seen in enumerate(result.values):
        for step, counts in enumerate(seen, start=1):
            own, other = counts[rank], counts[1 - rank]
            assert own == step
            assert step < 3 or other >= min(step - 1, 5), "nobody leads by more than one from step 3 on"


def test_an_object_of_it_is_taken_and_one_that_servers_cannot_know_is_refused(my_modes):
    with pytest.raises(hw.errors.ConfigurationError, match="expected 'sync'"):
        hw.Cluster(workers=1, sync="Converging:free=3")
    with hw.Cluster(workers=1, sync="Converging:free=3", rules=["my_modes"]) as cluster:
        import my_modes as module

        assert parse_sync(cluster.statistics().sync) == module.Converging(3)
    with hw.Cluster(workers=1, sync=module.Converging(3)) as cluster:
        assert cluster.statistics().sync == "Converging:free=3"
    with pytest.raises(hw.errors.HeadwaterError, match="got 'Converging:free=3', expected 'sync'"):
        hw.run(train, workers=1, engine="local", sync=module.Converging(3), deadline=30)


def test_a_process_that_joins_must_know_the_mode_and_is_told_how(my_modes):
    with hw.Cluster(workers=1, sync="Converging:free=3", rules=["my_modes"]) as cluster:
        code = f"import headwater as hw; hw.connect({cluster.address!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert "Converging" in done.stderr
        assert "import the module that defines it" in done.stderr
        assert "expected 'sync'" in done.stderr
