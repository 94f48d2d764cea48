"""docs/metrics.md, made from the table: `python -m headwater.observe.metrics_page > docs/metrics.md`."""

from __future__ import annotations

from headwater.observe.metric import Metric
from headwater.observe.metrics import METRICS

_HEAD = """# Metrics

Every metric of a cluster, as `--metrics HOST:PORT` of `headwater run` and `headwater serve` exports it (and \
`metrics=` of `hw.run` and `hw.Cluster`), as `headwater status --json` prints it, and as OTLP carries it. \
How to scrape them: [observe.md](observe.md). This page is made from the table in the code \
(`python -m headwater.observe.metrics_page`); a test compares the two.

The coordinator has all of them. A server or worker that is scraped by itself has those whose last column \
names it.

"""


def page() -> str:
    """The text of docs/metrics.md."""
    rows = [
        "| metric | type | labels | meaning | also of |",
        "|---|---|---|---|---|",
        *map(_row, METRICS),
    ]
    bounds = [
        f"- `{one.exposed_name}`: {', '.join(f'{bound:g}' for bound in one.bounds)}"
        for one in METRICS
        if one.bounds
    ]
    return f"{_HEAD}{chr(10).join(rows)}\n\nUpper bounds of the buckets:\n\n{chr(10).join(bounds)}\n"


def _row(one: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in one.labels)
    nodes = ", ".join(sorted(one.of - {"cluster"}))
    return f"| `{one.exposed_name}` | {one.kind} | {labels} | {one.help} | {nodes} |"


if __name__ == "__main__":
    print(page(), end="")
