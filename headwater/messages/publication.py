"""Versions made readable beside training: what a follower asks every server for, and what each sends."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from headwater.messages.base import Message, Refused
from headwater.messages.reading import DataProgress

ReadType: TypeAlias = Literal["float32", "bfloat16"]
"""How a follower wants the parameters of models."""


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model or table by id, and the version in which the follower has it; -1: it has nothing."""

    id: int
    have: int = -1


class Publish(Message, frozen=True):
    """Have every server copy what is wanted at one position of the log: the first of version `at` or later.

    A model that has not changed since the follower's version is left out; of a table come the rows that were
    touched since, where the server still knows which. `shared`: to a follower of this machine: give its
    memory of a version to read, instead of values.
    """

    number: int
    models: tuple[Wanted, ...] = ()
    tables: tuple[Wanted, ...] = ()
    dtype: ReadType = "float32"
    at: int = 0
    shared: bool = False


class Taken(Message, frozen=True):
    """The follower has received all of its last publication: servers may use that memory again.

    `keeps`: the versions whose shared memory it still reads; of others it reads none any more.
    """

    number: int
    keeps: tuple[int, ...] = ()


class PublishedRows(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One server's rows of a table: int64[rows] ids, float32[rows, dim] values, int64[deleted] ids follow.

    `base` -1: these are all rows of the server's slots. Otherwise what was touched after that version, and
    `deleted` has no row any more. `last`: int32[rows], the version of each row's last gradient modulo 2³²,
    follows too.
    """

    table: int
    base: int
    rows: int
    deleted: int
    last: bool


class SharedModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the elements of a model begin in a shared file."""

    model: int
    offset: int


class SharedTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a table's rows are in a shared file, as `TableCopy` has them.

    `rows`: how many; `width`: pages that a slot may have; `directory`: where int32[slots] counts of pages,
    int32[slots] counts of entries and int32[slots, width] pages begin. `pages`: where each chunk of the index
    begins; `slabs`: by slab, where each chunk of it does.
    """

    table: int
    rows: int
    width: int
    directory: int
    pages: tuple[int, ...]
    slabs: tuple[tuple[int, ...], ...]


class SharedVersion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One version in a file of `size` bytes that came with the message; not written while it is lent."""

    size: int
    models: tuple[SharedModel, ...]
    tables: tuple[SharedTable, ...]


class Publication(Message, frozen=True):
    """A server's part of a publication, the answer to Publish; the payload has `models`, then `tables`.

    Of each of `models` this server's whole range follows, in the type that was asked for. `recorded`: where
    workers were in their data at that position. `age`: how many seconds ago this was known to be the newest
    version. `shared`: everything is in the memory that came with this, and nothing follows.
    """

    number: int
    version: int
    position: int = 0
    models: tuple[int, ...] = ()
    tables: tuple[PublishedRows, ...] = ()
    recorded: DataProgress = DataProgress()
    failure: Refused | None = None
    age: float = 0.0
    shared: SharedVersion | None = None
