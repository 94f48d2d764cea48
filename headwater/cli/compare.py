"""`headwater compare`: a script in several modes, under several stragglers, with several seeds."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand

from headwater.cli.options import command, configuration
from headwater.cli.script import load_function
from headwater.comparison import compare as compare_modes
from headwater.comparison.measure import NO_OPTION
from headwater.comparison.text import lines
from headwater.spec.cluster import ClusterConfig
from headwater.worker.plan import SplitKind

app = typer.Typer(add_completion=False, rich_markup_mode="rich")

_MANY = ("--modes", "--stragglers", "--simulate")


class ManyValues(TyperCommand):
    """Options that take every word up to the next option: `--modes sync ssp:3 async`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As if the option stood before each of its words."""
        return super().parse_args(ctx, repeated(args))


def repeated(words: list[str]) -> list[str]:
    """The same command line with an option of several words repeated before each of them."""
    found: list[str] = []
    option: str | None = None
    for word in words:
        if word.startswith("--"):
            option = word if word in _MANY else None
            if option is None:
                found.append(word)
        elif option is not None:
            found += [option, word]
        else:
            found.append(word)
    return found


@command(app, config=configuration(without=NO_OPTION))
def compare(
    script: Annotated[
        str,
        typer.Argument(
            metavar="SCRIPT[:FUNCTION]", help="A Python file; FUNCTION(worker) is `train` unless named."
        ),
    ],
    config: ClusterConfig,
    until: Annotated[
        str,
        typer.Option(metavar="METRIC=VALUE", help="The target: loss=0.35 (at most), or accuracy>=0.9."),
    ],
    modes: Annotated[
        list[str] | None, typer.Option(metavar="MODE...", help="As --sync of `headwater run`; several.")
    ] = None,
    stragglers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND...",
            help="none, slow:rank=0,factor=3, lognormal:sigma=1,median=0.5, pareto:shape=2, "
            "pause:rank=0,step=20,seconds=2, death:rank=1,step=20, return:rank=1,step=20,after=5; several.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each mode under each straggler.")] = 3,
    simulate: Annotated[
        list[int] | None,
        typer.Option(metavar="WORKERS...", help="Numbers of workers to predict, such as 4 16 64 1000."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where report.html and results.json go.")] = Path(
        "compare"
    ),
    smooth: Annotated[
        int, typer.Option(min=1, help="How many logged values are averaged before they are compared.")
    ] = 10,
    step_s: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long an undisturbed step takes; without: measured before."),
    ] = None,
    engine: Annotated[str, typer.Option(help="local (processes) or inline (threads).")] = "local",
    splits: Annotated[
        str,
        typer.Option(
            help="static: each worker reads a part of its own in every mode. dynamic: modes without rounds "
            "lease splits, as they do by default, and a slow worker reads less."
        ),
    ] = "static",
) -> None:
    """Compare modes on a script of yours: the same data order, seeds and delays in every mode.

    The script logs the metric: worker.log(loss=…). Delays are planted by the worker; the script needs no
    change. SCRIPT stands before options that take several words.

    [bold]Examples[/bold]

    headwater compare train.py --modes sync ssp:3 async --until loss=0.35 --seeds 3 --out compare

    headwater compare train.py --stragglers none slow:rank=0,factor=3 --until accuracy>=0.9 --simulate 16 256

    Exit codes: 0 done, 1 a training or a cluster failed, 2 a wrong argument, 130 interrupted.
    """
    train = load_function(script)
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    compared = compare_modes(
        train,
        until=until,
        modes=modes or ("sync", "ssp:3", "async"),
        stragglers=stragglers or ("none",),
        seeds=seeds,
        simulate=simulate or (),
        out=out,
        smooth=smooth,
        step_s=step_s,
        engine=engine,
        splits=cast(SplitKind, splits),
        progress=_say,
        output=_say,
        **{name: value for name, value in options.items() if name not in NO_OPTION},
    )
    print()
    for line in lines(compared):
        print(line)
    for sentence in compared.verdict.split("; "):
        print(sentence)
    print(f"report: {out / 'report.html'}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


app.registered_commands[0].cls = ManyValues
