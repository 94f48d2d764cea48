"""What a call of `batches` or `splits` reads: its arguments, checked, with the size of the data set."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from headwater.data import groups_of, length_of
from headwater.errors import ConfigurationError
from headwater.spec.amounts import flag, one_of, whole

SplitKind: TypeAlias = Literal["static", "dynamic"]


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """One call: `epochs` passes over `size` samples, in this order, `batch` at a time.

    `drop_last`: an epoch ends where not every worker has a full batch left.
    """

    size: int
    groups: tuple[int, ...] | None
    batch: int
    epochs: int
    shuffle: bool
    seed: int
    splits: SplitKind
    drop_last: bool = False


def plan_of(
    dataset: Any,
    batch: int,
    epochs: int,
    shuffle: bool,
    seed: int,
    splits: SplitKind | None,
    *,
    rounds: bool,
    drop_last: bool = False,
) -> ReadPlan:
    """A call with these arguments; `dataset` may be a plain number of samples.

    `splits` None: dynamic, but static where training goes in `rounds`.

    Raises:
        ConfigurationError: impossible arguments.
        DataError: a file of the data set cannot be read.
    """
    batch = count_of("batches", "batch_size", batch, 1)
    epochs, seed = count_of("batches", "epochs", epochs, 0), count_of("batches", "seed", seed, 0)
    if splits is None:
        splits = "static" if rounds else "dynamic"
    one_of("batches: splits", splits, ("static", "dynamic"))
    if splits == "dynamic" and rounds:
        raise ConfigurationError(
            "batches: splits='dynamic' in synchronous mode, where the slowest worker sets the pace of all "
            "anyway: leave it out, or train with sync='async' or 'ssp:N'"
        )
    counted = isinstance(dataset, numbers.Integral) and not isinstance(dataset, bool)
    size = int(dataset) if counted else length_of(dataset)
    if not 1 <= size < 2**63:
        raise ConfigurationError(f"batches: the data set has {size} samples, expected 1 to 2**63 - 1")
    groups = None if counted else groups_of(dataset)
    shuffle, drop_last = flag_of("batches", "shuffle", shuffle), flag_of("batches", "drop_last", drop_last)
    return ReadPlan(size, groups, batch, epochs, shuffle, seed, splits, drop_last)


def flag_of(call: str, name: str, value: Any) -> bool:
    """A yes or no that a user passed to `call` as `name`; 1 and 0 are such too.

    Raises:
        ConfigurationError: it is none.
    """
    return flag(f"{call}: {name}", value)


def count_of(call: str, name: str, value: Any, least: int) -> int:
    """A whole number that a user passed to `call` as `name`.

    Raises:
        ConfigurationError: it is none, or below `least`.
    """
    return whole(f"{call}: {name}", value, least)
