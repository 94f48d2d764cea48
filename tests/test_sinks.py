"""What workers log arrives in the history and in every sink, with its version, once."""

import csv
import json
import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from waiting import wait_until

import headwater as hw
from headwater.errors import ConfigurationError
from headwater.machines.coordinator import Logged
from headwater.messages import LoggedPoint
from headwater.observe.history import KEPT, History, Point
from headwater.observe.recorder import Recorder
from headwater.observe.sinks import sink_of
from headwater.worker.logged import POINTS, LoggedMetrics


def train(worker):
    model = worker.model("m", {"x": np.zeros(8, np.float32)}, hw.SGD(lr=0.1))
    for i in range(20):
        model.push({"x": np.ones(8, np.float32)})
        worker.step()
        worker.log(loss=1.0 / (i + 1), rank_=worker.rank)


class Kept:
    """A sink of one's own."""

    def __init__(self):
        self.points, self.closed, self.threads = [], 0, set()

    def write(self, points):
        self.threads.add(threading.current_thread().name)
        self.points += points

    def close(self):
        self.closed += 1


def test_the_history_of_a_run_has_every_value_with_its_step_and_version():
    sink = Kept()
    result = hw.run(train, workers=2, engine="inline", log_to=[sink])
    history = result.history
    assert len(history) == 2 * 20 * 2
    assert history.names == ["loss", "rank_"]
    for rank in range(2):
        versions, losses = history.curve("loss", rank)
        assert versions.tolist() == list(range(1, 21))
        assert losses.tolist() == [1.0 / (i + 1) for i in range(20)]
    assert len(history.curve("loss")[0]) == 40
    steps = [row.step for row in history if row.name == "loss" and row.rank == 1]
    assert steps == list(range(1, 21))
    times = [row.time for row in history]
    assert times == sorted(times)
    assert sum(len(point.metrics) for point in sink.points) == len(history)
    assert (sink.closed, sink.threads) == (1, {"headwater-sinks"})
    assert "history=History(80 values of loss, rank_)" in repr(result)
    with pytest.raises(KeyError, match="nobody logged 'accuracy'; there are loss, rank_"):
        history.curve("accuracy")


def test_pandas_takes_a_history():
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    history = History()
    history.add(
        [Point(2.0, 0, 3, 3, 1, {"loss": 0.5, "norm": math.inf}), Point(1.0, 0, 2, 2, 0, {"loss": 0.7})]
    )
    frame = pandas.DataFrame(history)
    assert list(frame.columns) == ["time", "generation", "version", "step", "rank", "name", "value"]
    assert frame["value"].tolist() == [0.7, 0.5, math.inf]
    assert frame.pivot_table(index="version", columns="name", values="value").loc[3, "norm"] == math.inf


def test_a_history_is_bounded_and_covers_all_of_the_time():
    history = History()
    for i in range(3 * KEPT):
        history.add([Point(float(i), 0, i, i, 0, {"loss": float(i)})])
    versions, values = history.curve("loss")
    assert KEPT / 2 <= len(versions) <= KEPT
    assert versions[0] == 0
    assert versions[-1] >= 3 * KEPT - 8
    assert set(np.diff(versions)) == {4}
    assert versions.tolist() == values.tolist()


def test_a_report_has_few_points_and_covers_all_of_the_time():
    logged = LoggedMetrics()
    for i in range(10_000):
        logged.add({"loss": float(i)}, i, i, float(i))
    points = logged.news(10_000.0)
    assert POINTS / 2 <= len(points) <= POINTS
    assert points[-1].step > 9_900
    assert points[0].step < 100
    assert points[0].age == 10_000.0 - points[0].step
    assert logged.news(1.0) == ()
    logged.add({"loss": 1.0}, 5, 5, 0.0)
    logged.add({"norm": 2.0, "loss": 3.0}, 5, 5, 0.0)
    (point,) = logged.news(0.0)
    assert point.metrics == {"loss": 3.0, "norm": 2.0}, "of one step is one point"


ODD = [
    Point(1.5, 0, 1, 1, 0, {"loss": math.nan, 'ü,\n"x"': math.inf}),
    Point(2.5, 1, 2, 2, 3, {"loss": -math.inf, "norm": 0.1}),
]


def test_json_lines_are_valid_json_whatever_the_numbers_and_names(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    for points in (ODD[:1], ODD[1:]):
        sink = hw.sinks.Jsonl(path)
        sink.write(points)
        sink.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [line["version"] for line in lines] == [1, 2], "it is appended to"
    assert lines[0]["metrics"] == {"loss": "NaN", 'ü,\n"x"': "Infinity"}
    assert float(lines[1]["metrics"]["loss"]) == -math.inf
    assert lines[1] | {"metrics": 0} == {
        "time": 2.5, "generation": 1, "version": 2, "step": 2, "rank": 3, "metrics": 0
    }  # fmt: skip


def test_csv_has_one_heading_and_a_row_for_each_value(tmp_path):
    path = tmp_path / "log.csv"
    for points in (ODD[:1], ODD[1:]):
        sink = hw.sinks.Csv(path)
        sink.write(points)
        sink.close()
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["loss", 'ü,\n"x"', "loss", "norm"]
    assert [float(row["value"]) for row in rows[1:]] == [math.inf, -math.inf, 0.1]
    assert math.isnan(float(rows[0]["value"]))


def test_tensorboard_reads_what_its_sink_wrote(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    hw.run(train, workers=2, engine="inline", log_to=[hw.sinks.TensorBoard(tmp_path)])
    for rank in range(2):
        events = EventAccumulator(str(tmp_path / f"worker-{rank}"), {"tensors": 0})
        events.Reload()
        found = [
            (event.step, float(tensor_util.make_ndarray(event.tensor_proto)))
            for event in events.Tensors("loss")
        ]
        assert [step for step, _ in found] == list(range(1, 21))
        assert found[3][1] == pytest.approx(0.25)


WANDB = """
import sys
import headwater as hw
from headwater.observe.history import Point
sink = hw.sinks.Wandb(mode="offline", project="p", dir=sys.argv[1])
sink.write([Point(1.5, 0, 7, 7, 3, {"norm": 0.1, "loss": float("nan")})])
print(dict(sink._run.summary)["worker-3/norm"], dict(sink._run.summary)["version"])
sink.close()
"""


def test_wandb_takes_points_offline(tmp_path):
    """In a process of its own: wandb leaves one behind until its own ends."""
    pytest.importorskip("wandb", reason="needs wandb")
    done = subprocess.run(
        [sys.executable, "-c", WANDB, str(tmp_path)],
        env={**os.environ, "WANDB_SILENT": "true"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "0.1 7\n", done.stderr
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_mlflow_reads_what_its_sink_wrote(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "runs").as_uri()
    sink = hw.sinks.Mlflow(uri, experiment="e", name="first")
    sink.write([Point(1.0 + i, 0, i, i, 2, {"loss": 1.0 / i}) for i in range(1, 6)])
    sink.close()
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    found = client.get_metric_history(run.info.run_id, "worker-2/loss")
    assert [(one.step, one.value) for one in found] == [(i, 1.0 / i) for i in range(1, 6)]
    assert run.info.status == "FINISHED"


def logged(rank, *steps):
    return Logged(rank, 0, tuple(LoggedPoint(step, step, 0.5, {"loss": float(step)}) for step in steps))


def test_a_sink_that_fails_is_told_once_and_others_get_everything(caplog):
    class Fails(Kept):
        def write(self, points):
            super().write(points)
            raise OSError(28, "no space left on device")

        def close(self):
            raise OSError(28, "no space left on device")

    good, bad = Kept(), Fails()
    recorder = Recorder([bad, good], clock=lambda: 100.0)
    for step in range(5):
        recorder.take(logged(0, step))
    recorder.close()
    recorder.close()
    recorder.take(logged(0, 9))
    assert [point.step for point in good.points] == [point.step for point in bad.points] == [0, 1, 2, 3, 4]
    assert good.points[0].time == 99.5
    assert good.closed == 1
    told = [record.getMessage() for record in caplog.records if record.name == "headwater.sinks"]
    (line,) = told
    assert line.startswith("log_to: Fails failed: OSError(28,")
    assert line.endswith("; training goes on")
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("wrong", ["runs/a", [hw.sinks.Jsonl], [print], 3, None])
def test_what_is_no_sink_is_refused_before_anything_starts(wrong):
    with pytest.raises(ConfigurationError, match="log_to: got"):
        hw.run(train, log_to=wrong)


def test_a_file_that_cannot_be_written_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "file").write_text("")
    for kind in (hw.sinks.Jsonl, hw.sinks.Csv):
        with pytest.raises(ConfigurationError, match="log_to: cannot write to"):
            kind(tmp_path / "file" / "log")


@pytest.mark.parametrize("module", ["tensorboard.summary", "wandb", "mlflow"])
def test_a_missing_package_is_named(module, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    make = {
        "tensorboard.summary": lambda: hw.sinks.TensorBoard("x"),
        "wandb": hw.sinks.Wandb,
        "mlflow": hw.sinks.Mlflow,
    }
    with pytest.raises(ConfigurationError, match=r"log_to needs the package .*: pip install"):
        make[module]()


def test_the_command_line_names_sinks_by_kind_and_path(tmp_path):
    assert isinstance(sink_of(f"jsonl:{tmp_path}/a:b.jsonl"), hw.sinks.Jsonl)
    assert (tmp_path / "a:b.jsonl").exists()
    for wrong in ("json:x", "jsonl", "jsonl:", "", "wandb:x"):
        with pytest.raises(
            ConfigurationError, match="expected one of tensorboard:PATH, jsonl:PATH, csv:PATH"
        ):
            sink_of(wrong)


def test_a_worker_that_is_started_again_goes_on_counting_steps():
    with hw.Cluster(workers=1) as cluster:
        for _ in range(2):
            with cluster.worker() as worker:
                model = worker.model("m", {"x": np.zeros(8, np.float32)}, hw.SGD(lr=0.1))
                for _ in range(3):
                    model.push({"x": np.ones(8, np.float32)})
                    worker.step()
                    worker.log(loss=1.0)
        wait_until(lambda: len(cluster.history) == 6)  # what workers tell comes beside their steps
        assert [row.step for row in cluster.history] == [1, 2, 3, 4, 5, 6]
