"""`headwater serve`: nodes one by one, for machines and schedulers of any kind; their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headwater.cli.assignments import parse_settings
from headwater.cli.certificates import make_certificates
from headwater.cli.environment import (
    FROM_ENVIRONMENT,
    Advertise,
    Bind,
    Insecure,
    reach_of,
    takes_credentials,
)
from headwater.cli.faults import faults_reported
from headwater.cli.options import (
    Checkpoint,
    Deadline,
    Every,
    Keep,
    Lease,
    MinWorkers,
    OnServerLoss,
    Patience,
    Replicas,
    Rules,
    Sync,
)
from headwater.cli.serving import load_all, node_reported, serve_coordinator, serve_server, serve_worker
from headwater.spec.cluster import ClusterSettings
from headwater.spec.sync import parse_sync
from headwater.storage import checkpoints_of
from headwater.wire.security import PLAIN, Security

serve = typer.Typer(
    help="Run nodes one by one, under any scheduler, and make the certificates that they show each other. "
    "Every option of a node can be an environment variable: HEADWATER_MIN_WORKERS for --min-workers.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Coordinator = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="What `headwater serve coordinator` printed.")
]
Wait = Annotated[
    float,
    typer.Option(min=0, help="Seconds for which a coordinator that cannot be reached is tried again."),
]


@serve.command(context_settings=FROM_ENVIRONMENT)
@takes_credentials
def coordinator(
    workers: Annotated[int, typer.Option(min=1, help="Workers that must have joined, and must finish.")],
    servers: Annotated[int, typer.Option(min=1, help="Servers, which hold equal parts of the model.")] = 1,
    sync: Sync = "sync",
    rules: Rules = None,
    replicas: Replicas = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            envvar="HEADWATER_SET",
            help="A setting for `worker.settings`; repeatable.",
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    every: Every = "60s",
    keep: Keep = 3,
    resume: Annotated[
        bool, typer.Option("--resume", help="Begin with the latest good checkpoint, where there is one.")
    ] = False,
    on_server_loss: OnServerLoss = None,
    min_workers: MinWorkers = 1,
    patience: Patience = 10.0,
    deadline: Deadline = 600.0,
    lease: Lease = 15.0,
    journal: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="With it the coordinator may be killed and started again: the roster is there. "
            "Needs a --bind that is always the same.",
        ),
    ] = None,
    bind: Bind = None,
    advertise: Advertise = None,
    security: Security = PLAIN,
    insecure: Insecure = False,
) -> None:
    """Keep the roster of a cluster, hand out data, take checkpoints; prints its address when it is ready.

    [bold]Examples[/bold]

    headwater serve coordinator --workers 4 --servers 2 --bind 0.0.0.0:7000 --token-file token

    headwater serve coordinator --workers 4 --bind unix:/tmp/hw --journal hw.journal --checkpoint runs/a

    Exit codes: 0 every worker has finished, 1 the cluster cannot go on, 2 a wrong argument, 130 and 143 told
    to end.
    """
    with faults_reported():
        checkpoints = checkpoints_of(checkpoint, every, keep, resume, on_server_loss)  # type: ignore[arg-type]
        load_all(rules)
        settings = ClusterSettings(
            workers=workers,
            servers=servers,
            sync=str(parse_sync(sync)),
            settings=parse_settings(tuple(set_ or ())),
            patience=patience,
            deadline=deadline,
            lease=lease,
            replicas=replicas,
            min_workers=min_workers,
        )
        serve_coordinator(settings, checkpoints, journal, reach_of(bind, advertise, security))


@serve.command(context_settings=FROM_ENVIRONMENT)
@takes_credentials
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
    bind: Bind = None,
    advertise: Advertise = None,
    security: Security = PLAIN,
    insecure: Insecure = False,
) -> None:
    """Be a server or standby, whichever is missing, or a spare that waits until one is.

    [bold]Example[/bold]

    headwater serve server --coordinator tcp:node1:7000 --bind 0.0.0.0 --token-file token

    Exit codes: 0 training has finished, 1 it cannot go on, 2 a wrong argument, 75 no coordinator (any more):
    start it again, 130 and 143 told to end.
    """
    with node_reported():
        load_all(rules)
        serve_server(coordinator, role, index, reach_of(bind, advertise, security), wait)


@serve.command(context_settings=FROM_ENVIRONMENT)
@takes_credentials
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
    security: Security = PLAIN,
) -> None:
    """Run a training function as a worker; its settings come from the coordinator.

    [bold]Example[/bold]

    headwater serve worker train.py --coordinator tcp:node1:7000 --rank $SLURM_PROCID --token-file token

    Exit codes: 0 training has finished, 1 it failed, 2 a wrong argument, 75 the cluster, or the place in it,
    is lost: start it again, 130 and 143 told to end.
    """
    with node_reported():
        load_all(rules)
        serve_worker(script, coordinator, rank, security, wait)


@serve.command()
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
    """
    with faults_reported():
        for line in make_certificates(directory, host or []):
            print(line)
