"""Where a cluster keeps its checkpoints: which it begins with, who takes new ones, and the lock on all."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Literal, TypeAlias

from headwater import checkpoint as files
from headwater.errors import ConfigurationError
from headwater.nodes.checkpointer import Checkpointer, Every

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
        restore: path of the checkpoint that servers begin with; "" for none.

    Raises:
        ConfigurationError: no such checkpoint, or another cluster uses the directory.
        CheckpointError: none is good.
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
            if settings.resume:
                self._use(files.latest(settings.directory))
        except BaseException:
            self._lock.release()
            raise

    @property
    def last(self) -> str | None:
        """Path of the newest checkpoint this cluster has written, or began with; None without one."""
        written = self._checkpointer.last if self._checkpointer is not None else ""
        return written or self.restore or None

    def begin(self, address: str) -> None:
        """Take checkpoints of the cluster at this address from now on."""
        settings = self.settings
        if settings.directory:
            self._checkpointer = Checkpointer(address, settings.directory, settings.every, settings.keep)
            self._checkpointer.begin()

    def rewind(self) -> None:
        """Have servers begin with the latest good checkpoint; from nothing where there is none yet."""
        self.restore = ""
        if files.list_checkpoints(self.settings.directory):
            self._use(files.latest(self.settings.directory))
        _log.warning("training begins anew from %s", self.restore or "the start: there is no checkpoint yet")

    def take_last(self) -> None:
        """Take a checkpoint of now, unless it is written already; for the end of a run."""
        if self._checkpointer is not None:
            self._checkpointer.take_last()

    def close(self) -> None:
        """Take no more checkpoints, and let go of the directory; idempotent."""
        if self._checkpointer is not None:
            self._checkpointer.close()
        if self._lock is not None:
            self._lock.release()

    def _use(self, found: files.Latest) -> None:
        for reason in found.skipped:
            _log.warning("%s is used, since a newer one is not good: %s", found.checkpoint.path, reason)
        self.restore = found.checkpoint.path
