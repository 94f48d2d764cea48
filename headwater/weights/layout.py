"""What the files of a published version are called and what their index says, in both dialects.

Invariants:
- A version is complete when its index is there: the index is written last.
- A digest is of the bytes of a tensor's new state, never of what travels.
"""

from __future__ import annotations

import importlib
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from headwater.errors import ConfigurationError, WeightsError
from headwater.spec.amounts import one_of

INDEX = "model.safetensors.index.json"
EXTRA = "headwater.json"
"""Headwater's own index beside the engines': the training's version, positions and tables."""

_FOLDER = re.compile(r"weight_v(\d{6,})")


def folder_name(number: int) -> str:
    """The folder of version `number`, an integer ≥ 1."""
    return f"weight_v{number:06d}"


def folder_number(name: str) -> int | None:
    """The inverse; None for a name that is not one of a version."""
    found = _FOLDER.fullmatch(name)
    return int(found.group(1)) if found else None


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one family of engines writes versions.

    Attributes:
        prefix: before the number of a version in the index.
        digits: of that number, padded with zeros.
        checksum: the algorithm of its digests.
        full_digest: before a tensor's name in the metadata of a full version's files.
    """

    name: str
    prefix: str
    digits: int
    checksum: str
    full_digest: str

    def text(self, number: int) -> str:
        """A version's number as the index has it."""
        return f"{self.prefix}{number:0{self.digits}d}"


DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect("sglang", "", 6, "xxh3-128", ""),
        Dialect("modelexpress", "v", 1, "adler32", "mx.adler32:"),
    )
}


def dialect_of(name: str) -> Dialect:
    """Raises ConfigurationError, which lists the dialects, for an unknown name."""
    return DIALECTS[one_of("dialect", name, sorted(DIALECTS))]


def number_of(text: Any, where: str) -> int:
    """A version's number, from either dialect's text."""
    digits = text.removeprefix("v") if isinstance(text, str) else text
    try:
        return int(digits)
    except (TypeError, ValueError):
        raise WeightsError(f"{where} names a version {text!r}, expected digits or v and digits") from None


# ── the index ───────────────────────────────────────────────────────────────────────────────────


class IndexMetadata(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an index says of its version. Only a delta has `base_version` and `delta_encoding`."""

    version: str | int | None = None
    base_version: str | int | None = None
    delta_encoding: str | None = None
    compression_format: str | None = None
    checksum_format: str | None = None
    total_size: int | None = None


class Index(msgspec.Struct, frozen=True):
    """`weight_map`: the file of each tensor that this version carries."""

    weight_map: dict[str, str]
    metadata: IndexMetadata = IndexMetadata()


class TableFile(msgspec.Struct, frozen=True):
    """A table of a version: its file, and whether that holds all rows or what changed."""

    file: str
    full: bool
    sha256: str


class Extra(msgspec.Struct, frozen=True):
    """What Headwater adds. `generation`, `number`: of the training's version; `positions`: its data."""

    version: int
    base_version: int | None = None
    generation: int | None = None
    number: int | None = None
    positions: Any = None
    tables: dict[str, TableFile] = {}


# ── digests ─────────────────────────────────────────────────────────────────────────────────────


def _adler32(data: Any) -> str:
    return f"{zlib.adler32(data):08x}"


def _library(module: str, function: str) -> Callable[[Any], str]:
    try:
        found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ConfigurationError(
            f"checksums of {module} need the package {module}: pip install {module}, or use another checksum"
        ) from error
    return lambda data: str(found(data).hexdigest())


def digest_of(algorithm: str) -> Callable[[Any], str]:
    """The function from bytes to hexadecimal digits.

    Raises:
        ConfigurationError: an unknown algorithm, or one whose package is not installed.
    """
    if algorithm == "adler32":
        return _adler32
    if algorithm == "xxh3-128":
        return _library("xxhash", "xxh3_128")
    if algorithm == "blake3":
        return _library("blake3", "blake3")
    raise ConfigurationError(f"checksum {algorithm!r} is unknown: expected xxh3-128, blake3 or adler32")


def zstd() -> Any:
    """The compressor's package. Raises ConfigurationError where it is not installed."""
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise ConfigurationError(
            "published weights need the package zstandard: install Headwater with its extra `weights`"
        ) from error
