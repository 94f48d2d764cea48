"""The server node, as primary or standby, and what it consists of."""

from headwater.runtime.server.node import ServerNode, ServerSettings

__all__ = ["ServerNode", "ServerSettings"]
