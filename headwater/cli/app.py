"""The commands and their options; what each does lies in a file of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from headwater.bench.suites import SUITES
from headwater.cli import checkpoint as checkpoints
from headwater.cli.bench import measure
from headwater.cli.engines import chosen_engine
from headwater.cli.environment import (
    Advertise,
    Bind,
    Insecure,
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
from headwater.cli.serve import serve
from headwater.cli.status import show_status
from headwater.cli.training import train_script
from headwater.cli.verify import show_verification
from headwater.wire.security import PLAIN, Security

app = typer.Typer(
    name="headwater",
    help="A parameter server for Python: train with synchronous, asynchronous or bounded-stale workers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(serve, name="serve")

checkpoint = typer.Typer(
    help="Look at the checkpoints that trainings wrote; a cluster need not be running.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(checkpoint, name="checkpoint")


def main() -> None:
    """Entry point of the command."""
    app()


@app.command()
@takes_credentials
def run(
    script: Annotated[
        str,
        typer.Argument(
            metavar="SCRIPT[:FUNCTION]", help="A Python file; FUNCTION(worker) is `train` unless named."
        ),
    ],
    workers: Annotated[int, typer.Option(min=1, help="Processes that compute gradients.")] = 2,
    servers: Annotated[int, typer.Option(min=1, help="Processes that hold equal parts of the model.")] = 1,
    sync: Sync = "sync",
    engine: Annotated[
        str, typer.Option(help="local (processes), ray (actors), or inline (threads, for debugging).")
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="The Ray cluster; otherwise what `ray.init()` finds."),
    ] = None,
    working_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="With ray: uploaded, for scripts that import modules of their own."),
    ] = None,
    server_resource: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=AMOUNT", help="With ray: what a server reserves, as num_cpus=2."),
    ] = None,
    worker_resource: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=AMOUNT", help="With ray: what a worker reserves; repeatable."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting for `worker.settings`; repeatable."),
    ] = None,
    replicas: Replicas = 0,
    checkpoint: Checkpoint = None,
    every: Every = "60s",
    keep: Keep = 3,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the latest good checkpoint.")] = False,
    on_server_loss: OnServerLoss = None,
    min_workers: MinWorkers = 1,
    restarts: Annotated[int, typer.Option(min=0, help="How often the process of a worker may die.")] = 3,
    rules: Rules = None,
    transport: Annotated[
        str, typer.Option(help="unix (shared memory) or tcp (as between machines).")
    ] = "unix",
    bind: Bind = None,
    advertise: Advertise = None,
    security: Security = PLAIN,
    insecure: Insecure = False,
    patience: Patience = 10.0,
    deadline: Deadline = 600.0,
    lease: Lease = 15.0,
) -> None:
    """Run a training function in every worker, against servers on this machine or in a Ray cluster.

    The script is loaded without its `if __name__ == "__main__":` block, and its folder is importable.

    [bold]Examples[/bold]

    headwater run train.py --workers 4 --servers 2 --sync ssp:3

    headwater run train.py:fit --set epochs=3 --set lr=0.05

    headwater run train.py --replicas 1 --checkpoint runs/a --every 1000steps --resume

    headwater run train.py --engine ray --ray-address 10.0.0.1:6379 --worker-resource num_cpus=4

    headwater run train.py --bind 0.0.0.0:7000 --token-file token

    Exit codes: 0 done, 1 the training or the cluster failed, 2 a wrong argument, 130 interrupted.
    """
    with faults_reported():
        train_script(
            script,
            set_ or (),
            workers=workers,
            servers=servers,
            sync=sync,
            engine=chosen_engine(
                engine, ray_address, working_dir, server_resource or (), worker_resource or ()
            ),
            replicas=replicas,
            checkpoint=checkpoint,
            every=every,
            keep=keep,
            resume=resume,
            on_server_loss=on_server_loss,
            min_workers=min_workers,
            restarts=restarts,
            rules=tuple(rules or ()),
            transport=transport,
            bind=bind,
            advertise=advertise,
            token=security.token,
            tls=security.tls,
            insecure=insecure,
            patience=patience,
            deadline=deadline,
            lease=lease,
        )


@app.command()
@takes_credentials
def status(
    address: Annotated[str, typer.Argument(help="What `headwater run` printed as cluster address.")],
    json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    security: Security = PLAIN,
) -> None:
    """Show the nodes and models of a running cluster, and whom each node waits for.

    [bold]Examples[/bold]

    headwater status unix:@headwater-0f3a --json

    headwater status tcp:node1:7000 --token-file token
    """
    with faults_reported():
        show_status(address, as_json=json, security=security)


@app.command()
@takes_credentials
def verify(
    address: Annotated[str, typer.Argument(help="What `headwater run` printed as cluster address.")],
    json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    security: Security = PLAIN,
) -> None:
    """Compare every server of a running cluster with its standby, at one entry of the log.

    Training goes on; each node copies what it holds in memory, as for a checkpoint, and sums that up.

    [bold]Examples[/bold]

    headwater verify unix:@headwater-0f3a

    headwater verify tcp:node1:7000 --token-file token

    Exit codes: 0 all equal, 1 a standby differs, has not caught up or does not exist.
    """
    with faults_reported():
        show_verification(address, as_json=json, security=security)


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help=f"One of: {', '.join(SUITES)}.")],
    json: Annotated[bool, typer.Option("--json", help="Print the figures as a JSON list.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds: seconds, and less certain.")] = False,
) -> None:
    """Measure this machine: each figure beside the limit it is held against, taken in the same run.

    dense: rounds of a model of ResNet-50's size. peers: the same beside gloo, torch RPC and Ray.
    latency: pulls of 1 KB. kernels: update loops. tcp, tls: the wire alone, against plain sockets.
    memory: what nodes keep resident. splits: who gets which data. safety: replicas, failover,
    checkpoints. lookup, table: the loops of embedding tables. rows: tables in a cluster.

    [bold]Examples[/bold]

    headwater bench dense

    headwater bench kernels --quick --json > kernels.json
    """
    with faults_reported():
        measure(suite, as_json=json, quick=quick)


_Path = Annotated[
    str, typer.Argument(help="A checkpoint such as runs/g000-v000001200, or a directory of them.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


@checkpoint.command(name="list")
def list_checkpoints(
    directory: Annotated[str, typer.Argument(help="Where a training keeps its checkpoints.")],
    json: _Json = False,
) -> None:
    """List the checkpoints of a directory, oldest first; their files are not read.

    [bold]Example[/bold]

    headwater checkpoint list runs/a

    Exit codes: 0 listed, 1 it cannot be read, 2 there is no such directory.
    """
    with faults_reported():
        checkpoints.list_directory(directory, as_json=json)


@checkpoint.command(name="show")
def show_checkpoint(path: _Path, json: _Json = False) -> None:
    """Show what a checkpoint holds: models, tables, rules, counts; of a directory, the newest one.

    [bold]Example[/bold]

    headwater checkpoint show runs/a --json

    Exit codes: 0 shown, 1 its manifest is damaged, 2 no checkpoint, or one of a newer format.
    """
    with faults_reported():
        checkpoints.show(path, as_json=json)


@checkpoint.command(name="verify")
def verify_checkpoint(path: _Path, json: _Json = False) -> None:
    """Read every byte of a checkpoint, or of all in a directory, and name each damaged or missing file.

    [bold]Example[/bold]

    headwater checkpoint verify runs/a

    Exit codes: 0 all sound, 1 something is damaged, 2 no checkpoint, or one of a newer format.
    """
    with faults_reported():
        checkpoints.verify(path, as_json=json)


@checkpoint.command(name="export")
def export_checkpoint(
    path: _Path,
    file: Annotated[str, typer.Argument(help="The file to write; one that exists is replaced.")],
) -> None:
    """Write a checkpoint's values as one safetensors file, tensors under their own names.

    [bold]Example[/bold]

    headwater checkpoint export runs/a model.safetensors

    Then in Python: module.load_state_dict(safetensors.torch.load_file("model.safetensors"))

    Exit codes: 0 written, 1 damaged or not writable, 2 no checkpoint, or one of a newer format.
    """
    with faults_reported():
        checkpoints.export(path, file)
