"""Batches of samples: as torch puts them together, and as NumPy arrays where there is no torch in them."""

import collections

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

import headwater as hw
from headwater.data.fetch import fetch
from headwater.errors import ConfigurationError

Sample = collections.namedtuple("Sample", "x y")
INDICES = np.array([2, 0, 3])


class Samples(Dataset):
    def __init__(self, make):
        self._make = make

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self._make(index)


TORCHS = {
    "a tensor and an integer": lambda i: (torch.full((4,), float(i)), i % 2),
    "a tensor and a float": lambda i: (torch.full((4,), float(i)), i / 2),
    "a named tuple": lambda i: Sample(torch.full((2,), float(i)), i),
    "a dictionary": lambda i: {"x": torch.ones(2) * i, "y": i, "name": f"sample {i}"},
    "nested": lambda i: {"x": (torch.ones(1) * i, [i, i + 1]), "y": Sample(i, {"z": torch.ones(1)})},
    "a list": lambda i: [torch.ones(2) * i, i],
    "a tensor": lambda i: torch.ones(3) * i,
    "a scalar tensor and a truth": lambda i: (torch.tensor(i), i > 1),
}
ARRAYS = {
    "an array and an integer": lambda i: (np.full(3, i, np.float32), i),
    "a NumPy scalar": lambda i: (np.float32(i), np.int64(i)),
    "numbers": lambda i: (float(i), i),
}


def same(left, right):
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            same(left[key], right[key])
    elif isinstance(left, tuple | list):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            same(one, other)
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert left.equal(right)
    else:
        assert left == right


@pytest.mark.parametrize("kind", {**TORCHS, **ARRAYS})
def test_samples_of_a_torch_data_set_are_put_together_exactly_as_torch_does(kind):
    make = {**TORCHS, **ARRAYS}[kind]
    expected = default_collate([make(i) for i in INDICES.tolist()])
    same(fetch(Samples(make), INDICES), expected)
    same(fetch(Subset(Samples(make), list(range(8))), INDICES), expected)


@pytest.mark.parametrize("kind", TORCHS)
def test_samples_with_tensors_in_them_are_too_whatever_data_set_they_are_of(kind):
    samples = [TORCHS[kind](i) for i in range(8)]
    same(fetch(samples, INDICES), default_collate([samples[i] for i in INDICES.tolist()]))


def test_a_tensor_data_set_gives_tensors():
    data = TensorDataset(torch.arange(8.0).reshape(8, 1), torch.arange(8))
    x, y = fetch(data, INDICES)
    assert (x.reshape(-1).tolist(), y.tolist()) == ([2.0, 0.0, 3.0], [2, 0, 3])


def test_samples_without_tensors_become_arrays_of_the_same_structure():
    samples = [Sample(float(i), {"a": [i, i + 1], "name": str(i)}) for i in range(8)]
    batch = fetch(samples, INDICES)
    assert isinstance(batch, Sample)
    assert batch.x.tolist() == [2.0, 0.0, 3.0]
    assert [part.tolist() for part in batch.y["a"]] == [[2, 0, 3], [3, 1, 4]]
    assert batch.y["name"] == ["2", "0", "3"]
    pairs = fetch([(i, np.ones(2)) for i in range(8)], INDICES)
    assert isinstance(pairs, tuple)
    assert pairs[1].shape == (3, 2)


def test_samples_of_different_lengths_are_named():
    with pytest.raises(ConfigurationError, match=r"have \[1, 2\] parts and cannot be put together"):
        fetch([[0], [0, 1], [0]], np.array([0, 1]))


def test_pandas_objects_are_read_by_position():
    pandas = pytest.importorskip("pandas")
    index = [7, 3, 0, 1]
    series = pandas.Series([30, 10, 20, 0], index=index)
    frame = pandas.DataFrame({"x": [1.0, 2.0, 3.0, 4.0], "name": list("abcd")}, index=index)
    x, y, rows = fetch((np.array([30, 10, 20, 0]), series, frame), INDICES)
    assert y.tolist() == x.tolist() == [20, 30, 0]
    assert rows["name"].tolist() == ["c", "a", "d"]
    assert rows["x"].to_numpy().tolist() == [3.0, 1.0, 4.0]
    strings = fetch(pandas.Series(list("abcd"), index=index), INDICES)
    assert list(strings) == ["c", "a", "d"]


def test_the_usual_loop_over_a_torch_data_set_trains():
    def train(worker):
        net = torch.nn.Linear(4, 2)
        opt = hw.torch.DistributedOptimizer(worker, net, hw.SGD(lr=0.1))
        for x, y in worker.batches(Samples(TORCHS["a tensor and an integer"]), 4):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            opt.step()
        return worker.version

    assert hw.run(train, workers=2, engine="inline", patience=5, deadline=60).values == [1, 1]
