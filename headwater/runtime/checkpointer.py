"""Takes checkpoints while training goes on: an observer that asks for a snapshot at an entry of the log, has
every server write its part, and writes the manifest when all have.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable

import msgspec

from headwater import checkpoint as files
from headwater import messages as m
from headwater.errors import ConfigurationError, HeadwaterError, RewoundError, named
from headwater.loggers import logger
from headwater.machines.checkpoint_plan import CheckpointPlan
from headwater.runtime.client import Client
from headwater.spec.every import Every
from headwater.wire.security import PLAIN, Security

_log = logger("headwater.checkpoint")

_AGAIN_S = 1.0


class Checkpointer:
    """For the cluster at `address`, into `directory`, of which this process holds the lock.

    Args:
        keep: how many complete checkpoints stay.
        counted: told how many were written, and how long that took, after each.

    Attributes:
        last: path of the last one written; "" before.
    """

    def __init__(
        self,
        address: str,
        directory: str,
        every: Every,
        keep: int,
        *,
        security: Security = PLAIN,
        counted: Callable[[m.CheckpointCounts], None] = lambda counts: None,
    ) -> None:
        self.last = ""
        self._counts = m.CheckpointCounts()
        self._counted = counted
        self._security = security
        self._address = address
        # Servers write their parts themselves, wherever they work.
        self._directory = directory if "://" in directory else os.path.abspath(directory)
        self._every = every
        self._keep = keep
        self._session: Client | None = None
        self._plan = CheckpointPlan(0 if every.seconds else every.versions)
        self._busy = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headwater-checkpoints", daemon=True)

    def begin(self) -> None:
        """Take checkpoints from now on, in a thread of its own."""
        self._thread.start()

    def interrupt(self) -> None:
        """Take no more, and give up one that is being written; does not block. Idempotent."""
        self._closing.set()
        session = self._session
        if session is not None:
            session.interrupt()

    def close(self) -> None:
        """As `interrupt`, but blocks until none is being written, or waits to join. Idempotent."""
        self.interrupt()
        if self._thread.is_alive():
            self._thread.join()

    def take_last(self) -> None:
        """Stop taking them regularly, and take one of now unless that was written already.

        One that is being written is waited for: it may be this one, and servers would write the same files.

        Raises:
            HeadwaterError: it could not be written.
        """
        self._closing.set()
        with self._busy:
            pass  # none is begun any more
        self.close()
        self.take_now()

    def take_now(self) -> None:
        """Take one of now, unless that was written already; blocks until it is on disk. From any thread.

        Raises:
            HeadwaterError: it could not be written.
        """
        session = Client(self._address, "observer", security=self._security)
        try:
            self._take(session, 0, final=True)
        finally:
            session.close()

    # ── in the thread ───────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._session = Client(self._address, "observer", deadline=math.inf, security=self._security)
                self._take_regularly(self._session)
            except HeadwaterError as error:
                if not self._closing.is_set():
                    level = logging.INFO if isinstance(error, RewoundError) else logging.WARNING
                    _log.log(level, "checkpoints: %s", error)
                    self._closing.wait(_AGAIN_S)
            finally:
                if self._session is not None:
                    self._session.close()

    def _take_regularly(self, session: Client) -> None:
        version = session.describe().version
        while not self._closing.is_set():
            if self._every.seconds:
                self._closing.wait(self._every.seconds)
            at = self._plan.next(version)
            if not self._closing.is_set():
                version = self._take(session, at)

    def _take(self, session: Client, at: int, *, final: bool = False) -> int:
        """Take one at version `at` or later; returns the version.

        What the disk refuses is only logged, unless there is no later one to make up for it.
        """
        generation = session.welcome.generation
        version: int = session.ask(lambda number: m.Checkpoint(number, at), "checkpoint").version
        began = time.monotonic()
        try:
            with self._busy:
                # Whoever was before may have written this one, or a newer one.
                wanted = self._plan.wants(generation, version)
                if not wanted or (self._closing.is_set() and not final):
                    return version
                size = self._write(session, generation, version)
                self._plan.wrote(generation, version)
                self._count(version, size, time.monotonic() - began)
        except HeadwaterError as error:
            self._count_failure()
            if final or not session.usable():
                raise
            _log.warning("no checkpoint of version %d: %s", version, error)
            return version
        _log.info("%s written in %.2f s", self.last, time.monotonic() - began)
        return version

    def _count(self, version: int, size: int, seconds: float) -> None:
        counts = self._counts
        self._counts = msgspec.structs.replace(
            counts,
            written=counts.written + 1,
            bytes=counts.bytes + size,
            seconds=counts.seconds + seconds,
            version=version,
            last_bytes=size,
            last_seconds=seconds,
        )
        self._counted(self._counts)

    def _count_failure(self) -> None:
        self._counts = msgspec.structs.replace(self._counts, failed=self._counts.failed + 1)
        self._counted(self._counts)

    def _write(self, session: Client, generation: int, version: int) -> int:
        """Returns the bytes of its files."""
        files.begin(self._directory, generation, version)
        try:
            stored: list[m.Stored] = session.ask(
                lambda number: m.Store(number, self._directory, generation, version),
                "store",
                expects=m.Stored,
            )
            for one in stored:
                if one.failure is not None:
                    raise named(one.failure.error, one.failure.reason, default=ConfigurationError)
            manifest = files.commit(
                self._directory,
                generation,
                version,
                [one.part for one in stored if one.part is not None],
                members=stored[0].standings,
                splits=stored[0].recorded,
            )
        except BaseException:
            files.abandon(self._directory, generation, version)
            raise
        self.last = (
            f"{self._directory.rstrip('/')}/{files.folder_name(manifest.generation, manifest.version)}"
        )
        files.prune(self._directory, self._keep)
        return manifest.size
