"""A torch DataLoader inside a worker: the documented recipe, and what its forked processes keep open."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import headwater as hw

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),  # JAX's, once another test has loaded it
]

PAGE = Path(__file__).parent.parent / "docs" / "data.md"


def connections():
    """The sockets and windows this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith(("socket:", "/memfd:headwater")):
            found.add(target)
    return found


class Inherited(Dataset):
    """How many of the given connections the process that loads a sample has open."""

    def __init__(self, of):
        self._of = of

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return len(self._of & connections()), os.getpid()


def test_processes_of_a_data_loader_have_none_of_the_connections():
    before = connections()
    with hw.Cluster(workers=1, servers=2, patience=5, deadline=60) as cluster, cluster.worker() as worker:
        net = torch.nn.Linear(2, 1)
        opt = hw.torch.DistributedOptimizer(worker, net, hw.SGD(lr=1.0))
        ours = connections() - before
        assert any("memfd" in target for target in ours)
        counts, pids = zip(*DataLoader(Inherited(ours), num_workers=2, timeout=30), strict=True)
        assert [int(count) for count in counts] == [0] * 4
        assert os.getpid() not in [int(pid) for pid in pids]
        opt.step()  # and the parent's are as they were
        assert ours <= connections()


def test_the_recipe_with_a_data_loader_trains():
    page = PAGE.read_text().partition("## With a torch DataLoader")[2]
    recipe = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    names = {}
    exec(recipe, names)
    result = hw.run(names["train"], workers=2, engine="inline", patience=5, deadline=60)
    assert result.version == 16
    assert result.values == [pytest.approx(3, abs=0.3)] * 2
