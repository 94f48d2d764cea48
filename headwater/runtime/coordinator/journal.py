"""The coordinator's journal: what must outlive its process, in one SQLite file of one coordinator at a time.

Rows of a name, a JSON value and its checksum; one transaction for each change of the roster.

Invariants:
- What `write` and `end` were given is on disk when they return, also after a loss of power. A term that was
  told to servers and then forgotten would be given to another change: two rosters of one term. So commits
  wait for the disk (synchronous=FULL): some milliseconds for each join or death, nothing for a step.
- SQLite's lock is held from opening to closing, or until the process ends. With that the log of changes
  (WAL: one wait for the disk a commit, not three) needs no shared memory beside it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from headwater.errors import ConfigurationError, JournalError
from headwater.machines.roster import RosterRecord
from headwater.messages import Member, Refused

_APPLICATION = 0x48575452  # "HWTR"
_FORMAT = 1
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

Value = TypeVar("Value")


class _Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The numbers of a RosterRecord, and how many rows belong to it."""

    term: int
    since: int
    generation: int
    next: int
    members: int
    gone: int
    finished: tuple[int, ...] = ()
    first: int = 0


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member of a RosterRecord."""

    member: Member
    caught_up: bool


class Journal:
    """The journal at `path`, made if there is none; "" keeps it in memory.

    Does not lock by itself: its owner calls one method at a time.

    Args:
        settings: of the cluster, by name, as JSON can hold them; the same for every start.

    Attributes:
        path: of the file.
        found: the roster that it held when it was opened; None in a new one.

    Raises:
        ConfigurationError: another coordinator holds it, its cluster has ended or has other settings.
        JournalError: it is damaged or no journal, or cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = os.fspath(path)
        self._secret = b""
        self.found: RosterRecord | None = None
        self._stored: dict[str, bytes] = {}
        with self._translated():
            self._database = _opened(self.path)
        try:
            with self._translated():
                self._begin(msgspec.json.encode(dict(settings), order="sorted"))
        except BaseException:
            self._database.close()
            raise

    def write(self, record: RosterRecord) -> None:
        """Keep this roster instead of the last; blocks until it is on disk. Raises JournalError."""
        self._store({**self._rest(), **_rows(record)})

    def end(self, refusal: Refused) -> None:
        """The cluster is over, and the journal serves no other; as `write`."""
        self._store({**self._stored, "cluster/ended": msgspec.json.encode(refusal)})

    def key_of(self, member: int) -> str:
        """What only this member is told, and every coordinator on this journal knows."""
        return hmac.new(self._secret, b"member %d" % member, hashlib.sha256).hexdigest()

    def is_key(self, key: str, member: int) -> bool:
        """Whether `key` is the one of this member; takes equally long for all that are not."""
        return hmac.compare_digest(key.encode(), self.key_of(member).encode())

    def close(self) -> None:
        """Let go of the file; idempotent."""
        self._database.close()

    # ── opening ─────────────────────────────────────────────────────────────────────────────────

    def _begin(self, settings: bytes) -> None:
        """Take the lock, and over what is there."""
        if self._is_new():
            first = {"cluster/settings": settings, "cluster/secret": msgspec.json.encode(secrets.token_hex())}
            self._store(first)
        else:
            self._load()
        self._secret = bytes.fromhex(self._value("cluster/secret", str))
        self._check_settings(settings)
        if "cluster/ended" in self._stored:
            why = self._value("cluster/ended", Refused).reason
            raise ConfigurationError(
                f"the journal {self.path} is of a cluster that has ended ({why}): "
                f"remove it, or name another file for a new cluster"
            )
        if "roster/terms" in self._stored:
            self.found = self._roster()

    def _is_new(self) -> bool:
        """Lock the file, look what it is, and make a new one of an empty one."""
        execute = self._database.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")
        execute("BEGIN EXCLUSIVE")
        (application,), (version,) = (execute(f"PRAGMA {n}").fetchone() for n in _MARKS)
        (tables,) = execute("SELECT count(*) FROM sqlite_master").fetchone()
        new = (application, version, tables) == (0, 0, 0)
        if new:
            execute("CREATE TABLE journal (name TEXT PRIMARY KEY, value BLOB, checksum INTEGER)")
            for name, mark in zip(_MARKS, (_APPLICATION, _FORMAT), strict=True):
                execute(f"PRAGMA {name} = {mark}")
        execute("COMMIT")
        if not new and application != _APPLICATION:
            raise JournalError(f"{self.path} is another program's SQLite file, no journal: name another file")
        if not new and version != _FORMAT:
            raise JournalError(
                f"the journal {self.path} has format {version}, this version of headwater reads {_FORMAT}: "
                f"use the version that wrote it, or remove it and begin anew from a checkpoint"
            )
        return new

    def _load(self) -> None:
        (verdict,) = self._database.execute("PRAGMA integrity_check").fetchone()
        if verdict != "ok":
            raise self._damaged(verdict)
        for name, value, checksum in self._database.execute("SELECT * FROM journal"):
            if not isinstance(value, bytes) or _checksum(name, value) != checksum:
                raise self._damaged(f"the checksum of {name} does not match")
            self._stored[name] = value

    def _check_settings(self, settings: bytes) -> None:
        here = msgspec.json.decode(settings)
        there = self._value("cluster/settings", dict)
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

    def _roster(self) -> RosterRecord:
        terms = self._value("roster/terms", _Terms)
        entries = [self._value(name, _Entry) for name in self._of("member")]
        gone = {int(name.rpartition("/")[2]): self._value(name, str) for name in self._of("gone")}
        if (len(entries), len(gone)) != (terms.members, terms.gone):
            raise self._damaged(f"{terms.members} members are expected, {len(entries)} are there")
        return RosterRecord(
            terms.term,
            terms.since,
            terms.generation,
            terms.next,
            tuple(entry.member for entry in entries),
            tuple(entry.member.id for entry in entries if entry.caught_up),
            gone,
            terms.finished,
            terms.first,
        )

    # ── rows ────────────────────────────────────────────────────────────────────────────────────

    def _of(self, kind: str) -> list[str]:
        """Names of the rows of a kind, by number."""
        names = [name for name in self._stored if name.startswith(f"{kind}/")]
        return sorted(names, key=lambda name: int(name.rpartition("/")[2]))

    def _rest(self) -> dict[str, bytes]:
        """The rows that are not of the roster."""
        return {name: value for name, value in self._stored.items() if name.startswith("cluster/")}

    def _value(self, name: str, type: type[Value]) -> Value:
        try:
            return msgspec.json.decode(self._stored[name], type=type)
        except (KeyError, msgspec.DecodeError) as error:
            raise self._damaged(f"{name} is missing or not what it should be: {error}") from error

    def _store(self, rows: Mapping[str, bytes]) -> None:
        """Make the file hold exactly these, by what differs from what it holds."""
        changed = [(k, v, _checksum(k, v)) for k, v in rows.items() if self._stored.get(k) != v]
        dropped = [(name,) for name in self._stored.keys() - rows.keys()]
        with self._translated():
            self._database.execute("BEGIN")
            self._database.executemany("INSERT OR REPLACE INTO journal VALUES (?, ?, ?)", changed)
            self._database.executemany("DELETE FROM journal WHERE name = ?", dropped)
            self._database.execute("COMMIT")
        self._stored = dict(rows)

    # ── what can go wrong ───────────────────────────────────────────────────────────────────────

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """SQLite's errors as ours."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF in _BUSY:
                raise ConfigurationError(
                    f"the journal {self.path} is in use by another coordinator ({_holder(self.path)}): "
                    f"end that one, or name another file for another cluster"
                ) from error
            raise JournalError(
                f"cannot use the journal {self.path}: {error}: "
                f"name a file on a disk with room, in a directory that this user may write"
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, why: str) -> JournalError:
        return JournalError(
            f"the journal {self.path} is damaged: {why}: put a copy in its place, or remove it, end what is "
            f"left of its cluster and begin anew from a checkpoint"
        )


_MARKS = ("application_id", "user_version")


def _opened(path: str) -> sqlite3.Connection:
    """A connection whose transactions are explicit. A new file is this user's alone: it holds a secret."""
    if path:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except OSError:
            pass  # it is there, which is fine and must not be opened besides; or SQLite says what is wrong
    return sqlite3.connect(path or ":memory:", timeout=0, isolation_level=None, check_same_thread=False)


def _checksum(name: str, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(name.encode()))


def _rows(record: RosterRecord) -> dict[str, bytes]:
    counts = len(record.members), len(record.gone)
    more = record.finished, record.first
    terms = _Terms(record.term, record.since, record.generation, record.next, *counts, *more)
    rows = {"roster/terms": msgspec.json.encode(terms)}
    for member in record.members:
        rows[f"member/{member.id}"] = msgspec.json.encode(_Entry(member, member.id in record.caught_up))
    rows.update({f"gone/{id}": msgspec.json.encode(why) for id, why in record.gone.items()})
    return rows


def _holder(path: str) -> str:
    """Who has locked the file, as the kernel of this machine tells; without opening it, as closing a file
    gives up the locks that this process has on it."""
    try:
        inode = os.stat(path).st_ino
        with open("/proc/locks") as table:
            for line in table:
                fields = line.split()
                if fields[1] == "POSIX" and fields[5].endswith(f":{inode}"):
                    return f"process {fields[4]}"
    except (OSError, IndexError):
        pass  # another system, or the lock is held on another machine
    return "which process, this machine cannot tell"
