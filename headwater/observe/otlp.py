"""`--otlp URL`: the metrics to an OpenTelemetry collector, every few seconds. Needs the extra `otlp`.

The table of metrics already has sums since a beginning and histograms with fixed buckets, which is what OTLP
carries, so nothing is counted again here. A collector that cannot be reached is logged once, and tried again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import headwater
from headwater.errors import ConfigurationError, HeadwaterError
from headwater.loggers import logger
from headwater.messages import ClusterStatistics, Histogram
from headwater.observe.metric import Metric, Sample
from headwater.observe.metrics import METRICS
from headwater.spec.words import option

_log = logger("headwater.metrics")

_EVERY_S = 10.0
_ANSWER_S = 5.0


class OtlpExporter:
    """Sends to `url` (`http://host:4318`) until it is closed.

    Args:
        statistics: asks for them; blocks.
        every: seconds between two exports.

    Raises:
        ConfigurationError: not such a URL, or the extra `otlp` is not installed.
    """

    def __init__(
        self, url: str, statistics: Callable[[], ClusterStatistics], *, every: float = _EVERY_S
    ) -> None:
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            raise ConfigurationError(
                f"{option('otlp')}: got {url!r}, expected the URL of a collector, such as "
                "http://127.0.0.1:4318"
            )
        self._library = _library()
        endpoint = url if url.endswith("/v1/metrics") else f"{url.rstrip('/')}/v1/metrics"
        self._exporter = self._library.OTLPMetricExporter(endpoint=endpoint, timeout=_ANSWER_S)
        self._statistics = statistics
        self._every = every
        self._began = time.time_ns()
        self._closing = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="headwater-otlp", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Export once more, and stop; blocks for the collector, for a few seconds at most. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        self._exporter.shutdown()

    def _run(self) -> None:
        while not self._closing.wait(self._every):
            self._export()
        self._export()

    def _export(self) -> None:
        try:
            data = self._data(self._statistics())
        except HeadwaterError as error:
            _log.info("no metrics for the collector: %s", error)
            return
        result = self._exporter.export(data)
        good = result is self._library.MetricExportResult.SUCCESS
        if not good and not self._failed:
            _log.warning("the collector does not take metrics; they are sent again every %g s", self._every)
        self._failed = not good

    def _data(self, statistics: ClusterStatistics) -> Any:
        sdk, now = self._library, time.time_ns()
        metrics = [self._metric(metric, list(metric.read(statistics)), now) for metric in METRICS]
        scope = sdk.InstrumentationScope("headwater", headwater.__version__)
        resource = sdk.Resource({"service.name": "headwater", "service.version": headwater.__version__})
        return sdk.MetricsData([sdk.ResourceMetrics(resource, [sdk.ScopeMetrics(scope, metrics, "")], "")])

    def _metric(self, metric: Metric, samples: Sequence[Sample], now: int) -> Any:
        sdk = self._library
        cumulative = sdk.AggregationTemporality.CUMULATIVE
        points = [self._point(metric, values, value, now) for values, value in samples]
        if metric.kind == "histogram":
            data = sdk.Histogram(points, cumulative)
        elif metric.kind == "counter":
            data = sdk.Sum(points, cumulative, True)
        else:
            data = sdk.Gauge(points)
        return sdk.Metric(metric.exposed_name, metric.help, _UNITS.get(metric.unit, metric.unit), data)

    def _point(self, metric: Metric, values: Sequence[str], value: float | Histogram, now: int) -> Any:
        sdk, labels = self._library, dict(zip(metric.labels, values, strict=True))
        if not isinstance(value, Histogram):
            return sdk.NumberDataPoint(labels, self._began, now, value)
        return sdk.HistogramDataPoint(
            attributes=labels,
            start_time_unix_nano=self._began,
            time_unix_nano=now,
            count=value.count,
            sum=value.sum,
            bucket_counts=value.counts or (0,) * (len(metric.bounds) + 1),
            explicit_bounds=metric.bounds,
            min=None,  # buckets do not know it
            max=None,
        )


_UNITS = {"seconds": "s", "bytes": "By", "info": "1"}
"""As OpenTelemetry writes them (UCUM)."""


def _library() -> Any:
    """The names that are used here, as attributes of one object."""
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import export
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    except ImportError as error:
        raise ConfigurationError(
            "OTLP needs the extra `otlp`: pip install '.[otlp]' in a clone (opentelemetry-sdk and "
            "opentelemetry-exporter-otlp-proto-http)"
        ) from error

    class Library:
        """Of OpenTelemetry."""

        def __getattr__(self, name: str) -> Any:
            return getattr(export, name)

    library = Library()
    library.OTLPMetricExporter = OTLPMetricExporter  # type: ignore[attr-defined]
    library.Resource, library.InstrumentationScope = Resource, InstrumentationScope  # type: ignore[attr-defined]
    return library
