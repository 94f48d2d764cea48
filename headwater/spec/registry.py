"""Classes that messages choose by name: those that come with Headwater, and those of the user's modules.

Invariant: a message chooses among names that are registered already; nothing that arrives causes an import.
"""

from __future__ import annotations

import importlib
from typing import Generic, TypeVar

from headwater.errors import ConfigurationError
from headwater.spec.settings import Settings, field_types

Kind = TypeVar("Kind", bound=Settings)
Class = TypeVar("Class", bound=type[Settings])


class Registry(Generic[Kind]):
    """All classes of one kind that this process knows, by the name that stands in specs.

    Args:
        kind: in words for a user, such as "rule".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[Kind]] = {}

    def add(self, cls: type[Kind]) -> None:
        """Make a class available; the same one of a module that is loaded again replaces itself.

        Raises:
            ConfigurationError: another class has its name.
        """
        name = cls.registered_name()
        known = self._classes.get(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigurationError(
                f"{self.kind} {name!r} of {cls.__module__} has the name of a {self.kind} "
                f"of {known.__module__}: rename one of them"
            )
        self._classes[name] = cls

    def find(self, name: str) -> type[Kind]:
        """The class of that name.

        Raises:
            ConfigurationError: none is loaded in this process.
        """
        if name not in self._classes:
            raise ConfigurationError(
                f"no {self.kind} {name!r} is loaded here, only {', '.join(self._classes)}: "
                "start every server with --rules and the module that defines it"
            )
        return self._classes[name]

    def __contains__(self, cls: object) -> bool:
        return cls in self._classes.values()

    def classes(self) -> list[type[Kind]]:
        """All of them, in the order in which they were registered."""
        return list(self._classes.values())


def register(cls: Class) -> Class:
    """Class decorator: make a rule or a mode of your own available under its name to this process.

    Raises:
        ConfigurationError: not a frozen dataclass derived from Rule or Mode, or the name is taken.
    """
    registry = getattr(cls, "registry", None)
    if not (isinstance(cls, type) and isinstance(registry, Registry)):
        raise ConfigurationError(f"register takes a class derived from Rule or Mode, got {cls!r}")
    field_types(cls)
    registry.add(cls)
    return cls


def load_rules(module_name: str) -> None:
    """Import a module of the user's rules and modes (`--rules`); never called with a name from the network.

    Raises:
        ConfigurationError: the module cannot be imported.
    """
    try:
        importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigurationError(
            f"rules module {module_name!r} cannot be imported ({error}): "
            "give a module name that Python finds from here, without .py"
        ) from error
    except Exception as error:
        raise ConfigurationError(
            f"rules module {module_name!r} raised while it was imported: {type(error).__name__}: {error}"
        ) from error
