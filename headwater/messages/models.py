"""What models, tables and windows consist of."""

from __future__ import annotations

import msgspec

from headwater.messages.base import Scalar


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named tensor of a model and the parameter group it belongs to.

    `aliases`: what else it is called where values are shown, such as the other name of tied weights.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int = 0
    aliases: tuple[str, ...] = ()


class RuleSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule by name, with its settings; the receiver looks the name up among its loaded rules.

    A setting that is itself a named object (a schedule) is a RuleSpec of its own.
    """

    name: str
    settings: dict[str, Scalar | RuleSpec]


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model is: tensors in order, and one rule per parameter group.

    `clip_norm`: the largest norm that the gradient of one commit may have; a larger one is scaled down.
    `merge`: how the gradients of a commit become one, as `headwater.spec.merges` has it; None: as the mode's
    `reduce` says. `codec`: how gradients are represented, as `headwater.spec.codecs` has it; `values_codec`:
    how values are that workers read; None: as float32. `outer`: its gradients are changes after local steps,
    so who does not carry it has nothing to say of it, and it is noted how alike successive ones are.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    rules: tuple[RuleSpec, ...]
    clip_norm: float | None = None
    merge: str | None = None
    codec: str | None = None
    values_codec: str | None = None
    outer: bool = False


class TableSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a table is: `dim` float32 a row, its rule, how its rows begin and end (None: at once, never).

    `codec`: how gradients of rows are represented; None: as float32.
    """

    name: str
    dim: int
    rule: RuleSpec
    initializer: RuleSpec
    seed: int
    admission: RuleSpec | None
    expiry: RuleSpec | None
    codec: str | None = None


class WindowSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A descriptor that travels with the message: a window of `size` bytes, laid out as the message says."""

    size: int


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Elements [start, stop) of a model's flat vector whose float32 values are in the payload."""

    model: int
    start: int
    stop: int


class Rows(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`count` ids of a table that one server holds, each once, and a row for each.

    `ids` and `rows`: byte offsets of int64[count] and float32[count, dim] in the member's scratch window.
    Without one the ids are in the payload of the request, and rows in that of whoever writes them.
    """

    table: int
    count: int
    ids: int
    rows: int


class WriteRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member, having made `step` steps, wrote what has this digest to a model that had had `updates`."""

    kind: str
    digest: int
    step: int
    member: int
    updates: int


class ProgramRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What workers' programs have said of a model or table besides its spec.

    `first`: its rules at its first update, by group; () before. `governor`: the member whose program says
    what the settings are; -1 for nobody. `resumed`: it is from a checkpoint, not declared since.
    `written`: what programs wrote to its values and states themselves, the last of each kind. `vectors`:
    names of the vectors beside its values, in the order in which they were created; `note`: kept with them.
    """

    first: tuple[RuleSpec, ...] = ()
    governor: int = -1
    resumed: bool = False
    written: tuple[WriteRecord, ...] = ()
    vectors: tuple[str, ...] = ()
    note: bytes = b""
