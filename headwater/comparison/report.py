"""A comparison as one HTML file, which needs no other file and no network, and as JSON.

The plots are drawn by plotly's own script, which is copied out of the installed package.
"""

from __future__ import annotations

import html
import importlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from headwater.comparison import plots
from headwater.comparison.comparison import Comparison, mean_of, mean_staleness
from headwater.comparison.experiment import check_folder
from headwater.comparison.intervals import Interval
from headwater.comparison.page_text import HEAD, SCRIPT
from headwater.comparison.plots import Plot
from headwater.errors import ConfigurationError


def check_plots() -> Any:
    """The module of plotly that has its script.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        return importlib.import_module("plotly.offline")
    except ImportError as error:
        raise ConfigurationError(
            "a report needs plotly, which is not installed: install Headwater's extra `compare`, as "
            "pip install '.[compare]' in a clone"
        ) from error


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write report.html and results.json into the folder; the path of the first."""
    script = str(check_plots().get_plotlyjs())
    check_folder(folder)
    path = folder / "report.html"
    path.write_text(page(comparison, script), encoding="utf-8")
    (folder / "results.json").write_text(_json(results(comparison)), encoding="utf-8")
    return path


def results(comparison: Comparison) -> dict[str, Any]:
    """Everything but the curves, as plain data; what is not finite is None."""
    return {
        "verdict": comparison.verdict,
        "target": str(comparison.experiment.target),
        "workers": comparison.workers,
        "runs": comparison.rows(),
        "predictions": [
            {name: getattr(one, name) for name in one.__slots__} for one in comparison.predictions
        ],
    }


def page(comparison: Comparison, plotly: str) -> str:
    """The whole file."""
    experiment = comparison.experiment
    drawn: list[Plot] = []
    sections = [_section(comparison, str(one), drawn) for one in experiment.stragglers]
    figures = [{"data": one.data, "layout": one.layout} for one in drawn]
    return "\n".join(
        [
            HEAD,
            "<body><main>",
            "<h1>Comparison of modes</h1>",
            f'<p class="verdict">{_escape(_capital(comparison.verdict))}.</p>',
            f"<p>{_escape(_about(comparison))}</p>",
            *sections,
            "</main>",
            f"<script>{plotly}</script>",
            f"<script>const FIGURES = {_json(figures)};{SCRIPT}</script>",
            "</body></html>",
        ]
    )


def _about(comparison: Comparison) -> str:
    experiment = comparison.experiment
    seeds = "one seed" if experiment.seeds == 1 else f"{experiment.seeds} seeds"
    costs = comparison.costs
    step = f" A step computed for {_seconds(costs.step)} (median, undisturbed)." if costs is not None else ""
    return (
        f"{comparison.workers} workers, {seeds} for each mode and straggler, the same data, seeds and delays "
        f"in every mode. The target is {experiment.target}, by the mean of the last {experiment.smooth} "
        f"logged values. Time counts from the first step's answer.{step} Intervals are Student's, "
        "of 95 %; a difference between modes is called shown where the intervals of all pairs of modes, "
        "which together hold with 95 %, exclude equal times."
    )


def _section(comparison: Comparison, straggler: str, drawn: list[Plot]) -> str:
    own = [
        plots.curves(comparison, straggler, "time", "seconds"),
        plots.curves(comparison, straggler, "samples", "samples"),
        plots.curves(comparison, straggler, "version", "versions"),
        plots.times(comparison, straggler),
        plots.ranks(comparison, straggler),
        plots.staleness(comparison, straggler),
    ]
    predicted = any(one.straggler == straggler for one in comparison.predictions)
    if predicted:
        own.append(plots.predicted(comparison, straggler))
    parts = [f"<section><h2>Straggler: {_escape(straggler)}</h2>", _table(comparison, straggler)]
    parts.append('<div class="plots">')
    for plot in own:
        wide = ' class="full"' if plot.wide else ""
        parts.append(
            f'<figure{wide}><figcaption>{_escape(plot.title)}</figcaption><div class="plot" role="img" '
            f'aria-label="{_escape(plot.text)}" id="plot-{len(drawn)}"></div></figure>'
        )
        drawn.append(plot)
    parts.append("</div>")
    if predicted:
        parts.append(_predictions(comparison, straggler))
    return "\n".join([*parts, "</section>"])


def _table(comparison: Comparison, straggler: str) -> str:
    metric = comparison.experiment.target.metric
    rows = []
    for mode in comparison.experiment.modes:
        runs = comparison.of(mode, straggler)
        missed = sum(one.reached is None for one in runs)
        when = _interval(comparison.time_to_target(mode, straggler))
        pace = mean_of([one.samples_per_s for one in runs]) or mean_of([one.steps_per_s for one in runs])
        rows.append(
            (
                mode,
                f"{when}{f'; not in {missed} of {len(runs)}' if missed else ''}",
                f"{pace:,.1f}",
                f"{mean_of([one.waiting for one in runs]):.0%}",
                f"{mean_of([mean_staleness(one) for one in runs]):.2f}",
                f"{mean_of([one.late for one in runs]):.1%}",
                f"{mean_of([one.at_equal_samples for one in runs]):.4g}",
                f"{mean_of([one.last for one in runs]):.4g}",
            )
        )
    unit = "samples/s" if any(one.samples for one in comparison.figures) else "steps/s"
    headings = ("mode", "seconds to target", unit, "waiting", "staleness", "late")
    return _html_table(
        f"Means over the seeds, stragglers: {straggler}",
        (*headings, f"{metric} at equal samples", f"{metric} at the end"),
        rows,
    )


def _predictions(comparison: Comparison, straggler: str) -> str:
    rows = [
        (
            one.mode,
            f"{one.workers:,}",
            f"{one.steps_per_s:,.1f}",
            f"{one.relative:.1%}",
            f"{one.waiting:.0%}",
            f"{one.staleness:.1f}",
            f"{one.late:.1%}",
        )
        for one in comparison.predictions
        if one.straggler == straggler
    ]
    headings = ("mode", "workers", "steps/s", "of the undisturbed pace", "waiting", "staleness", "late")
    return (
        "<p>Predicted in virtual time with the sequencer that clusters run, from the steps and exchanges "
        "measured here; every worker has as much of a processor as it had here. Crosses are measured.</p>"
        + _html_table(f"Predicted, stragglers: {straggler}", headings, rows)
    )


def _html_table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_escape(one)}</th>' for one in headings)
    body = "".join(
        f'<tr><th scope="row">{_escape(row[0])}</th>'
        + "".join(f"<td>{_escape(one)}</td>" for one in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><caption>{_escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _interval(found: Interval) -> str:
    if not found.count:
        return "–"
    if not math.isfinite(found.high):
        return f"{found.mean:.3g} (no interval)"
    return f"{found.mean:.3g} ({max(0.0, found.low):.3g} to {found.high:.3g})"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _json(value: Any) -> str:
    """Within a script: what ends one is escaped, and what is not finite is null."""
    return json.dumps(_finite(value), ensure_ascii=False).replace("</", "<\\/")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
