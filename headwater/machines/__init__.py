"""Every decision of a node, as state machines without I/O: messages in, actions out."""
