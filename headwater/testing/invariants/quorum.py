"""What must hold of rounds that a quorum closes, those of fragments side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwater import messages as m
from headwater.shard import Shard
from headwater.spec.sync import Synchronous
from headwater.testing.invariants.counted import Accounting
from headwater.testing.invariants.fragments import FragmentCommits, fragments_of

if TYPE_CHECKING:
    from headwater.testing.processes.host import Host
    from headwater.testing.world import World


class QuorumRounds(Accounting):
    """A commit has as many updates as the quorum asks for, or fewer, where all others wait in other rounds.
    It has changes of one fragment or of none; to the quorum count those that began from its last commit.
    """

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._positions: dict[int, int] = {}
        self._commits: dict[int, FragmentCommits] = {}

    def processed(self, host: Host, shard: Shard, entry: m.AnyEntry) -> None:
        """The first time, compare a commit with what was before."""
        mode, generation = self.world.sync, host.timeline.generation
        known = entry.position <= self._positions.get(generation, 0)
        if known or not isinstance(mode, Synchronous) or mode.quorum is None:
            return
        self._positions[generation] = entry.position
        commits = self._commits.setdefault(generation, FragmentCommits())
        if isinstance(entry, m.Committed):
            self._check(host, entry, commits, mode.quorum)
        commits.read(entry)

    def _check(self, host: Host, entry: m.Committed, commits: FragmentCommits, quorum: int) -> None:
        """A commit does not change who is active."""
        active = self.accounts(host).clocks.keys()
        took = {ticket.member for ticket in entry.updates}
        fragments = set(fragments_of(entry).values())
        if len(fragments) > 1 or not took <= active:
            self.fail(f"{entry} has changes of fragments {sorted(fragments)}, active are {sorted(active)}")
        (fragment,) = fragments
        current = {id for id in active if not commits.missed(id, fragment)}
        enough = len(took) >= min(quorum, len(active))
        if enough and len(took & current) >= min(quorum, len(current)):
            return
        for other in active - took:
            member = self.world.member(other)
            request = member.call.request if member.call is not None and member.outstanding else None
            if not isinstance(request, m.Step) or request.fragment == fragment:
                self.fail(
                    f"{entry} has {len(took)} updates, {len(took & current)} of them from the last commit of "
                    f"fragment {fragment}, which {sorted(current)} have; {member.name} waits nowhere else"
                )
