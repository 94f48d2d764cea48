"""What must hold of a `Workload`, whose steps count themselves: none lost or doubled, every value right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headwater import messages as m
from headwater.shard import Shard
from headwater.shard.replica import MaterializedEntry, owned, restamped
from headwater.shard.snapshot import ShardSnapshot
from headwater.spec.sync import Commits, StaleSynchronous, Synchronous
from headwater.testing.invariants.digest import digest
from headwater.testing.invariants.invariant import Invariant
from headwater.testing.processes.client import Call, Floats
from headwater.testing.workload import LEDGER, TRAINED

if TYPE_CHECKING:
    from headwater.testing.invariants.accounts import Accounts
    from headwater.testing.processes.host import Host
    from headwater.testing.processes.member import Member
    from headwater.testing.world import World


class Accounting(Invariant):
    """Of a world whose members do what a workload says."""

    def accounts(self, who: Host | Member) -> Accounts:
        """Of the generation that this process is of."""
        accounts = who.timeline.accounts
        assert accounts is not None
        return accounts


class EachUpdateOnce(Accounting):
    """The log has every step once, applied or late, in its member's order; acknowledged ones are in it."""

    def sends(self, member: Member, call: Call) -> None:
        """A step begins."""
        request, accounts = call.request, self.accounts(member)
        accounts.requests[member.id, request.number] = request
        step = request.step if isinstance(request, m.Step) else member.steps
        accounts.steps[member.id, request.number] = step

    def processed(self, host: Host, shard: Shard, entry: m.AnyEntry) -> None:
        """Who decides the next step of a member, decides the one after its last."""
        accounts = self.accounts(host)
        if entry.position <= accounts.position:
            return
        tickets = entry.updates if isinstance(entry, m.Committed) else ()
        for ticket in (entry.ticket,) if isinstance(entry, m.Late) else tickets:
            member, step = accounts.step_of(ticket)
            last = accounts.decided.get(member, 0)
            if step != last + 1:
                self.fail(
                    f"{entry} decides step {step} of {self.world.member(member).name} after step {last}"
                )
            accounts.decided[member] = step
        accounts.read(entry)

    def answered(self, member: Member, call: Call, answer: m.Answer) -> None:
        """It is where the answer says."""
        if answer.result is None or not isinstance(call.request, m.Step):
            return
        accounts = self.accounts(member)
        known = accounts.applied if answer.result.applied else accounts.late
        version = known.get((member.id, call.request.step))
        if version is None or (answer.result.applied and version != answer.result.version):
            self.fail(
                f"{member.name} is told {answer.result} of step {call.request.step}, the log has {version}"
            )


class ValuesOfTheirVersion(Accounting):
    """On every server, in every copy and in what every member reads, values are those of their version."""

    def processed(self, host: Host, shard: Shard, entry: m.AnyEntry) -> None:
        """In a copy of a shard."""
        accounts = self.accounts(host)
        vector = shard.vectors.get(LEDGER)
        if vector is not None and (wrong := accounts.difference(vector.values, shard.version)):
            self.fail(f"{host.name}: {wrong}")
        trained = shard.vectors.get(TRAINED)
        if trained is not None:
            self._compare(host, trained.values, trained.start, trained.stop, shard.version)

    def answered(self, member: Member, call: Call, answer: m.Answer) -> None:
        """In what a member reads."""
        window = member.windows.get(LEDGER)
        if window is not None and LEDGER in answer.values:
            wrong = self.accounts(member).difference(window.parameters, answer.version)
            if wrong:
                self.fail(f"{member.name} reads: {wrong}")
        window = member.windows.get(TRAINED)
        if window is not None and TRAINED in answer.values:
            self._compare(member, window.parameters, 0, len(window.parameters), answer.version)

    def _compare(self, who: Host | Member, values: Floats, start: int, stop: int, version: int) -> None:
        expected = self.accounts(who).trained.get(version)
        if expected is not None and values.tobytes() != expected[start:stop].tobytes():
            self.fail(
                f"{who.name}: at version {version} the trained model has other bits than one process gets"
            )


class RowsOfTheirVersion(Accounting):
    """What a member reads of a table's rows is what the log adds up to at the version of the answer."""

    def answered(self, member: Member, call: Call, answer: m.Answer) -> None:
        """The rows that it brought."""
        if call.rows:
            self._compare(member, call.pulled, answer.version)

    def read_ahead(self, member: Member, table: int, ids: Sequence[int]) -> None:
        """Those that came before they were asked for are of the last answer's version too."""
        self._compare(member, [(table, id) for id in ids], member.version)

    def _compare(self, member: Member, read: Sequence[tuple[int, int]], version: int) -> None:
        accounts = self.accounts(member)
        expected = accounts.rows.get(version)
        if expected is None:
            return
        for table, id in read:
            if table != accounts.workload.counted:
                continue
            row = tuple(int(x) for x in member.rows[table, id])
            if row != expected.get(id, (0, 0)):
                self.fail(
                    f"{member.name} reads {row} of row {id} at version {version}, the log has "
                    f"{expected.get(id, (0, 0))}"
                )


class KeptIsKnown(Accounting):
    """A worker that joins is told what the last applied step of its rank had it keep."""

    def answered(self, member: Member, call: Call, answer: m.Answer) -> None:
        """As the log says."""
        if answer.recalled is None:
            return
        kept = self.accounts(member).recalled[member.id, call.request.number]
        if answer.recalled.kept not in kept:
            self.fail(f"{member.name} is told that its rank keeps {answer.recalled.kept!r}, it kept {kept}")


class LateUpdatesAreNowhere(Accounting):
    """A late step changes no value and no version, and is reported as not applied."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._versions: dict[int, int] = {}

    def processed(self, host: Host, shard: Shard, entry: m.AnyEntry) -> None:
        """Values are compared elsewhere: here, the version."""
        if isinstance(entry, m.Late) and shard.version != host.timeline.versions[entry.position - 2]:
            self.fail(f"{host.name} has version {shard.version} after {entry}")

    def answered(self, member: Member, call: Call, answer: m.Answer) -> None:
        """What the member is told."""
        result = answer.result
        if result is not None and not result.applied and result.contributors:
            self.fail(f"{member.name} is told {result}")


class BoundedStaleness(Accounting):
    """No step is answered before its mode allows: in `ssp:N`, not while it leads anybody by more than N."""

    def processed(self, host: Host, shard: Shard, entry: m.AnyEntry) -> None:
        """At the entry that answers it."""
        sync, accounts = self.world.sync, self.accounts(host)
        if entry.position != accounts.position:
            return
        tickets: tuple[m.ExchangeId, ...] = ()
        if isinstance(entry, m.Committed):
            tickets = entry.answered
        elif isinstance(entry, m.Served) and entry.kind == "step":
            tickets = (entry.ticket,)
        clocks = accounts.clocks
        for ticket in tickets:
            clock = clocks.get(ticket.member)
            if clock is None:
                continue
            slowest = min(clocks.values())
            if isinstance(sync, StaleSynchronous):  # in numbers of its own, lest the mode judge itself
                fair = clock - slowest <= sync.bound
            else:
                fair = bool(sync.may_read(clock, slowest))
            if not fair:
                name = self.world.member(ticket.member).name
                self.fail(f"{entry} answers {name} after {clock} steps, the slowest has finished {slowest}")


@dataclass(frozen=True)
class _Step:
    """A step as a mode sees it, of which nothing is known but that it was committed."""

    rank: int
    clock: int = 0
    missed: int = 0
    since: float = 0.0
    pace: m.Pace | None = None
    fragment: int = -1


@dataclass(frozen=True)
class _Round:
    """The steps of a commit, as a mode saw them."""

    steps: list[_Step]
    active: int

    def current(self, fragment: int) -> int:
        return self.active

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[_Step]:
        return iter(self.steps)


class CompleteRounds(Accounting):
    """With rounds, a commit has one update of every active worker, or of as many as the mode asks for."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._positions: dict[int, int] = {}

    def processed(self, host: Host, shard: Shard, entry: m.AnyEntry) -> None:
        """A commit does not change who is active."""
        generation = host.timeline.generation
        if (
            not self.world.sync.rounds
            or (isinstance(self.world.sync, Synchronous) and self.world.sync.leaves_out)  # see QuorumRounds
            or not isinstance(entry, m.Committed)
            or entry.position <= self._positions.get(generation, 0)
        ):
            return
        self._positions[generation] = entry.position
        took = {ticket.member for ticket in entry.updates}
        active = set(self.accounts(host).clocks)
        if not took <= active or not self._is_complete(took, active):
            self.fail(f"{entry} has the updates of members {sorted(took)}, active are {sorted(active)}")

    def _is_complete(self, took: set[int], active: set[int]) -> bool:
        """By the mode's own numbers; a mode of a user's own says for itself what it would commit at last."""
        mode = self.world.sync
        if isinstance(mode, Synchronous):
            return took == active
        choice = mode.next(_Round([_Step(member) for member in sorted(took)], len(active)), math.inf)
        return isinstance(choice, Commits) and [len(group) for group in choice.groups] == [len(took)]


class ConsistentCut(Accounting):
    """The parts of a checkpoint are of one position, and a shard restored from one goes on equal."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._inputs: dict[tuple[int, int, int], MaterializedEntry] = {}
        self._doubles: dict[tuple[int, int], Shard] = {}

    def took_snapshot(self, member: int, number: int, snapshot: ShardSnapshot) -> None:
        """Against the log; what is restored from it follows the same entries from now on."""
        asked = self.world.member(member)
        ledger = next((model for model in snapshot.models if model.spec.name == "ledger"), None)
        if ledger is not None and (wrong := self.accounts(asked).difference(ledger.values, snapshot.version)):
            self.fail(f"the part of server {snapshot.index}: {wrong}")
        place = asked.timeline.generation, snapshot.index
        self._doubles[place] = Shard.restore(snapshot, self.world.sync.reduce)

    def answered(self, member: Member, call: Call, answer: m.Answer) -> None:
        """All parts are there."""
        if not isinstance(call.request, m.Checkpoint):
            return
        parts = self.world.snapshots[member.id, answer.number]
        places = {(part.position, part.version) for part in parts.values()}
        if (
            len(parts) < self.world.servers
            or len(places) > 1
            or {version for _, version in places} != {answer.version}
        ):
            self.fail(
                f"{len(parts)} parts of positions and versions {places}, answered with {answer.version}"
            )

    def prepared(self, host: Host, shard: Shard, resolved: MaterializedEntry) -> None:
        """What a standby is sent, a double will follow."""
        if self.accounts(host).workload.checkpoints or self.world.disk is not None:
            place = host.timeline.generation, shard.index, resolved.inputs.entry.position
            self._inputs[place] = resolved

    def processed(self, host: Host, shard: Shard, entry: m.AnyEntry) -> None:
        """The double of this shard does the same; where no standby was sent its inputs, it ends."""
        place = host.timeline.generation, shard.index
        double = self._doubles.get(place)
        if double is None or entry.position != double.position + 1:
            return
        resolved = self._inputs.get((*place, entry.position))
        if resolved is None or resolved.inputs.entry != entry:
            del self._doubles[place]
            return
        # A standby that took over ships again, in the term that its new standby begins with.
        double.follow(owned(restamped(resolved, double.term)))
        double.commit(entry.position)
        if entry.position % self.world.digest_every == 0 and digest(double) != digest(shard):
            self.fail(f"a shard restored from a checkpoint differs from {host.name} after {entry}")

    def over(self) -> None:
        """At the end, once more."""
        for place, double in self._doubles.items():
            for host in self.world.hosts:
                shard = host.shard
                same = place == (host.timeline.generation, shard.index) and shard.position == double.position
                if host.alive and same and digest(double) != digest(shard):
                    self.fail(f"a shard restored from a checkpoint differs from {host.name} at the end")


class EverySample(Accounting):
    """What was to be read was read: exactly once in parts of one's own, and in splits where nobody died, the
    coordinator included."""

    def over(self) -> None:
        """By what the log recorded."""
        world = self.world
        accounts = world.generations.now.accounts
        assert accounts is not None
        workload = accounts.workload
        if world.coordinator.lost or any(member.waited_for for member in world.living()):
            return
        recorded = world.shards[0].positions.recorded()
        if not workload.splits:
            done = {position.rank: place.done for position in recorded.last for place in position.places}
            wanted = dict.fromkeys(range(workload.ranks), workload.steps)
            if done != wanted and not accounts.lost:
                self.fail(f"samples done by rank are {done}, expected {wanted}")
            elif accounts.taken != workload.steps * workload.ranks and not accounts.lost:
                self.fail(f"{accounts.taken} samples were read of {workload.steps * workload.ranks}")
            return
        deaths = any(member.dead for member in world.members) or world.coordinators > 1
        taken = accounts.taken
        if taken < workload.steps * workload.ranks or (
            not deaths and taken > workload.steps * workload.ranks
        ):
            self.fail(f"{taken} samples were read of {workload.steps * workload.ranks}, {deaths=}")


COUNTED: tuple[type[Invariant], ...] = (
    EachUpdateOnce,
    ValuesOfTheirVersion,
    RowsOfTheirVersion,
    KeptIsKnown,
    LateUpdatesAreNowhere,
    BoundedStaleness,
    CompleteRounds,
    ConsistentCut,
    EverySample,
)
"""What holds of a `Workload`, in this order."""
