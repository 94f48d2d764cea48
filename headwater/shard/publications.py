"""What a shard copies for followers at an entry of the log, and the memory for it.

Invariants:
- What was copied stays as it is until the follower has received it from every server; only then is its
  memory used again. Of a follower that is gone it is let go, since some of it may still be on its way.
- Followers of one entry share one copy of a model.
- There is memory for as many followers as the sequencer has publications under way (`log/sequencer.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.kernels import copy_out
from headwater.kernels.cast import cast_bfloat16
from headwater.shard.cuts import Arrays, ShardCut
from headwater.shard.tables import Tables
from headwater.shard.vector import Vector

_KEPT = 2
"""Copies of one length that are kept for the next publication."""


class Publications:
    """Of the shard that has `vectors` and `tables`. Does not lock by itself."""

    def __init__(self, vectors: Mapping[int, Vector], tables: Tables) -> None:
        self._vectors = vectors
        self._tables = tables
        self._followers: set[int] = set()
        self._lent: dict[int, Arrays] = {}
        self._cuts: dict[int, ShardCut] = {}
        self._free: dict[tuple[int, str], Arrays] = {}
        self._shared: dict[tuple[int, str], NDArray[Any]] = {}
        self._at = -1

    def follow(self, member: int, request: m.Publish, version: int) -> None:
        """The member has a publication from now on, here or on the server that this standby follows."""
        self._followers.add(member)
        for wanted in request.tables:
            self._tables[wanted.id].touched.begin(version)

    def cut(
        self, member: int, request: m.Publish, version: int, position: int, recorded: m.DataProgress
    ) -> None:
        """Copy what the member asks for, until it is taken; blocks for a pass over what is copied."""
        if self._at != position:
            self._at, self._shared = position, {}
        models = {
            wanted.id: self._copy(wanted.id, request.dtype)
            for wanted in request.models
            if self._vectors[wanted.id].changed > wanted.have
        }
        tables = [(wanted.id, self._tables[wanted.id].cut(wanted.have, version)) for wanted in request.tables]
        self._cuts[member] = ShardCut(version, position, models, tables, recorded)
        self._lent[member] = list(models.values())

    def _copy(self, model: int, dtype: m.ReadType) -> NDArray[Any]:
        key = model, dtype
        made = self._shared.get(key)
        if made is None:
            values = self._vectors[model].values
            made = self._shared[key] = self._memory(len(values), dtype)
            if dtype == "bfloat16":
                cast_bfloat16(values, made)
            else:
                copy_out(values, np.array([made.ctypes.data]))
        return made

    def _memory(self, length: int, dtype: m.ReadType) -> NDArray[Any]:
        kept = self._free.get((length, dtype))
        return kept.pop() if kept else np.empty(length, np.uint16 if dtype == "bfloat16" else np.float32)

    def take(self, member: int) -> ShardCut | None:
        """What was copied for the member, once."""
        return self._cuts.pop(member, None)

    def taken(self, member: int) -> None:
        """The member has received it everywhere: nobody reads the copies any more, unless others do too."""
        for array in self._lent.pop(member, []):
            if any(array is other for lent in self._lent.values() for other in lent):
                continue
            dtype = "bfloat16" if array.dtype == np.uint16 else "float32"
            kept = self._free.setdefault((len(array), dtype), [])
            if len(kept) < _KEPT:
                kept.append(array)

    def forget(self, member: int) -> None:
        """The member is gone for good."""
        self._cuts.pop(member, None)
        self._lent.pop(member, None)
        self._followers.discard(member)
        if not self._followers:
            for table in self._tables:
                table.touched.end()
            self._free, self._shared = {}, {}
