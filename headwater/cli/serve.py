"""`headwater serve`: nodes one by one, for machines and schedulers of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headwater.cli.certificates import make_certificates
from headwater.cli.log_lines import LogStyle
from headwater.cli.options import (
    Address,
    LogTo,
    Metrics,
    Otlp,
    command,
    configuration,
    credentials,
    listening,
    log_style,
    the,
)
from headwater.cli.serving import (
    load_all,
    losses_reported,
    serve_coordinator,
    serve_follower,
    serve_server,
    serve_worker,
)
from headwater.spec.cluster import ClusterConfig
from headwater.wire.endpoint import Endpoint
from headwater.wire.security import Security

app = typer.Typer(
    help="Run nodes one by one, under any scheduler, and make the certificates that they show each other. "
    "Every option can be an environment variable: HEADWATER_MIN_WORKERS for --min-workers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)

Coordinator = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="What `headwater serve coordinator` printed.")
]
Rules = Annotated[
    list[str] | None,
    typer.Option(metavar="MODULE", help="A module with rules and modes of your own; repeatable."),
]
Probes = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Answer probes there: /live, and /ready with the reason, in plain text and without a secret.",
    ),
]
Wait = Annotated[
    float,
    typer.Option(min=0, help="Seconds for which a coordinator that cannot be reached is tried again."),
]


@command(app, config=configuration("workers"), reach=listening(), log=log_style())
def coordinator(
    config: ClusterConfig,
    journal: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="With it the coordinator may be killed and started again: the roster is there. "
            "Needs a --bind that is always the same.",
        ),
    ] = None,
    metrics: Metrics = None,
    otlp: Otlp = None,
    health: Probes = None,
    log_to: LogTo = None,
    reach: Endpoint = Endpoint(),  # noqa: B008 - made from its options
    log: LogStyle = LogStyle(),  # noqa: B008 - made from its options
) -> None:
    """Keep the roster of a cluster, hand out data, take checkpoints; prints its address when it is ready.

    [bold]Examples[/bold]

    headwater serve coordinator --workers 4 --servers 2 --bind 0.0.0.0:7000 --token-file token

    headwater serve coordinator --workers 4 --bind unix:/tmp/hw --journal hw.journal --checkpoint runs/a

    Exit codes: 0 every worker has finished, or `headwater stop` has ended it; 1 the cluster cannot go on; 2 a
    wrong argument; 130 and 143 told to end.
    """
    with log.begin("coordinator", "info"):
        serve_coordinator(config, journal, reach, metrics, otlp, health, log_to or ())


@command(app, reach=listening(), log=log_style())
def server(
    coordinator: Coordinator = None,
    role: Annotated[
        str | None, typer.Option(metavar="server|standby", help="Without: whichever is missing.")
    ] = None,
    index: Annotated[
        int | None, typer.Option(min=0, help="Which server, or whose standby; without: one that is missing.")
    ] = None,
    rules: Rules = None,
    wait: Wait = 300.0,
    metrics: Metrics = None,
    health: Probes = None,
    reach: Endpoint = Endpoint(),  # noqa: B008 - made from its options
    log: LogStyle = LogStyle(),  # noqa: B008 - made from its options
) -> None:
    """Be a server or standby, whichever is missing, or a spare that waits until one is.

    [bold]Example[/bold]

    headwater serve server --coordinator tcp:node1:7000 --bind 0.0.0.0 --token-file token

    Exit codes: 0 training has finished, 1 it cannot go on, 2 a wrong argument, 75 no coordinator (any more):
    start it again, 130 and 143 told to end.
    """
    load_all(rules)
    with log.begin("server", "info") as node, losses_reported():
        serve_server(coordinator, role, index, reach, wait, metrics, health, named=node.named)


@command(app, security=credentials(), log=log_style())
def worker(
    script: Annotated[
        str,
        typer.Argument(
            metavar="SCRIPT[:FUNCTION]",
            envvar="HEADWATER_SCRIPT",
            help="A Python file; FUNCTION(worker) is `train` unless named.",
        ),
    ],
    coordinator: Coordinator = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Which worker; without: the next free one.")] = None,
    rules: Rules = None,
    wait: Wait = 300.0,
    metrics: Metrics = None,
    health: Probes = None,
    security: Security = Security(),  # noqa: B008 - made from its options
    log: LogStyle = LogStyle(),  # noqa: B008 - made from its options
) -> None:
    """Run a training function as a worker; its settings come from the coordinator.

    [bold]Example[/bold]

    headwater serve worker train.py --coordinator tcp:node1:7000 --rank $SLURM_PROCID --token-file token

    Exit codes: 0 training has finished, 1 it failed, 2 a wrong argument, 75 the cluster, or the place in it,
    is lost: start it again, 130 and 143 told to end.
    """
    load_all(rules)
    with log.begin("worker", "info") as node, losses_reported():
        serve_worker(script, coordinator, rank, security, wait, metrics, health, named=node.named)


@command(app, reach=listening(), log=log_style())
def follower(
    address: Address = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME", help="A model to follow; repeatable. Without: all."),
    ] = None,
    table: Annotated[
        list[str] | None,
        typer.Option("--table", metavar="NAME", help="A table to follow; repeatable. Without: all."),
    ] = None,
    every: Annotated[
        str,
        typer.Option("--every", metavar="N|Ns", help="How often it takes a version: commits, or seconds."),
    ] = "1s",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of parameters: float32, or bfloat16 (rounded to nearest even).")
    ] = "float32",
    wait: Wait = 300.0,
    deadline: Annotated[
        float, typer.Option(min=0, help="Seconds until the first version must be there.")
    ] = 600.0,
    health: Probes = None,
    reach: Endpoint = Endpoint(),  # noqa: B008 - made from its options
    log: LogStyle = LogStyle(),  # noqa: B008 - made from its options
) -> None:
    """Keep one copy of models and tables beside training, for many readers; prints its address.

    Readers of its machine read its memory; to those of others it sends what has changed. ADDRESS is a
    cluster's, or that of another follower.

    [bold]Example[/bold]

    headwater serve follower tcp:node1:7000 --every 1s --bind 0.0.0.0:7100 --token-file token

    Exit codes: 0 training has finished, 1 it cannot go on, 2 a wrong argument, 75 no cluster (any more):
    start it again, 130 and 143 told to end.
    """
    with log.begin("follower", "info"), losses_reported():
        named = model or None, table or None
        serve_follower(the(address), *named, every, dtype, reach, wait, deadline, health)


@command(app)
def certificates(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files are written.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,NAME...]",
            help="A machine, by every host name and IP address that others dial it with; repeatable. "
            "Without: this machine.",
        ),
    ] = None,
) -> None:
    """Make an authority, and a certificate for each machine, for TLS between nodes.

    Writes ca.pem and ca.key, and NAME.pem and NAME.key for each machine. An authority that is there
    already is used again, so machines can be added later; no file is ever overwritten. Every node needs
    ca.pem and its own two files; ca.key stays where it is.

    [bold]Examples[/bold]

    headwater serve certificates certs --host node1,10.0.0.1 --host node2,10.0.0.2

    Exit codes: 0 written, 1 the files cannot be written, 2 a wrong argument.
    """
    for line in make_certificates(directory, host or []):
        print(line)
