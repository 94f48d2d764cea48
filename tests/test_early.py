"""Children that begin while a script is loaded become its nodes; those that do not fit, or are left, end."""

import subprocess
import sys

import psutil
import pytest

from headwater.engines import early
from headwater.engines.process import LaunchContext

pytestmark = pytest.mark.fresh

SCRIPT = """
import os, sys
import psutil

BEFORE = [child.pid for child in psutil.Process().children(recursive=True)]
CHANGE = None

def train(worker):
    worker.barrier()
    return os.getpid() in BEFORE, len(BEFORE)
"""


def begun(folder, text="import torch.nn\nimport numpy as np\nfrom mine import torch\n", **counts):
    script = folder / "script.py"
    script.write_text(text)
    return early.begun(script, **{"workers": 1, "servers": 1, **counts})


def children(before):
    return [child for child in psutil.Process().children() if child not in before]


def test_what_a_script_imports_at_its_top_and_takes_long_is_imported_ahead(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch.nn as nn\nfrom numpy import zeros\nimport json\nfrom . import jax\nif 1:\n  import jax"
    )
    assert early.heavy_imports(script) == ["numpy", "torch", "headwater.torch"]
    script.write_text("def (")
    assert early.heavy_imports(script) == ()
    assert early.heavy_imports(tmp_path / "none.py") == ()


def test_children_that_fit_are_taken_and_all_others_end(tmp_path, monkeypatch):
    before = psutil.Process().children()
    with begun(tmp_path, "", workers=2):
        assert len(children(before)) == 3
        here = LaunchContext.here(early.sharing_cores(2), str(tmp_path))
        worker = early.take("worker", here)
        assert worker.process.poll() is None
        monkeypatch.setenv("CHANGED", "by the script")
        assert early.take("worker", LaunchContext.here(early.sharing_cores(2), str(tmp_path))) is None
        assert len(children(before)) == 2
        assert early.take("standby", here) is None
    assert [child.pid for child in children(before)] == [worker.process.pid]
    worker.discard()
    assert not children(before)
    assert early.take("server", here) is None


def test_a_script_that_raises_leaves_no_child(tmp_path):
    before = psutil.Process().children()
    with pytest.raises(ZeroDivisionError), begun(tmp_path):
        raise ZeroDivisionError
    assert not children(before)


@pytest.mark.parametrize("change", [False, True], ids=["nothing", "its environment"])
def test_nodes_are_the_processes_that_began_first_unless_the_script_changes(tmp_path, change):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("CHANGE = None", "os.environ['CHANGED'] = 'yes'" if change else ""))
    code = "from headwater.cli import main; main()"
    command = [sys.executable, "-c", code, "run", str(script), "--workers", "2", "--servers", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.stdout.count(f"({not change}, 3)") == 2, result.stdout + result.stderr
