"""A node that asks the coordinator what it is to be, and asks again whenever it is nothing any more.

    asks ──NoSlot──▶ spare ──Assignment──▶ server or standby ──its membership ends──▶ asks, or is done

The slot is kept while the connection over which it was given is open, and the node joins over it. A node that
was of a cluster says so from then on, so a cluster of a later job at the same address refuses it.
"""

from __future__ import annotations

from headwater import messages as m
from headwater.errors import (
    FinishedError,
    HeadwaterError,
    OtherClusterError,
    ProtocolError,
    RefusedError,
    RewoundError,
    named,
)


class Enlistment:
    """Of one node. `role`, `index`: what it is to be; None: whatever is missing.

    Attributes:
        request: what it asks next.
        reason: why it waits as a spare; "" while it does not.
    """

    def __init__(self, role: m.ServerRole | None = None, index: int | None = None) -> None:
        self.request = m.RequestSlot(role, index)
        self.reason = ""

    def heard(self, message: m.AnyMessage) -> m.Assignment | None:
        """The coordinator says something: what this node is to be, or None while it waits.

        Raises:
            RefusedError, FinishedError: it is to be nothing, ever.
            ProtocolError: no coordinator says that.
        """
        if isinstance(message, m.Assignment):
            self.reason = ""
            self.request = m.RequestSlot(self.request.role, self.request.index, message.cluster)
            return message
        if isinstance(message, m.Refused):
            raise named(message.error, message.reason, default=RefusedError)
        if isinstance(message, m.Finished):
            raise FinishedError("training has finished")
        if not isinstance(message, m.NoSlot):
            raise ProtocolError(f"the coordinator answered {type(message).__name__}")
        self.reason = message.reason
        return None


def asks_again(parting: HeadwaterError) -> bool:
    """Whether a node whose membership ended with this asks what it is to be next: it was declared dead, or
    everything begins anew from a checkpoint."""
    return isinstance(parting, RewoundError | RefusedError) and not isinstance(
        parting, FinishedError | OtherClusterError
    )
