"""How the gradients of one commit become the one that a model's rule gets: a name in the model's spec.

- `mean`: Σ weight · g / Σ weight over the contributors; `sum`: Σ weight · g.
- `rda`: by tensor, the length is the weighted mean of the contributors' lengths, the direction that of the
  weighted sum of their unit vectors. Of M orthogonal gradients of one length a mean is shorter by √M, this is
  not. A zero gradient counts in the length only; where directions cancel, the result is 0.
- `median`: of each element, the median over the contributors.
- `trimmed:f`: of each element, the mean without the f largest and the f smallest.

Who contributes to a commit without carrying a tensor counts there as a zero gradient, in all of them. Weights
count in `mean`, `sum` and `rda`; the other two are to withstand what single contributors say, also of their
weight. A commit with too few contributors for `trimmed:f` trims as many as leave one, or two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from headwater.errors import ConfigurationError

Kind: TypeAlias = Literal["mean", "sum", "rda", "median", "trimmed"]

_EXPECTED = "'mean', 'sum', 'rda', 'median', 'trimmed:F' with F ≥ 1, or None for what the mode's reduce says"


@dataclass(frozen=True, slots=True)
class MergeKind:
    """What `merge=` of a model says. `trim`: how many are left out at either end, of "trimmed"."""

    kind: Kind
    trim: int = 0

    @property
    def needs(self) -> int:
        """How many contributors it takes at least."""
        return 2 * self.trim + 1

    def left_out(self, contributors: int) -> int:
        """Of so many values in order, how many of the smallest, and how many of the largest, do not count."""
        most = (contributors - 1) // 2
        return most if self.kind == "median" else min(self.trim, most)

    def __str__(self) -> str:
        return f"trimmed:{self.trim}" if self.kind == "trimmed" else self.kind


def parse_merge(value: object) -> MergeKind:
    """Turn what a user wrote into a merge; `str(merge)` is the inverse.

    Raises:
        ConfigurationError: not a merge; the text lists the valid forms.
    """
    if isinstance(value, str) and value in ("mean", "sum", "rda", "median"):
        return MergeKind(value)  # type: ignore[arg-type]
    kind, _, number = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind == "trimmed" and number.isdecimal() and int(number) >= 1:
        return MergeKind("trimmed", int(number))
    raise ConfigurationError(f"merge: got {value!r}, expected {_EXPECTED}")
