"""A server that asks the coordinator what it is to be, again whenever it is nothing any more."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing

from headwater.engines.roles import prepare_server
from headwater.errors import (
    ConnectionLostError,
    FinishedError,
    HeadwaterError,
    RewoundError,
)
from headwater.loggers import logger
from headwater.machines.enlistment import Enlistment, asks_again
from headwater.messages import Assignment, ClusterStatistics, ServerRole
from headwater.observe.metrics import statistics_of_server
from headwater.observe.prometheus import MetricsServer
from headwater.runtime.coordinator_client import enlist
from headwater.runtime.server import ServerNode
from headwater.spec.seconds import seconds
from headwater.standalone.patience import patiently
from headwater.wire.endpoint import LOCAL, Endpoint

_log = logger("headwater.server")


class StandaloneServer:
    """A process that is a server or standby of the cluster at `coordinator`.

    Args:
        role, index: what it is to be; None: whatever is missing.
        reach: where members reach it.
        wait: seconds for which a coordinator that cannot be reached is tried again.
        metrics: "HOST:PORT" where Prometheus scrapes what this node knows of itself.
        named: told who this node is, whenever that is known anew.
    """

    def __init__(
        self,
        coordinator: str,
        *,
        role: ServerRole | None = None,
        index: int | None = None,
        reach: Endpoint = LOCAL,
        wait: float = 300.0,
        metrics: str | None = None,
        named: Callable[[str, int], None] = lambda role, index: None,
    ) -> None:
        self._coordinator = coordinator
        self._enlistment = Enlistment(role, index)
        self._reach = reach
        self._wait = seconds("wait", wait, zero=True)
        self._metrics = metrics
        self._named = named
        self._serving: ServerNode | None = None

    def run(self) -> None:
        """Serve until training has finished; blocks.

        Where nothing is missing it waits as a spare. It asks anew when everything begins anew from a
        checkpoint, and when it was declared dead.

        Raises:
            ConnectionLostError: there is no coordinator (any more), or it closed the cluster.
            ConfigurationError: there can be no such server.
            RefusedError: one side does not admit the other.
            OtherClusterError: at that address there is now the coordinator of another cluster.
            HeadwaterError: it cannot go on, and why.
        """
        with ExitStack() as undo:
            if self._metrics is not None:
                exporter = MetricsServer(
                    self._metrics, self._statistics, node="server", security=self._reach.security
                )
                undo.enter_context(closing(exporter))
            self._run()

    def readiness(self) -> tuple[bool, str]:
        """Whether it serves now, and as what; blocks for the node's own parts. From any thread."""
        node = self._serving
        if node is None:
            return False, "waits for the coordinator, or until a server or standby is missing"
        own = node.statistics()
        return True, f"{own.role} {own.index}, at version {own.version}"

    def _statistics(self) -> ClusterStatistics:
        """What this node knows now. Raises ConnectionLostError while it serves nobody."""
        node = self._serving
        if node is None:
            raise ConnectionLostError("this node is no server now")
        return statistics_of_server(node.statistics())

    def _run(self) -> None:
        prepare_server()
        while True:
            try:
                parting = patiently(self._serve, self._wait)
            except (FinishedError, RewoundError) as error:
                parting = error
            _log.warning("%s", parting)
            if isinstance(parting, FinishedError):
                return
            if not asks_again(parting):
                raise parting

    def _serve(self) -> HeadwaterError:
        """Be a server once; returns why it is none any more. Raises what kept it from becoming one."""
        channel, assignment = enlist(
            self._coordinator,
            self._enlistment,
            spare=lambda reason: _log.info("%s", reason),
            security=self._reach.security,
        )
        try:
            node = self._node(assignment)
        except BaseException:
            channel.close()
            raise
        node.start(channel)
        self._serving = node
        try:
            return node.wait_for_parting()
        finally:
            self._serving = None
            node.close()

    def _node(self, assignment: Assignment) -> ServerNode:
        self._named(assignment.role, assignment.index)
        _log.info(
            "it is %s %d of %d%s",
            assignment.role,
            assignment.index,
            assignment.servers,
            f", from {assignment.restore}" if assignment.restore else "",
        )
        return ServerNode(self._coordinator, assignment, self._reach)
