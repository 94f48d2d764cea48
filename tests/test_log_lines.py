"""How commands log: time, level and node in every line, as text or JSON; what the user configured stands."""

import json
import logging
import re
import threading

import numpy as np
import pytest
from typer.testing import CliRunner

import headwater as hw
from headwater.cli.app import app
from headwater.cli.log_lines import JsonLines, LogStyle, TextLines
from headwater.engines.logs import Logs
from headwater.errors import ConfigurationError

LOG = logging.getLogger("headwater.server")


def lines_of(style, say, **begin):
    shown = []
    with style.begin("server", "info", shown.append) as node:
        say(node)
    return shown


def test_a_line_has_time_level_and_node_and_says_the_node_once():
    def say(node):
        LOG.info("waits for a place")
        node.named("server", 1)
        LOG.warning("server 1: its standby is gone")
        LOG.info("headwater-server-1: the cluster is closed")
        LOG.debug("not shown")

    first, second, third = lines_of(LogStyle(), say)
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d\d\d INFO    server: waits for a place", first)
    assert second.endswith(" WARNING server 1: its standby is gone")
    assert third.endswith(" INFO    server 1: the cluster is closed")


def test_json_lines_have_the_same_in_fields():
    def say(node):
        node.named("standby", 0)
        try:
            raise ValueError("ü\n")
        except ValueError:
            LOG.error("it says %r", "x", exc_info=True)

    (line,) = lines_of(LogStyle(format="json"), say)
    assert "\n" not in line
    found = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found["time"])
    assert {name: found[name] for name in ("level", "logger", "role", "index", "message")} == {
        "level": "error",
        "logger": "headwater.server",
        "role": "standby",
        "index": 0,
        "message": "it says 'x'",
    }
    assert "ValueError: ü" in found["exception"]


@pytest.mark.parametrize("level", ["debug", "INFO", "warning", "error"])
def test_the_level_says_what_is_logged(level):
    def say(node):
        for name in ("debug", "info", "warning", "error"):
            getattr(LOG, name)(name)

    shown = lines_of(LogStyle(level), say)
    kept = ("debug", "info", "warning", "error")
    assert [line.rpartition(" ")[2] for line in shown] == list(kept[kept.index(level.lower()) :])


def test_what_the_user_configured_stands(capsys, monkeypatch):
    before = logging.getLogger("headwater").level
    own = logging.StreamHandler()
    own.setFormatter(logging.Formatter("MINE %(message)s"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [own])
    with LogStyle().begin("worker", "info"):
        LOG.warning("once")
    assert capsys.readouterr().err == "MINE once\n"
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with LogStyle().begin("worker", "info"):
        LOG.warning("once")
    err = capsys.readouterr().err
    assert err.count("once") == 1
    assert "WARNING worker: once" in err
    assert logging.getLogger("headwater").level == before
    assert not [one for one in logging.getLogger("headwater").handlers if one.formatter is not None]


def test_a_record_of_another_handler_is_formatted_too():
    record = logging.LogRecord("headwater.x", logging.INFO, "f", 1, "text", (), None)
    assert TextLines().format(record).endswith("INFO    headwater.x: text")
    assert json.loads(JsonLines().format(record))["index"] == -1


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"level": "loud"}, "debug, info, warning or error"), ({"format": "xml"}, "text or json")],
)
def test_what_is_no_level_or_format_is_refused(options, expected):
    with pytest.raises(ConfigurationError, match=f"expected {expected}"):
        LogStyle(**options)


def test_nodes_are_told_the_level_of_headwaters_loggers(monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logger = logging.getLogger("headwater")
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    assert Logs.here().levels["headwater"] == logging.DEBUG
    assert "" not in Logs.here().levels


TRAIN = """
import numpy as np
import headwater as hw

def train(worker):
    model = worker.model("m", {"x": np.zeros(2, np.float32)}, hw.SGD(lr=0.1))
    model.push({"x": np.ones(2, np.float32)})
    worker.step()
"""


def test_run_takes_the_level_from_its_option_and_from_the_environment(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    command = ["run", str(script), "--engine", "inline", "--workers", "1"]
    quiet = CliRunner().invoke(app, command)
    assert quiet.exit_code == 0, quiet.output
    assert "has joined" not in quiet.stderr
    for more, env in ((["--log-level", "info"], {}), ([], {"HEADWATER_LOG_LEVEL": "info"})):
        shown = CliRunner().invoke(app, command + more, env=env)
        assert re.search(r"^[\d:.]+ INFO    coordinator: worker 0 .* has joined$", shown.stderr, re.M), (
            shown.stderr
        )
    asjson = CliRunner().invoke(app, [*command, "--log-level", "info", "--log-format", "json"])
    joined = [json.loads(line) for line in asjson.stderr.splitlines() if line.startswith("{")]
    assert any("has joined" in line["message"] for line in joined)
    wrong = CliRunner().invoke(app, [*command, "--log-level", "loud"])
    assert wrong.exit_code == 2
    assert "--log-level: got 'loud', expected debug, info, warning or error" in wrong.stderr


def test_drain_ends_everybodys_batches_with_their_next_step():
    read = []

    def train(worker):
        with worker:
            model = worker.model("m", {"x": np.zeros(2, np.float32)}, hw.SGD(lr=0.1))
            for _ in worker.batches(np.arange(10_000_000), 1):
                model.push({"x": np.ones(2, np.float32)})
                worker.step()
                began.set()
            read.append(worker.statistics().samples)

    began = threading.Event()
    with hw.Cluster(workers=1) as cluster:
        thread = threading.Thread(target=train, args=(cluster.worker(),))
        thread.start()
        assert began.wait(60)
        told = CliRunner().invoke(app, ["drain", cluster.address, "--wait", "0"])
        thread.join(60)
        assert not thread.is_alive()
    assert told.exit_code == 0, told.output
    assert told.stdout == f"the workers of the cluster at {cluster.address} were told to end\n"
    assert 0 < read[0] < 10_000_000


def test_drain_says_when_the_cluster_has_not_ended():
    with hw.Cluster(workers=1) as cluster, cluster.worker():
        told = CliRunner().invoke(app, ["drain", cluster.address, "--wait", "0.1"])
    assert told.exit_code == 1
    assert "has not ended within 0.1 s; it still answers" in told.stderr
