"""The rules of Prometheus for names, as far as a table of metrics can break them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from headwater.observe.metric import Metric

_RESERVED = ("le", "quantile", "job", "instance")
_UNITS = (
    "",
    "seconds",
    "bytes",
    "info",
    "commits",
    "entries",
    "samples",
    "servers",
    "rows",
    "ids",
    "elements",
)


def faults_of(metrics: Sequence[Metric]) -> list[str]:
    """What breaks the rules of Prometheus for names (and our own: unique, one sentence of help)."""
    faults = [f"{name} stands twice" for name in _twice([one.exposed_name for one in metrics])]
    for one in metrics:
        rules = {
            "begins with headwater_ and is lower case": re.fullmatch(r"headwater(_[a-z0-9]+)+", one.name),
            "a unit is a base unit": one.unit in _UNITS,
            "ends with its unit": not one.unit or one.name.endswith(f"_{one.unit}"),
            "_total is a counter's alone": not one.name.endswith("_total"),
            "no _count, _sum, _bucket": not re.search(r"_(count|sum|bucket|created)$", one.name),
            "no kind in the name": not re.search(r"counter|gauge|histogram", one.name),
            "help is one sentence": re.fullmatch(r"[A-Z][^\n]*\.", one.help),
            "labels are lower case": all(re.fullmatch(r"[a-z][a-z0-9_]*", label) for label in one.labels),
            "no reserved label": not set(one.labels) & set(_RESERVED),
            "a histogram has bounds that grow": (one.kind == "histogram") == bool(one.bounds)
            and list(one.bounds) == sorted(set(one.bounds)),
        }
        faults += [f"{one.name}: {rule}" for rule, holds in rules.items() if not holds]
    return faults


def _twice(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})
