"""Settings as a user writes them: `name=value,…`.

Invariant: what `text_of` writes of a value, `settings_of` reads as that value.
"""

from __future__ import annotations

import typing
from typing import TypeVar

from headwater.errors import ConfigurationError
from headwater.spec.settings import Settings, field_types, required_fields

Kind = TypeVar("Kind", bound=Settings)


def settings_of(cls: type[Kind], argument: str) -> Kind:
    """The object of `cls` with the settings `name=value,…`.

    The value of the first field that has no default may stand first, without the name.

    Raises:
        ConfigurationError: an unknown, missing, repeated, ill-typed or impossible setting.
    """
    hints = {text_name(name): (name, hint) for name, hint in field_types(cls).items()}
    given: dict[str, object] = {}
    for place, part in enumerate(argument.split(",") if argument else ()):
        name, equals, text = (one.strip() for one in part.partition("="))
        if not equals and place == 0 and (required := required_fields(cls)):
            name, text = text_name(required[0]), name
        if name not in hints or hints[name][0] in given:
            raise ConfigurationError(f"{part.strip()!r} is no setting, or a repeated one")
        field, hint = hints[name]
        given[field] = value_of(text, hint)
    return cls.from_flat(given)


def text_name(field: str) -> str:
    """A field's name in text: without the unit that it ends with."""
    return field.removesuffix("_s")


def text_of(value: object) -> str:
    """A setting's value in text."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def value_of(text: str, hint: object) -> object:
    """`text` as what a field of this type takes, or as it is, for `Settings` to refuse."""
    choices = typing.get_args(hint) or (hint,)
    for kind in (int, float):
        if kind in choices:
            try:
                return kind(text)
            except ValueError:
                continue
    return {"True": True, "False": False}.get(text, text) if bool in choices else text
