"""Where nodes run: the same verbs for threads of this process, processes of this machine, actors of Ray."""

from __future__ import annotations

from collections.abc import Callable

from headwater.engines.engine import Engine, Launch, Outcome
from headwater.engines.inline import InlineEngine
from headwater.engines.local import LocalEngine
from headwater.engines.ray import RayEngine
from headwater.errors import ConfigurationError
from headwater.spec.words import option, wording

ENGINES: dict[str, Callable[[Launch], Engine]] = {
    "inline": InlineEngine,
    "local": LocalEngine,
    "ray": RayEngine().start,
}
"""Every engine by the name users give; the contract suite runs over all of them."""


def make_engine(engine: str | RayEngine, launch: Launch) -> Engine:
    """The engine of that name, or with those options.

    Raises:
        ConfigurationError: there is none, lists the valid names; or what it needs is not installed.
    """
    if isinstance(engine, RayEngine):
        return engine.start(launch)
    if not isinstance(engine, str) or engine not in ENGINES:
        raise ConfigurationError(
            f"{option('engine')}: got {engine!r}, expected one of {', '.join(map(repr, ENGINES))}"
            f"{wording(', or a RayEngine', '')}"
        )
    return ENGINES[engine](launch)


__all__ = ["ENGINES", "Engine", "Launch", "Outcome", "RayEngine", "make_engine"]
