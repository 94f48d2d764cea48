"""When updates are committed and when a worker may read: the three training modes.

Pure: no clock, no I/O. Every decision carries a reason fit to show a user. A mode is two questions:

- `may_commit`: the updates held everywhere, may they be committed?
- `may_read`: a worker that finished `clock` steps, may it have its answer?

`rounds` says whether a commit takes the updates of all active workers at once or of one alone; `waits`
whether a worker's answer may wait for another worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from headwater.errors import ConfigurationError

Reduce: TypeAlias = Literal["mean", "sum"]


@dataclass(frozen=True, slots=True)
class Decision:
    """Yes or no; when no, why, in words for a user."""

    allowed: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.allowed


_YES = Decision(True)


@dataclass(frozen=True, slots=True)
class Synchronous:
    """One commit a round, with one update of every active worker (Valiant's bulk synchronous model).

    `reduce`: how the gradients of a round are combined, "mean" over the contributors or "sum".

    Raises:
        ConfigurationError: `reduce` is neither.
    """

    reduce: Reduce = "mean"
    rounds: ClassVar[bool] = True
    waits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.reduce not in ("mean", "sum"):
            raise ConfigurationError(f"Synchronous: reduce must be 'mean' or 'sum', got {self.reduce!r}")

    def may_commit(self, held: int, active: int) -> Decision:
        """Decide whether a round with `held` of `active` updates is complete."""
        if held < active:
            return Decision(False, f"{held} of {active} updates of this round have arrived")
        return _YES

    def may_read(self, clock: int, slowest: int) -> Decision:
        """Allow always: what a round commits, all its workers have committed together."""
        return _YES

    def __str__(self) -> str:
        return "sync" if self.reduce == "mean" else "sync:reduce=sum"


@dataclass(frozen=True, slots=True)
class StaleSynchronous:
    """Let a worker lead the slowest active worker by at most `bound` steps (Ho et al. 2013).

    Raises:
        ConfigurationError: `bound` is not an integer ≥ 0.
    """

    bound: int
    rounds: ClassVar[bool] = False
    waits: ClassVar[bool] = True
    reduce: ClassVar[Reduce] = "mean"

    def __post_init__(self) -> None:
        if isinstance(self.bound, bool) or not isinstance(self.bound, int) or self.bound < 0:
            raise ConfigurationError(f"StaleSynchronous: bound must be an integer ≥ 0, got {self.bound!r}")

    def may_commit(self, held: int, active: int) -> Decision:
        """Allow always: an update is committed as soon as all servers hold it."""
        return _YES

    def may_read(self, clock: int, slowest: int) -> Decision:
        """Decide whether a worker that finished `clock` steps may have its answer."""
        lead = clock - slowest
        if lead > self.bound:
            return Decision(False, f"leads the slowest worker by {lead} steps, allowed {self.bound}")
        return _YES

    def __str__(self) -> str:
        return f"ssp:{self.bound}"


@dataclass(frozen=True, slots=True)
class Asynchronous:
    """Every update is committed as soon as all servers hold it; nobody waits for another."""

    rounds: ClassVar[bool] = False
    waits: ClassVar[bool] = False
    reduce: ClassVar[Reduce] = "mean"

    def may_commit(self, held: int, active: int) -> Decision:
        """Allow always."""
        return _YES

    def may_read(self, clock: int, slowest: int) -> Decision:
        """Allow always."""
        return _YES

    def __str__(self) -> str:
        return "async"


Sync: TypeAlias = Synchronous | StaleSynchronous | Asynchronous

_EXPECTED = (
    "'sync', 'sync:reduce=sum', 'async', 'ssp:N' or a Synchronous, StaleSynchronous or Asynchronous object"
)


def parse_sync(value: str | Sync) -> Sync:
    """Turn what a user wrote into a mode; `str(mode)` is the inverse.

    Raises:
        ConfigurationError: not a mode; the text lists the valid forms.
    """
    if isinstance(value, Synchronous | StaleSynchronous | Asynchronous):
        return value
    if not isinstance(value, str):
        raise ConfigurationError(f"sync: got {value!r}, expected {_EXPECTED}")
    kind, _, argument = value.strip().partition(":")
    if kind == "async" and not argument:
        return Asynchronous()
    if kind == "ssp" and argument.isdecimal():
        return StaleSynchronous(int(argument))
    if kind == "sync" and not argument:
        return Synchronous()
    if kind == "sync" and argument in ("reduce=sum", "reduce=mean"):
        return Synchronous(reduce="sum" if argument.endswith("sum") else "mean")
    raise ConfigurationError(f"sync: got {value!r}, expected {_EXPECTED}")
