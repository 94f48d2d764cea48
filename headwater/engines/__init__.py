"""Where nodes run: the same verbs for threads of this process and for processes of this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from headwater.engines.engine import Engine, Launch, Outcome
from headwater.engines.inline import InlineEngine
from headwater.engines.local import LocalEngine
from headwater.errors import ConfigurationError

EngineName: TypeAlias = Literal["inline", "local"]

ENGINES: dict[str, Callable[[Launch], Engine]] = {"inline": InlineEngine, "local": LocalEngine}
"""Every engine by the name users give; the contract suite runs over all of them."""


def make_engine(name: str, launch: Launch) -> Engine:
    """The engine of that name.

    Raises:
        ConfigurationError: there is none; lists the valid names.
    """
    if name not in ENGINES:
        raise ConfigurationError(f"engine: got {name!r}, expected one of {', '.join(map(repr, ENGINES))}")
    return ENGINES[name](launch)


__all__ = ["ENGINES", "Engine", "EngineName", "Launch", "Outcome", "make_engine"]
