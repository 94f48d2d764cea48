"""`--set key=value` and its like: text into the values that `worker.settings` holds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from headwater.errors import ConfigurationError


def parse_settings(assignments: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """`["epochs=3", "lr=0.1"]` as `{"epochs": 3, "lr": 0.1}`; a later one of the same name wins.

    `option`: where they were given, for the text of errors.

    Raises:
        ConfigurationError: one has no `=`, or no name before it.
    """
    settings: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigurationError(f"{option} takes key=value, got {assignment!r}")
        settings[key.strip()] = parse_value(value)
    return settings


def parse_value(text: str) -> Any:
    """An int, a float, a bool, or a JSON list or object where the text is one, the text itself otherwise."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except ValueError:
            pass
    return text
