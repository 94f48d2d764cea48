"""The benchmarks against other systems, which are no part of the package, still measure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MEASURE = """
import json
from benchmarks import peers
from headwater.bench.figures import Effort
import msgspec

del peers.RIVALS["Ray"]  # which takes half a minute to start and to end
tiny = Effort(repeats=2, rounds=2, shapes={"w": (64, 1024), "b": (100,)})
print(json.dumps(msgspec.to_builtins(peers.measure_peers(tiny))))
"""


@pytest.mark.long
def test_rounds_of_other_systems_are_measured_beside_headwaters():
    pytest.importorskip("torch", reason="needs the extra `torch`")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert {figure["limit_name"] for figure in figures} == {"gloo all-reduce", "torch RPC"}
    assert all(figure["figure"] > 0 and figure["limit"] > 0 for figure in figures)
