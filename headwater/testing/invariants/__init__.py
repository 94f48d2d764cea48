"""What must hold, and how it is told that it does not."""

from headwater.testing.invariants.always import ALWAYS, EachPortionOnce
from headwater.testing.invariants.counted import COUNTED as _COUNTED
from headwater.testing.invariants.invariant import Invariant, Violation, explained
from headwater.testing.invariants.quorum import QuorumRounds
from headwater.testing.invariants.rewinds import ENLISTED, REWOUND
from headwater.testing.invariants.traced import TRACED
from headwater.testing.invariants.views import FOLLOWED

COUNTED = (*_COUNTED, QuorumRounds)

__all__ = [
    "ALWAYS",
    "COUNTED",
    "ENLISTED",
    "FOLLOWED",
    "REWOUND",
    "TRACED",
    "EachPortionOnce",
    "Invariant",
    "Violation",
    "explained",
]
