"""Where a cluster keeps its checkpoints: which it begins with, who takes new ones, and the lock on all."""

from __future__ import annotations

import os
from collections.abc import Callable

from headwater import checkpoint as files
from headwater.errors import ConfigurationError
from headwater.loggers import logger
from headwater.machines.checkpoint_plan import own_since
from headwater.messages import CheckpointCounts
from headwater.runtime.checkpointer import Checkpointer
from headwater.spec.cluster import ClusterConfig
from headwater.spec.words import option
from headwater.wire.security import PLAIN, Security

_log = logger("headwater.checkpoint")


class Storage:
    """The checkpoint directory of one running cluster, locked until `close`.

    Attributes:
        generation: of the log, to begin with.
        restore: path of the checkpoint that servers begin with; "" for none, as before `resume`.

    Raises:
        ConfigurationError: another cluster uses the directory.
        CheckpointError: it cannot be made or read.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self.generation = 0
        self.restore = ""
        self._config = config
        self._directory = _everywhere(config.checkpoint)
        self._lock: files.DirectoryLock | None = None
        self._checkpointer: Checkpointer | None = None
        if not self._directory:
            return
        self._lock = files.DirectoryLock(self._directory)
        try:
            self.generation = files.next_generation(self._directory)
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

    def begin(
        self,
        address: str,
        counted: Callable[[CheckpointCounts], None] = lambda counts: None,
        *,
        security: Security = PLAIN,
    ) -> None:
        """Take checkpoints of the cluster at this address from now on; `counted` is told after each."""
        config = self._config
        if self._directory:
            self._checkpointer = Checkpointer(
                address, self._directory, config.every, config.keep, security=security, counted=counted
            )
            self._checkpointer.begin()

    def resume(self) -> None:
        """Have servers begin with the latest good checkpoint, where that is asked for; with nothing where
        there is none yet.

        Raises:
            CheckpointError: there are some, and none is good.
        """
        if not self._config.resume:
            return
        try:
            if files.list_checkpoints(self._directory):
                self._use(files.latest(self._directory))
            else:
                _log.warning("%s holds no checkpoint yet: training begins at the start", self._directory)
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
        since = own_since(resumes=self._config.resume, first=self.generation if first is None else first)
        if any(found.generation >= since for found in files.list_checkpoints(self._directory)):
            self._use(files.latest(self._directory, since=since))
        _log.warning("training begins anew from %s", self.restore or "the start: there is no checkpoint yet")
        return self.restore

    def take_last(self) -> None:
        """Take a checkpoint of now, unless it is written already; for the end of a run."""
        if self._checkpointer is not None:
            self._checkpointer.take_last()

    def take_now(self) -> str:
        """Take a checkpoint of now, unless it is written already; returns its path. Blocks.

        Raises:
            ConfigurationError: there is no directory for it.
            HeadwaterError: it cannot be written.
        """
        if self._checkpointer is None:
            raise ConfigurationError(f"a checkpoint needs a directory: pass {option('checkpoint', 'DIR')}")
        self._checkpointer.take_now()
        return self._checkpointer.last

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


def _everywhere(directory: str) -> str:
    """What servers with other working directories find it by."""
    return os.path.abspath(directory) if directory and "://" not in directory else directory
