"""What a user's logging handler or callback raises costs a line, and never a thread of ours."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest

import headwater as hw
from headwater import loggers
from headwater.engines.output import Output


class Broken(logging.Handler):
    def emit(self, record):
        raise RuntimeError("no disk")


@pytest.fixture
def broken(monkeypatch):
    """The package's logger with such a handler, to which everything is told."""
    log = logging.getLogger("headwater")
    monkeypatch.setattr(log, "handlers", [Broken()])
    monkeypatch.setattr(log, "level", logging.DEBUG)
    log.manager._clear_cache()
    monkeypatch.setattr(loggers._Logger, "_told", False)
    yield
    log.manager._clear_cache()


def train(worker):
    model = worker.model("m", {"w": np.zeros(3, np.float32)}, hw.Accumulate())
    for _ in range(3):
        model.push({"w": np.ones(3)})
        worker.step()
    return model.pull()["w"].tolist()


def test_a_logging_handler_that_raises_ends_neither_a_node_nor_a_run(broken, capfd):
    result = hw.run(train, workers=2, servers=2, replicas=1, engine="inline", patience=5, deadline=30)
    assert result.values == [[6.0] * 3] * 2
    told = capfd.readouterr().err
    assert told.count("RuntimeError: no disk") == 1, "once is enough"
    assert "its line is lost" in told


def test_a_logger_that_the_user_was_first_to_ask_for_is_one_of_these():
    first = logging.getLogger("headwater.asked_for_before")
    first.addHandler(Broken())
    loggers.logger("headwater.asked_for_before").warning("told")
    assert loggers.logger("headwater.asked_for_before") is first
    assert type(logging.getLogger("somebody.elses")) is logging.Logger


def test_an_output_callback_that_ends_its_process_loses_its_line_only():
    lines = []

    def output(line):
        if line == "second":
            raise SystemExit(3)
        lines.append(line)

    called = Output(output)
    for line in ("first", "second", "third"):
        called(line)
    assert lines == ["first", "third"]


def test_every_module_logs_to_one_of_these():
    package = Path(hw.__file__).parent
    others = [
        str(path)
        for path in package.rglob("*.py")
        if re.search(r'^\w+ = logging\.getLogger\("headwater', path.read_text(), re.MULTILINE)
    ]
    assert others == []
