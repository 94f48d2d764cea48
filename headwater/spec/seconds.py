"""Lengths of time that a user gives: what counts as one is decided here, wherever it is given."""

from __future__ import annotations

import math
import numbers
from typing import Any

from headwater.errors import ConfigurationError
from headwater.spec.amounts import shown

LONGEST_S = 365 * 86_400.0
"""A year: whatever takes longer is no wait. Every clock and every system call can count so far."""


def seconds(name: str, value: Any, *, zero: bool = False) -> float:
    """`value` as a length of time; `name` is what the user calls it. `zero`: it may be none at all.

    Raises:
        ConfigurationError: not a number, not above 0, not a number of seconds (NaN), or more than a year.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigurationError(f"{name} must be a number of seconds, got {shown(value)}")
    try:
        length = float(value)
    except OverflowError:
        length = math.inf
    if not (length > 0 or (zero and length == 0)) or length > LONGEST_S:
        least = "≥ 0" if zero else "> 0"
        raise ConfigurationError(
            f"{name} must be {least} seconds and at most a year ({LONGEST_S:.0f} s), got {shown(value):.40}: "
            f"a wait that never ends could not say for whom"
        )
    return length
