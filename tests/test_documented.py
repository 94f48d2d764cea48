"""What an editor shows of the public names: every argument and every field is explained, and every type is
known."""

import dataclasses
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest

import headwater as hw
from headwater.cluster import NodeConfig, NodeOptions
from headwater.spec.cluster import ClusterConfig, ClusterOptions

ROOT = Path(__file__).parent.parent


def explained(text):
    """The names that a docstring's `Args:` and `Attributes:` explain."""
    names = re.findall(r"^ {4,8}([\w, ]+): \S", inspect.cleandoc(text or "").replace("\t", "    "), re.M)
    return {name.strip() for several in names for name in several.split(",")}


def test_help_of_run_explains_every_argument():
    """As `help(hw.run)`, and Shift-Tab in a notebook, show them."""
    for function in (hw.run, hw.Cluster.__init__):
        parameters = set(inspect.signature(function).parameters) - {"self"}
        assert {"workers", "every", "lease", "bind", "token", "output"} <= parameters
        assert parameters <= explained(function.__doc__)


def test_keywords_and_configurations_have_the_same_fields():
    for config, options in ((ClusterConfig, ClusterOptions), (NodeConfig, NodeOptions)):
        assert {one.name for one in dataclasses.fields(config)} == set(options.__annotations__)


def test_a_wrong_keyword_is_told_with_the_right_one():
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'sevrers'\. Did you mean 'servers'"):
        hw.run(print, sevrers=3)


VALUES = [
    value
    for name in hw.__all__
    if dataclasses.is_dataclass(value := getattr(hw, name)) or hasattr(value, "__struct_fields__")
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value.__name__)
def test_every_field_of_a_public_value_is_explained(value):
    if issubclass(value, msgspec.Struct):
        fields = set(value.__struct_fields__)
    else:
        fields = {field.name for field in dataclasses.fields(value)}
    assert fields <= explained(value.__doc__), fields - explained(value.__doc__)


USER = """
    import numpy as np
    import headwater as hw

    def train(worker: hw.Worker) -> float:
        model = worker.model("m", {"w": np.zeros(3, np.float32)}, hw.Adam(lr=hw.Cosine(0.1, over=100)))
        reveal_type(hw.torch.DistributedOptimizer)
        reveal_type(hw.jax.DistributedOptimizer)
        return float(model.pull()["w"][0])

    result = hw.run(train, workers=2, servers=2, every="100steps", checkpoint="runs")
    reveal_type(result)
    reveal_type(result.statistics.progress[0])
    hw.run(train, sevrers=2)
    hw.run(train, workers="2")
    hw.no_such_name
"""


@pytest.mark.long
def test_a_users_file_is_typed(tmp_path):
    """Every public name has its type, and wrong keywords, types and names are errors."""
    (tmp_path / "user.py").write_text(textwrap.dedent(USER))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", "user.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    shown = [re.sub(r"^user.py:(\d+): ", "", line) for line in done.stdout.splitlines()]
    types = [line for line in shown if "Revealed type" in line]
    errors = [line for line in shown if line.startswith("error")]
    assert "DistributedOptimizer" in types[0]
    assert "torch" in types[0]
    assert "DistributedOptimizer" in types[1]
    assert [re.search(r'"([\w.]+)"', line).group(1) for line in types[2:]] == [
        "headwater.driver.RunResult",
        "headwater.messages.roster.Progress",
    ]
    assert len(errors) == 3, done.stdout
    assert 'Unexpected keyword argument "sevrers"' in errors[0]
    assert 'Argument "workers"' in errors[1]
    assert 'no attribute "no_such_name"' in errors[2]
