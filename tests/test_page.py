"""The page beside a training: its numbers are those of `status --json`, and it survives its coordinator."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
from browser import browser, needs_chromium
from serving import site
from waiting import wait_until

import headwater as hw
from headwater.cli.page import _free
from headwater.errors import ConfigurationError, ConnectionLostError
from headwater.messages import (
    CheckpointCounts,
    ClusterStatistics,
    Histogram,
    NodeStatistics,
    Progress,
    WorkerTotals,
)
from headwater.page import charts, markup
from headwater.page.events import events_between
from headwater.page.moment import moment_of
from headwater.page.poller import EVENTS, POINTS, Poller
from headwater.spec.words import numbered

ROOT = Path(__file__).parent.parent


# ── what is shown, without a browser ────────────────────────────────────────────────────────────


def node(role, index, *, pid=1, waits=None, silence=0.0):
    place = {"rank": index} if role == "worker" else {"index": index}
    return NodeStatistics(role, pid, "unix:@x", 1, 7, waits, silence=silence, **place)


def totals(rank, steps, *, late=0, samples=0, exposed=None):
    counts = {"applied": steps - late, "late": late}
    stale = Histogram((steps, *[0] * 12), 0.0)
    told = exposed or {}
    return WorkerTotals(
        rank, counts, samples, 2.0, 8.0, stale, exposed={k: int(v * 1e9) for k, v in told.items()}
    )


def statistics(workers=2, *, nodes=None, **fields):
    standard = {
        "term": 3,
        "generation": 0,
        "version": 7,
        "workers": workers,
        "sync": "sync",
        "nodes": nodes
        or (
            node("coordinator", 0),
            node("server", 0, pid=10),
            *(node("worker", rank, pid=100 + rank) for rank in range(workers)),
        ),
        "models": (),
        "tables": (),
        "progress": tuple(
            Progress(1, rank, 7, 7, 70, 0, 2.0, 8.0, {}, {"loss": 0.5 + rank}) for rank in range(workers)
        ),
        "totals": tuple(totals(rank, 7, samples=70) for rank in range(workers)),
    }
    return ClusterStatistics(**{**standard, **fields})


def test_rates_are_differences_between_two_answers():
    first = moment_of(statistics(), 10.0)
    assert (first.steps_per_s, first.commits_per_s) == (None, None)
    later = statistics(version=17, totals=(totals(0, 17, samples=100), totals(1, 12, samples=80)))
    second = moment_of(later, 12.0, first)
    assert (second.steps_per_s, second.samples_per_s, second.commits_per_s) == (7.5, 20.0, 5.0)
    assert [row.rate for row in second.workers] == [5.0, 2.5]
    assert second.metrics == {"loss": 1.0}
    rewound = moment_of(statistics(generation=1, version=2), 14.0, second)
    assert rewound.steps_per_s is None


def test_members_that_wait_for_the_same_are_one_line():
    reason = "step 8 waits for worker 1: 2 of 3 updates of this round have arrived"
    nodes = (
        node("coordinator", 0),
        node("server", 0),
        node("worker", 0, waits=reason),
        node("worker", 1),
        node("worker", 2, waits=reason),
    )
    moment = moment_of(statistics(3, nodes=nodes), 1.0)
    (wait,) = moment.waits
    assert (wait.members, wait.reason) == (("worker 0", "worker 2"), reason)
    assert [row.waits for row in moment.workers] == [True, False, True]
    assert "workers 0, 2</span> step 8 waits for worker 1" in markup.waits(moment)


def test_a_rank_that_is_not_there_has_a_row_that_says_so():
    nodes = (node("coordinator", 0), node("server", 0), node("worker", 0))
    moment = moment_of(statistics(3, nodes=nodes, finished=(1,)), 1.0)
    assert [(row.state, row.is_gone) for row in moment.workers] == [
        ("computing", False),
        ("finished", False),
        ("not there", True),
    ]


def test_many_workers_are_named_in_few_words():
    reason = "step 8 waits for worker 50"
    nodes = [node("worker", rank, waits=None if rank == 50 else reason) for rank in range(100)]
    moment = moment_of(statistics(100, nodes=(node("server", 0), *nodes)), 1.0)
    assert "workers 0 to 49, 51 to 99</span> step 8 waits" in markup.waits(moment)
    nobody = moment_of(statistics(100, nodes=(node("server", 0),)), 0.0)
    assert events_between(nobody, moment) == ["workers 0 to 99 joined"]
    ended = moment_of(statistics(100, nodes=(node("server", 0),), finished=tuple(range(100))), 2.0)
    assert events_between(moment, ended) == ["workers 0 to 99 have finished"]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], "nobody"),
        ([3], "worker 3"),
        ([2, 1, 0], "workers 0, 1, 2"),
        ([0, 1, 2, 3], "workers 0 to 3"),
        ([9, 0, 4, 5, 6, 7, 11], "workers 0, 4 to 7, 9, 11"),
        (range(0, 60, 2), "workers 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22 and 18 more"),
    ],
)
def test_numbers_of_nodes_are_said_in_few_words(numbers, text):
    assert numbered("worker", numbers) == text


def test_texts_of_a_cluster_are_never_markup():
    evil = "<script>alert(1)</script>"
    nodes = (node("coordinator", 0), node("worker", 0, waits=evil), node("server", 0, waits=evil))
    progress = (Progress(1, 0, 7, 7, 70, 0, 2.0, 8.0, {}, {evil: 1.0}),)
    moment = moment_of(statistics(1, nodes=nodes, progress=progress, sync=evil, joining=(evil,)), 1.0)
    for text in (
        markup.workers(moment),
        markup.nodes(moment),
        markup.waits(moment),
        markup.tiles(moment),
        markup.about(moment),
    ):
        assert evil not in text


def test_what_happened_between_two_answers_is_told():
    before = statistics(
        nodes=(node("server", 0, pid=10), node("standby", 0, pid=11), node("worker", 0, pid=100))
    )
    after = statistics(
        nodes=(node("server", 0, pid=11), node("worker", 0, pid=102), node("worker", 1, pid=101)),
        unreplicated=(0,),
        generation=1,
        finished=(1,),
        checkpoints=CheckpointCounts(written=1, version=40),
    )
    assert events_between(moment_of(before, 0.0), moment_of(after, 1.0)) == [
        "training began anew from a checkpoint, as generation 1",
        "standby 0 (pid 11) is gone",
        "server 0 is now pid 11, its standby, which took over",
        "worker 0 is now pid 102",
        "worker 1 joined (pid 101)",
        "server 0 has no caught-up standby",
        "checkpoint of version 40 was written",
        "worker 1 has finished",
    ]
    assert events_between(moment_of(after, 0.0), moment_of(after, 1.0)) == []


def test_a_hundred_workers_are_a_hundred_rows_and_little_text():
    many = tuple(totals(rank, 7, exposed={"compute": rank}) for rank in range(100))
    moment = moment_of(statistics(100, totals=many), 1.0)
    text = markup.workers(moment)
    assert text.count('<th scope="row">') == 100
    assert len(text) < 120_000
    assert [rank for rank, _ in moment.exposed] == list(range(99, 87, -1))
    assert len(charts.exposed(moment)["yAxis"]["data"]) == 12


def test_memory_of_a_page_is_bounded_and_an_answer_that_fails_ends_nothing():
    answers = iter(range(10**9))

    def ask():
        number = next(answers)
        if number % 3 == 1:
            raise ConnectionLostError("nobody answers")
        return statistics(version=number, totals=(totals(0, number), totals(1, number)))

    poller = Poller(ask, every_s=0.0)
    try:
        wait_until(lambda: poller.shown().number > 3 * POINTS)
        shown = poller.shown()
        assert len(shown.points) == POINTS
        assert len(shown.events) == EVENTS
        told = {re.sub(": .*", "", one.text) for one in shown.events}
        assert told == {"the coordinator does not answer", "the coordinator answers again"}
        assert len(charts.pace(shown.points)["series"][0]["data"]) <= 301
    finally:
        poller.close()


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("8080", "HOST:PORT"),
        (":8080", "HOST:PORT"),
        ("127.0.0.1:http", "HOST:PORT"),
        ("0.0.0.0:0", "insecure"),
    ],
)
def test_a_place_where_a_page_cannot_or_must_not_be_is_told(place, told):
    with pytest.raises(ConfigurationError, match=told):
        _free(place, insecure=False)
    assert _free("127.0.0.1:0", insecure=False)[1] > 0


def test_without_nicegui_the_command_says_what_to_install():
    code = (
        "import sys; sys.modules['nicegui'] = None; sys.argv = ['headwater', 'page', 'unix:@nobody']\n"
        "from headwater.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install '.[page]'" in done.stderr


# ── in a browser ────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def page(address, *options):
    """A process `headwater page`; its URL."""
    pytest.importorskip("nicegui", reason="needs NiceGUI: the extra `page`")
    process = subprocess.Popen(
        [sys.executable, "-m", "headwater", "page", address, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("page: "), line + process.stdout.read()
        yield line.removeprefix("page: ").strip()
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


def shown(window):
    """Every number that the page marks with its name."""
    return window.run(
        "Object.fromEntries([...document.querySelectorAll('[data-name]')]"
        ".map(one => [one.dataset.name, Number(one.dataset.value)]))"
    )


def stepped(steps):
    """A cluster whose two workers have taken so many steps and do nothing more."""
    cluster = hw.Cluster(engine="inline", workers=2, sync="async", servers=2)
    workers = [cluster.worker() for _ in range(2)]
    for worker in workers:
        model = worker.model("net", {"w": np.zeros(8, np.float32)}, hw.SGD(lr=0.1))
        for _ in range(steps):
            model.push({"w": np.ones(8, np.float32)})
            worker.step()
            worker.log(loss=1.5)
        worker._progress.tell(now=True)
    return cluster, workers


@needs_chromium
def test_a_browser_shows_the_version_of_the_cluster():
    cluster, workers = stepped(2)
    with cluster, contextlib.ExitStack() as left, page(cluster.address) as url, browser() as window:
        for worker in workers:
            left.enter_context(worker)
        window.open(url)
        window.until(lambda one: shown(one).get("version") == 4)
        assert not window.errors


@needs_chromium
@pytest.mark.long
def test_the_page_shows_what_status_says_and_fetches_nothing_from_elsewhere(tmp_path):
    cluster, workers = stepped(25)
    with cluster, contextlib.ExitStack() as left, page(cluster.address) as url, browser() as window:
        for worker in workers:
            left.enter_context(worker)
        window.size(1440, 1000)
        window.open(url)
        window.until(lambda one: shown(one).get("version") == 50)
        told = msgspec.json.decode(
            subprocess.run(
                [sys.executable, "-m", "headwater", "status", cluster.address, "--json"],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                check=True,
            ).stdout
        )
        own = shown(window)
        assert own["version"] == told["version"] == 50
        for one in told["totals"]:
            assert own[f"steps-{one['rank']}"] == sum(one["steps"].values()) == 25
        for one in told["progress"]:
            assert own[f"version-{one['rank']}"] == one["version"]
        assert own["workers"] == sum(one["role"] == "worker" for one in told["nodes"]) == 2
        assert own["servers"] == sum(one["role"] == "server" for one in told["nodes"]) == 2
        sizes = {}
        for width, dark in ((1440, False), (1440, True), (420, False)):
            window.size(width, 900)
            window.dark(dark)
            window.until(lambda one, dark=dark: one.run("Quasar.Dark.isActive") == dark)
            path = tmp_path / f"page-{width}-{dark}.png"
            window.picture(path)
            sizes[width, dark] = path.stat().st_size
            assert window.run("document.documentElement.scrollWidth") <= width
        assert min(sizes.values()) > 20_000
        charts_drawn = "[...document.querySelectorAll('.chart canvas')].filter(one => one.width > 100).length"
        assert window.run(charts_drawn) == 4
        assert not window.errors
        assert window.fetched
        assert all(one.startswith((url, url.replace("http", "ws"), "data:")) for one in window.fetched)


@needs_chromium
@pytest.mark.long
def test_a_page_of_a_hundred_workers_fits_wide_and_narrow_windows(tmp_path):
    workers = 100
    cluster = hw.Cluster(engine="inline", workers=workers, sync="ssp:3", servers=2)
    with cluster, contextlib.ExitStack() as left, page(cluster.address) as url, browser() as window:
        members = [left.enter_context(cluster.worker()) for _ in range(workers)]
        with ThreadPoolExecutor(workers) as pool:  # the model is declared when everybody has come
            declare = lambda one: one.model("net", {"w": np.zeros(8, np.float32)}, hw.SGD(lr=0.1))  # noqa: E731
            models = list(pool.map(declare, members))
        window.open(url)
        window.until(lambda one: shown(one).get("workers") == workers)
        for _ in range(2):
            for worker, model in zip(members, models, strict=True):
                model.push({"w": np.ones(8, np.float32)})
                worker.step()
                worker.log(loss=1.5)
        for worker in members:
            worker._progress.tell(now=True)
        window.until(lambda one: shown(one).get("version") == 2 * workers)
        window.until(lambda one: all(shown(one).get(f"steps-{rank}") == 2 for rank in range(workers)))
        for width, dark in ((1440, False), (1440, True), (420, False), (420, True)):
            window.size(width, 900)
            window.dark(dark)
            window.until(lambda one, dark=dark: one.run("Quasar.Dark.isActive") == dark)
            window.picture(tmp_path / f"page-{width}-{dark}.png")
            assert window.run("document.documentElement.scrollWidth") <= width
            cut = (
                "[...document.querySelectorAll('.tile dd')].filter(one => one.scrollWidth > one.clientWidth)"
            )
            assert window.run(f"{cut}.map(one => one.textContent)") == []
        assert window.run("document.querySelectorAll('.events li').length") < 30
        assert not window.errors


@needs_chromium
@pytest.mark.long
def test_the_page_can_be_read_and_used_without_eyes_and_without_a_mouse():
    cluster, workers = stepped(3)
    with cluster, contextlib.ExitStack() as left, page(cluster.address) as url, browser() as window:
        for worker in workers:
            left.enter_context(worker)
        window.open(url)
        window.until(lambda one: shown(one).get("version") == 6)
        count = "document.querySelectorAll('{}').length"
        assert window.run(count.format("main, h1")) == 2
        assert window.run(count.format("section:not([aria-labelledby])")) == 0
        title = "document.getElementById(one.getAttribute('aria-labelledby'))"
        named = f"[...document.querySelectorAll('section')].every(one => {title})"
        assert window.run(named)
        assert window.run(count.format("table")) == window.run(count.format("table caption")) == 3
        assert window.run(count.format("th:not([scope])")) == 0
        assert window.run(count.format(".chart:not([role=img][aria-label])")) == 0
        assert window.run(count.format("[role=status]")) == 1
        reached = []
        for _ in range(12):
            window.key("Tab", 9)
            reached.append(window.run("document.activeElement.getAttribute('aria-label')"))
        assert {"Light or dark", "Workers", "Servers and coordinator", "Models and tables"} <= set(reached)
        dark = window.run("Quasar.Dark.isActive")
        window.run("document.querySelector('.toggle').focus()")
        window.key("Enter", 13)
        window.run("document.querySelector('.toggle').click()")
        window.until(lambda one: one.run("Quasar.Dark.isActive") != dark)


@needs_chromium
@pytest.mark.long
@pytest.mark.fresh
def test_a_stopped_worker_is_seen_within_two_seconds_and_a_coordinator_may_be_started_again(tmp_path):
    with site(tmp_path) as cluster:
        cluster.address = f"unix:{tmp_path}/hw.sock"
        cluster.coordinator("--workers", 2, "--servers", 1, "--journal", "journal")
        server = cluster.server()
        workers = [cluster.worker("--rank", rank) for rank in (0, 1)]
        cluster.goes_on()
        with page(cluster.address) as url, browser() as window:
            window.open(url)
            window.until(lambda one: shown(one).get("version", 0) > 0)
            workers[1].signal(signal.SIGSTOP)
            began = time.monotonic()
            window.until(lambda one: re.search(r"worker 0\s+step \d+ waits for worker 1", one.text()), 20)
            took = time.monotonic() - began
            workers[1].signal(signal.SIGCONT)
            assert took < 2.0
            cluster.nodes[0].kill()
            window.until(lambda one: "no answer for" in one.text(), 40)
            cluster.coordinator()
            window.until(lambda one: "the coordinator answers again" in one.text(), 60)
            window.until(lambda one: "no answer for" not in one.text())
            before = shown(window)["version"]
            window.until(lambda one: shown(one)["version"] > before)
            assert not [one for one in window.errors if "ECONNREFUSED" not in one]
        cluster.stop()
        for one in (server, *workers):
            one.code()


@pytest.mark.long
def test_only_pages_of_this_server_may_read_it():
    pytest.importorskip("nicegui", reason="needs NiceGUI: the extra `page`")

    def status(url, **headers):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    cluster, workers = stepped(1)
    with cluster, contextlib.ExitStack() as left, page(cluster.address) as url:
        for worker in workers:
            left.enter_context(worker)
        assert status(url) == 200
        assert status(url, Origin=url.rstrip("/")) == 200
        assert status(url, Origin="http://elsewhere.example") == 403
        assert status(url, Host="elsewhere.example") == 403


@pytest.mark.long
def test_run_shows_a_page_for_as_long_as_it_trains(tmp_path):
    pytest.importorskip("nicegui", reason="needs NiceGUI: the extra `page`")
    script = tmp_path / "train.py"
    script.write_text(
        "import pathlib, time\nimport numpy as np\nimport headwater as hw\n\n\ndef train(worker):\n"
        "    model = worker.model('m', {'w': np.zeros(3, np.float32)}, hw.SGD(lr=0.1))\n"
        f"    while not pathlib.Path({str(tmp_path / 'stop')!r}).exists():\n"
        "        model.push({'w': np.ones(3, np.float32)})\n"
        "        worker.step()\n"
    )
    ran = subprocess.Popen(
        [sys.executable, "-m", "headwater", "run", str(script), "--page"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        line = next(line for line in ran.stdout if "page: http" in line)
        url = re.search(r"http://\S+", line).group(0)
        with urllib.request.urlopen(url, timeout=20) as answer:
            assert b"Headwater" in answer.read()
        (tmp_path / "stop").touch()
        ran.stdout.read()
        assert ran.wait(60) == 0
    finally:
        ran.kill()
        ran.wait()
        ran.stdout.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=30)
