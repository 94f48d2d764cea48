"""Which reserved place each node has: one node in a place at a time, a standby apart from its server."""

from __future__ import annotations

import threading
from collections.abc import Sequence


def seats_of_shards(machines: Sequence[str], shards: int) -> list[tuple[int, ...]]:
    """The places of each shard's server and of its standby, where there is a second place.

    `machines`: for each place, the machine that it is on. A shard's two places are on different machines
    unless more than half of all places are on one, and servers lie on as many machines as possible.
    """
    order = sorted(range(len(machines)), key=lambda place: machines[place])
    if len(order) < 2 * shards:
        return [(place,) for place in range(shards)]
    pairs = list(zip(order[:shards], order[shards : 2 * shards], strict=True))
    return [pair if shard % 2 == 0 else pair[::-1] for shard, pair in enumerate(pairs)]


class BundleSlots:
    """Who sits where; a node whose places are all taken waits until one is known to be free."""

    def __init__(self, seats: Sequence[tuple[int, ...]]) -> None:
        self._seats = seats
        self._taken: set[int] = set()
        self._changed = threading.Condition()

    def take(self, index: int) -> int | None:
        """A place of shard or rank `index`; None when all it has are taken."""
        with self._changed:
            return self._take(index)

    def wait(self, index: int, cancelled: threading.Event) -> int | None:
        """Block for a place; None when `cancelled`, which `wake` makes it look at."""
        with self._changed:
            while not cancelled.is_set():
                if (place := self._take(index)) is not None:
                    return place
                self._changed.wait()
        return None

    def _take(self, index: int) -> int | None:
        free = next((place for place in self._seats[index] if place not in self._taken), None)
        if free is not None:
            self._taken.add(free)
        return free

    def release(self, place: int) -> None:
        """Its node has ended."""
        with self._changed:
            self._taken.discard(place)
            self._changed.notify_all()

    def wake(self) -> None:
        """Have all who wait look again."""
        with self._changed:
            self._changed.notify_all()
