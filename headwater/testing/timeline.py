"""One generation of the log of a simulated cluster: what was processed in it, and what it adds up to."""

from __future__ import annotations

from headwater.messages import AnyEntry
from headwater.testing.invariants.accounts import Accounts


class Timeline:
    """A generation.

    Attributes:
        begins: path of the checkpoint that it begins with; "" for none.
        log, versions: every entry that was processed, and the version after it.
        declared: whether it has a model.
        accounts: what its members' steps add up to, where there is a workload.
    """

    def __init__(self, generation: int, begins: str, accounts: Accounts | None) -> None:
        self.generation = generation
        self.begins = begins
        self.accounts = accounts
        self.declared = False
        self.log: list[AnyEntry] = []
        self.versions: list[int] = []
