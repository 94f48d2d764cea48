"""Options that a cluster has however its nodes are started: those of `run` and of `serve coordinator`."""

from __future__ import annotations

from typing import Annotated

import typer

Sync = Annotated[
    str,
    typer.Option(
        help="sync, async, ssp:N (lead at most N steps), sync:quorum=K,grace=SECONDS (backup workers), "
        "or a mode of your own: NAME:SETTING=VALUE,…, from a module of --rules."
    ),
]
Replicas = Annotated[
    int, typer.Option(min=0, max=1, help="Standbys of every server, which take over when it is lost.")
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        metavar="DIR", help="Where checkpoints go: a directory or fsspec URL that every server reaches."
    ),
]
Every = Annotated[str, typer.Option(metavar="N[steps]|Ns", help="Commits, or seconds, between checkpoints.")]
Keep = Annotated[int, typer.Option(min=1, help="How many checkpoints stay.")]
OnServerLoss = Annotated[
    str | None,
    typer.Option(
        metavar="rewind|stop",
        help="When a server is lost with its standby; rewind to the last checkpoint where there are any.",
    ),
]
MinWorkers = Annotated[int, typer.Option(min=1, help="With fewer workers than that training waits.")]
Rules = Annotated[
    list[str] | None,
    typer.Option(metavar="MODULE", help="A module with update rules or modes of your own; repeatable."),
]
Patience = Annotated[float, typer.Option(help="Seconds after which a wait is reported.")]
Deadline = Annotated[float, typer.Option(help="Seconds after which a wait fails.")]
Lease = Annotated[
    float, typer.Option(help="Seconds after which a node that is not heard of is declared dead.")
]
