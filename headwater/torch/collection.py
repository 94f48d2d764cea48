"""Bags of many features over many tables, looked up in one exchange; and the same for modules of one forward.

Invariants:
- Features of one table are looked up together, so an id that several have travels once.
- All rows of one forward are of one version.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from headwater.errors import ConfigurationError, UsageError
from headwater.kernels.arrange import Ids
from headwater.spec.initializers import Initializer
from headwater.spec.lifetime import AfterCount, Expiry
from headwater.spec.rules import Rule
from headwater.torch.bag import BagMode, EmbeddingBag, check_offsets
from headwater.torch.embedding import INITIAL, TableModule, host_ids, uncompiled
from headwater.worker import Worker


@dataclass(frozen=True, slots=True)
class EmbeddingBagConfig:
    """One table of an `EmbeddingBagCollection`, and the features that are looked up in it.

    Attributes:
        name, dim, rule, initializer, seed, admission, expiry: of the table, see `Worker.table`.
        features: names, each of one table only.
        mode: what becomes of a bag's rows: "sum", "mean" or "max", column by column.
        padding_idx: the id that counts nowhere, as if it were not in its bag; None for none.
    """

    name: str
    dim: int
    rule: Rule
    features: Sequence[str]
    mode: BagMode = "sum"
    initializer: Initializer = INITIAL
    seed: int = 0
    admission: AfterCount | None = None
    expiry: Expiry | None = None
    padding_idx: int | None = None


class EmbeddingBagCollection(torch.nn.Module):
    """TorchRec's `EmbeddingBagCollection` over tables on the servers: any int64 is an id.

    A forward makes one exchange, whatever the number of tables and features, and none where the rows were
    prefetched. The `DistributedOptimizer` of a module that contains this one sends all gradients with its
    step.

    Args:
        worker: joined, used by this thread.
        tables: at least one, each of another name.

    Raises:
        ConfigurationError: no table, or a name of a table or a feature that is there twice.
        RegistrationError: not a table, or another one than already registered; names both.
    """

    def __init__(self, worker: Worker, tables: Sequence[EmbeddingBagConfig]) -> None:
        super().__init__()
        _check(tables)
        self.features = [tuple(one.features) for one in tables]
        self.bags = torch.nn.ModuleList(
            EmbeddingBag(
                worker,
                one.name,
                one.dim,
                one.rule,
                mode=one.mode,
                initializer=one.initializer,
                seed=one.seed,
                admission=one.admission,
                expiry=one.expiry,
                padding_idx=one.padding_idx,
                include_last_offset=True,
            )
            for one in tables
        )

    def forward(self, features: Any) -> dict[str, torch.Tensor]:
        """Each feature's bags: float32[batch, dim] on the device of the ids, in the order of the tables.

        Args:
            features: a TorchRec `KeyedJaggedTensor`, or anything else with `keys`, `values` and `offsets`,
                attributes or methods without arguments: names, integers [n], and integers
                [features · batch + 1], where each bag begins, feature after feature, and where the last
                ends; with `weights_or_none`, floats [n], each row's factor, where the mode is "sum". Or a
                mapping from names to ids: integers [batch, length], or a pair of integers [n] and offsets
                [batch + 1]. Other features than those of the tables are ignored.

        Blocks for an exchange unless prefetched.

        Raises:
            UsageError: a feature is missing, or ids, offsets or weights do not fit these rules; says which.
            ClosedError: the worker has left.
            StalledError: no answer within the deadline.
        """
        return uncompiled(self._look_up, features)

    def prefetch(self, features: Any) -> None:
        """Have the rows ready for the forward of the same features that follows the next step.

        As `Table.prefetch`: they come with that step's answer. Raises UsageError as `forward`.
        """
        for bags, mine in self._parts(features):
            bags.prefetch(mine.ids)

    def _look_up(self, features: Any) -> dict[str, torch.Tensor]:
        parts = [(bags, mine, bags.in_bags(mine.ids, mine.offsets)) for bags, mine in self._parts(features)]
        parts[0][0].table.local.bring([(bags.table.local, one.ids) for bags, _, one in parts])
        out: dict[str, torch.Tensor] = {}
        for bags, mine, one in parts:
            rows = bags.reduce(one, bags.checked(mine.ids.shape, mine.weights), mine.device)
            batch = len(rows) // len(mine.names)
            for place, name in enumerate(mine.names):
                out[name] = rows[place * batch : (place + 1) * batch]
        return out

    def _parts(self, features: Any) -> Iterator[tuple[EmbeddingBag, _Jagged]]:
        """Each table's bags with the features that are looked up in it, one after the other."""
        given = dict(_features(features))
        for names, bags in zip(self.features, self.bags, strict=True):
            assert isinstance(bags, EmbeddingBag)
            if missing := [name for name in names if name not in given]:
                raise UsageError(
                    f"the batch has no feature {', '.join(map(repr, missing))}, which table "
                    f"{bags.table.name!r} is looked up with; it has {', '.join(map(repr, given)) or 'none'}"
                )
            yield bags, _Jagged.of([given[name] for name in names], bags.table.name)


class _Feature(NamedTuple):
    """Bags of one feature: ids, int64[n]; where each begins and the last ends; factors of the rows."""

    name: str
    ids: Ids
    offsets: Ids
    weights: torch.Tensor | None
    device: torch.device


class _Jagged(NamedTuple):
    """Bags of several features, one feature after the other."""

    names: list[str]
    ids: Ids
    offsets: Ids
    weights: torch.Tensor | None
    device: torch.device

    @classmethod
    def of(cls, features: Sequence[_Feature], table: str) -> _Jagged:
        batches = {len(one.offsets) - 1 for one in features}
        if len(batches) > 1:
            sizes = ", ".join(f"{one.name!r} {len(one.offsets) - 1}" for one in features)
            raise UsageError(f"features of table {table!r} have different numbers of bags: {sizes}")
        ids = np.concatenate([one.ids for one in features])
        offsets, end = [], 0
        for one in features:
            offsets.append(one.offsets[:-1] + end)
            end += len(one.ids)
        weights = [one.weights for one in features if one.weights is not None]
        return cls(
            [one.name for one in features],
            ids,
            np.append(np.concatenate(offsets), end),
            torch.cat(weights) if weights else None,
            features[0].device,
        )


def _features(batch: Any) -> Iterator[tuple[str, _Feature]]:
    """By name, what the batch has."""
    if isinstance(batch, Mapping):
        for name, value in batch.items():
            yield name, _of_mapping(name, value)
        return
    keys, values, offsets = (_asked(batch, what) for what in ("keys", "values", "offsets"))
    names = list(keys)
    ids, device = host_ids(values)
    begins, _ = host_ids(offsets)
    bags = len(begins) - 1
    if ids.ndim != 1 or begins.ndim != 1 or not names or bags < 0 or bags % len(names):
        raise UsageError(
            f"features {names}: values must be 1-D, and offsets have a multiple of {len(names)} entries and "
            f"one more, got shapes {ids.shape} and {begins.shape}"
        )
    check_offsets(begins, len(ids), True)
    weights = _asked(batch, "weights_or_none") if hasattr(batch, "weights_or_none") else None
    batch_size = bags // len(names)
    for place, name in enumerate(names):
        mine = begins[place * batch_size : (place + 1) * batch_size + 1]
        here = slice(int(mine[0]), int(mine[-1]))
        factors = None if weights is None else weights[here]
        yield name, _Feature(name, ids[here], mine - mine[0], factors, device)


def _of_mapping(name: str, value: Any) -> _Feature:
    pair = isinstance(value, tuple) and len(value) == 2
    ids, device = host_ids(value[0] if pair else value)
    if pair:
        offsets, _ = host_ids(value[1])
        if ids.ndim != 1:
            raise UsageError(f"feature {name!r}: ids that come with offsets are 1-D, got shape {ids.shape}")
        check_offsets(offsets, len(ids), True)
        return _Feature(name, ids, offsets, None, device)
    if ids.ndim != 2:
        raise UsageError(
            f"feature {name!r}: expected ids [batch, length], or a pair of ids and offsets, got shape "
            f"{ids.shape}"
        )
    offsets = np.arange(len(ids) + 1, dtype=np.int64) * ids.shape[1]
    return _Feature(name, ids.reshape(-1), offsets, None, device)


def _asked(batch: Any, what: str) -> Any:
    found = getattr(batch, what, None)
    if found is None:
        raise UsageError(
            f"got a batch of {type(batch).__name__} without {what!r}: pass a KeyedJaggedTensor, something "
            f"with keys, values and offsets, or a mapping from names to ids"
        )
    return found() if callable(found) else found


def _check(tables: Sequence[EmbeddingBagConfig]) -> None:
    if not tables:
        raise ConfigurationError("EmbeddingBagCollection: got no tables, expected at least one")
    for one in tables:
        if isinstance(one.features, str) or not one.features:
            raise ConfigurationError(
                f"table {one.name!r}: features={one.features!r}, expected a list of names, at least one"
            )
    names, features = [one.name for one in tables], [name for one in tables for name in one.features]
    for what, listed in (("table", names), ("feature", features)):
        if twice := sorted({repr(name) for name in listed if listed.count(name) > 1}):
            raise ConfigurationError(
                f"EmbeddingBagCollection: {what} {', '.join(twice)} is there twice: each {what} belongs to "
                f"one EmbeddingBagConfig"
            )


def pull_rows(wanted: Mapping[TableModule, Any] | Iterable[tuple[TableModule, Any]]) -> None:
    """Have the rows ready that the modules of one forward are about to look up: one exchange for all.

    Call it before them, with each module's ids (integers of any shape), such as at the top of a `forward`
    that uses several: `hw.torch.pull_rows({self.users: users, self.items: items})`. A module that looks up
    twice is there twice, in pairs. The modules are called as ever, once each with just these ids. All rows
    are of one version. Where all were prefetched nothing is asked.

    Raises:
        UsageError: no `Embedding` or `EmbeddingBag`, or ids that are not integers, or do not fit int64.
        ClosedError: the worker has left.
        StalledError: no answer within the deadline.
    """
    pairs = list(wanted.items() if isinstance(wanted, Mapping) else wanted)
    asked = []
    for module, ids in pairs:
        if not isinstance(module, TableModule):
            raise UsageError(
                f"pull_rows: got {type(module).__name__}, expected an Embedding or EmbeddingBag of "
                f"headwater.torch for each of the ids"
            )
        asked.append((module.table.local, module.asked(ids)))
    if asked:
        asked[0][0].bring(asked)
