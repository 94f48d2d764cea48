"""Samples by index from what users call a data set: arrays, tuples of them, map-style data sets, files."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.data.files import Files
from headwater.errors import ConfigurationError

Indices = NDArray[np.int64]


def length_of(dataset: Any) -> int:
    """The number of samples.

    Raises:
        ConfigurationError: it has none, is a mapping with other keys than numbers, or the arrays of a tuple
            differ in length.
    """
    if isinstance(dataset, tuple):
        if not dataset:
            raise ConfigurationError("a data set needs at least one array, got an empty tuple")
        lengths = [length_of(part) for part in dataset]
        if len(set(lengths)) != 1:
            raise ConfigurationError(f"the arrays of a data set must have one length, got {lengths}")
        return lengths[0]
    scalar = isinstance(dataset, str | bytes | np.generic)
    if scalar or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigurationError(
            f"a data set needs __len__ and __getitem__, got {type(dataset).__name__}: "
            f"pass an array, a tuple of arrays, a map-style Dataset or hw.Files"
        )
    if isinstance(dataset, Mapping) and 0 not in dataset:
        keys = ", ".join(map(repr, list(dataset)[:6])) or "none"
        raise ConfigurationError(
            f"a data set is asked for sample 0, 1, …, got a {type(dataset).__name__} with the keys {keys}: "
            f"pass one of its values, or a tuple of them"
        )
    try:
        return len(dataset)
    except TypeError as error:
        raise ConfigurationError(
            f"a data set needs a length, got {type(dataset).__name__}: {error}"
        ) from error


def groups_of(dataset: Any) -> tuple[int, ...] | None:
    """How many samples each group of neighbours has that are best read together; None: any order will do."""
    parts = dataset if isinstance(dataset, tuple) else (dataset,)
    return next((part.groups for part in parts if isinstance(part, Files)), None)


def fetch(dataset: Any, indices: Indices) -> Any:
    """The samples at `indices` as one batch.

    Arrays, tensors and files are indexed at once, pandas objects by position; a tuple gives a tuple. The
    samples of any other data set are fetched one by one and put together: those of a torch Dataset, and
    samples with tensors in them, by torch's `default_collate`, others in the same way as NumPy arrays.
    """
    if isinstance(dataset, tuple):
        return tuple(fetch(part, indices) for part in dataset)
    if isinstance(dataset, Files):
        return dataset[indices]
    if hasattr(dataset, "iloc"):
        found = dataset.iloc[indices]
        return found.to_numpy() if found.ndim == 1 else found  # a Series would be read by label again
    if hasattr(dataset, "dtype") and hasattr(dataset, "shape"):
        return dataset[indices]
    fetch_many = getattr(dataset, "__getitems__", None)
    samples = fetch_many(indices.tolist()) if fetch_many else [dataset[i] for i in indices.tolist()]
    torch = sys.modules.get("torch")
    if torch is not None and (
        isinstance(dataset, torch.utils.data.Dataset) or _has_tensor(samples[0], torch)
    ):
        return torch.utils.data.default_collate(samples)
    return _stack(samples)


def _has_tensor(sample: Any, torch: ModuleType) -> bool:
    if isinstance(sample, Mapping):
        return any(_has_tensor(part, torch) for part in sample.values())
    if isinstance(sample, tuple | list):
        return any(_has_tensor(part, torch) for part in sample)
    return isinstance(sample, torch.Tensor)


def _stack(samples: list[Any]) -> Any:
    """As `default_collate`, with arrays for tensors, and tuples that stay tuples."""
    first = samples[0]
    if isinstance(first, tuple | list):
        sizes = {len(sample) for sample in samples}
        if len(sizes) > 1:
            raise ConfigurationError(
                f"the samples of a batch have {sorted(sizes)} parts and cannot be put together: pad them in "
                f"the data set, or read them yourself by the indices of worker.splits"
            )
        parts = [_stack(list(part)) for part in zip(*samples, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if isinstance(first, Mapping):
        return {key: _stack([sample[key] for sample in samples]) for key in first}
    if isinstance(first, str | bytes):
        return samples
    return np.stack([np.asarray(sample) for sample in samples])
