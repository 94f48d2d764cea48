"""The thread that keeps a follower up to date: its membership, when it asks for a version, what arrives.

Invariants:
- Whatever fails, what readers see stays complete and of one version; the thread begins anew.
- One exchange at a time, and nothing is received, copied or installed under the lock that readers take.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from headwater import messages as m
from headwater.errors import (
    ClosedError,
    ClusterEndedError,
    ConfigurationError,
    EnvironmentFailure,
    HeadwaterError,
    OtherClusterError,
    ProtocolError,
    RewoundError,
)
from headwater.follower.subject import Subject, choose, names, read_type
from headwater.kernels.slabs import PRIVATE, ChunkMemory
from headwater.loggers import logger
from headwater.machines.connections import Frame
from headwater.machines.follower import Fill, FollowerMachine, Slot
from headwater.runtime.client import Client
from headwater.shard.shared_version import SharedCopy
from headwater.spec.every import Every
from headwater.spec.words import option
from headwater.wire.arena import ArenaViews
from headwater.wire.security import Security

_log = logger("headwater.follower")

_AGAIN_S = 0.5
_TELL_S = 0.5
_POLL_S = 0.02
"""Pause between two questions for the newest version, while somebody waits for one, in seconds."""


@dataclass(slots=True, eq=False)
class Counts:
    """What a follower has done since it began; `FollowerStatistics` says what the fields mean."""

    received: int = 0
    whole: int = 0
    failed: int = 0
    reconnects: int = 0
    held_up: int = 0


@dataclass(frozen=True, slots=True)
class Wish:
    """What to follow, and how; the arguments of `hw.follow`, checked."""

    address: str
    models: tuple[str, ...] | None
    tables: tuple[str, ...] | None
    every: Every
    security: Security
    dtype: m.ReadType
    bounded: bool

    @classmethod
    def of(
        cls,
        address: str,
        models: str | Iterable[str] | None,
        tables: str | Iterable[str] | None,
        every: str | int | float | Every,
        security: Security,
        dtype: str,
        *,
        bounded: bool,
    ) -> Wish:
        """Raises ConfigurationError: an impossible argument."""
        return cls(
            address,
            names("models", models),
            names("tables", tables),
            Every.parse(every),
            security,
            read_type(dtype),
            bounded,
        )


class Keeper:
    """Fills `machine`; all its state that others read is guarded by `changed`.

    Attributes:
        changed: notified whenever something is new.
        subject: what is followed; None before the first connection.
        failure: why nothing follows any more; None while something may.
        reason: why it is not up to date, in words; "" while it is.
        asked: the last moment for which somebody wants to know the newest version, in seconds; heard: the
            last one for which it is known.
        waiting: the numbers of the versions that somebody waits for.
        hurry: a version is wanted at once.
        listeners: told of each slot that was installed.
    """

    def __init__(
        self, wish: Wish, machine: FollowerMachine, memory: Callable[[], ChunkMemory] | None = None
    ) -> None:
        """`memory`: makes that of one copy, which then nobody else's takes the place of."""
        self.wish = wish
        self._memory = memory
        self.machine = machine
        self.changed = threading.Condition()
        self.subject: Subject | None = None
        self._unknown = False  # to a server, yet, is what another one has told of
        self.failure: HeadwaterError | None = None
        self.reason = "it has not connected yet"
        self.counts = Counts()
        self.asked = self.heard = -math.inf
        self.waiting: list[int] = []
        self.hurry = False
        self.listeners: list[Callable[[Slot], None]] = []
        self._deadline = 0.0
        self.cluster = ""
        self._began = 0.0
        self._client: Client | None = None
        self._closing = False
        self._lent = False  # versions lie in the memory of a follower of this machine
        self._views = ArenaViews()
        self._again_at = self._tell_at = 0.0
        self._thread = threading.Thread(target=self._run, name="headwater-follower", daemon=True)

    def begin(self, deadline: float) -> None:
        """Follow from now on; names that do not exist yet may come within `deadline` seconds."""
        self._deadline = time.monotonic() + deadline
        self._thread.start()

    def close(self) -> None:
        """Follow no more; blocks until the thread has ended. Idempotent."""
        with self.changed:
            self._closing = True
            client = self._client
            self.changed.notify_all()
        if client is not None:
            client.interrupt()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    # ── the thread ──────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            while not self._closing and self.failure is None:
                try:
                    self._follow()
                except HeadwaterError as error:
                    self._note(error)
                except (MemoryError, OSError) as error:
                    self._note(EnvironmentFailure(f"{type(error).__name__}: {error}"))
                with self.changed:
                    if not self._closing and self.failure is None:
                        self.changed.wait(_AGAIN_S)
        finally:  # whoever waits must not wait for a thread that is gone
            with self.changed:
                if self.failure is None:
                    self.failure = ClosedError("the follower is closed")
                self.changed.notify_all()

    def _follow(self) -> None:
        """As one member, until that ends."""
        self._unknown = False
        client = Client(self.wish.address, "observer", security=self.wish.security, cluster=self.cluster)
        try:
            with self.changed:
                self._client = client
            self.cluster = client.welcome.cluster
            client.machine.deadline = math.inf
            subject = self._choose(client)
            lent, self._lent = self._lent, self._is_lent(client)
            memory = self._memory or (lambda: PRIVATE)
            make = subject.shared if self._lent else lambda: subject.copy(memory())
            self._tell_at = 0.0
            with self.changed:
                self.subject = subject
                self.machine.joined(client.welcome.generation, make, anew=lent != self._lent)
                self.reason = "its first version is on its way"
            while not self._closing:
                at = self._wait_for_turn(client)
                if at is not None:
                    self._publish(client, at)
        finally:
            with self.changed:
                self._client = None
                self.machine.failed()
            client.close()

    def _is_lent(self, client: Client) -> bool:
        """Whether versions are lent here, and not sent.

        Raises:
            ConfigurationError: a follower has them in another type.
        """
        keeps, wanted = client.welcome.keeps, self.wish.dtype
        if keeps == "bfloat16" != wanted:
            raise ConfigurationError(
                f"the follower at {self.wish.address} keeps parameters as {keeps}, and {wanted} was asked "
                f"for: pass {option('dtype', keeps)}, or follow its cluster"
            )
        return keeps == wanted and self._memory is None and all(client.shares)

    def _note(self, error: HeadwaterError) -> None:
        """Something ended what was followed: is there anything to be done about it?"""
        if self._closing:
            return
        final = isinstance(error, ClusterEndedError | OtherClusterError)
        with self.changed:
            first = self.machine.current is None
            rewound = isinstance(error, RewoundError)
            if final or (first and not rewound and not self._unknown):
                self.failure = error
            else:
                self.counts.reconnects += 1
            self.reason = str(error)
            self.changed.notify_all()
        level = logging.INFO if final or isinstance(error, RewoundError) else logging.WARNING
        _log.log(level, "%s: %s", "the end" if self.failure is not None else "connecting again", error)

    def _choose(self, client: Client) -> Subject:
        """Once all are there: until training has begun, others may come."""
        wish, servers = self.wish, len(client.channels)
        named = wish.models is not None and wish.tables is not None
        while True:
            description = client.describe()
            over = description.version > 0 or time.monotonic() >= self._deadline or self._closing
            try:
                subject = choose(description, wish.models, wish.tables, wish.dtype, servers)
                if named or over:
                    return subject
            except ConfigurationError:
                if over:
                    raise
            with self.changed:
                self.changed.wait(_POLL_S)

    # ── when ────────────────────────────────────────────────────────────────────────────────────

    def _wait_for_turn(self, client: Client) -> int | None:
        """Block until a version is to be asked for: the smallest number that will do; None: look again."""
        every = self.wish.every
        with self.changed:
            current = self.machine.current
            if current is None or current.version is None:
                return 0
            if current.version.generation < self.machine.generation:
                return 0
            shown = current.version.number
            if every.versions and not self.wish.bounded:
                return shown + every.versions
            now = time.monotonic()
            due = self._began + every.seconds if every.seconds else math.inf
            if (self.hurry or now >= due) and now < self._again_at:
                self.changed.wait(self._again_at - now)
                return None
            if self.hurry or now >= due:
                return 0
            wanted = max([*self.waiting, shown + every.versions if every.versions else 0])
            if self.asked <= self.heard:
                pause = _POLL_S if wanted > shown else due - now
                self.changed.wait(min(due - now, pause) if pause != math.inf else None)
                if self._closing or (wanted <= shown and self.asked <= self.heard):
                    return None
        self._hear_newest(client)
        return 0 if wanted > shown and self.machine.newest >= wanted else None

    def _hear_newest(self, client: Client) -> None:
        began = time.monotonic()
        told = client.describe()
        with self.changed:
            self.heard = max(self.heard, began - told.age)
            self.machine.heard(told.version, began - told.age)
            self.changed.notify_all()
        self._tell(client)

    # ── one publication ─────────────────────────────────────────────────────────────────────────

    def _publish(self, client: Client, at: int) -> None:
        """Ask for a version, receive and show it. Raises HeadwaterError; the former one is there then."""
        fill = self._begin()
        if fill is None:
            return
        began = self._began = time.monotonic()
        heads: list[float] = []

        def place(server: int, part: m.Publication) -> list[Any]:
            heads.append(time.monotonic())  # it was copied just before this came
            arrays = fill.slot.copy.place(server, part)
            self.counts.received += sum(array.nbytes for array in arrays)
            return arrays

        try:
            fill.begin()
            parts = client.call(
                lambda server, number: Frame(
                    fill.request(server, number, self.wish.dtype, at, shared=self._lent)
                ),
                "publish",
                place,
                m.Publication,
                files=lambda message, descriptors: self._open(fill, message, descriptors),
            )
            whole = any(part.models for part in parts) and not fill.slot.copy.tables
            whole |= any(rows.base < 0 for part in parts for rows in part.tables)
            number = fill.install(parts)
        except BaseException as error:
            with self.changed:
                self.counts.failed += 1
                self.machine.failed()
            self._unknown = isinstance(error, ProtocolError) and time.monotonic() < self._deadline
            raise
        age = max(part.age for part in parts)
        with self.changed:
            self._show(fill, number, (heads[0] if heads else began) - age, whole)
            keeps = tuple(self.machine.readable()) if self._lent else ()
        client.ask(lambda number: m.Taken(number, keeps), "publish")
        self._tell(client)

    def _tell(self, client: Client) -> None:
        """The coordinator, now and then, what is shown."""
        now = time.monotonic()
        with self.changed:
            current = self.machine.current
            if now < self._tell_at or current is None or current.version is None:
                return
            self._tell_at = now + _TELL_S
            told = m.FollowerProgress(
                client.welcome.member.id,
                current.version.number,
                max(0.0, now - current.as_of),
                self.machine.installed,
                self.counts.received,
                self.reason,
            )
        client.tell(told)

    def _open(self, fill: Fill, message: m.AnyMessage, descriptors: Sequence[int]) -> None:
        """Memory that a follower of this machine lends."""
        copy = fill.slot.copy
        if not isinstance(copy, SharedCopy) or len(descriptors) != 1:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        shared = message.shared if isinstance(message, m.Publication) else None
        copy.open(self._views.open(descriptors[0], 0 if shared is None else shared.size))

    def _begin(self) -> Fill | None:
        with self.changed:
            self.hurry = False
            if self.machine.held_up:
                self.counts.held_up += 1
                self.reason = f"its readers keep {self.machine.pins} versions pinned"
                _log.debug("no newer version: %s", self.reason)
                while self.machine.held_up and not self._closing:
                    self.changed.wait()
            return None if self._closing else self.machine.begin()

    def _show(self, fill: Fill, number: int, as_of: float, whole: bool) -> None:
        """Holding the lock."""
        if self.machine.arrived(number, as_of) is None:
            self._again_at = time.monotonic() + _POLL_S  # a follower has nothing newer yet
        self.heard = max(self.heard, as_of)
        self.counts.whole += whole
        self.reason = ""
        for listener in self.listeners:
            listener(fill.slot)
        self.changed.notify_all()
