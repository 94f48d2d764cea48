"""Steps as a mode sees them, and a mode of a user's own."""

from dataclasses import dataclass, field

from headwater.messages import Pace
from headwater.spec.sync import Commits, Decision, Mode, Wait


@dataclass(frozen=True)
class Step:
    """A step that every server holds."""

    rank: int = 0
    clock: int = 0
    missed: int = 0
    since: float = 0.0
    pace: Pace | None = None
    fragment: int = -1


@dataclass(frozen=True)
class Steps:
    """Pending steps of `active` workers, of whom `fresh[fragment]` have that fragment's last values."""

    active: int
    steps: list[Step] = field(default_factory=list)
    fresh: dict[int, int] = field(default_factory=dict)

    def current(self, fragment):
        return self.fresh.get(fragment, 0)

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        return iter(self.steps)


def steps(held, active, since=()):
    """So many steps of so many active workers, held since these times or since 0."""
    times = [*since, *[0.0] * (held - len(since))]
    return Steps(active, [Step(rank, since=time) for rank, time in enumerate(times)])


@dataclass(frozen=True)
class Pairs(Mode):
    """Any `wanted` updates are a commit; of fewer active workers, all of theirs."""

    wanted: int = 2
    rounds = True
    reduce = "sum"

    def next(self, pending, now):
        wanted = min(self.wanted, pending.active)
        if len(pending) < wanted:
            return Wait(f"{len(pending)} of {wanted} updates have arrived")
        return Commits((tuple(pending)[:wanted],))


@dataclass(frozen=True)
class Deaf(Mode):
    """Asynchronous, but no answer is ever allowed."""

    def may_read(self, clock, slowest):
        return Decision(False, "no reason")
