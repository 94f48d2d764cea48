"""From a server to its standby and back: entries with what the log does not say of their effect."""

from __future__ import annotations

from typing import Literal, TypeAlias

from headwater.messages.base import Message
from headwater.messages.exchange import Request
from headwater.messages.log import AnyEntry


class EntryInputs(Message, frozen=True):
    """From a server to its standby: an entry, and what of its effect the log does not say.

    `requests`: those that the entry names, by member. The payload has, for each (model, elements) of
    `models`, this server's range: reduced gradients, assigned or (model -1) initial values; then, for each
    (table, count, dim) of `tables`, int64[count] ids and their reduced gradients, float32[count, dim]; then,
    for each (member, field, size) of `blobs`, the bytes of that field of the member's request.
    `term` is that in which it is sent, `written` that of the sequencer that wrote the entry.
    """

    term: int
    entry: AnyEntry
    requests: tuple[tuple[int, Request], ...]
    models: tuple[tuple[int, int], ...] = ()
    tables: tuple[tuple[int, int, int], ...] = ()
    written: int = 0
    blobs: tuple[tuple[int, Literal["kept", "data"], int], ...] = ()


class Chunk(Message, frozen=True):
    """From a server to its standby: shared memory number `chunk`, of `size` bytes; with its descriptor."""

    chunk: int
    size: int


class AppendEntry(Message, frozen=True):
    """From a server to its standby: the next entry, and how far the log is committed.

    `chunks`: for each array of the inputs' payload the shared memory that it begins, or -1 where it is
    part of this frame's payload.
    """

    inputs: EntryInputs
    committed: int
    chunks: tuple[int, ...]


class CommitIndex(Message, frozen=True):
    """From a server to its standby: the log is committed up to here."""

    term: int
    committed: int


class AppendAck(Message, frozen=True):
    """From a standby to its server: up to which position it has and has applied entries, as of `term`."""

    term: int
    prepared: int
    applied: int


class StartTerm(Message, frozen=True):
    """A new sequencer began: entries up to `position` stand, what a server has after it is discarded.

    A promoted standby serves members only once it has applied up to there: they may have seen all of it.
    """

    term: int
    position: int


ReplicationMessage: TypeAlias = EntryInputs | Chunk | AppendEntry | CommitIndex | AppendAck | StartTerm
"""What a server and its standby tell each other, after the snapshot that the standby begins with."""
