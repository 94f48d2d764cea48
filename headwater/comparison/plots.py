"""The plots of a report, as plotly's JSON: a figure is its traces and its layout.

Colours are those of Okabe and Ito, which the colour-blind tell apart; modes differ by their dashes too.
Colours of text and lines are the page's, which sets them for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.comparison.comparison import Comparison, RunFigures
from headwater.comparison.curve import Curve, Floats

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#666666")
_DASHES = ("solid", "dash", "dot", "dashdot")
_POINTS = 200
_PARTS = (
    ("computing", "computing", "#009E73"),
    ("planted", "planted delay", "#E69F00"),
    ("waiting", "waiting", "#CC79A7"),
)


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure. `text`: what it shows, in words, for those who do not see it."""

    title: str
    text: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    wide: bool = False


def curves(comparison: Comparison, straggler: str, axis: str, label: str) -> Plot:
    """The metric over `axis` of `Curve`: a line a mode, the mean over seeds, in a band from least to most."""
    target = comparison.experiment.target
    traces: list[dict[str, Any]] = []
    for number, mode in enumerate(comparison.experiment.modes):
        found = band([one.curve for one in comparison.of(mode, straggler)], axis)
        if found is None:
            continue
        x, low, mean, high = found
        colour = COLOURS[number % len(COLOURS)]
        both = [*x, *x[::-1]]
        traces.append(
            {
                "x": both,
                "y": [*high, *low[::-1]],
                "fill": "toself",
                "fillcolor": colour + "33",
                "line": {"width": 0},
                "hoverinfo": "skip",
                "showlegend": False,
                "legendgroup": mode,
            }
        )
        traces.append(
            {
                "x": x,
                "y": mean,
                "name": mode,
                "legendgroup": mode,
                "mode": "lines",
                "line": {"color": colour, "width": 2.5, "dash": _DASHES[number % len(_DASHES)]},
            }
        )
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": target.value, "y1": target.value}
    return Plot(
        f"{target.metric} over {label}",
        f"{target.metric} over {label}: a line for each mode, a band from the least to the most of its seeds",
        traces,
        {
            "xaxis": {"title": {"text": label}},
            "yaxis": {"title": {"text": target.metric}, "type": _scale(traces)},
            "shapes": [line | {"line": {"color": "#888888", "dash": "dot", "width": 1.5}}],
        },
    )


def _scale(traces: list[dict[str, Any]]) -> str:
    """Logarithmic where values are positive and go over more than two decades."""
    values = [value for trace in traces for value in trace["y"] if value is not None]
    return "log" if values and min(values) > 0 and max(values) > 100 * min(values) else "linear"


def band(runs: Sequence[Curve], axis: str) -> tuple[list[float], list[Any], list[Any], list[Any]] | None:
    """x, and the least, mean and most over the runs; where all of them have values. None: nowhere."""
    lines = [(getattr(one, axis), one.value) for one in runs if len(one.value)]
    if not lines:
        return None
    begin = max(float(x[0]) for x, _ in lines)
    end = min(float(x[-1]) for x, _ in lines)
    if not end > begin:
        return None
    grid = np.linspace(begin, end, _POINTS)
    values = np.stack([_held(grid, x, y) for x, y in lines])
    return grid.tolist(), _plain(values.min(0)), _plain(values.mean(0)), _plain(values.max(0))


def _held(grid: Floats, x: Floats, y: Floats) -> Floats:
    """The last value at or before each place."""
    held: Floats = y[np.clip(np.searchsorted(x, grid, side="right") - 1, 0, len(y) - 1)]
    return held


def _plain(values: Floats) -> list[Any]:
    return [float(value) if math.isfinite(value) else None for value in values]


def times(comparison: Comparison, straggler: str) -> Plot:
    """Time to the target: a bar a mode, its interval, and a dot for each seed."""
    target, modes = comparison.experiment.target, comparison.experiment.modes
    found = [comparison.time_to_target(mode, straggler) for mode in modes]
    half = [one.high - one.mean if math.isfinite(one.high) else None for one in found]
    bars = {
        "type": "bar",
        "x": list(modes),
        "y": [one.mean if one.count else None for one in found],
        "error_y": {"type": "data", "array": half, "visible": True},
        "marker": {
            "color": [COLOURS[number % len(COLOURS)] for number in range(len(modes))],
            "opacity": 0.75,
        },
        "showlegend": False,
    }
    dots = [(mode, one.reached) for mode in modes for one in comparison.of(mode, straggler)]
    seeds = {
        "type": "scatter",
        "mode": "markers",
        "x": [mode for mode, reached in dots if reached is not None],
        "y": [reached for _, reached in dots if reached is not None],
        "marker": {"color": "#888888", "size": 8, "symbol": "circle-open", "line": {"width": 2}},
        "name": "each seed",
        "showlegend": False,
    }
    return Plot(
        f"time to {target}",
        f"seconds until {target}, a bar for each mode with its 95 % interval",
        [bars, seeds],
        {"yaxis": {"title": {"text": "seconds"}, "rangemode": "tozero"}},
    )


def ranks(comparison: Comparison, straggler: str) -> Plot:
    """Where each rank's time went: a stacked bar for each rank in each mode, in shares, mean over seeds."""
    labels: list[list[str]] = [[], []]
    shares: dict[str, list[float]] = {name: [] for name, *_ in _PARTS}
    for mode in comparison.experiment.modes:
        runs = comparison.of(mode, straggler)
        for rank in range(comparison.workers):
            seconds = {name: _of_rank(runs, rank, name) for name, *_ in _PARTS}
            total = sum(seconds.values()) or 1.0
            labels[0].append(mode)
            labels[1].append(f"worker {rank}")
            for name, value in seconds.items():
                shares[name].append(100 * value / total)
    traces = [
        {"type": "bar", "x": labels, "y": shares[name], "name": title, "marker": {"color": colour}}
        for name, title, colour in _PARTS
    ]
    return Plot(
        "where each rank's time went",
        "for each worker in each mode the shares of computing, planted delay and waiting for the servers",
        traces,
        {"barmode": "stack", "yaxis": {"title": {"text": "% of its time"}, "range": [0, 100]}},
    )


def _of_rank(runs: Sequence[RunFigures], rank: int, name: str) -> float:
    return float(sum(getattr(one, name) for run in runs for one in run.ranks if one.rank == rank))


def staleness(comparison: Comparison, straggler: str) -> Plot:
    """How many of the applied steps had which staleness, by mode."""
    traces = []
    for number, mode in enumerate(comparison.experiment.modes):
        counts: dict[int, int] = {}
        for run in comparison.of(mode, straggler):
            for commits, steps in run.staleness.items():
                counts[commits] = counts.get(commits, 0) + steps
        total = sum(counts.values()) or 1
        traces.append(
            {
                "type": "bar",
                "x": sorted(counts),
                "y": [100 * counts[commits] / total for commits in sorted(counts)],
                "name": mode,
                "marker": {"color": COLOURS[number % len(COLOURS)]},
            }
        )
    return Plot(
        "staleness",
        "the share of steps with each staleness, in commits, by mode",
        traces,
        {
            "barmode": "group",
            "xaxis": {"title": {"text": "commits"}},
            "yaxis": {"title": {"text": "% of steps"}},
        },
    )


def predicted(comparison: Comparison, straggler: str) -> Plot:
    """The predicted pace for each number of workers, and the measured one beside it."""
    traces: list[dict[str, Any]] = []
    for number, mode in enumerate(comparison.experiment.modes):
        line = [one for one in comparison.predictions if (one.mode, one.straggler) == (mode, straggler)]
        colour = COLOURS[number % len(COLOURS)]
        traces.append(
            {
                "x": [one.workers for one in line],
                "y": [100 * one.relative for one in line],
                "name": mode,
                "mode": "lines+markers",
                "line": {"color": colour, "width": 2.5, "dash": _DASHES[number % len(_DASHES)]},
            }
        )
        if paces := measured_paces(comparison, mode, straggler):
            traces.append(
                {
                    "x": [comparison.workers] * len(paces),
                    "y": [100 * pace for pace in paces],
                    "name": f"{mode}, measured",
                    "showlegend": False,
                    "mode": "markers",
                    "marker": {
                        "color": colour,
                        "size": 11,
                        "symbol": "x-thin",
                        "line": {"width": 3, "color": colour},
                    },
                }
            )
    return Plot(
        "predicted pace",
        "applied steps a second, in % of workers that never wait and are not disturbed, by number of workers",
        traces,
        {
            "xaxis": {"title": {"text": "workers"}, "type": "log"},
            "yaxis": {"title": {"text": "% of the undisturbed pace"}, "rangemode": "tozero"},
        },
        wide=True,
    )


def measured_paces(comparison: Comparison, mode: str, straggler: str) -> list[float]:
    """For each seed, applied steps a second over those of workers that never wait."""
    costs = comparison.costs
    if costs is None:
        return []
    alone = comparison.workers / (costs.step + costs.exchange + costs.update)
    return [one.steps_per_s * (1 - one.late) / alone for one in comparison.of(mode, straggler)]
