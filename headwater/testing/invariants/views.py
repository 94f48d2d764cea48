"""What must hold of what followers show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from headwater import messages as m
from headwater.machines.follower import Slot
from headwater.shard import Shard
from headwater.spec.version import Version
from headwater.testing.invariants.invariant import Invariant
from headwater.testing.processes.client import Floats
from headwater.testing.workload import LEDGER, ROWS

if TYPE_CHECKING:
    from headwater.testing.following import Following
    from headwater.testing.processes.host import Host
    from headwater.testing.processes.member import Member
    from headwater.testing.world import World


class ViewsOfTheirVersion(Invariant):
    """What a follower shows is one whole version of all servers; it only grows; what is pinned stays."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._values: dict[tuple[int, int, int], Floats] = {}
        self._rows: dict[tuple[int, int, int], dict[int, bytes]] = {}
        self._recorded: dict[tuple[int, int], m.DataProgress] = {}
        self._shown: dict[int, tuple[Slot, Version]] = {}

    def processed(self, host: Host, shard: Shard, entry: m.AnyEntry) -> None:
        """Note what each server is where it copies."""
        repeats = isinstance(entry, m.Served) and entry.kind == "publish"
        if not (repeats or isinstance(entry, m.Published)):
            return
        place = shard.index, host.timeline.generation, entry.position
        self._values[place] = shard.vectors[LEDGER].values.copy()
        snapshot = shard.tables[ROWS].snapshot(shard.version)
        self._rows[place] = _by_id(snapshot.ids, snapshot.values)
        self._recorded[host.timeline.generation, entry.position] = shard.positions.recorded()

    def happened(self) -> None:
        """A newer version may be shown."""
        for place, follower in enumerate(self.world.followers):
            current = follower.machine.current
            if current is None:
                continue
            shown = current, follower.machine.shown
            before = self._shown.get(place)
            if before != shown:
                self._shown[place] = shown
                if before is not None and shown[1] <= before[1]:
                    self.fail(f"a follower shows {shown[1]} after {before[1]}")
                self._compare(*shown)

    def wakes(self, member: Member) -> None:
        """Whatever was installed meanwhile, what is pinned is what it was."""
        for follower in self.world.followers:
            self._look_at_pins(follower)

    def over(self) -> None:
        """The last ones too."""
        for follower in self.world.followers:
            self._look_at_pins(follower)

    def _look_at_pins(self, follower: Following) -> None:
        kept = {id(slot) for slot, _ in follower.views}
        if len(kept) > follower.machine.pins:
            self.fail(f"{len(kept)} versions are pinned, at most {follower.machine.pins} may be")
        for slot, version in follower.views:
            if slot.version != version:
                self.fail(f"what was pinned as {version} is {slot.version}")
            self._compare(slot, version)

    def _compare(self, slot: Slot, version: Version) -> None:
        copy = slot.copy
        rows: dict[int, bytes] = {}
        for server, (start, stop) in enumerate(copy.layouts[LEDGER].cut(copy.servers)):
            place = server, version.generation, copy.position
            if place not in self._values:
                self.fail(f"{version} is shown as of entry {copy.position}, where nothing was copied")
            if not np.array_equal(copy.vectors[LEDGER][start:stop], self._values[place]):
                self.fail(f"{version} has other values of server {server} than that had")
            rows |= self._rows[place]
        scanned = [_by_id(*part) for part in copy.tables[ROWS].scan(1000)]
        if (scanned[0] if scanned else {}) != rows:
            self.fail(
                f"{version} has rows {sorted(*scanned)}, the servers had {sorted(rows)}, or other values"
            )
        if copy.recorded != self._recorded[version.generation, copy.position]:
            self.fail(f"{version} has other positions in the data than the log")


FOLLOWED = (ViewsOfTheirVersion,)


def _by_id(ids: Any, rows: Any) -> dict[int, bytes]:
    return {id: row.tobytes() for id, row in zip(ids.tolist(), rows, strict=True)}
