"""The coordinator as a machine: every decision of the master node, and how they couple (`machine`)."""

from headwater.machines.coordinator.identity import Identity
from headwater.machines.coordinator.machine import (
    AllFinished,
    CoordinatorMachine,
    EndAsked,
    WriteCheckpoint,
)
from headwater.machines.coordinator.members import Ended, Logged
from headwater.machines.coordinator.newcomers import CheckAddresses, ChooseCheckpoint
from headwater.machines.coordinator.state import CoordinatorRecord

__all__ = [
    "AllFinished",
    "CheckAddresses",
    "ChooseCheckpoint",
    "CoordinatorMachine",
    "CoordinatorRecord",
    "EndAsked",
    "Ended",
    "Identity",
    "Logged",
    "WriteCheckpoint",
]
