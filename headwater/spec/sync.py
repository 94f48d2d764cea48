"""Modes: when updates are committed, and when a worker may have its answer.

A mode is one open seam. The sequencer asks every mode the same three questions, and every answer that keeps
somebody waiting, or drops something, has a reason fit to show a user:

- `may_count`: a step has arrived whose worker missed some commits: may it still be committed?
- `next`: these steps wait to be committed: which are committed now, as one update or as several; or what do
  they wait for, and until when?
- `may_read`: a worker has finished so many steps, the slowest so many: may it have its answer?

Other parts ask what a mode *means*, by its properties (`rounds`, `reduce`, `late`); nobody asks for a
mode by its class or its text. A mode of a user's own derives from `Mode` and is registered like a rule.

Pure: no clock, no I/O; a mode keeps nothing between two questions. It travels as the text that a user writes,
`name:setting=value,…`, and means the same wherever it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Protocol, Self, TypeAlias

from headwater.errors import ConfigurationError
from headwater.messages import Pace
from headwater.spec.registry import Registry, register
from headwater.spec.seconds import LONGEST_S
from headwater.spec.setting_text import settings_of, text_name, text_of
from headwater.spec.settings import Settings, field_types, require
from headwater.spec.slack import grace
from headwater.spec.words import option

Reduce: TypeAlias = Literal["mean", "sum"]
Late: TypeAlias = Literal["drop", "carry"]
SLACK: Literal["slack"] = "slack"


# ── what is asked, and what is answered ─────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Decision:
    """Yes or no; when no, why, in words for a user."""

    allowed: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.allowed


YES = Decision(True)


class ReadyStep(Protocol):
    """A step of an active worker that every server holds, and that no commit contains yet.

    Attributes:
        rank: of its worker.
        clock: steps that its worker had finished before.
        missed: commits since its worker was answered last; of an outer step, those of its fragment since its
            worker got that fragment's values last.
        fragment: of an outer step, the model whose change it sends; -1 of any other.
        since: when every server held it, in seconds of the clock that `Mode.next` is told.
        pace: how fast its worker makes local steps, where it has said so.
    """

    @property
    def rank(self) -> int: ...
    @property
    def clock(self) -> int: ...
    @property
    def missed(self) -> int: ...
    @property
    def fragment(self) -> int: ...
    @property
    def since(self) -> float: ...
    @property
    def pace(self) -> Pace | None: ...


class Pending(Protocol):
    """All such steps, at most one a worker; iterated in rank order.

    Attributes:
        active: how many workers take steps: nobody ends, leaves, dies or waits in a barrier among them.
        current: of these, how many have the values of a fragment's last commit.
    """

    @property
    def active(self) -> int: ...
    def current(self, fragment: int) -> int: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[ReadyStep]: ...


@dataclass(frozen=True, slots=True)
class Commits:
    """Commit these now: each group is applied as one update, in the order of the groups."""

    groups: tuple[tuple[ReadyStep, ...], ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Commit nothing yet. `reason`: for a user; `due`: when to ask again though nothing has arrived."""

    reason: str
    due: float | None = None


# ── the seam ────────────────────────────────────────────────────────────────────────────────────


class Mode(Settings):
    """Base of all modes: a frozen dataclass whose fields are its settings. By itself: asynchronous.

    Override what differs. A property may be overridden by a field or by a plain class attribute.
    """

    __slots__ = ()

    registry: ClassVar[Registry[Mode]] = Registry("mode")
    keyword: ClassVar[str]
    """Its name in texts, where that is not the name of the class."""
    form: ClassVar[str]
    """How its text looks, in error messages, where that does not follow from its fields."""

    @property
    def rounds(self) -> bool:
        """Whether who is in a commit must not depend on timing: a commit takes the updates of all active
        workers, or of as many as are needed of them, together.

        Then each worker reads a part of the data that is its own by default, whoever ended its batches goes
        on only together with all others, and what a step's answer brought is current until the next step.
        """
        return False

    @property
    def leaves_out(self) -> bool:
        """Whether a commit of a mode with rounds may be without the updates of some active workers."""
        return False

    @property
    def reduce(self) -> Reduce:
        """Whether the gradients of a commit are averaged over its contributors, or added up."""
        return "mean"

    @property
    def late(self) -> Late:
        """What becomes of the gradients of a late step: they are dropped, or its worker carries them over: it
        keeps them, and they go out with its next step.
        """
        return "drop"

    def may_count(self, missed: int) -> Decision:
        """Decide whether a step may be committed whose worker missed so many commits; if not, it is late."""
        return YES

    def next(self, pending: Pending, now: float) -> Commits | Wait:
        """Decide what becomes of the pending steps, of which there is at least one; `now` in seconds.

        Asked whenever something has changed, when a returned `due` has come, and again after what it chose
        was committed.
        """
        return Commits(tuple((step,) for step in pending))

    def may_read(self, clock: int, slowest: int) -> Decision:
        """Decide whether a worker that finished `clock` steps may have its answer; the slowest active worker
        has finished `slowest`.
        """
        return YES

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("reduce", ("mean", "sum")), ("late", ("drop", "carry"))):
            value, expected = getattr(self, name), " or ".join(map(repr, allowed))
            require(isinstance(value, str) and value in allowed, self, name, expected)

    # ── as text ─────────────────────────────────────────────────────────────────────────────────

    def __str__(self) -> str:
        """What `parse_sync` makes this mode of again: its name, and the settings that are no defaults."""
        said = [
            f"{text_name(field.name)}={text_of(value)}"
            for field in fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, field.name)) != field.default
        ]
        return f"{self.name}:{','.join(said)}" if said else self.name

    @classmethod
    def of_text(cls, argument: str) -> Self:
        """The mode with the settings `name=value,…`.

        The value of the first field that has no default may stand first, without the name.

        Raises:
            ConfigurationError: an unknown, missing, repeated, ill-typed or impossible setting.
        """
        return settings_of(cls, argument)

    @classmethod
    def registered_name(cls) -> str:
        keyword: str = cls.__dict__.get("keyword", cls.__name__)
        return keyword

    @classmethod
    def expected(cls) -> str:
        """How the text of such a mode looks, in quotes."""
        settings = ",".join(f"{text_name(name)}=…" for name in field_types(cls))
        text = f"{cls.registered_name()}:{settings}" if settings else cls.registered_name()
        form: str = cls.__dict__.get("form", repr(text))
        return form


def parse_sync(value: str | Mode) -> Mode:
    """Turn what a user wrote into a mode; `str(mode)` is the inverse.

    Raises:
        ConfigurationError: not a mode, or one that this process does not know; the text lists the valid
            forms.
    """
    if isinstance(value, Mode):
        if type(value) not in Mode.registry.classes():
            raise ConfigurationError(
                f"{option('sync')}: mode {value.name} is not registered, so servers cannot know it: "
                f"decorate its class with @headwater.register"
            )
        return value
    expected = ", ".join(mode.expected() for mode in Mode.registry.classes())
    if not isinstance(value, str):
        raise ConfigurationError(
            f"{option('sync')}: got {value!r}, expected {expected} or an object of such a mode"
        )
    name, colon, argument = value.strip().partition(":")
    known = {mode.registered_name(): mode for mode in Mode.registry.classes()}
    if name not in known:
        raise ConfigurationError(
            f"{option('sync')}: got {value!r}, expected {expected}; for a mode of your own, import the "
            f"module that defines it, or name that module with {option('rules', 'MODULE')}"
        )
    if colon and not argument:
        raise ConfigurationError(f"{option('sync')}: got {value!r}, expected {expected}")
    try:
        return known[name].of_text(argument)
    except ConfigurationError as error:
        raise ConfigurationError(f"{option('sync')}: got {value!r}: {error}; expected {expected}") from error


# ── the modes that come with Headwater ──────────────────────────────────────────────────────────


@register
@dataclass(frozen=True, slots=True)
class Synchronous(Mode):
    """One commit a round, with one update of every active worker (Valiant's bulk synchronous model).

    With `quorum` a round does not wait for stragglers (Chen et al. 2016): it is closed when that many
    updates have arrived, or all active workers' where there are fewer. An update that comes later than
    that is late: its step is answered with `applied=False` and current values.

    Outer steps (`OuterOptimizer`) have rounds of each fragment, side by side. To the quorum of one count only
    changes that began from the fragment's last commit, so rounds follow each other no faster than that many
    workers make their local steps. Other changes are late; under "carry" they are in the round that is open.

    Args:
        quorum: how many updates close a round; None: those of all active workers.
        grace_s: seconds that a round is held open for more after the quorum's last update; "slack": for as
            long as that makes nobody wait, as far as workers report how long their local steps take (see
            `headwater.spec.slack`).
        reduce: how the gradients of a round are combined, "mean" over the contributors or "sum".
        late: what becomes of a late update, "drop", or "carry": its worker sends it with the next one, and a
            change after local steps counts in the next round by itself.
        cap_s: longest grace under "slack", in seconds.

    Raises:
        ConfigurationError: `quorum` is not an integer ≥ 1, `grace_s` or `cap_s` not a number ≥ 0, `grace_s`
            or `late="carry"` without a quorum, `cap_s` without "slack", or `reduce` or `late` none of the
            two.
    """

    keyword = "sync"
    form = (
        "'sync', 'sync:quorum=K,grace=SECONDS,reduce=sum,late=carry' (any of these; grace=slack,cap=SECONDS)"
    )

    quorum: int | None = None
    grace_s: float | Literal["slack"] = 0.0
    reduce: Reduce = "mean"
    late: Late = "drop"
    cap_s: float = 10.0

    def check(self) -> None:
        require(self.quorum is None or self.quorum >= 1, self, "quorum", "≥ 1, or None for everybody")
        length = 0.0 if isinstance(self.grace_s, str) else self.grace_s
        require(0 <= length <= LONGEST_S, self, "grace_s", "≥ 0 seconds and at most a year, or 'slack'")
        require(0 <= self.cap_s <= LONGEST_S, self, "cap_s", "≥ 0 seconds and at most a year")
        if self.quorum is None and self.grace_s:
            raise ConfigurationError(
                f"sync: grace_s={self.grace_s} without a quorum: a round waits for everybody anyway"
            )
        if self.cap_s != 10.0 and self.grace_s != SLACK:
            raise ConfigurationError(f"sync: cap_s={self.cap_s:g} is for grace='slack', which it bounds")
        if self.quorum is None and self.late == "carry":
            raise ConfigurationError("sync: late=carry without a quorum: nobody is ever late")

    @property
    def rounds(self) -> bool:
        return True

    @property
    def leaves_out(self) -> bool:
        return self.quorum is not None

    def needed(self, active: int) -> int:
        """How many updates a round with `active` active workers needs at least."""
        return active if self.quorum is None else min(self.quorum, active)

    def may_count(self, missed: int) -> Decision:
        """With a quorum, a step counts for the round that was open when its worker was answered last."""
        if self.quorum is None or not missed:
            return YES
        return Decision(False, f"its round was closed without it, {missed} commit{'s' * (missed > 1)} ago")

    def next(self, pending: Pending, now: float) -> Commits | Wait:
        """The round, once it is complete: everybody's, or the quorum's after the grace."""
        held = len(pending)
        if self.quorum is None:
            if held < (needed := self.needed(pending.active)):
                return Wait(f"{held} of {needed} updates of this round have arrived")
            return Commits((tuple(pending),))
        rounds: dict[int, list[ReadyStep]] = {}
        for step in pending:
            rounds.setdefault(step.fragment, []).append(step)
        waits = []
        for fragment, steps in rounds.items():
            choice = self._round(fragment, steps, pending, now)
            if isinstance(choice, Commits):
                return choice
            waits.append(choice)
        if held == pending.active:
            # Nobody else can come, so a smaller round must do: the largest, or of those the oldest.
            largest = max(len(steps) for steps in rounds.values())
            alike = [steps for steps in rounds.values() if len(steps) == largest]
            oldest = min(alike, key=lambda steps: steps[0].since)
            return Commits((tuple(oldest),))
        due = min((wait.due for wait in waits if wait.due is not None), default=None)
        return Wait("; ".join(wait.reason for wait in waits), due)

    def _round(
        self, fragment: int, steps: Sequence[ReadyStep], pending: Pending, now: float
    ) -> Commits | Wait:
        """The round of a fragment, or of what is no outer step, of which these have arrived."""
        counting, needed = steps, self.needed(pending.active)
        if fragment >= 0 and (current := pending.current(fragment)):
            counting = [step for step in steps if not step.missed]
            fresh = self.needed(current)
        else:
            fresh = needed
        if len(counting) < fresh or len(steps) < needed:
            why = f"{len(steps)} of {needed} updates of this round have arrived"
            if counting is not steps:
                why += f", {len(counting)} of {fresh} that began from the last one"
            return Wait(why)
        others = pending.active - len(pending)
        if others and self.grace_s:
            quorum = sorted(counting, key=lambda step: step.since)[:fresh]
            seconds, why = self._grace(quorum)
            due = quorum[-1].since + seconds
            if now < due:
                return Wait(f"the round stays open for the other {others} for {seconds:g} s{why}", due)
        return Commits((tuple(steps),))

    def _grace(self, quorum: Sequence[ReadyStep]) -> tuple[float, str]:
        """For how long a round stays open that these have made complete, the last one just now, and why."""
        if self.grace_s != SLACK:
            return self.grace_s, ""
        last = quorum[-1].since
        seconds, why = grace(((step.pace, last - step.since) for step in quorum), self.cap_s)
        return seconds, f": {why}"


@register
@dataclass(frozen=True, slots=True)
class StaleSynchronous(Mode):
    """Let a worker lead the slowest active worker by at most `bound` steps (Ho et al. 2013).

    Args:
        bound: steps, at least 0.

    Raises:
        ConfigurationError: `bound` is not an integer ≥ 0.
    """

    keyword = "ssp"
    form = "'ssp:N'"

    bound: int

    def check(self) -> None:
        require(self.bound >= 0, self, "bound", "≥ 0 steps")

    def may_read(self, clock: int, slowest: int) -> Decision:
        lead = clock - slowest
        if lead > self.bound:
            return Decision(False, f"leads the slowest worker by {lead} steps, allowed {self.bound}")
        return YES

    def __str__(self) -> str:
        return f"{self.name}:{self.bound}"


@register
@dataclass(frozen=True, slots=True)
class Asynchronous(Mode):
    """Every update is committed as soon as all servers hold it; nobody waits for another."""

    keyword = "async"
    form = "'async'"
