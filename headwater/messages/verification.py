"""Whether standbys are what their servers are."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from headwater.messages.base import Message, Refused


class Digest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one part of a shard, such as the parameters of a model: BLAKE2b with 128 bits, as hex digits."""

    part: str
    value: str


class Digested(Message, frozen=True):
    """From a standby to its server: what it was right after the entry at `position`."""

    position: int
    digests: tuple[Digest, ...]


class Compare(Message, frozen=True):
    """Ask a server for what it was at the entry that answered the sender's last Verify, and its standby."""

    number: int


class Compared(Message, frozen=True):
    """Answer to Compare. `standby` is None where there was none that had caught up; `reason` says why."""

    number: int
    index: int
    version: int
    position: int
    own: tuple[Digest, ...]
    standby: tuple[Digest, ...] | None
    reason: str = ""
    failure: Refused | None = None


VerificationMessage: TypeAlias = Compare | Compared | Digested
"""What is said when somebody asks whether a standby is equal."""
