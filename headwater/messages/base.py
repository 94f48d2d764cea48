"""What all messages share, and the two answers that anybody may give."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Scalar: TypeAlias = bool | int | float | str | None
Role: TypeAlias = Literal["worker", "server", "standby", "observer"]
ServerRole: TypeAlias = Literal["server", "standby"]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What all of them share: immutable, tagged with the class name, strict."""


class Acknowledged(Message, frozen=True):
    """Done."""


class Refused(Message, frozen=True):
    """Not done, and why; `error` is the name of a class in `headwater.errors`."""

    error: str
    reason: str


Reply: TypeAlias = Acknowledged | Refused
"""What anybody may answer."""
