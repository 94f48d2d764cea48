"""Simulated clusters: what servers run, under virtual time, with whatever can go wrong (docs/testing.md)."""

from headwater.spec.sync import Mode
from headwater.testing.faults import Crash, Cut, Fault, Faults, Partition, Stop
from headwater.testing.invariants import Invariant, Violation
from headwater.testing.schedule import Schedule
from headwater.testing.search import Exploration, explore, shrink
from headwater.testing.simulation import Result, run, simulate

__all__ = [
    "Crash",
    "Cut",
    "Exploration",
    "Fault",
    "Faults",
    "Invariant",
    "Mode",
    "Partition",
    "Result",
    "Schedule",
    "Stop",
    "Violation",
    "explore",
    "run",
    "shrink",
    "simulate",
]
