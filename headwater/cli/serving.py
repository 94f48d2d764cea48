"""What `headwater serve` does once its options are read: nodes as processes, with logs and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import TypeAlias

import typer

from headwater.cli.faults import complain
from headwater.cli.health import Health
from headwater.cli.probes import ProbeServer, Readiness
from headwater.cli.script import load_function
from headwater.cli.signals import signals_to
from headwater.errors import (
    ConfigurationError,
    ConnectionLostError,
    OtherClusterError,
    RefusedError,
    UnreachableError,
)
from headwater.loggers import logger
from headwater.messages import ServerRole
from headwater.observe.sinks import sink_of
from headwater.spec.cluster import ClusterConfig
from headwater.spec.registry import load_rules
from headwater.standalone import StandaloneCluster, StandaloneFollower, StandaloneServer, StandaloneWorker
from headwater.wire.endpoint import Endpoint
from headwater.wire.security import Security

AGAIN = 75
"""EX_TEMPFAIL: nothing is wrong with this process, and it may be started again."""

_log = logger("headwater")

Named: TypeAlias = Callable[[str, int], None]
"""Is told who a node is, once that is known."""


def _nobody(role: str, index: int) -> None:
    pass


def load_all(rules: Sequence[str] | None) -> None:
    """Load the modules of `--rules`, before anything that may name a rule or a mode of theirs.

    Raises:
        ConfigurationError: one cannot be imported.
    """
    for module in rules or ():
        load_rules(module)


def serve_coordinator(
    config: ClusterConfig,
    journal: str | None,
    reach: Endpoint,
    metrics: str | None = None,
    otlp: str | None = None,
    health: str | None = None,
    log_to: Sequence[str] = (),
) -> None:
    """Be the coordinator until training has finished; prints its address on standard output.

    Raises:
        HeadwaterError: the cluster cannot begin, or not go on.
        typer.Exit: 128 + the number of a signal.
    """
    sinks = [sink_of(text) for text in log_to]
    cluster = StandaloneCluster(
        config, journal=journal or "", reach=reach, metrics=metrics, otlp=otlp, log_to=sinks
    )

    def readiness() -> tuple[bool, str]:
        found = Health.of(cluster.statistics())
        return found.is_ready, found.readiness()

    with closing(cluster), signals_to(cluster.interrupt), _probed(health, readiness):
        print(cluster.address, flush=True)
        _log.info(
            "coordinator at %s, for %d workers, %d servers",
            cluster.address,
            config.workers,
            config.servers,
        )
        number = cluster.run()
    if number:
        raise typer.Exit(128 + number)
    _log.info("the cluster has ended")


def serve_server(
    coordinator: str | None,
    role: str | None,
    index: int | None,
    reach: Endpoint,
    wait: float,
    metrics: str | None = None,
    health: str | None = None,
    *,
    named: Named = _nobody,
) -> None:
    """Be a server until training has finished.

    Raises:
        ConfigurationError: an impossible option.
        HeadwaterError: as `StandaloneServer.run`.
    """
    server = StandaloneServer(
        _given(coordinator),
        role=_role(role),
        index=index,
        reach=reach,
        wait=wait,
        metrics=metrics,
        named=named,
    )
    with signals_to(_end), _probed(health, server.readiness):
        server.run()


def serve_worker(
    script: str,
    coordinator: str | None,
    rank: int | None,
    security: Security,
    wait: float,
    metrics: str | None = None,
    health: str | None = None,
    *,
    named: Named = _nobody,
) -> None:
    """Run the script's function as a worker until training has finished.

    Raises:
        ConfigurationError: an impossible option, or no such function.
        ScriptError: the script raised while it was loaded.
        HeadwaterError: as `StandaloneWorker.run`.
        SystemExit: 128 + the number of a signal.
    """
    address = _given(coordinator)
    worker = StandaloneWorker(
        load_function(script), address, rank=rank, security=security, wait=wait, metrics=metrics, named=named
    )
    with signals_to(worker.interrupt), _probed(health, worker.readiness):
        worker.run()


def serve_follower(
    address: str,
    models: Sequence[str] | None,
    tables: Sequence[str] | None,
    every: str,
    dtype: str,
    reach: Endpoint,
    wait: float,
    deadline: float,
    health: str | None = None,
) -> None:
    """Follow, and be followed, until training has finished; prints its address on standard output.

    Raises:
        HeadwaterError: as `StandaloneFollower`, and its `run`.
        SystemExit: 128 + the number of a signal.
    """
    follower = StandaloneFollower(
        address,
        models,
        tables,
        every,
        dtype=dtype,
        reach=reach,
        wait=wait,
        deadline=deadline,
        at=lambda own: print(own, flush=True),
    )
    with signals_to(follower.interrupt), _probed(health, follower.readiness):
        follower.run()


def _probed(place: str | None, readiness: Readiness) -> AbstractContextManager[object]:
    """Answers probes at `place` during the block."""
    return nullcontext() if place is None else ProbeServer(place, readiness)


@contextmanager
def losses_reported() -> Iterator[None]:
    """For a node that others can do without: it may be started again where it has lost its cluster.

    Raises:
        typer.Exit: AGAIN for one that has lost its cluster, or its place in it.
    """
    try:
        yield
    except (UnreachableError, OtherClusterError):
        raise  # it would be the same again, or another job's
    except (ConnectionLostError, RefusedError) as error:
        complain(str(error))
        raise typer.Exit(AGAIN) from None


def _end(number: int) -> None:
    """A server ends at once: it owes nobody anything that its standby, or a checkpoint, has not.

    The signal may come while a log line is being written, and no stream can be written to meanwhile.
    """
    os.write(sys.stderr.fileno(), f"headwater: ended by signal {number}\n".encode())
    os._exit(128 + number)


def _given(coordinator: str | None) -> str:
    if not coordinator:
        raise ConfigurationError(
            "of which cluster? Pass --coordinator ADDRESS, which `headwater serve coordinator` printed, "
            "or set HEADWATER_COORDINATOR"
        )
    return coordinator


def _role(role: str | None) -> ServerRole | None:
    if role is None or role == "server" or role == "standby":
        return role  # type: ignore[return-value]
    raise ConfigurationError(f"--role: got {role!r}, expected server or standby")
