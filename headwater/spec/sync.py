"""When updates are committed and when a worker may read: the three training modes.

Pure: no clock, no I/O. Every decision carries a reason fit to show a user. A mode is two questions:

- `may_commit`: the updates held everywhere, may they be committed?
- `may_read`: a worker that finished `clock` steps, may it have its answer?

`rounds` says whether a commit takes the updates of many active workers at once or of one alone; `waits`
whether a worker's answer may wait for another worker.
"""

from __future__ import annotations

import math
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

    With `quorum` a round does not wait for stragglers (Chen et al. 2016): it is closed when that many
    updates have arrived, or all active workers' where there are fewer. An update that comes later than
    that is dropped: its step is answered with `applied=False` and current values.

    `grace_s`: seconds that a round is held open for more after the quorum's last update.
    `reduce`: how the gradients of a round are combined, "mean" over the contributors or "sum".

    Raises:
        ConfigurationError: `quorum` is not an integer ≥ 1, `grace_s` not a number ≥ 0 or without a
            quorum, or `reduce` neither of the two.
    """

    quorum: int | None = None
    grace_s: float = 0.0
    reduce: Reduce = "mean"
    rounds: ClassVar[bool] = True
    waits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        quorum, grace = self.quorum, self.grace_s
        if quorum is not None and (isinstance(quorum, bool) or not isinstance(quorum, int) or quorum < 1):
            raise ConfigurationError(f"Synchronous: quorum must be an integer ≥ 1 or None, got {quorum!r}")
        if isinstance(grace, bool) or not isinstance(grace, int | float) or not 0 <= grace < math.inf:
            raise ConfigurationError(f"Synchronous: grace_s must be seconds ≥ 0, got {grace!r}")
        if quorum is None and grace:
            raise ConfigurationError(
                f"Synchronous: grace_s={grace:g} without a quorum: a round waits for everybody anyway"
            )
        if self.reduce not in ("mean", "sum"):
            raise ConfigurationError(f"Synchronous: reduce must be 'mean' or 'sum', got {self.reduce!r}")

    def needed(self, active: int) -> int:
        """How many updates a round with `active` active workers needs at least."""
        return active if self.quorum is None else min(self.quorum, active)

    def may_commit(self, held: int, active: int, over: bool = False) -> Decision:
        """Decide whether a round with `held` of `active` updates is complete; `over`: its grace is."""
        needed = self.needed(active)
        if held < needed:
            return Decision(False, f"{held} of {needed} updates of this round have arrived")
        if held < active and not over:
            return Decision(
                False, f"the round stays open for the other {active - held} for {self.grace_s:g} s"
            )
        return _YES

    def may_read(self, clock: int, slowest: int) -> Decision:
        """Allow always: what a round commits, all its workers have committed together."""
        return _YES

    def __str__(self) -> str:
        options = {
            "quorum": None if self.quorum is None else str(self.quorum),
            "grace": f"{float(self.grace_s)!r}".removesuffix(".0") if self.grace_s else None,
            "reduce": "sum" if self.reduce == "sum" else None,
        }
        said = ",".join(f"{name}={value}" for name, value in options.items() if value is not None)
        return f"sync:{said}" if said else "sync"


@dataclass(frozen=True, slots=True)
class StaleSynchronous:
    """Let a worker lead the slowest active worker by at most `bound` steps (Ho et al. 2013).

    Raises:
        ConfigurationError: `bound` is not an integer ≥ 0.
    """

    bound: int
    rounds: ClassVar[bool] = False
    waits: ClassVar[bool] = True
    quorum: ClassVar[None] = None
    grace_s: ClassVar[float] = 0.0
    reduce: ClassVar[Reduce] = "mean"

    def __post_init__(self) -> None:
        if isinstance(self.bound, bool) or not isinstance(self.bound, int) or self.bound < 0:
            raise ConfigurationError(f"StaleSynchronous: bound must be an integer ≥ 0, got {self.bound!r}")

    def needed(self, active: int) -> int:
        """One update is a commit."""
        return 1

    def may_commit(self, held: int, active: int, over: bool = False) -> Decision:
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
    quorum: ClassVar[None] = None
    grace_s: ClassVar[float] = 0.0
    reduce: ClassVar[Reduce] = "mean"

    def needed(self, active: int) -> int:
        """One update is a commit."""
        return 1

    def may_commit(self, held: int, active: int, over: bool = False) -> Decision:
        """Allow always."""
        return _YES

    def may_read(self, clock: int, slowest: int) -> Decision:
        """Allow always."""
        return _YES

    def __str__(self) -> str:
        return "async"


Sync: TypeAlias = Synchronous | StaleSynchronous | Asynchronous

_EXPECTED = (
    "'sync', 'sync:quorum=K,grace=SECONDS,reduce=sum' (any of these), 'async', 'ssp:N' or a Synchronous, "
    "StaleSynchronous or Asynchronous object"
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
    if kind == "sync":
        return _synchronous(value, argument)
    raise ConfigurationError(f"sync: got {value!r}, expected {_EXPECTED}")


def _synchronous(value: str, argument: str) -> Synchronous:
    """The mode of `sync:argument`, whose parts are name=value, each at most once."""
    parts = [part.partition("=") for part in argument.split(",")] if argument else []
    given = {name.strip(): text.strip() for name, _, text in parts}
    known = len(given) == len(parts) and given.keys() <= {"quorum", "grace", "reduce"}
    try:
        quorum, grace, reduce = given.get("quorum"), given.get("grace", "0"), given.get("reduce", "mean")
        numbers = None if quorum is None else int(quorum), float(grace)
    except ValueError:
        raise ConfigurationError(f"sync: got {value!r}, expected {_EXPECTED}") from None
    if not known or reduce not in ("mean", "sum"):
        raise ConfigurationError(f"sync: got {value!r}, expected {_EXPECTED}")
    return Synchronous(*numbers, reduce="sum" if reduce == "sum" else "mean")
