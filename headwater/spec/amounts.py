"""Numbers, texts and choices that a user gives: what counts as one is decided here, wherever it is given.

NumPy's scalars count as Python's do; a bool is no number. What is returned is Python's own, so it can travel.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import Any

import numpy as np

from headwater.errors import ConfigurationError, UsageError

MOST = 2**63 - 1
"""The largest integer that travels."""


def whole(
    what: str, value: Any, least: int = 1, most: int = MOST, error: type[UsageError] = ConfigurationError
) -> int:
    """`value` as an integer from `least` to `most`; `what` is how the user calls it.

    Raises:
        error: it is none.
    """
    found = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
    if found is None or found < least:
        raise error(f"{what} must be an integer ≥ {least}, got {shown(value)}")
    if found > most:
        raise error(f"{what} must be at most {most:,}, got {shown(value)}")
    return found


def real(what: str, value: Any, *, zero: bool = False, error: type[UsageError] = ConfigurationError) -> float:
    """`value` as a finite float above 0, or with `zero` from 0 up; `what` is how the user calls it.

    Raises:
        error: it is none.
    """
    found = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
    if not (found > 0 or (zero and found == 0)) or found == math.inf:
        raise error(f"{what} must be a finite number {'≥' if zero else '>'} 0, got {shown(value)}")
    return found


def flag(what: str, value: Any, error: type[UsageError] = ConfigurationError) -> bool:
    """`value` as a yes or no; 1 and 0 are such too.

    Raises:
        error: it is none.
    """
    if not isinstance(value, bool | np.bool_ | numbers.Integral) or value not in (0, 1):
        raise error(f"{what} must be True or False, got {shown(value)}")
    return bool(value)


def text(what: str, value: Any, error: type[UsageError] = ConfigurationError) -> str:
    """`value` as a text that is not empty and can travel.

    Raises:
        error: it is none.
    """
    if not isinstance(value, str) or not value:
        raise error(f"{what} must be a text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as cause:
        raise error(f"{what} is {shown(value)}, which is no Unicode text: {cause}") from cause
    return str(value)


def path(what: str, value: Any, error: type[UsageError] = ConfigurationError) -> str:
    """`value`, a text or an object that names a path (PathLike), as a text.

    Raises:
        error: it is none.
    """
    found = value.__fspath__() if hasattr(type(value), "__fspath__") else value
    if not isinstance(found, str):
        raise error(f"{what} must be a path, got {shown(value)}")
    if "\0" in found:
        raise error(f"{what} is {shown(found)}: no file's name has a zero byte")
    return found


def one_of(
    what: str, value: Any, allowed: Collection[str], error: type[UsageError] = ConfigurationError
) -> str:
    """`value`, which is one of these texts.

    Raises:
        error: it is none of them.
    """
    if not isinstance(value, str) or value not in allowed:
        *first, last = map(repr, allowed)
        raise error(f"{what} must be {', '.join(first)} or {last}, got {shown(value)}")
    return str(value)


def shown(value: Any) -> str:
    """`value` as an error shows it: short, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - of a user, or of an integer with more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:197]}…"
