"""The repository keeps its own rules: lint, types, layers, public names, and docs that tell the truth."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import headwater

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "headwater"

LAYERS = [
    ["errors"],
    ["messages"],
    ["spec"],
    ["kernels"],
    ["log", "shard"],
    ["machines"],
    ["wire", "checkpoint", "data", "weights"],
    ["runtime"],
    ["worker"],
    ["torch", "jax"],
    ["engines"],
    ["cluster", "supervisor", "storage", "run", "standalone"],
    ["cli", "bench", "testing", "__main__", "__init__"],
]
"""A module imports from its own group and the groups above it (docs/architecture.md)."""


FROM_THE_NETWORK = [
    "messages",
    "spec",
    "log",
    "machines",
    "wire",
    "checkpoint",
    "shard",
    "kernels",
    "runtime",
    "worker",
]
"""Folders on the way of what comes from the network."""


def _run(*command):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing():
    _run("ruff", "check", ".")
    _run("ruff", "format", "--check", ".")


def test_mypy_finds_nothing():
    _run("mypy")


def _group_of(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return next(i for i, group in enumerate(LAYERS) if part in group)


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "headwater":
            yield from (f"headwater.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_a_module_imports_only_from_its_own_group_and_those_above(path):
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] != "headwater" or len(parts) == 1:
            continue
        target = PACKAGE / parts[1]
        target = target if target.is_dir() else target.with_suffix(".py")
        assert _group_of(target) <= _group_of(path), f"{path.name} imports {name} from a group below its own"


@pytest.mark.parametrize("folder", FROM_THE_NETWORK)
def test_nothing_is_unpickled_on_the_way_of_what_comes_from_the_network(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        assert not {"pickle", "cloudpickle", "marshal", "shelve"} & set(_imports(path)), path


def test_no_decision_reads_a_clock_that_can_jump():
    """Dates are written into manifests and certificates; everything that waits counts monotonic seconds."""
    dates = {"write.py", "certificates.py"}
    for path in PACKAGE.rglob("*.py"):
        jumps = re.findall(r"\btime\.(?:time|time_ns|localtime|gmtime)\b|\bdatetime\b", path.read_text())
        assert not jumps or path.name in dates or path.parent.name == "bench", (path, jumps)


def test_importing_headwater_loads_neither_torch_nor_ray_nor_jax_nor_the_compiler():
    code = "import sys, headwater; print([m for m in ('torch', 'ray', 'jax', 'numba') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_every_public_name_exists_and_is_documented():
    documented = set(re.findall(r"^\| `(\w+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    assert documented == set(headwater.__all__)
    for name in headwater.__all__:
        assert getattr(headwater, name).__doc__, name


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"```bash\n(python3 -m venv.*)\n```", (ROOT / "README.md").read_text())
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_test_that_the_guarantees_name_exists():
    defined = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        names = re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
        defined |= {f"{path.name}::{name}" for name in names}
    named = re.findall(r"`(test_\w+\.py::test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text())
    assert len(named) > 15
    assert not set(named) - defined


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))], ids=lambda p: p.name
)
def test_links_between_pages_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target
