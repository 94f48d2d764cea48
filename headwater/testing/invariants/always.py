"""What must hold in every run, whatever its members do: each a small class that is told what happens.

Each raises `Violation` at the moment at which it can be seen that it does not hold. Those that need to know
what the members' steps add up to are in `headwater.testing.invariants.counted`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from headwater import messages as m
from headwater.machines.memory import Bytes
from headwater.shard import Shard
from headwater.testing.invariants.digest import digest
from headwater.testing.invariants.invariant import Invariant
from headwater.testing.processes.client import Call, Floats, Window

if TYPE_CHECKING:
    from headwater.testing.processes.host import Host
    from headwater.testing.processes.member import Member
    from headwater.testing.world import World


class OneOrder(Invariant):
    """All servers and standbys, also former ones, process the same entries at the same positions."""

    def processed(self, host: Host, shard: Shard, entry: m.AnyEntry) -> None:
        """The first one says what the log is."""
        log, versions = host.timeline.log, host.timeline.versions
        position = entry.position
        if position == len(log) + 1:
            log.append(entry)
            versions.append(shard.version)
        elif position > len(log):
            self.fail(f"{host.name} processed entry {position} after {len(log)}")
        elif log[position - 1] != entry or versions[position - 1] != shard.version:
            self.fail(
                f"{host.name} has at position {position} {entry} and version {shard.version}, others have "
                f"{log[position - 1]} and version {versions[position - 1]}"
            )


class EqualReplicas(Invariant):
    """A shard's copies at one position have the same bits: values, rule state, ledger, standings."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._digests: dict[tuple[int, int, int], int] = {}

    def processed(self, host: Host, shard: Shard, entry: m.AnyEntry) -> None:
        """Compare with who was there before."""
        if self.world.replicas and entry.position % self.world.digest_every == 0:
            self._compare(host, shard)

    def _compare(self, host: Host, shard: Shard) -> None:
        place = host.timeline.generation, shard.index, shard.position
        own = digest(shard)
        if self._digests.setdefault(place, own) != own:
            self.fail(
                f"{host.name} differs at position {shard.position} from another copy of shard {shard.index}"
            )

    def over(self) -> None:
        """At the end every copy that has come to the same position is compared."""
        if self.world.replicas:
            for host in self.world.hosts:
                if host.alive:
                    self._compare(host, host.shard)


class GrowingVersions(Invariant):
    """No member ever sees an older version than before, and a step's version lies between its reads."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._steps: dict[Member, int] = {}

    def answered(self, member: Member, call: Call, answer: m.Answer) -> None:
        """Against the last answer."""
        if answer.version < member.version:
            self.fail(f"{member.name} sees version {answer.version} after {member.version}")
        result, request = answer.result, call.request
        if result is None or not isinstance(request, m.Step):
            return
        if result.version > answer.version:
            self.fail(
                f"{member.name} is answered with version {answer.version} for a step in {result.version}"
            )
        if request.step == self._steps.get(member):
            return  # once more: it gets the result of the first time
        self._steps[member] = request.step
        if result.applied and result.staleness != result.version - 1 - request.seen:
            self.fail(f"{member.name}: {result} on version {request.seen}")


class CurrentAnswers(Invariant):
    """Whatever is answered is of a version not older than any that a member knew when it was asked for.

    So reads are linearizable: whoever asks after another was told sees it, also itself. Of one generation.
    """

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._newest: dict[int, int] = {}
        self._asked: dict[Member, int] = {}

    def sends(self, member: Member, call: Call) -> None:
        """What has been told so far."""
        self._asked[member] = self._newest.get(member.timeline.generation, 0)

    def answered(self, member: Member, call: Call, answer: m.Answer) -> None:
        """Against that."""
        if answer.version < self._asked[member]:
            self.fail(
                f"{member.name} is answered {call} with version {answer.version}, but version "
                f"{self._asked[member]} had been told when it asked"
            )
        generation = member.timeline.generation
        self._newest[generation] = max(self._newest.get(generation, 0), answer.version)


class QuietMemory(Invariant):
    """A member's memory is touched only to answer its outstanding exchange, also by former servers."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._left: dict[Member, list[tuple[Window, Floats, Floats]]] = {}
        self._rows: dict[Member, tuple[int, Bytes]] = {}

    def answered(self, member: Member, call: Call, answer: m.Answer) -> None:
        """From here on nobody may."""
        if self.world.shares:
            self._left[member] = [
                (window, window.gradients.copy(), window.parameters.copy())
                for window in member.windows.values()
            ]
            scratch = member.memory
            self._rows[member] = scratch.generation, scratch.memory.copy()

    def wakes(self, member: Member) -> None:
        """Until the program goes on."""
        for window, gradients, parameters in self._left.pop(member, ()):
            same = np.array_equal(window.gradients, gradients, equal_nan=True)
            if not same or not np.array_equal(window.parameters, parameters, equal_nan=True):
                self.fail(f"the memory of {member.name} was touched while it had no exchange outstanding")
        generation, rows = self._rows.pop(member, (-1, None))
        scratch = member.memory
        if rows is not None and scratch.generation == generation and not np.array_equal(scratch.memory, rows):
            self.fail(f"rows of {member.name} were touched while it had no exchange outstanding")


class NamedWaits(Invariant):
    """Whoever waits can be told for what, or for whom."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._next = 0

    def happened(self) -> None:
        """Now and then."""
        self._next -= 1
        if self._next < 0:
            self._next = 10 if len(self.world.members) < 100 else 100_000
            for member, reason in self.world.waits().items():
                if not reason or "waits for nobody" in reason:
                    self.fail(f"member {member} is told that {reason!r}")


class NobodyWaitsForEver(Invariant):
    """When nothing happens any more, every program has come to its end."""

    def over(self) -> None:
        """Except where a shard was lost with all its copies."""
        if self.world.coordinator.lost:
            return
        waiting = {member.name: member.call for member in self.world.living() if member.waited_for}
        if waiting:
            self.fail(f"{waiting} wait for ever: {self.world.waits() or 'nobody is told why'}")


class EachPortionOnce(Invariant):
    """Each portion of an evaluation is in the log once; the sums that it adds up to its asker compares."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._counted: dict[tuple[int, int, int], int] = {}

    def processed(self, host: Host, shard: Shard, entry: m.AnyEntry) -> None:
        """Whoever brought it, and however many computed it."""
        if isinstance(entry, m.Counted):
            portion = entry.done.portion
            place = host.timeline.generation, portion.round, portion.index
            if self._counted.setdefault(place, entry.position) != entry.position:
                self.fail(f"{entry} counts a portion that entry {self._counted[place]} has counted")


ALWAYS: tuple[type[Invariant], ...] = (
    OneOrder,
    EqualReplicas,
    GrowingVersions,
    CurrentAnswers,
    QuietMemory,
    NamedWaits,
    NobodyWaitsForEver,
)
"""What holds whatever the programs do."""
