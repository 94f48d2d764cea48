"""`--set key=value` and its like: text into the scalars that `worker.settings` holds."""

from __future__ import annotations

from collections.abc import Iterable

from headwater.errors import ConfigurationError
from headwater.messages import Scalar


def parse_settings(assignments: Iterable[str], option: str = "--set") -> dict[str, Scalar]:
    """`["epochs=3", "lr=0.1"]` as `{"epochs": 3, "lr": 0.1}`; a later one of the same name wins.

    `option`: where they were given, for the text of errors.

    Raises:
        ConfigurationError: one has no `=`, or no name before it.
    """
    settings: dict[str, Scalar] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigurationError(f"{option} takes key=value, got {assignment!r}")
        settings[key.strip()] = parse_scalar(value)
    return settings


def parse_scalar(text: str) -> Scalar:
    """An int, a float or a bool where the text is one, the text itself otherwise."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
