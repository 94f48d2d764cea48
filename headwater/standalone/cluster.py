"""The coordinator of a cluster whose servers and workers come by themselves, and its checkpoints."""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import signal

from headwater.errors import ConfigurationError, HeadwaterError, RewoundError
from headwater.messages import Refused
from headwater.runtime.coordinator import CoordinatorNode, Serving
from headwater.spec.cluster import ClusterSettings
from headwater.storage import Checkpoints, Storage
from headwater.wire.endpoint import LOCAL, Endpoint

_log = logging.getLogger("headwater.coordinator")


class StandaloneCluster:
    """Takes in whoever comes, until every declared worker has finished.

    With a journal it may be killed and started again: training goes on meanwhile and afterwards. For that
    its address must be the same at every start.

    Args:
        settings: `rewinds` and `generation` follow from the checkpoints.
        checkpoints: with `resume` a new cluster begins with the latest good one, if there is any.

    Attributes:
        address: where nodes join.

    Raises:
        ConfigurationError: impossible settings, or the directory, the journal or the address is in use.
        JournalError: the journal is damaged.
        CheckpointError: the directory cannot be used.
    """

    def __init__(
        self,
        settings: ClusterSettings,
        checkpoints: Checkpoints,
        *,
        journal: str | os.PathLike[str] = "",
        reach: Endpoint = LOCAL,
    ) -> None:
        if journal and not reach.is_fixed:
            raise ConfigurationError(
                "a coordinator with a journal must be found again where it was: "
                "bind to a fixed port, or to unix:/path"
            )
        self._journal = journal
        self._security = reach.security
        self._events: queue.SimpleQueue[HeadwaterError | int | None] = queue.SimpleQueue()
        self._storage = Storage(
            dataclasses.replace(checkpoints, directory=_everywhere(checkpoints.directory))
        )
        try:
            self._node = CoordinatorNode(
                dataclasses.replace(
                    settings, rewinds=checkpoints.rewinds, generation=self._storage.generation
                ),
                journal=journal,
                reach=reach,
                serving=Serving(self._restore, self._events.put),
            )
        except BaseException:
            self._storage.close()
            raise
        self.address = self._node.address
        self._keep_checkpoints()

    def interrupt(self, number: int) -> None:
        """Have `run` end; from any thread, and from a signal's handler, with its number."""
        self._events.put(number)

    def run(self) -> int:
        """Block until every declared worker has finished; then takes a last checkpoint and tells all members.

        After `interrupt` it takes a last checkpoint too, and ends: the cluster with it, or this coordinator
        alone where it has a journal and the number is not SIGINT's.

        Returns:
            0, or the number that `interrupt` was given.

        Raises:
            HeadwaterError: the cluster cannot go on, and why.
        """
        try:
            while True:
                event = self._events.get()
                if isinstance(event, int):
                    self._interrupted(event)
                    return event
                if event is not None:
                    raise event
                if self._node.finished() and self._finish():
                    return 0
        finally:
            self.close()

    def close(self) -> None:
        """End the cluster; idempotent. Members are told."""
        self._node.close()
        self._storage.close()

    def _finish(self) -> bool:
        """Everybody has done his work; False where it was lost at the last moment."""
        try:
            self._storage.take_last()
        except RewoundError as error:
            _log.warning("no last checkpoint: %s", error)
            self._keep_checkpoints()
            return False
        except HeadwaterError as error:
            self._node.end(type(error).__name__, f"no last checkpoint could be written: {error}")
            raise
        self._node.finish()
        return True

    def _interrupted(self, number: int) -> None:
        if self._node.complete():
            try:
                self._storage.take_last()
            except HeadwaterError as error:
                _log.warning("no last checkpoint: %s", error)
        if self._journal and number != signal.SIGINT:
            _log.warning("the coordinator ends alone: start it again on its journal, %s", self._journal)
            self._node.halt()
        else:
            self._node.finish(Refused("ClusterEndedError", "the cluster is closed"))

    def _keep_checkpoints(self) -> None:
        self._storage.sign(self._node.cluster)
        self._storage.begin(self._node.addresses[0], security=self._security)

    def _restore(self, begun: bool, first: int) -> str:
        """The checkpoint that a generation begins with."""
        if begun:
            self._storage.rewind(first)
        elif self._storage.settings.resume:
            self._storage.resume(required=False)
        return self._storage.restore


def _everywhere(directory: str) -> str:
    """What servers with other working directories find it by."""
    return os.path.abspath(directory) if directory and "://" not in directory else directory
