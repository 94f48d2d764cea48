"""What is compared: a metric of `Worker.log`, and the value that it is to reach."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from headwater.errors import ConfigurationError
from headwater.spec.words import option

_FORM = re.compile(r"\s*([A-Za-z_]\w*)\s*(<=|>=|=)\s*(\S+)\s*")


@dataclass(frozen=True, slots=True)
class Target:
    """A metric reaches `value`: from above, as a loss does, or from below where `rises`."""

    metric: str
    value: float
    rises: bool = False

    def is_reached(self, value: float) -> bool:
        """Whether this value is as good as that; never where it is not finite."""
        if not np.isfinite(value):
            return False
        return value >= self.value if self.rises else value <= self.value

    def __str__(self) -> str:
        return f"{self.metric} {'≥' if self.rises else '≤'} {self.value:g}"


def parse_target(text: object) -> Target:
    """`loss=0.35` (at most), `loss<=0.35`, `accuracy>=0.9`.

    Raises:
        ConfigurationError: none of these.
    """
    found = _FORM.fullmatch(text) if isinstance(text, str) else None
    try:
        value = float(found.group(3)) if found else math.nan
    except ValueError:
        value = math.nan
    if found is None or not math.isfinite(value):
        raise ConfigurationError(
            f"{option('until')}: got {text!r}, expected a metric of worker.log and the value that it is to "
            f"reach, as loss=0.35 (at most) or accuracy>=0.9"
        )
    return Target(found.group(1), value, found.group(2) == ">=")
