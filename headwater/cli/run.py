"""`headwater run`: load the script, train, and show how it goes.

What `train` prints and the summary go to standard output; how it goes, and what is logged, to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from headwater.cli.engines import chosen_engine
from headwater.cli.log_lines import LogStyle
from headwater.cli.options import LogTo, Metrics, Otlp, command, configuration, listening, log_style
from headwater.cli.page_process import PageProcess
from headwater.cli.script import load_function, script_path
from headwater.cli.summary import summarize
from headwater.driver import RunResult
from headwater.driver import run as train_with
from headwater.engines import RayEngine
from headwater.engines.early import begun
from headwater.observe.display import Display, LiveDisplay, PlainDisplay
from headwater.observe.sinks import sink_of
from headwater.spec.cluster import ClusterConfig
from headwater.wire.endpoint import Endpoint
from headwater.worker import Worker

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@command(app, config=configuration(), reach=listening(), log=log_style())
def run(
    script: Annotated[
        str,
        typer.Argument(
            metavar="SCRIPT[:FUNCTION]",
            envvar="HEADWATER_SCRIPT",
            help="A Python file; FUNCTION(worker) is `train` unless named.",
        ),
    ],
    config: ClusterConfig,
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
    restarts: Annotated[
        int, typer.Option(min=0, help="How often the worker of one rank may die and be started again.")
    ] = 3,
    transport: Annotated[
        str, typer.Option(help="unix (shared memory) or tcp (as between machines).")
    ] = "unix",
    metrics: Metrics = None,
    otlp: Otlp = None,
    log_to: LogTo = None,
    trace: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="What all nodes do, from beginning to end; Perfetto opens it."),
    ] = None,
    page: Annotated[
        bool, typer.Option("--page", help="Show it in a web page too: prints its address (extra `page`).")
    ] = False,
    reach: Endpoint = Endpoint(),  # noqa: B008 - made from its options
    log: LogStyle = LogStyle(),  # noqa: B008 - made from its options
) -> None:
    """Run a training function in every worker, against servers on this machine or in a Ray cluster.

    The script is loaded without its `if __name__ == "__main__":` block, and its folder is importable.

    [bold]Examples[/bold]

    headwater run train.py --workers 4 --servers 2 --sync ssp:3

    headwater run train.py:fit --set epochs=3 --set lr=0.05 --set 'layers=[64,32]'

    headwater run train.py --replicas 1 --checkpoint runs/a --every 1000steps --resume

    headwater run train.py --engine ray --ray-address 10.0.0.1:6379 --worker-resource num_cpus=4

    headwater run train.py --bind 0.0.0.0:7000 --token-file token

    Exit codes: 0 done, 1 the training or the cluster failed, 2 a wrong argument, 130 interrupted.
    """
    chosen = chosen_engine(engine, ray_address, working_dir, server_resource or (), worker_resource or ())
    result = train_script(
        script,
        config,
        chosen,
        restarts=restarts,
        transport=transport,
        metrics=metrics,
        otlp=otlp,
        trace=trace,
        log_to=list(map(sink_of, log_to or ())),
        reach=reach,
        log=log,
        page=page,
    )
    for line in summarize(result):
        print(line)


def train_script(
    script: str,
    config: ClusterConfig,
    engine: str | RayEngine,
    *,
    reach: Endpoint,
    log: LogStyle = LogStyle(),  # noqa: B008 - it is immutable
    page: bool = False,
    **options: Any,
) -> RunResult:
    """Run the script's function and show how it goes; blocks until it is over.

    `page`: a web page is served meanwhile. `options`: arguments of `headwater.run` beside the cluster's
    configuration.

    Raises:
        HeadwaterError: as `headwater.run`, or the script cannot be loaded.
    """
    path, servers = script_path(script), config.servers * (1 + config.replicas)
    with contextlib.ExitStack() as stack:
        if engine == "local" and path.is_file():
            stack.enter_context(begun(path, workers=config.workers, servers=servers))
        return _train(load_function(script), script, config, engine, reach, log, page, options)


def _train(
    train: Callable[[Worker], Any],
    script: str,
    config: ClusterConfig,
    engine: str | RayEngine,
    reach: Endpoint,
    log: LogStyle,
    page: bool,
    options: Mapping[str, Any],
) -> RunResult:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a terminal lacks is escaped
            stream.reconfigure(errors="backslashreplace")
    console = Console(highlight=False, stderr=True)
    kind = LiveDisplay if console.is_terminal else PlainDisplay
    display: Display = kind(console, workers=config.workers, script=script)
    beside = PageProcess(reach.security, display.log) if page else contextlib.nullcontext()

    def started(address: str) -> None:
        display.started(address)
        if isinstance(beside, PageProcess):
            beside.begin(address)

    with display, log.begin("coordinator", "warning", display.log), beside:
        result = train_with(
            train,
            **{field.name: getattr(config, field.name) for field in dataclasses.fields(config)},
            engine=engine,
            bind=reach.bind,
            advertise=reach.advertise,
            token=reach.security.token,
            tls=reach.security.tls,
            insecure=reach.security.insecure,
            output=display.print,
            started=started,
            watch=display.show,
            progress=False,
            **options,
        )
        display.show(result.statistics)
    return result
