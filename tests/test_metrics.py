"""The table of metrics: closed forms, names, and everything that is made from it."""

import http.client
import json
import re
import socket
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import numpy as np
import pytest
from connections import tls
from desks import Desk
from waiting import wait_until

import headwater as hw
from headwater.errors import ConfigurationError
from headwater.messages import (
    Ask,
    CaughtUp,
    ClusterStatistics,
    Histogram,
    Progress,
    ServerStatistics,
    Traffic,
    WorkerTotals,
)
from headwater.observe import metrics_page
from headwater.observe.metric import Metric
from headwater.observe.metric_names import faults_of
from headwater.observe.metrics import METRICS, as_data, statistics_of_server, statistics_of_worker
from headwater.observe.prometheus import MetricsServer
from headwater.wire.security import Security

pytest.importorskip("prometheus_client", reason="needs the extra `metrics`")
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parent.parent
TOKEN = "a secret that nobody guesses"


def get(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        return answer.read().decode()


def scraped(url):
    """(name, labels as a set of pairs) → value."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(get(url))
        for sample in family.samples
    }


def value(samples, name, /, **labels):
    return samples[name, frozenset(labels.items())]


def steps_of(worker, count):
    """Staleness of each step."""
    model = worker.model("m", {"x": np.zeros(8, np.float32)}, hw.SGD(lr=0.1))
    staleness = []
    for i in range(count):
        model.push({"x": np.ones(8, np.float32)})
        staleness.append(worker.step().staleness)
        worker.log(loss=i)
    return staleness


def trained(workers, count, **options):
    """Samples that are scraped once all workers have left, and the staleness of all their steps."""
    staleness = []

    def train(worker):
        with worker:
            staleness.extend(steps_of(worker, count))

    with hw.Cluster(workers=workers, metrics="127.0.0.1:0", **options) as cluster:
        threads = [threading.Thread(target=train, args=(cluster.worker(),)) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return scraped(cluster.metrics_url), staleness


def test_two_workers_of_a_hundred_synchronous_steps_make_200_steps_and_100_commits():
    samples, _ = trained(2, 100)
    assert value(samples, "headwater_steps_total", result="applied") == 200
    assert value(samples, "headwater_steps_total", result="late") == 0
    assert value(samples, "headwater_commits_total") == value(samples, "headwater_version") == 100
    assert value(samples, "headwater_staleness_commits_count") == 200
    assert value(samples, "headwater_staleness_commits_sum") == 0
    assert value(samples, "headwater_staleness_commits_bucket", le="0.0") == 200
    assert value(samples, "headwater_model_updates_total", model="m") == 100
    for stage in ("data", "compute", "push", "wait", "pull"):
        assert value(samples, "headwater_stage_seconds_count", stage=stage) == 200


@pytest.mark.parametrize("mode", ["async", "ssp:2"])
def test_the_staleness_histogram_adds_up_to_the_staleness_of_all_steps(mode):
    samples, staleness = trained(3, 30, sync=mode)
    assert value(samples, "headwater_staleness_commits_sum") == sum(staleness)
    assert value(samples, "headwater_staleness_commits_count") == len(staleness) == 90
    counts = Counter(staleness)
    assert value(samples, "headwater_staleness_commits_bucket", le="1.0") == counts[0] + counts[1]
    assert value(samples, "headwater_steps_total", result="applied") == 90


def declared(*workers):
    """Each worker's model, which takes all of them at once."""
    models = {}

    def declare(worker):
        params = {"x": np.zeros(2, np.float32)}
        models[worker.rank] = worker.model("m", params, hw.SGD(lr=0.1), nonfinite="skip")

    threads = [threading.Thread(target=declare, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [models[worker.rank] for worker in workers]


@pytest.mark.parametrize(("mode", "late"), [("grace=0", "late"), ("grace=0,late=carry", "carried")])
def test_steps_are_counted_by_what_became_of_them(mode, late):
    with (
        hw.Cluster(workers=2, sync=f"sync:quorum=1,{mode}") as cluster,
        cluster.worker() as first,
        cluster.worker() as second,
    ):
        one, other = declared(first, second)
        one.push({"x": np.ones(2, np.float32)})
        first.step()  # a round by itself
        other.push({"x": np.ones(2, np.float32)})
        second.step()  # too late for it
        one.push({"x": np.full(2, np.nan, np.float32)})
        first.step()  # an empty turn
        first.leave()
        second.barrier()
        expected = {"applied": 1, "late": 0, "carried": 0, "skipped": 1} | {late: 1}

        def found():
            rows = as_data(cluster.statistics())["headwater_steps_total"]
            return {row["labels"]["result"]: row["value"] for row in rows}

        wait_until(lambda: found() == expected, why=found)


def test_one_kill_is_one_failover():
    desk = Desk(replicas=1)
    server, standby = desk.running("standby")
    server.say(CaughtUp(standby.member.id))
    desk.deaf.add(standby.member.id)
    server.hangs_up()
    assert desk.machine.members.tally.members().failovers == 0, "the heir does not know yet"
    desk.passes(1.5)
    desk.passes(1.0)  # it is left behind, not waited for
    counts = desk.machine.members.tally.members()
    assert (counts.failovers, counts.lost, counts.joined) == (1, {"server": 1}, {"server": 1, "standby": 1})
    assert 1.5 < counts.failover_seconds < 2.6


def test_counts_of_a_rank_are_those_of_all_its_incarnations():
    desk = Desk()
    _, worker = desk.running("worker")

    def say(node, steps):
        told = Progress(node.member.id, 0, steps, steps, 2 * steps, 0, 1.0, 2.0, {1: steps}, {})
        more = {"results": {"applied": steps}, "stages": {"push": Histogram((steps, 0), 1.0)}}
        node.say(Progress(**{name: getattr(told, name) for name in told.__struct_fields__} | more))

    say(worker, 5)
    say(worker, 7)
    worker.hangs_up()
    again = desk.joins("worker", 0)
    say(again, 3)
    (totals,) = desk.connect().say(Ask()).last(ClusterStatistics).totals
    assert (totals.steps, totals.samples, totals.incarnations) == ({"applied": 10}, 20, 2)
    assert (totals.staleness.sum, totals.staleness.count) == (10, 10)
    assert totals.stages["push"] == Histogram((10, 0), 2.0)


# ── names ───────────────────────────────────────────────────────────────────────────────────────


def test_names_follow_the_rules_of_prometheus():
    assert faults_of(METRICS) == []


GOOD = Metric("headwater_x_seconds", "gauge", "seconds", "What it is.", lambda s: ())


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"name": "x_seconds"}, "begins with headwater_"),
        ({"name": "headwater_X_seconds"}, "lower case"),
        ({"unit": "ms", "name": "headwater_x_ms"}, "base unit"),
        ({"unit": "bytes"}, "ends with its unit"),
        ({"name": "headwater_x_total", "unit": ""}, "_total"),
        ({"name": "headwater_gauge_seconds"}, "no kind"),
        ({"name": "headwater_x_count", "unit": ""}, "no _count"),
        ({"help": "no sentence"}, "one sentence"),
        ({"labels": ("Rank",)}, "labels are lower case"),
        ({"labels": ("le",)}, "reserved"),
        ({"bounds": (1.0,)}, "bounds"),
    ],
)
def test_the_linter_finds_what_breaks_them(changed, rule):
    assert faults_of([GOOD]) == []
    (fault,) = faults_of([replace(GOOD, **changed)])
    assert rule in fault


def test_the_linter_finds_a_name_that_stands_twice():
    assert faults_of([GOOD, GOOD]) == ["headwater_x_seconds stands twice"]


# ── what is made from the table ─────────────────────────────────────────────────────────────────


def test_the_page_of_metrics_is_the_one_that_the_table_makes():
    assert (ROOT / "docs" / "metrics.md").read_text() == metrics_page.page(), (
        "run: python -m headwater.observe.metrics_page > docs/metrics.md"
    )


def _series():
    """Every name that a scrape may have."""
    for metric in METRICS:
        yield metric.exposed_name
        if metric.kind == "histogram":
            yield from (f"{metric.name}_{part}" for part in ("bucket", "sum", "count"))


def _labels(name):
    for metric in METRICS:
        if name.startswith(metric.name) and name in {metric.exposed_name, f"{metric.name}_bucket"}:
            return {*metric.labels, "le", "job", "instance"}
    return {"job", "instance", "stage"}


def check(expression):
    """A PromQL expression names only metrics and labels that there are."""
    names = set(re.findall(r"\bheadwater_\w+", expression))
    assert names, expression
    assert names <= set(_series()), names - set(_series())
    for name, matchers in re.findall(r"(headwater_\w+)\{([^}]*)\}", expression):
        used = set(re.findall(r"(\w+)\s*=", matchers))
        assert used <= _labels(name), (name, used)
    grouped = {
        label for text in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for label in text.split(", ")
    }
    known = set().union(*map(_labels, names))
    assert grouped <= known, (expression, grouped - known)
    assert expression.count("(") == expression.count(")")


def test_the_dashboard_shows_only_metrics_that_there_are():
    board = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    assert board["uid"] == "headwater"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) > 10
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]}
    assert len(places) == len(ids), "no panel lies on another"
    for panel in board["panels"]:
        assert panel["targets"]
        for target in panel["targets"]:
            check(target["expr"].replace('{job=~"$job"}', ""))


def test_alert_rules_name_only_metrics_that_there_are():
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    (group,) = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text())["groups"]
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"]) > 8
    for rule in group["rules"]:
        check(rule["expr"])
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))


def test_a_wrong_name_on_the_dashboard_would_be_found():
    with pytest.raises(AssertionError):
        check("rate(headwater_step_total[1m])")
    with pytest.raises(AssertionError):
        check('headwater_steps_total{outcome="applied"}')


def test_data_and_scrapes_have_the_same_values():
    statistics = ClusterStatistics(
        3, 1, 7, 2, "sync", (), (), (), (Progress(1, 0, 5, 7, 0, 0, 0.5, 1.0, {}, {"loss": 0.25}),)
    )
    data = as_data(statistics)
    assert data["headwater_logged"] == [{"labels": {"rank": "0", "name": "loss"}, "value": 0.25}]
    server = MetricsServer("127.0.0.1:0", lambda: statistics)
    try:
        samples = scraped(server.url)
    finally:
        server.close()
    for name, rows in data.items():
        for row in rows:
            if "value" in row:
                assert value(samples, name, **row["labels"]) == row["value"]
    assert set(data) == {metric.exposed_name for metric in METRICS}


# ── bad input ───────────────────────────────────────────────────────────────────────────────────


def nothing():
    return ClusterStatistics(0, 0, 0, 1, "sync", (), (), (), ())


@pytest.mark.parametrize(
    "place", ["9464", ":9464", "localhost", "localhost:http", "", 9464, "localhost:99999"]
)
def test_what_is_no_place_is_refused(place):
    with pytest.raises(ConfigurationError, match="expected"):
        MetricsServer(place, nothing)


def test_a_port_in_use_is_told():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigurationError, match=r"cannot listen there.*in use.*pass another port"):
            hw.Cluster(workers=1, metrics=place)


def test_beyond_loopback_a_token_is_demanded_and_asked_for():
    with pytest.raises(ConfigurationError, match="not authenticated"):
        MetricsServer("0.0.0.0:0", nothing)
    server = MetricsServer("0.0.0.0:0", nothing, security=Security(TOKEN))
    url = server.url.replace("0.0.0.0", "127.0.0.1")
    try:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(url, **headers)
            assert refused.value.code == 401
            assert "headwater_" not in refused.value.read().decode()
        assert "headwater_version 0.0" in get(url, Authorization=f"Bearer {TOKEN}")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(url.replace("/metrics", "/secrets"), Authorization=f"Bearer {TOKEN}")
    finally:
        server.close()


def test_with_tls_a_scraper_shows_a_certificate_of_the_clusters_authority():
    server = MetricsServer("127.0.0.1:0", nothing, security=Security(tls=tls()))
    known = ssl.create_default_context(cafile=tls().ca)
    known.load_cert_chain(tls().certificate, tls().key)
    stranger = ssl.create_default_context(cafile=tls().ca)
    stranger.maximum_version = ssl.TLSVersion.TLSv1_2  # which refuses while shaking hands, not afterwards
    try:
        assert server.url.startswith("https://")
        with urllib.request.urlopen(server.url, timeout=30, context=known) as answer:
            assert "headwater_version 0.0" in answer.read().decode()
        with pytest.raises(urllib.error.URLError, match="SSL"):
            urllib.request.urlopen(server.url, timeout=30, context=stranger)
        with pytest.raises((urllib.error.URLError, ConnectionError, http.client.HTTPException)):
            get(server.url.replace("https", "http"))
    finally:
        server.close()


def test_a_cluster_that_does_not_answer_is_503_and_the_next_scrape_is_served():
    answers = [hw.errors.ConnectionLostError("this coordinator has ended"), None]

    def statistics():
        if (answer := answers.pop(0)) is not None:
            raise answer
        return nothing()

    server = MetricsServer("127.0.0.1:0", statistics)
    try:
        with pytest.raises(urllib.error.HTTPError, match="503") as away:
            get(server.url)
        assert away.value.read() == b"this coordinator has ended\n"
        assert "headwater_version" in get(server.url)
        with socket.create_connection(server.url.split("/")[2].split(":")) as rude:
            rude.sendall(b"\x16\x03\x01 this is no request\r\n\r\n")
            assert rude.recv(1 << 16)
    finally:
        server.close()


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigurationError, match=r"pip install '\.\[metrics\]'"):
        hw.Cluster(workers=1, metrics="127.0.0.1:0")


def test_ten_thousand_names_of_metrics_are_bounded_and_counted():
    with hw.Cluster(workers=1) as cluster, cluster.worker() as worker:
        worker.log(**{f"name_{i}": float(i) for i in range(10_000)}, **{"x" * 101: 1.0})
        worker.log(name_0=float("nan"), name_1=float("-inf"))
        worker.step()
        own = worker.statistics()
        assert (len(own.metrics), own.dropped) == (100, 9_901)
        wait_until(lambda: as_data(cluster.statistics())["headwater_logged"])  # the coordinator has been told
        data = as_data(cluster.statistics())
    assert len(data["headwater_logged"]) == 100
    assert data["headwater_logged_dropped"] == [{"labels": {}, "value": 9_901}]


def test_series_of_logged_metrics_are_bounded_over_all_ranks():
    reports = tuple(
        Progress(rank, rank, 1, 1, 0, 0, 0.0, 0.0, {}, {f"name_{i}": 1.0 for i in range(100)})
        for rank in range(30)
    )
    data = as_data(ClusterStatistics(0, 0, 0, 30, "sync", (), (), (), reports))
    assert len(data["headwater_logged"]) == 2_000
    assert data["headwater_logged_dropped"][0]["value"] == 1_000


# ── servers and workers by themselves, and collectors ───────────────────────────────────────────


def test_traffic_is_counted_by_node_and_transport():
    with hw.Cluster(workers=1, transport="tcp") as cluster, cluster.worker() as worker:
        steps_of(worker, 4)
        data = as_data(cluster.statistics())
    received = {
        (row["labels"]["node"], row["labels"]["transport"]): row["value"]
        for row in data["headwater_received_bytes_total"]
    }
    assert received["server 0", "tcp"] > 4 * 32, "four gradients of eight floats, and their headers"
    assert received["coordinator", "unix"] > 100
    nodes = {row["labels"]["node"]: row["value"] for row in data["headwater_connections"]}
    assert nodes["server 0"] >= 2, "its worker, and the coordinator"


def test_a_server_by_itself_exports_what_it_knows():
    report = ServerStatistics(1, "server", 0, 9, 12, 3, 40, (), (), {}, traffic=Traffic(2, {"tcp": 5}))
    server = MetricsServer("127.0.0.1:0", lambda: statistics_of_server(report), node="server")
    try:
        samples = scraped(server.url)
    finally:
        server.close()
    assert value(samples, "headwater_exchanges_total", role="server", index="0") == 40
    assert value(samples, "headwater_sent_bytes_total", node="server 0", transport="tcp") == 5
    assert not [name for name, _ in samples if name.startswith("headwater_members")], "nothing of the cluster"


def test_a_worker_by_itself_exports_what_it_told_last():
    with hw.Cluster(workers=1) as cluster, cluster.worker() as worker:
        steps_of(worker, 3)
        worker.barrier()
        data = as_data(statistics_of_worker(worker.told))
    assert data["headwater_worker_steps_total"] == [{"labels": {"rank": "0"}, "value": 3}]


def test_a_collector_gets_the_same_numbers_over_otlp():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra `otlp`")
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    from headwater.observe.otlp import OtlpExporter

    bodies = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    histogram = Histogram((1, 2, *(0,) * 11), 2.0)
    statistics = msgspec.structs.replace(nothing(), version=9, totals=(WorkerTotals(0, staleness=histogram),))
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        OtlpExporter(f"http://127.0.0.1:{server.server_address[1]}", lambda: statistics).close()
        server.shutdown()
        thread.join()
    ((path, body),) = bodies
    assert path == "/v1/metrics"
    (resource,) = ExportMetricsServiceRequest.FromString(body).resource_metrics
    found = {metric.name: metric for metric in resource.scope_metrics[0].metrics}
    assert set(found) == {metric.exposed_name for metric in METRICS}
    assert found["headwater_commits_total"].sum.is_monotonic
    assert found["headwater_commits_total"].sum.data_points[0].as_int == 9
    (point,) = found["headwater_staleness_commits"].histogram.data_points
    assert (list(point.bucket_counts[:2]), point.sum, point.count) == ([1, 2], 2.0, 3)
    assert found["headwater_uptime_seconds"].unit == "s"


def test_a_collector_that_is_no_url_is_refused():
    with pytest.raises(ConfigurationError, match="expected the URL of a collector"):
        hw.Cluster(workers=1, otlp="localhost:4318")
