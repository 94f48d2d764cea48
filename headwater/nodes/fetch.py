"""Samples by index from whatever a user calls a data set: arrays, tuples of arrays, map-style data sets."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.errors import ConfigurationError

Indices = NDArray[np.int64]


def length_of(dataset: Any) -> int:
    """The number of samples.

    Raises:
        ConfigurationError: it has none, or the arrays of a tuple differ in length.
    """
    if isinstance(dataset, tuple):
        lengths = [length_of(part) for part in dataset]
        if len(set(lengths)) != 1:
            raise ConfigurationError(f"the arrays of a data set must have one length, got {lengths}")
        return lengths[0]
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigurationError(
            f"a data set needs __len__ and __getitem__, got {type(dataset).__name__}: "
            f"pass an array, a tuple of arrays or a map-style Dataset"
        )
    return len(dataset)


def fetch(dataset: Any, indices: Indices) -> Any:
    """The samples at `indices` as one batch.

    Arrays and tensors are indexed at once, a tuple of them gives a tuple; the samples of any other
    data set are fetched one by one and stacked, as torch's default collation does.
    """
    if isinstance(dataset, tuple):
        return tuple(fetch(part, indices) for part in dataset)
    if hasattr(dataset, "dtype") and hasattr(dataset, "shape"):
        return dataset[indices]
    fetch_many = getattr(dataset, "__getitems__", None)
    samples = fetch_many(indices.tolist()) if fetch_many else [dataset[i] for i in indices.tolist()]
    return _stack(samples)


def _stack(samples: list[Any]) -> Any:
    first = samples[0]
    if isinstance(first, tuple | list):
        return type(first)(_stack(list(part)) for part in zip(*samples, strict=True))
    if isinstance(first, Mapping):
        return {key: _stack([sample[key] for sample in samples]) for key in first}
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(first, torch.Tensor):
        return torch.stack(samples)
    if isinstance(first, str | bytes):
        return samples
    return np.stack([np.asarray(sample) for sample in samples])
