"""The cores that workers share out: those that this process may use, not those that the machine has."""

import os
import subprocess
import sys

import pytest

from headwater.engines import early
from headwater.engines.cores import available_cores
from headwater.engines.process import LaunchContext


@pytest.fixture
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


def groups(tmp_path, own, files):
    """A tree of control groups with these files, and the file that says which of them this process is in."""
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "own").write_text(own)
    return tmp_path / "groups", tmp_path / "own"


@pytest.mark.usefixtures("sixteen_cores")
@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {}, 16),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 16),
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "nonsense\n"}, 16),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "200000 100000\n"}, 2),
        ("0::/not/there\n", {"cpu.max": "600000 100000\n"}, 6),
        (
            "4:memory:/m\n3:cpu,cpuacct:/d\n",
            {
                "cpu,cpuacct/d/cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct/d/cpu.cfs_period_us": "50000\n",
                "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            5,
        ),
        ("1:cpu:/d\n", {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_a_quota_counts_and_the_smallest_one_of_all_groups_above(tmp_path, own, files, cores):
    assert available_cores(*groups(tmp_path, own, files)) == cores


@pytest.mark.usefixtures("sixteen_cores")
def test_without_control_groups_the_cores_are_those_that_the_process_is_bound_to(tmp_path):
    assert available_cores(tmp_path, tmp_path / "none") == 16


def test_a_process_bound_to_one_core_has_one():
    code = "from headwater.engines.cores import available_cores; print(available_cores())"
    bound = f"import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); {code}"
    assert subprocess.run([sys.executable, "-c", bound], capture_output=True, check=True).stdout == b"1\n"


@pytest.mark.parametrize(("workers", "threads"), [(1, "6"), (2, "3"), (4, "1"), (9, "1")])
def test_workers_share_the_cores_out_unless_the_user_said_otherwise(monkeypatch, workers, threads):
    monkeypatch.setattr(early, "available_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert LaunchContext.here(early.sharing_cores(workers)).environment["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert LaunchContext.here(early.sharing_cores(workers)).environment["OMP_NUM_THREADS"] == "7"
