"""Value objects made of named settings: what rules and schedules have in common.

Invariants:
- A `Settings` is checked where it is made; one that exists is possible.
- It travels as a `RuleSpec` (its class name and scalars) and comes back equal, to the last bit.
- A tuple setting `betas` travels, and is set, as the scalars `beta1`, `beta2`, ….
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Self

from headwater.errors import ConfigurationError
from headwater.messages import RuleSpec, Scalar
from headwater.spec.amounts import shown


class Settings:
    """Base of frozen dataclasses whose fields are settings.

    A field is a float, int, bool, str, None, one of the strings of a `Literal`, another Settings, a union of
    these, or a tuple of floats.

    Numbers of any kind (int, numpy) become plain float or int, so equality and travel are exact.

    Raises:
        ConfigurationError: on construction, a field of the wrong type, or what `check` refuses.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        for field, hint in field_types(type(self)).items():
            object.__setattr__(self, field, _converted(self, field, hint, getattr(self, field)))
        self.check()

    def check(self) -> None:
        """Refuse values that have the right type but cannot be; called when the object is made."""

    @classmethod
    def registered_name(cls) -> str:
        """What the class is called in specs, messages and texts."""
        return cls.__name__

    @property
    def name(self) -> str:
        """What its class is called in specs and messages."""
        return self.registered_name()

    def to_spec(self) -> RuleSpec:
        """This object as a message."""
        flat = self.flat()
        return RuleSpec(
            self.name,
            {key: value.to_spec() if isinstance(value, Settings) else value for key, value in flat.items()},
        )

    def flat(self) -> dict[str, Scalar | Settings]:
        """Every setting under the name it travels by."""
        flat: dict[str, Scalar | Settings] = {}
        for field, hint in field_types(type(self)).items():
            value = getattr(self, field)
            flat.update(
                zip(_flat_names(field, hint), value if isinstance(value, tuple) else [value], strict=True)
            )
        return flat

    @classmethod
    def from_flat(cls, flat: Mapping[str, object]) -> Self:
        """The object whose `flat` this is; what is left out has its default.

        Raises:
            ConfigurationError: an unknown, missing or ill-typed setting.
        """
        names = {field: _flat_names(field, hint) for field, hint in field_types(cls).items()}
        refuse_unknown(f"{cls.__name__} has no setting", flat, itertools.chain(*names.values()))
        arguments: dict[str, object] = {}
        for field, parts in names.items():
            missing = [part for part in parts if part not in flat]
            if not missing:
                values = tuple(flat[part] for part in parts)
                arguments[field] = values[0] if parts == [field] else values
            elif len(missing) < len(parts) or field in required_fields(cls):
                raise ConfigurationError(f"{cls.__name__} needs {', '.join(missing)} too")
        return cls(**arguments)


def require(valid: bool, owner: Settings, setting: str, expected: str) -> None:
    """Raise ConfigurationError unless `valid`: `owner`'s `setting` must be `expected`."""
    if not valid:
        got = getattr(owner, setting)
        raise ConfigurationError(f"{owner.name}: {setting}={got!r} is impossible: pass {setting} {expected}")


def refuse_unknown(problem: str, got: typing.Iterable[str], valid: typing.Iterable[str]) -> None:
    """Raise ConfigurationError naming what of `got` is not in `valid`, and all of `valid`."""
    known = list(valid)
    unknown = [name for name in got if name not in known]
    if unknown:
        raise ConfigurationError(f"{problem} {', '.join(map(repr, unknown))}: choose from {', '.join(known)}")


def field_types(cls: type) -> Mapping[str, Any]:
    """Field name → type, in declaration order.

    Raises:
        ConfigurationError: not a frozen dataclass, or annotations that cannot be evaluated.
    """
    return _field_types(cls)


@functools.cache
def _field_types(cls: type) -> Mapping[str, Any]:
    parameters = cls.__dict__.get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise ConfigurationError(f"{cls.__name__} is not a frozen dataclass: add @dataclass(frozen=True)")
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(cls)
    try:
        hints = _hints(cls)
    except NameError as error:
        raise ConfigurationError(
            f"{cls.__name__}: {error} in the type of a field: import it in that module"
        ) from error
    return {field.name: hints[field.name] for field in fields}


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
    """Evaluated once: that takes longer than all else of a rule's travel."""
    return typing.get_type_hints(cls)


def required_fields(cls: type) -> list[str]:
    """Names of the fields without a default."""
    none = dataclasses.MISSING
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(cls)
    return [field.name for field in fields if field.default is none and field.default_factory is none]


@functools.cache
def _tuple_length(hint: Any) -> int:
    return len(typing.get_args(hint)) if typing.get_origin(hint) is tuple else 0


@functools.cache
def _flat_names(field: str, hint: Any) -> Sequence[str]:
    return [f"{field.removesuffix('s')}{i + 1}" for i in range(_tuple_length(hint))] or [field]


def _converted(owner: Settings, field: str, hint: Any, value: object) -> object:
    """`value` as exactly the type `hint` says, or ConfigurationError."""
    length = _tuple_length(hint)
    if length and isinstance(value, tuple | list) and len(value) == length:
        return tuple(_converted(owner, field, float, element) for element in value)
    for choice in _choices(hint):
        if choice is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
            number = _float(value)
            if math.isfinite(number):
                return number
        elif choice is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
        elif isinstance(choice, str):
            if isinstance(value, str) and value == choice:
                return choice
        elif isinstance(choice, type) and choice not in (float, int) and isinstance(value, choice):
            return value
    raise ConfigurationError(f"{owner.name}: {field} must be {_described(hint)}, got {shown(value)}")


def _float(value: numbers.Real) -> float:
    """`value` as a float; infinite where a float cannot hold it."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _described(hint: Any) -> str:
    if _tuple_length(hint):
        return f"{_tuple_length(hint)} finite numbers"
    words = {float: "a finite number", int: "a whole number", bool: "True or False", str: "a string"}
    words |= {type(None): "None"}
    return " or ".join(
        repr(choice) if isinstance(choice, str) else words.get(choice, f"a {choice.__name__}")
        for choice in _choices(hint)
    )


def _choices(hint: Any) -> list[Any]:
    """What a field of this type may be: types, and strings of a `Literal`."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    return [
        choice
        for part in parts
        for choice in (typing.get_args(part) if typing.get_origin(part) is typing.Literal else (part,))
    ]
