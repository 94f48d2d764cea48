"""Functions that take the fields of configurations as keywords: one text for their help, their signature and
their errors.

A configuration is a dataclass whose fields say in their metadata what they mean, and a TypedDict of the same
names with the types that a caller may give; type checkers read that one.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

_WIDTH = 100


def means(
    text: str, metavar: str | None = None, *, least: int | None = None, most: int = 65_536
) -> dict[str, Any]:
    """A field's metadata: what it means; what a command line's help calls its value; for a count the least
    and the most that it may be."""
    return {"help": text, "metavar": metavar, "least": least, "most": most}


def takes(
    *configurations: tuple[type, type], without: Collection[str] = ()
) -> Callable[[Function], Function]:
    """Decorator: the function's `**options` are the fields of these (dataclass, TypedDict); not `without`.

    Its signature and its docstring, whose first section must be `Args:`, get them all.
    """
    fields = [
        (one, typed)
        for config, typed in configurations
        for one in dataclasses.fields(config)
        if one.name not in without
    ]

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(
                one.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_default(one),
                annotation=_type(typed, one.name),
            )
            for one, typed in fields
        ]
        function.__signature__ = signature.replace(parameters=own + more)  # type: ignore[attr-defined]
        function.__doc__ = _explained(inspect.cleandoc(function.__doc__ or ""), [one for one, _ in fields])
        return function

    return decorate


def chosen(options: Mapping[str, Any], *configurations: type) -> list[dict[str, Any]]:
    """The options of each dataclass.

    Raises:
        TypeError: one belongs to none, as for any function of Python.
    """
    parts = [{one.name for one in dataclasses.fields(config)} for config in configurations]
    for name in options:
        if not any(name in part for part in parts):
            near = difflib.get_close_matches(name, sorted(set().union(*parts)), 1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"got an unexpected keyword argument {name!r}{hint}")
    return [{name: options[name] for name in part if name in options} for part in parts]


def _default(one: dataclasses.Field[Any]) -> Any:
    default = one.default
    if one.default_factory is not dataclasses.MISSING or default == "":
        return None
    return (
        default
        if isinstance(default, str | int | float | tuple | None) or callable(default)
        else str(default)
    )


def _type(typed: type, name: str) -> Any:
    hint = typed.__annotations__[name]
    return getattr(hint, "__forward_arg__", hint)


def _explained(text: str, fields: list[dataclasses.Field[Any]]) -> str:
    """The docstring with what each field means, at the end of its arguments."""
    lines = []
    for one in fields:
        entry = f"{one.name}: {one.metadata['help'][0].lower()}{one.metadata['help'][1:]}"
        lines += textwrap.wrap(entry, _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8)
    head, args, rest = text.partition("Args:\n")
    assert args, "a docstring without arguments"
    own, gap, after = rest.partition("\n\n")
    return f"{head}{args}{own}\n" + "\n".join(lines) + gap + after
