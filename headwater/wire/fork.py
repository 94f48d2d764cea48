"""A forked child (a DataLoader worker) must not hold this process's connections open.

Otherwise the peers of a killed parent would see its end only when its last child ends. So every
object of this folder that owns a descriptor registers here, and the child closes them all first
thing: without shutdown, which would end the parent's connection too, and without taking locks,
which a thread that does not exist in the child may have held at the fork.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class DescriptorOwner(Protocol):
    """Something with descriptors that a forked child must not keep."""

    def close_descriptors(self) -> None:
        """Close them, in the forked child only: no shutdown, no lock, may be called twice."""


# A plain dict, changed by single operations only: a fork by another thread finds it whole.
_owners: dict[int, weakref.ref[DescriptorOwner]] = {}


def close_in_child(owner: DescriptorOwner) -> None:
    """Have `owner.close_descriptors()` called in every child forked from now on, while `owner` lives."""
    key = id(owner)
    _owners[key] = weakref.ref(owner, lambda _: _owners.pop(key, None))


def _after_fork() -> None:
    owners = [reference() for reference in list(_owners.values())]
    _owners.clear()
    for owner in owners:
        if owner is not None:
            owner.close_descriptors()


os.register_at_fork(after_in_child=_after_fork)
