"""`--metrics HOST:PORT`: the metrics over HTTP, as Prometheus and OpenMetrics scrape them.

A scrape asks the node for its statistics; nothing is kept here. On loopback anybody of this machine may
scrape. Beyond it a token (`Authorization: Bearer …`) or TLS is demanded, as of every listener of a cluster;
where the cluster has a token, also on loopback. Needs the extra `metrics`.
"""

from __future__ import annotations

import hmac
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

from headwater.errors import ConfigurationError, HeadwaterError
from headwater.loggers import logger
from headwater.messages import ClusterStatistics, Histogram
from headwater.observe.http_server import REQUEST_S, BoundedHTTPServer
from headwater.observe.metric import Metric, Node
from headwater.observe.metrics import METRICS
from headwater.spec.words import option
from headwater.wire.addresses import split_place
from headwater.wire.encryption import load
from headwater.wire.security import PLAIN, Security

_log = logger("headwater.metrics")


class MetricsServer:
    """Serves `/metrics` until it is closed.

    Args:
        place: "HOST:PORT" to listen on; port 0 takes a free one.
        statistics: asks for them; blocks. Called in threads of this server, one at a time.
        node: which metrics there are.
        security: whom it admits.

    Attributes:
        url: where it is scraped.

    Raises:
        ConfigurationError: not a place, one where strangers could connect, a port in use, or the extra
            `metrics` is not installed.
    """

    def __init__(
        self,
        place: str,
        statistics: Callable[[], ClusterStatistics],
        *,
        node: Node = "cluster",
        security: Security = PLAIN,
    ) -> None:
        library = _library()
        host, port = _split(place)
        security.check_bind(host)
        registry = library.CollectorRegistry(auto_describe=False)
        registry.register(_Collector(library, statistics, node))
        context = None if security.tls is None else load(security.tls, listening=True).context
        try:
            self._server = _Server(host, port, context, security.token, registry, library)
        except OSError as error:
            raise ConfigurationError(
                f"{option('metrics', place)}: cannot listen there: {error}; pass another port, or 0 for a "
                "free one"
            ) from error
        bound = self._server.server_address[1]
        named = f"[{host}]" if ":" in host else host
        self.url = f"{'http' if context is None else 'https'}://{named}:{bound}/metrics"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="headwater-metrics", daemon=True
        )
        self._thread.start()
        _log.info("metrics: %s", self.url)

    def close(self) -> None:
        """Stop listening; idempotent."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _library() -> Any:
    try:
        import prometheus_client
        import prometheus_client.core
    except ImportError as error:
        raise ConfigurationError(
            "metrics need the extra `metrics`: pip install '.[metrics]' in a clone (prometheus-client)"
        ) from error
    return prometheus_client


def _split(place: object) -> tuple[str, int]:
    """Host and port; the port must be said."""
    if isinstance(place, str):
        host, colon, port = place.rpartition(":")
        if colon and host and port.isdigit():
            return split_place(f"{host}:{port}")
    raise ConfigurationError(
        f"{option('metrics')}: got {place!r}, expected HOST:PORT, such as 127.0.0.1:9464"
    )


class _Collector:
    """Makes metric families of the newest statistics."""

    def __init__(self, library: Any, statistics: Callable[[], ClusterStatistics], node: Node) -> None:
        self._families = library.core
        self._bound = library.utils.floatToGoString
        self._statistics = statistics
        self._metrics = [metric for metric in METRICS if node in metric.of]
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Any]:
        """All families."""
        with self._lock:
            statistics = self._statistics()
        for metric in self._metrics:
            yield self._family(metric, statistics)

    def _family(self, metric: Metric, statistics: ClusterStatistics) -> Any:
        families, labels = self._families, list(metric.labels)
        if metric.kind == "histogram":
            family = families.HistogramMetricFamily(metric.name, metric.help, labels=labels)
        elif metric.kind == "counter":
            family = families.CounterMetricFamily(metric.name, metric.help, labels=labels)
        else:
            family = families.GaugeMetricFamily(metric.name, metric.help, labels=labels)
        for values, value in metric.read(statistics):
            if isinstance(value, Histogram):
                family.add_metric(list(values), self._buckets(metric, value), sum_value=value.sum)
            else:
                family.add_metric(list(values), value)
        return family

    def _buckets(self, metric: Metric, value: Histogram) -> list[tuple[str, float]]:
        """Cumulative."""
        counts = value.counts or (0,) * (len(metric.bounds) + 1)
        bounds = [*map(self._bound, metric.bounds), "+Inf"]
        reached, buckets = 0, []
        for bound, count in zip(bounds, counts, strict=True):
            reached += count
            buckets.append((bound, float(reached)))
        return buckets


class _Server(BoundedHTTPServer):
    """Knows whom it admits, and what it tells."""

    def __init__(
        self,
        host: str,
        port: int,
        context: ssl.SSLContext | None,
        token: str | None,
        registry: Any,
        library: Any,
    ) -> None:
        self.token, self.registry, self.library = token, registry, library
        self._context = context
        super().__init__(host, port, _Handler)

    def secured(self, request: socket.socket) -> socket.socket:
        """With TLS after its handshake."""
        return request if self._context is None else self._context.wrap_socket(request, server_side=True)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET /metrics."""

    server: _Server
    timeout = REQUEST_S
    server_version, sys_version = "headwater", ""

    def do_GET(self) -> None:
        """Answer a scrape."""
        token = self.server.token
        said = self.headers.get("Authorization", "")
        if token is not None and not hmac.compare_digest(said.encode(), f"Bearer {token}".encode()):
            self._say(401, "the cluster's token is needed: Authorization: Bearer TOKEN")
        elif self.path.partition("?")[0] not in ("/", "/metrics"):
            self._say(404, "there is /metrics")
        else:
            self._scrape()

    def _scrape(self) -> None:
        encode, kind = self.server.library.exposition.choose_encoder(self.headers.get("Accept", ""))
        try:
            body = encode(self.server.registry)
        except HeadwaterError as error:
            self._say(503, str(error))
            return
        self._answer(200, body, kind)

    def _say(self, code: int, text: str) -> None:
        self._answer(code, f"{text}\n".encode(), "text/plain; charset=utf-8")

    def _answer(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        if code == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Scrapes are not worth a line."""
