"""Where a cluster keeps its checkpoints: which it begins with, who takes new ones, and the lock on all."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Literal, TypeAlias

from headwater import checkpoint as files
from headwater.errors import ConfigurationError
from headwater.runtime.checkpointer import Checkpointer, Every
from headwater.wire.security import PLAIN, Security

OnServerLoss: TypeAlias = Literal["rewind", "stop"]

_log = logging.getLogger("headwater.checkpoint")


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoint settings of a cluster, as a user gives them; "" directory: none.

    Raises:
        ConfigurationError: impossible ones.
    """

    directory: str
    every: Every
    keep: int
    resume: bool
    on_server_loss: OnServerLoss | None

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 1:
            raise ConfigurationError(f"keep must be an integer ≥ 1, got {self.keep!r}")
        if self.on_server_loss not in (None, "rewind", "stop"):
            raise ConfigurationError(
                f"on_server_loss must be 'rewind' or 'stop', got {self.on_server_loss!r}"
            )
        if not self.directory and self.resume:
            raise ConfigurationError("resume needs a checkpoint directory: pass checkpoint=DIR")
        if not self.directory and self.on_server_loss == "rewind":
            raise ConfigurationError("on_server_loss='rewind' needs checkpoints: pass checkpoint=DIR")

    @property
    def rewinds(self) -> bool:
        """Whether training begins anew from a checkpoint when a shard is lost."""
        return bool(self.directory) and self.on_server_loss != "stop"


def checkpoints_of(
    checkpoint: str | os.PathLike[str] | None,
    every: str | int | Every,
    keep: int,
    resume: bool,
    on_server_loss: OnServerLoss | None,
) -> Checkpoints:
    """The settings as `run` and `Cluster` take them."""
    directory = "" if checkpoint is None else os.fspath(checkpoint)
    return Checkpoints(directory, Every.parse(every), keep, resume, on_server_loss)


class Storage:
    """The checkpoint directory of one running cluster, locked until `close`.

    Attributes:
        generation: of the log, to begin with.
        restore: path of the checkpoint that servers begin with; "" for none, as before `resume`.

    Raises:
        ConfigurationError: another cluster uses the directory.
        CheckpointError: it cannot be made or read.
    """

    def __init__(self, settings: Checkpoints) -> None:
        self.settings = settings
        self.generation = 0
        self.restore = ""
        self._lock: files.DirectoryLock | None = None
        self._checkpointer: Checkpointer | None = None
        if not settings.directory:
            return
        self._lock = files.DirectoryLock(settings.directory)
        try:
            self.generation = files.next_generation(settings.directory)
        except BaseException:
            self._lock.release()
            raise

    @property
    def last(self) -> str | None:
        """Path of the newest checkpoint this cluster has written, or began with; None without one."""
        written = self._checkpointer.last if self._checkpointer is not None else ""
        return written or self.restore or None

    def sign(self, cluster: str) -> None:
        """Say in the directory's lock whose it is."""
        if self._lock is not None:
            self._lock.sign(cluster)

    def begin(self, address: str, *, security: Security = PLAIN) -> None:
        """Take checkpoints of the cluster at this address from now on."""
        settings = self.settings
        if settings.directory:
            self._checkpointer = Checkpointer(
                address, settings.directory, settings.every, settings.keep, security=security
            )
            self._checkpointer.begin()

    def resume(self, *, required: bool = True) -> None:
        """Have servers begin with the latest good checkpoint; without one, if not `required`, with nothing.

        Raises:
            ConfigurationError: there is none at all.
            CheckpointError: none is good.
        """
        try:
            if required or files.list_checkpoints(self.settings.directory):
                self._use(files.latest(self.settings.directory))
        except BaseException:
            self.close()
            raise

    def rewind(self, first: int | None = None) -> str:
        """Have servers begin with the latest good checkpoint of this cluster, or what it resumed from; from
        nothing where there is neither: what another training left in the directory is not its own.

        `first`: the cluster's first generation, where another process than this one began it.
        Returns the checkpoint's path, "" for none.
        """
        self.restore = ""
        since = 0 if self.settings.resume else self.generation if first is None else first
        if any(found.generation >= since for found in files.list_checkpoints(self.settings.directory)):
            self._use(files.latest(self.settings.directory, since=since))
        _log.warning("training begins anew from %s", self.restore or "the start: there is no checkpoint yet")
        return self.restore

    def take_last(self) -> None:
        """Take a checkpoint of now, unless it is written already; for the end of a run."""
        if self._checkpointer is not None:
            self._checkpointer.take_last()

    def take_now(self) -> None:
        """Take a checkpoint of now, unless it is written already.

        Raises:
            ConfigurationError: there is no directory for it.
        """
        if self._checkpointer is None:
            raise ConfigurationError("a checkpoint needs a directory: pass checkpoint=DIR")
        self._checkpointer.take_now()

    def interrupt(self) -> None:
        """Take no more checkpoints, and give up one that is being written; does not block, idempotent."""
        if self._checkpointer is not None:
            self._checkpointer.interrupt()

    def close(self) -> None:
        """Take no more checkpoints, and let go of the directory; blocks for one that is given up.
        Idempotent."""
        if self._checkpointer is not None:
            self._checkpointer.close()
        if self._lock is not None:
            self._lock.release()

    def _use(self, found: files.Latest) -> None:
        for reason in found.skipped:
            _log.warning("%s is used, since a newer one is not good: %s", found.checkpoint.path, reason)
        self.restore = found.checkpoint.path
