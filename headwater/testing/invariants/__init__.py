"""What must hold, and how it is told that it does not."""

from headwater.testing.invariants.always import ALWAYS
from headwater.testing.invariants.counted import COUNTED
from headwater.testing.invariants.invariant import Invariant, Violation, explained
from headwater.testing.invariants.views import FOLLOWED

__all__ = ["ALWAYS", "COUNTED", "FOLLOWED", "Invariant", "Violation", "explained"]
