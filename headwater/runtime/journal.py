"""The coordinator's journal: what must outlive its process, in one file of one coordinator at a time.

A file is one line that says what it is, with a checksum of the rest, which is JSON of some kilobytes:

    {"journal":"headwater","format":2,"checksum":"…"}
    {"cluster":"…","secret":"…","settings":{…},"record":{…}}

Invariants:
- What `write` was given is on disk when it returns, also after a loss of power. A term that was told to
  servers and then forgotten would be given to another change: two rosters of one term. So a write waits for
  the disk twice, for the new file and for its directory: some milliseconds for each join or death, nothing
  for a step.
- A file is written beside the old one and renamed over it: there is one or the other, never a part.
- A lock on another file beside it is held from opening to closing, or until the process ends.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from headwater.checkpoint import FileLock, LockedError
from headwater.errors import ConfigurationError, JournalError
from headwater.machines.coordinator import CoordinatorRecord

_FORMAT = 2
"""1 was an SQLite file."""


class _Head(msgspec.Struct, frozen=True):
    """The first line."""

    journal: Literal["headwater"]
    format: int
    checksum: str


class _Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The rest. `record`: None until all servers have joined once."""

    cluster: str
    secret: str
    settings: dict[str, Any]
    record: CoordinatorRecord | None = None


class Journal:
    """The journal at `path`, made if there is none; "" keeps it in memory.

    Does not lock by itself: its owner calls one method at a time.

    Args:
        settings: of the cluster, by name, as JSON can hold them; the same for every start.

    Attributes:
        path: of the file.
        cluster: the cluster's identity; secret: what its members' keys are made of.
        found: what it held when it was opened; None in a new one.

    Raises:
        ConfigurationError: another coordinator holds it, its cluster has ended or has other settings.
        JournalError: it is damaged or no journal, or cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = os.fspath(path)
        self._lock: FileLock | None = None
        own = msgspec.json.decode(msgspec.json.encode(dict(settings)), type=dict[str, Any])
        fresh = _Content(secrets.token_hex(8), secrets.token_hex(32), own)
        if not self.path:
            self._content = fresh
        else:
            self._lock = self._locked()
            try:
                self._content = self._opened(fresh)
            except BaseException:
                self.close()
                raise
        self.cluster = self._content.cluster
        self.secret = bytes.fromhex(self._content.secret)
        self.found = self._content.record

    def write(self, record: CoordinatorRecord) -> None:
        """Keep this instead of the last; blocks until it is on disk. Raises JournalError."""
        self._store(msgspec.structs.replace(self._content, record=record))

    def close(self) -> None:
        """Let go of the file; idempotent."""
        if self._lock is not None:
            self._lock.release()

    # ── opening ─────────────────────────────────────────────────────────────────────────────────

    def _locked(self) -> FileLock:
        try:
            return FileLock(Path(f"{self.path}.lock"), 0o600)
        except LockedError as error:
            raise ConfigurationError(
                f"the journal {self.path} is in use by another coordinator ({error}): "
                f"end that one, or name another file for another cluster"
            ) from error
        except OSError as error:
            raise self._unusable(error) from error

    def _opened(self, fresh: _Content) -> _Content:
        """What is there, or `fresh`, which then is."""
        try:
            data = Path(self.path).read_bytes()
        except FileNotFoundError:
            self._store(fresh)
            return fresh
        except OSError as error:
            raise self._unusable(error) from error
        content = self._read(data)
        self._check_settings(fresh.settings, content.settings)
        if content.record is not None and content.record.ended:
            raise ConfigurationError(
                f"the journal {self.path} is of a cluster that has ended ({content.record.ended}): "
                f"remove it, or name another file for a new cluster"
            )
        return content

    def _read(self, data: bytes) -> _Content:
        line, _, rest = data.partition(b"\n")
        try:
            head = msgspec.json.decode(line, type=_Head)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise JournalError(
                f"{self.path} is no journal of this version of headwater, or its beginning is damaged: "
                f"name another file, or put a copy of the journal in its place"
            ) from error
        if head.format != _FORMAT:
            raise JournalError(
                f"the journal {self.path} has format {head.format}, "
                f"this version of headwater reads {_FORMAT}: "
                f"use the version that wrote it, or remove it and begin anew from a checkpoint"
            )
        if _checksum(rest) != head.checksum:
            raise self._damaged("its checksum does not match")
        try:
            return msgspec.json.decode(rest, type=_Content)
        except msgspec.DecodeError as error:
            raise self._damaged(str(error)) from error

    def _check_settings(self, here: dict[str, Any], there: dict[str, Any]) -> None:
        if here == there:
            return
        differ = [
            f"{name} was {there.get(name)!r}, now {here.get(name)!r}"
            for name in sorted(here.keys() | there.keys())
            if here.get(name) != there.get(name)
        ]
        raise ConfigurationError(
            f"the journal {self.path} is of a cluster with other settings: {'; '.join(differ)}: "
            f"start with those of before, or name another file for another cluster"
        )

    # ── writing ─────────────────────────────────────────────────────────────────────────────────

    def _store(self, content: _Content) -> None:
        """Replace the file as a whole. It is this user's alone: it holds a secret."""
        if self.path:
            rest = msgspec.json.encode(content)
            head = msgspec.json.encode(_Head("headwater", _FORMAT, _checksum(rest)))
            try:
                _replace(self.path, head + b"\n" + rest)
            except OSError as error:
                raise self._unusable(error) from error
        self._content = content

    def _unusable(self, error: OSError) -> JournalError:
        return JournalError(
            f"cannot use the journal {self.path}: {error.strerror}: "
            f"name a file on a disk with room, in a directory that this user may write"
        )

    def _damaged(self, why: str) -> JournalError:
        return JournalError(
            f"the journal {self.path} is damaged: {why}: put a copy in its place, or remove it, end what is "
            f"left of its cluster and begin anew from a checkpoint"
        )


def _checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _replace(path: str, data: bytes) -> None:
    """Have `data` at `path`, whole and on disk; what was there stays where this fails."""
    beside = f"{path}.new"
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(beside, path)
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
