"""What the servers are to do with the vectors beside a model's parameters."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec


class CreateVector(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A new vector of the model's layout, 0 everywhere. With `keep` one that exists stays as it is."""

    name: str
    keep: bool = False


class FreeVector(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Forget a vector."""

    name: str


class FillVector(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Set the elements of all tensors to `value`; what lies between them stays 0."""

    name: str
    value: float


class CombineVectors(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """out = Σ coefficient · vector; `out` may be among the vectors of `terms`."""

    out: str
    terms: tuple[tuple[str, float], ...]


class GatherGradients(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """out = the sum of the gradients that all members of the meeting have staged, in rank order.

    `mean`: their mean, by the weights of the members.
    """

    out: str
    mean: bool = False


class KeepNote(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The model's vectors are kept together with these bytes from now on."""

    note: bytes


VectorOperation: TypeAlias = (
    CreateVector | FreeVector | FillVector | CombineVectors | GatherGradients | KeepNote
)


class Reduction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number that is made of one vector, or of two: `other` counts for "dot" alone.

    "dot": the sum of products; "total": of magnitudes; "largest": the largest magnitude.
    """

    kind: Literal["dot", "total", "largest"]
    one: str
    other: str = ""


class VectorWork(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All operations in their order, then all reductions, of what the vectors are then; all or nothing.

    `read`: the answer brings the model's values; `recall`: and the note that is kept, as its data.
    """

    model: int
    operations: tuple[VectorOperation, ...] = ()
    reductions: tuple[Reduction, ...] = ()
    read: bool = False
    recall: bool = False

    @property
    def gathers(self) -> bool:
        """Whether members bring gradients."""
        return any(isinstance(one, GatherGradients) for one in self.operations)


class PortionPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An evaluation in `count` portions, handed out one by one; their gradients come to vector `out`.

    `backup`: whoever has nothing to do gets a copy of a portion that somebody else has not finished.
    """

    out: str
    count: int
    backup: bool = True


class Portion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Portion `index` of `count` of evaluation `round`, counted from 1, of a model."""

    round: int
    index: int
    count: int
    model: int


class PortionResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member has computed a portion; its gradient lies in the window or is the payload."""

    portion: Portion
    loss: float


class PortionsRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the evaluation of now is.

    `source`: the member who asked for it, and the number of its exchange; `finished`: portions with their
    losses; `held`: portions with the members who compute them; `over`: there is none to come.
    """

    round: int = 0
    count: int = 0
    model: int = -1
    backup: bool = True
    source: int = 0
    number: int = 0
    finished: tuple[tuple[int, float], ...] = ()
    held: tuple[tuple[int, tuple[int, ...]], ...] = ()
    over: bool = False
