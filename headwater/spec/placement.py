"""Where ids live: id → virtual slot → server.

Invariants:
- An id's slot is a function of the id alone, for ever: checkpoints and servers of any number agree on it.
- Slots go to servers in contiguous ranges, so the order of slots is also the order of servers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SLOTS = 4096
"""Virtual slots of every table; a slot moves between servers as a unit."""


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """uint64[...] → uint64[...], one to one (the finaliser of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def slots_of(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[...]: the virtual slot of each id."""
    hashed = mix(np.asarray(ids, dtype=np.int64).view(np.uint64))
    return (hashed & np.uint64(SLOTS - 1)).astype(np.int64)


def slots_of_server(index: int, servers: int) -> range:
    """The slots that server `index` of `servers` holds."""
    return range(index * SLOTS // servers, (index + 1) * SLOTS // servers)


def slot_bounds(servers: int) -> NDArray[np.int64]:
    """int64[servers + 1]: server i holds slots [bounds[i], bounds[i + 1])."""
    return np.arange(servers + 1, dtype=np.int64) * SLOTS // servers
