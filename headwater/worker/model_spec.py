"""What a user passes to declare a model or a table, checked and turned into a spec and arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from headwater import messages as m
from headwater.errors import ConfigurationError, GradientError, RegistrationError, UsageError
from headwater.shard.table import MOST_COLUMNS
from headwater.spec.amounts import MOST, flag, one_of, real, shown, text, whole
from headwater.spec.codecs import parse_codec, parse_row_codec, parse_values_codec, text_of
from headwater.spec.initializers import Initializer
from headwater.spec.layout import Layout
from headwater.spec.lifetime import AfterCount, Expiry
from headwater.spec.merges import parse_merge
from headwater.spec.rules import Rule

LARGEST_SPEC = 8 << 20
"""Bytes of a model's spec: standbys and readers are told the specs of all models in one message of 16 MiB."""

NonFinite: TypeAlias = Literal["raise", "skip", "off"]


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of a model that have a rule with other settings than the model's own.

    Args:
        names: of the tensors, at least one.
        rule: of the same kind as the model's.

    Raises:
        ConfigurationError: no names.
    """

    names: Sequence[str]
    rule: Rule

    def __post_init__(self) -> None:
        if isinstance(self.names, str | bytes) or not isinstance(self.names, Sequence | Set):
            raise ConfigurationError(f"Group: names must be a list of texts, got {shown(self.names)}")
        if not self.names:
            raise ConfigurationError("Group: names is empty: leave the group out")


def specify(
    name: str,
    params: Mapping[str, Any],
    rule: Rule,
    groups: Sequence[Group],
    clip_norm: float | None = None,
    merge: str | None = None,
    aliases: Mapping[str, str] = MappingProxyType({}),
    codec: str | None = None,
    values_codec: str | None = None,
    outer: bool = False,
) -> tuple[m.ModelSpec, dict[str, NDArray[Any]]]:
    """The spec of a model and its initial values as arrays.

    Raises:
        RegistrationError: what it names is not a model.
        ConfigurationError: an impossible `clip_norm`, `merge`, `codec` or `values_codec`.
    """
    largest = check_clip_norm(clip_norm)
    coded, values_coded = text_of(parse_codec(codec)), text_of(parse_values_codec(values_codec))
    combined = None if merge is None else str(parse_merge(merge))
    name = _name("a model", name)
    if not isinstance(params, Mapping):
        raise RegistrationError(
            f"model {name!r}: params must be a dict of names and arrays, got a {type(params).__name__}"
        )
    params = {_name(f"a tensor of model {name!r}", tensor): value for tensor, value in params.items()}
    if not isinstance(groups, list | tuple):
        raise RegistrationError(f"model {name!r}: groups must be a list of hw.Group, got {shown(groups)}")
    if not isinstance(aliases, Mapping):
        raise RegistrationError(f"model {name!r}: aliases must be a dict of names, got {shown(aliases)}")
    outer = flag(f"model {name!r}: outer", outer, RegistrationError)
    if not isinstance(rule, Rule):
        raise RegistrationError(f"model {name!r}: rule must be a Rule such as hw.SGD(lr=0.1), got {rule!r}")
    if not params:
        raise RegistrationError(f"model {name!r} has no tensors: pass at least one")
    group_of: dict[str, int] = {}
    for i, group in enumerate(groups, start=1):
        if not isinstance(group, Group):
            raise RegistrationError(f"model {name!r}: groups must be hw.Group objects, got {group!r}")
        for tensor in group.names:
            if tensor not in params:
                raise RegistrationError(
                    f"model {name!r}: a group names {tensor!r}, the tensors are {named(params)}"
                )
            if group_of.setdefault(tensor, i) != i:
                raise RegistrationError(f"model {name!r}: tensor {tensor!r} is in two groups")
        if type(group.rule) is not type(rule):
            raise RegistrationError(
                f"model {name!r}: all groups have one kind of rule, got {rule.name} and {group.rule.name}"
            )
    arrays = {
        tensor: as_array(f"tensor {tensor!r}", value, RegistrationError) for tensor, value in params.items()
    }
    specs = tuple(
        m.TensorSpec(
            tensor,
            array.shape,
            _dtype(params[tensor], array),
            group_of.get(tensor, 0),
            tuple(alias for alias, of in aliases.items() if of == tensor),
        )
        for tensor, array in arrays.items()
    )
    if rule.always_sum and combined not in (None, "sum"):
        raise RegistrationError(
            f"model {name!r}: {rule.name} adds up what is pushed, so merge={merge!r} cannot be: leave it out"
        )
    if rule.layerwise and (clip_norm is not None or combined == "rda"):
        other = f"clip_norm={clip_norm}" if clip_norm is not None else f"merge={merge!r}"
        raise RegistrationError(
            f"model {name!r}: {rule.name} scales each tensor by its own norm, and {other} needs another norm "
            f"before: leave out one of the two"
        )
    rules = tuple(one.to_spec() for one in (rule, *(group.rule for group in groups)))
    spec = m.ModelSpec(name, Layout(specs).tensors, rules, largest, combined, coded, values_coded, outer)
    _check_size(spec)
    return spec, arrays


def specify_table(
    name: str,
    dim: int,
    rule: Rule,
    initializer: Initializer,
    seed: int,
    admission: AfterCount | None,
    expiry: Expiry | None,
    codec: str | None = None,
) -> m.TableSpec:
    """The spec of a table.

    Raises:
        RegistrationError: what it names cannot be a table.
        ConfigurationError: an impossible `codec`.
    """
    coded = text_of(parse_row_codec(codec))
    name = _name("a table", name)
    what = f"table {name!r}"
    dim = whole(f"{what}: dim", dim, 1, MOST_COLUMNS, RegistrationError)
    seed = whole(f"{what}: seed", seed, -(2**63), MOST, RegistrationError)
    if not isinstance(rule, Rule):
        raise RegistrationError(f"{what}: rule must be a Rule such as hw.Adagrad(lr=0.1), got {rule!r}")
    if rule.layerwise:
        raise RegistrationError(
            f"{what}: {rule.name} is a rule for models: a table has no norm, as rows come and go"
        )
    if not isinstance(initializer, Initializer):
        raise RegistrationError(
            f"{what}: initializer must be one such as hw.Normal(std=0.01), got {initializer!r}"
        )
    if admission is not None and not isinstance(admission, AfterCount):
        raise RegistrationError(f"{what}: admission must be hw.AfterCount(n) or None, got {admission!r}")
    if expiry is not None and not isinstance(expiry, Expiry):
        raise RegistrationError(
            f"{what}: expiry must be hw.AfterSteps(n), hw.LeastRecentlyUsed(n) or None, got {expiry!r}"
        )
    begin, end = (None if part is None else part.to_spec() for part in (admission, expiry))
    return m.TableSpec(name, dim, rule.to_spec(), initializer.to_spec(), seed, begin, end, coded)


def _name(what: str, name: Any) -> str:
    """A name as a text that can travel. Raises RegistrationError."""
    return text(f"the name of {what}", name, RegistrationError)


def _check_size(spec: m.ModelSpec) -> None:
    """Raise RegistrationError where a message cannot hold it, beside as much of other models."""
    size = len(msgspec.msgpack.encode(spec))
    if size > LARGEST_SPEC:
        raise RegistrationError(
            f"model {spec.name!r}: names and shapes of {len(spec.tensors):,} tensors take {size:,} bytes, "
            f"at most {LARGEST_SPEC:,} can be registered: give it fewer tensors, or tensors shorter names"
        )


def check_nonfinite(nonfinite: str) -> None:
    """Raise ConfigurationError unless it is a NonFinite."""
    one_of("nonfinite", nonfinite, ("raise", "skip", "off"))


def check_clip_norm(clip_norm: Any) -> float | None:
    """A number that a norm can be held against, or None. Raises ConfigurationError."""
    return None if clip_norm is None else real("clip_norm", clip_norm)


def check_merge(merge: Any, workers: int) -> None:
    """Raise ConfigurationError unless it is None, or a merge that so many workers can contribute to."""
    kind = None if merge is None else parse_merge(merge)
    if kind is not None and kind.needs > workers:
        raise ConfigurationError(
            f"merge={merge!r} leaves out {kind.trim} at either end, which takes {kind.needs} contributors, "
            f"but the cluster has {workers} workers: leave out fewer, or take merge='median'"
        )


def check_weight(weight: Any) -> float:
    """`weight` as a float.

    Raises:
        ConfigurationError: no number from 0 up that is finite.
    """
    if type(weight) is float and 0.0 <= weight < math.inf:
        return weight  # each step comes this way
    return real("weight, such as how many samples the gradient is of,", weight, zero=True)


def as_array(what: str, value: Any, error: type[UsageError] = GradientError) -> NDArray[Any]:
    """`value` as an array of a real dtype, without a copy where its memory can be read.

    Raises:
        error: it is none; says what of.
    """
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float() if _dtype(value) == "bfloat16" else value
        only_dlpack = hasattr(value, "__dlpack__") and not hasattr(value, "__array__")
        array = np.from_dlpack(value) if only_dlpack else np.asarray(value)
        if array.dtype.name == "bfloat16":  # of ml_dtypes, as JAX's arrays become
            array = array.astype(np.float32)
    except (TypeError, ValueError, RuntimeError, BufferError) as cause:
        raise error(f"{what}: cannot read a {type(value).__name__} as an array: {cause}") from cause
    if array.dtype.kind not in "fiu":
        raise error(f"{what} must be of a real dtype such as float32, got {array.dtype}")
    return array


def _dtype(value: Any, otherwise: Any = None) -> str:
    return str(getattr(value, "dtype", getattr(otherwise, "dtype", None))).removeprefix("torch.")


def named(names: Iterable[str]) -> str:
    """The first of them, quoted, and how many more there are."""
    shown = list(names)
    return ", ".join(map(repr, shown[:6])) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
