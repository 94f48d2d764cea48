"""A follower that waits for its cluster and is there for readers until training has finished."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from headwater.errors import ConnectionLostError, FinishedError
from headwater.follower.keeper import Wish
from headwater.follower.served import FollowerNode, ServedStatistics
from headwater.loggers import logger
from headwater.spec.every import Every
from headwater.spec.seconds import seconds
from headwater.standalone.patience import patiently
from headwater.wire.endpoint import LOCAL, Endpoint

_log = logger("headwater.follower")


class StandaloneFollower:
    """A process that follows the cluster, or the follower, at `address`, and that others follow.

    Args:
        models, tables, every, dtype: as of `hw.follow`.
        reach: where readers reach it, and what they and it must prove.
        wait: seconds for which a cluster that cannot be reached at first is tried again.
        deadline: seconds until the first version must be there.
        at: told where readers follow it, once its first version is there.

    Raises:
        ConfigurationError: an impossible argument.
    """

    def __init__(
        self,
        address: str,
        models: str | Iterable[str] | None = None,
        tables: str | Iterable[str] | None = None,
        every: str | int | float | Every = "1s",
        *,
        dtype: str = "float32",
        reach: Endpoint = LOCAL,
        wait: float = 300.0,
        deadline: float = 600.0,
        at: Callable[[str], None] = lambda address: None,
    ) -> None:
        self._wish = Wish.of(address, models, tables, every, reach.security, dtype, bounded=True)
        self._reach = reach
        self._wait = seconds("wait", wait, zero=True)
        self._deadline = seconds("deadline", deadline)
        self._at = at
        self._node: FollowerNode | None = None
        self._interrupted = threading.Event()
        self._number = 0

    def interrupt(self, number: int) -> None:
        """Have `run` end with SystemExit: for the handler of signal `number`."""
        self._number = number
        if self._node is None:
            raise SystemExit(128 + number)
        self._interrupted.set()

    def statistics(self) -> ServedStatistics:
        """A snapshot. Raises ConnectionLostError while there is no version yet."""
        if self._node is None:
            raise ConnectionLostError("this follower has no version yet")
        return self._node.statistics()

    def readiness(self) -> tuple[bool, str]:
        """Whether it has a version for readers, which, and how old it is. From any thread."""
        node = self._node
        if node is None:
            return False, f"waits for a first version from {self._wish.address}"
        own = node.statistics()
        late = f"; {own.follower.reason}" if own.follower.reason else ""
        return True, f"{own.follower.version}, {own.follower.age:.1f} s old, {own.readers} readers{late}"

    def run(self) -> None:
        """Serve readers until training has finished; blocks.

        Raises:
            ConnectionLostError: the cluster is not there, or was closed before training had finished.
            ConfigurationError: what is to be followed does not exist, or it cannot listen there.
            RefusedError: one side does not admit the other.
            OtherClusterError: at that address there is now another cluster.
            StalledError: there was no first version in time; says why.
            SystemExit: after `interrupt`.
        """
        try:
            node = patiently(
                lambda: FollowerNode(self._wish, self._reach, deadline=self._deadline), self._wait
            )
        except FinishedError as error:
            _log.info("%s", error)
            return
        self._node = node
        try:
            _log.info("readers follow it at %s", ", ".join(node.addresses))
            self._at(node.address)
            while (why := node.wait(_LOOK_S)) is None:
                if self._interrupted.is_set():
                    raise SystemExit(128 + self._number)
        finally:
            node.close()
        _log.info("%s", why)
        if not isinstance(why, FinishedError):
            raise why


_LOOK_S = 0.2
"""Longest interval between two looks at whether it was interrupted, in seconds."""
