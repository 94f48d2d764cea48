"""How gradients are represented on their way to the servers, and what that costs in bytes.

A codec is part of a model's spec: it changes results in the same way whether bytes travel or not. What it
loses of a gradient is kept by the worker and added to the next gradient of that tensor (error feedback).
A residual belongs to one incarnation of a worker: one that is started again begins with none.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, get_args

from headwater.errors import ConfigurationError

BLOCK = 256
"""Elements that share a scale. Blocks begin at multiples of this in a model's vector, so none is cut between
two servers."""


def blocks(first: int, n: int) -> int:
    """How many blocks the elements [first, first + n) of a vector touch."""
    return -(-(first + n) // BLOCK) - first // BLOCK if n else 0


@dataclass(frozen=True, slots=True)
class BFloat16:
    """The upper half of each float32, rounded to nearest, ties to even; 2 bytes an element."""

    kind: ClassVar[str] = "bf16"

    def size(self, first: int, n: int) -> int:
        """Most bytes that n elements from number `first` on take."""
        return 2 * n

    def row_size(self, dim: int) -> int:
        """Bytes of a row of a table."""
        return 2 * dim

    def __str__(self) -> str:
        return self.kind


@dataclass(frozen=True, slots=True)
class Float16:
    """IEEE half precision, rounded to nearest, ties to even, at most ±65504; 2 bytes an element."""

    kind: ClassVar[str] = "fp16"

    def size(self, first: int, n: int) -> int:
        """As `BFloat16.size`."""
        return 2 * n

    def row_size(self, dim: int) -> int:
        """As `BFloat16.row_size`."""
        return 2 * dim

    def __str__(self) -> str:
        return self.kind


@dataclass(frozen=True, slots=True)
class Int8:
    """Integers from −127 to 127 times the block's scale (largest magnitude / 127); about 1 byte each."""

    kind: ClassVar[str] = "int8"

    def size(self, first: int, n: int) -> int:
        """As `BFloat16.size`."""
        return 4 * blocks(first, n) + n

    def row_size(self, dim: int) -> int:
        """As `BFloat16.row_size`: a row has one scale, however long it is."""
        return 4 + dim

    def __str__(self) -> str:
        return self.kind


@dataclass(frozen=True, slots=True)
class Q4:
    """A sign and a level L of 0 to 7: 0, or ±2^(L−7) times the block's largest magnitude; half a byte each.

    The nearest of these values is taken, of two equally near the larger one.
    """

    kind: ClassVar[str] = "q4"

    def size(self, first: int, n: int) -> int:
        """As `BFloat16.size`."""
        return 4 * blocks(first, n) + (n + 1) // 2

    def __str__(self) -> str:
        return self.kind


@dataclass(frozen=True, slots=True)
class TopK:
    """The `fraction` of a tensor's elements that are largest in magnitude, at least one; 8 bytes each.

    Of equal ones the first are taken. (Lin et al. 2018, Deep Gradient Compression.)

    Raises:
        ConfigurationError: `fraction` is not in (0, 1].
    """

    fraction: float
    kind: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        if not _is_number(self.fraction) or not 0 < self.fraction <= 1:
            raise ConfigurationError(f"codec topk: the fraction must be in (0, 1], got {self.fraction!r}")

    def count(self, n: int) -> int:
        """How many elements of a tensor of n are sent."""
        return min(n, max(1, math.ceil(self.fraction * n)))

    def size(self, first: int, n: int) -> int:
        """As `BFloat16.size`: all of a tensor's elements may lie in one server's part."""
        return 4 + 8 * n

    def __str__(self) -> str:
        return f"topk:{float(self.fraction)!r}"


@dataclass(frozen=True, slots=True)
class TwoBit:
    """+threshold, 0 or −threshold, a quarter of a byte an element, as MXNet's gradient compression has it.

    Raises:
        ConfigurationError: `threshold` is not a finite number > 0.
    """

    threshold: float = 0.5
    kind: ClassVar[str] = "2bit"

    def __post_init__(self) -> None:
        if not _is_number(self.threshold) or not 0 < self.threshold < math.inf:
            raise ConfigurationError(f"codec 2bit: the threshold must be > 0, got {self.threshold!r}")

    def size(self, first: int, n: int) -> int:
        """As `BFloat16.size`."""
        return -(-n // 4)

    def __str__(self) -> str:
        return f"2bit:{float(self.threshold)!r}"


@dataclass(frozen=True, slots=True)
class OneBit:
    """+1 above the threshold, −1 otherwise, an eighth of a byte an element, as MXNet's has it.

    Raises:
        ConfigurationError: `threshold` is not a finite number.
    """

    threshold: float = 0.0
    kind: ClassVar[str] = "1bit"

    def __post_init__(self) -> None:
        if not _is_number(self.threshold) or not math.isfinite(self.threshold):
            raise ConfigurationError(f"codec 1bit: the threshold must be finite, got {self.threshold!r}")

    def size(self, first: int, n: int) -> int:
        """As `BFloat16.size`."""
        return -(-n // 8)

    def __str__(self) -> str:
        return f"1bit:{float(self.threshold)!r}"


RowCodec: TypeAlias = BFloat16 | Float16 | Int8
"""What may represent gradients of a table's rows. Nothing is kept of what they lose: ids have no end."""

Codec: TypeAlias = BFloat16 | Float16 | Int8 | Q4 | TopK | TwoBit | OneBit

_PLAIN: dict[str, Callable[[], Codec]] = {
    "bf16": BFloat16,
    "fp16": Float16,
    "int8": Int8,
    "q4": Q4,
    "2bit": TwoBit,
    "1bit": OneBit,
}
_WITH_NUMBER: dict[str, Callable[[float], Codec]] = {"topk": TopK, "2bit": TwoBit, "1bit": OneBit}

_EXPECTED = "'bf16', 'fp16', 'int8', 'q4', 'topk:FRACTION', '2bit:THRESHOLD', '1bit:THRESHOLD' or None"

_VALUES = BFloat16 | Float16
"""What may also represent values on their way to workers: each element by itself, and close to it."""


def parse_codec(value: str | Codec | None) -> Codec | None:
    """Turn what a user wrote into a codec; `str(codec)` is the inverse.

    Raises:
        ConfigurationError: not a codec; the text lists the valid forms.
    """
    if value is None or isinstance(value, Codec):
        return value
    kind, _, argument = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind in _PLAIN and not argument:
        return _PLAIN[kind]()
    try:
        number = float(argument)
        return _WITH_NUMBER[kind](number)
    except (KeyError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"codec: got {value!r}, expected {_EXPECTED}") from None


def parse_row_codec(value: str | Codec | None) -> RowCodec | None:
    """As `parse_codec`, of gradients of rows."""
    codec = parse_codec(value)
    if codec is not None and not isinstance(codec, RowCodec):
        raise ConfigurationError(
            f"codec: got {value!r} for rows of a table, expected {_of(RowCodec)} or None"
        )
    return codec


def parse_values_codec(value: str | Codec | None) -> BFloat16 | Float16 | None:
    """As `parse_codec`, of values on their way to workers."""
    codec = parse_codec(value)
    if codec is not None and not isinstance(codec, _VALUES):
        raise ConfigurationError(f"values_codec: got {value!r}, expected {_of(_VALUES)} or None")
    return codec


def text_of(codec: Codec | None) -> str | None:
    """How it travels in a spec."""
    return None if codec is None else str(codec)


def _of(union: Any) -> str:
    return ", ".join(repr(codec.kind) for codec in get_args(union))


def _is_number(value: object) -> bool:
    """Whether it is one that float64 has."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True
