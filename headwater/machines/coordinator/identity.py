"""Who a cluster is, and how its members prove that they are who they were."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from headwater.errors import OtherClusterError


@dataclass(frozen=True, slots=True)
class Identity:
    """Of one cluster. `cluster` and `secret` were drawn at random when it began, and outlive its coordinator.

    `returns`: whether a coordinator that is gone may come back, on its journal. `pid`: of its process now.
    """

    cluster: str
    secret: bytes
    returns: bool = False
    pid: int = 0

    def key_of(self, member: int) -> str:
        """What only this member is told, and every coordinator with this identity knows."""
        return hmac.new(self.secret, b"member %d" % member, hashlib.sha256).hexdigest()

    def is_key(self, key: str, member: int) -> bool:
        """Whether `key` is the one of this member; takes equally long for all that are not."""
        return hmac.compare_digest(key.encode(), self.key_of(member).encode())

    def check(self, cluster: str) -> None:
        """Raise OtherClusterError for a node of another cluster; one of none yet ("") may be of this one."""
        if cluster and cluster != self.cluster:
            raise OtherClusterError(
                f"this node belongs to cluster {cluster}, and the coordinator that listens here now to "
                f"{self.cluster}: it is of another job; start the node anew if it is to take part in that"
            )
