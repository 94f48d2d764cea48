"""What is followed: which of a cluster's models and tables, and how readers see them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import ConfigurationError
from headwater.kernels.slabs import PRIVATE, ChunkMemory
from headwater.shard.shared_version import SharedCopy
from headwater.shard.version_copy import VersionCopy
from headwater.spec.amounts import shown
from headwater.spec.layout import Layout
from headwater.spec.words import option

_DTYPES: tuple[m.ReadType, ...] = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Subject:
    """Models and tables of one cluster, by name, with the ids that they have there."""

    models: dict[str, int]
    tables: dict[str, int]
    model_specs: dict[int, m.ModelSpec]
    table_specs: dict[int, m.TableSpec]
    dtype: m.ReadType
    servers: int

    def copy(self, memory: ChunkMemory = PRIVATE) -> VersionCopy:
        """Room for a version, in `memory`."""
        return VersionCopy(self.model_specs, self.table_specs, self.dtype, self.servers, memory)

    def shared(self) -> SharedCopy:
        """For versions that lie in another process's memory."""
        return SharedCopy(self.model_specs, self.table_specs, self.dtype)

    def views(self, model: int, vector: NDArray[Any], layout: Layout) -> dict[str, NDArray[Any]]:
        """Each tensor in its shape, in the order in which it was declared; read-only."""
        typed = vector.view(bfloat16()) if self.dtype == "bfloat16" else vector
        views = layout.views(typed)
        for view in views.values():
            view.flags.writeable = False
        ordered = {tensor.name: views[tensor.name] for tensor in self.model_specs[model].tensors}
        return layout.with_aliases(ordered)


def bfloat16() -> np.dtype[Any]:
    """NumPy's type for it. Raises ConfigurationError where its package is not installed."""
    try:
        found: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError as error:
        raise ConfigurationError(
            f"{option('dtype', 'bfloat16')} needs the package ml-dtypes: install Headwater with its extra "
            f"`weights`"
        ) from error
    return found


def read_type(dtype: str) -> m.ReadType:
    """Raises ConfigurationError, which lists the types, for one that cannot be."""
    found = {"bf16": "bfloat16", "fp32": "float32"}.get(dtype, dtype) if isinstance(dtype, str) else dtype
    for known in _DTYPES:
        if isinstance(found, str) and found == known:
            if known == "bfloat16":
                bfloat16()
            return known
    raise ConfigurationError(f"{option('dtype')} must be one of {', '.join(_DTYPES)}, got {shown(dtype)}")


def names(what: str, given: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """What a user named; None: all. Raises ConfigurationError for what is no name."""
    if given is None:
        return None
    listed = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    if not all(isinstance(name, str) for name in listed):
        raise ConfigurationError(f"{what} must be names, got {shown(given)}")
    return tuple(dict.fromkeys(listed))


def choose(
    description: m.Description,
    models: Sequence[str] | None,
    tables: Sequence[str] | None,
    dtype: m.ReadType,
    servers: int,
) -> Subject:
    """The models and tables with these names; None: all that there are.

    Raises:
        ConfigurationError: one does not exist; lists those that do.
    """
    known = {info.spec.name: info for info in description.models}
    rows = {spec.name: id for id, spec in enumerate(description.tables)}
    chosen = _among("model", models, known)
    chosen_tables = _among("table", tables, rows)
    if not chosen and not chosen_tables:
        raise ConfigurationError("the cluster has no models and no tables yet: there is nothing to follow")
    return Subject(
        {name: known[name].model for name in chosen},
        {name: rows[name] for name in chosen_tables},
        {known[name].model: known[name].spec for name in chosen},
        {rows[name]: description.tables[rows[name]] for name in chosen_tables},
        dtype,
        servers,
    )


def _among(what: str, wanted: Sequence[str] | None, known: dict[str, Any]) -> Sequence[str]:
    if wanted is None:
        return tuple(known)
    for name in wanted:
        if name not in known:
            there = ", ".join(map(repr, known)) or "none"
            raise ConfigurationError(f"the cluster has no {what} {name!r}: its {what}s are {there}")
    return wanted
