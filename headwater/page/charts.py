"""The charts of a page, as the options that ECharts takes. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from headwater.page.moment import Moment
from headwater.page.poller import CurvePoint
from headwater.spec.stages import STAGES

COLOURS = ("#2f81f7", "#e3893b", "#3fb37f", "#b07cd8", "#d9b13b", "#4fc3d9", "#e06c8a", "#8a97a5")
_STAGE_COLOURS = dict(zip(STAGES, ("#4fc3d9", "#3fb37f", "#d9b13b", "#b07cd8", "#2f81f7"), strict=True))
_TEXT, _LINE = "#8793a1", "#8793a133"
_SECONDS = {"formatter": "{value} s", "color": _TEXT, "hideOverlap": True}
_SHOWN = 300
"""Points that a curve is drawn with at most."""


def _frame(**options: Any) -> dict[str, Any]:
    return {
        "animation": False,
        "color": list(COLOURS),
        "textStyle": {"color": _TEXT, "fontFamily": "inherit"},
        "tooltip": {"trigger": "axis", "confine": True},
        "grid": {"left": 12, "right": 18, "top": 34, "bottom": 8, "containLabel": True},
        "legend": {"top": 0, "left": 0, "textStyle": {"color": _TEXT}, "icon": "roundRect", "itemHeight": 4},
        **options,
    }


def _axis(kind: str, **options: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "axisLine": {"lineStyle": {"color": _LINE}},
        "axisLabel": {"color": _TEXT},
        "splitLine": {"lineStyle": {"color": _LINE}},
        **options,
    }


def pace(points: Sequence[CurvePoint]) -> dict[str, Any]:
    """Steps a second of all workers over the time of the page."""
    data = [[round(one.time, 1), round(one.steps_per_s, 2)] for one in _thinned(points)]
    return _frame(
        xAxis=_axis("value", min="dataMin", max="dataMax", axisLabel=_SECONDS),
        yAxis=_axis("value", min=0),
        series=[_line("steps/s", data, filled=True)],
    )


def metrics(points: Sequence[CurvePoint]) -> dict[str, Any]:
    """What `Worker.log` was told, mean over the ranks."""
    names = sorted({name for one in points for name in one.metrics})
    thin = _thinned(points)
    series = [
        _line(
            name,
            [
                [round(one.time, 1), one.metrics[name]]
                for one in thin
                if name in one.metrics and math.isfinite(one.metrics[name])
            ],
        )
        for name in names
    ]
    return _frame(
        xAxis=_axis("value", min="dataMin", max="dataMax", axisLabel=_SECONDS),
        yAxis=_axis("value", scale=True),
        series=series,
    )


def exposed(moment: Moment) -> dict[str, Any]:
    """Seconds for which the cluster waited for each rank, by stage."""
    ranks = list(reversed(moment.exposed))
    series = [
        {
            "name": stage,
            "type": "bar",
            "stack": "all",
            "barMaxWidth": 28,
            "itemStyle": {"color": _STAGE_COLOURS[stage]},
            "data": [round(seconds[stage], 3) for _, seconds in ranks],
        }
        for stage in STAGES
    ]
    return _frame(
        xAxis=_axis("value", axisLabel=_SECONDS),
        yAxis=_axis("category", data=[f"worker {rank}" for rank, _ in ranks]),
        series=series,
    )


def staleness(moment: Moment) -> dict[str, Any]:
    """How many steps have which staleness."""
    last = max((at for at, (_, count) in enumerate(moment.staleness) if count), default=0)
    shown = moment.staleness[: last + 2]
    return _frame(
        legend={"show": False},
        xAxis=_axis("category", data=[bound for bound, _ in shown]),
        yAxis=_axis("value"),
        series=[{"name": "steps", "type": "bar", "data": [count for _, count in shown], "barMaxWidth": 36}],
    )


def _line(name: str, data: list[list[float]], filled: bool = False) -> dict[str, Any]:
    series: dict[str, Any] = {
        "name": name,
        "type": "line",
        "showSymbol": False,
        "lineStyle": {"width": 2},
        "data": data,
    }
    return series | ({"areaStyle": {"opacity": 0.12}} if filled else {})


def _thinned(points: Sequence[CurvePoint]) -> Sequence[CurvePoint]:
    step = max(1, len(points) // _SHOWN)
    return points[::-1][::step][::-1]
