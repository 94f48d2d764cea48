"""Versions of a running training as files: what is read is, bit by bit, the cast of what the training had."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import numpy as np
import pytest
from published import read_chain
from trained import trained
from typer.testing import CliRunner
from waiting import wait_until

import headwater as hw
from headwater.cli.app import app
from headwater.errors import ConfigurationError, WeightsError
from headwater.weights import WeightsWriter, versions
from headwater.weights.bfloat16 import to_bfloat16

pytest.importorskip("zstandard")
pytest.importorskip("ml_dtypes")


def train(training, turn):
    """A step that touches some elements and some rows, and deletes one; what a worker then sees."""

    def act(worker, model, table):
        gradient = np.zeros(2500, np.float32)
        gradient[np.random.default_rng(turn).choice(2500, 40)] = 1 / (turn + 3)
        model.push({"w": gradient})
        table.push(np.array([turn, 100 + turn]), np.full((2, 2), 0.25, np.float32))
        if turn % 3 == 2:
            table.delete([turn - 1])
        worker.step()
        seen = {name: array.copy() for name, array in model.pull().items()}
        return worker.version, seen, table.pull(np.arange(130))

    return training.do(act)


def publishing(training, directory, **options):
    """A publisher in a thread of its own; what it wrote, as it comes."""
    done = []
    thread = threading.Thread(
        target=hw.publish,
        args=(training.address, directory),
        kwargs={"wrote": lambda version, view: done.append((version, view.version.number)), **options},
    )
    thread.start()
    return done, thread


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_version_is_the_cast_of_the_values_at_that_version(tmp_path, dtype):
    cast = to_bfloat16 if dtype == "bfloat16" else np.asarray
    with trained(steps=1) as training:
        done, thread = publishing(
            training, tmp_path, tables="users", every=1, full_every=4, dtype=dtype, names={"b": "model.bias"}
        )
        wait_until(lambda: done)
        seen = {}
        for turn in range(9):
            version, *seen[version] = train(training, turn)
            wait_until(lambda version=version: done[-1][1] == version)
    thread.join(60)
    checked = [one for one in done if one[1] in seen]
    assert len(checked) == 9
    assert {version.full for version, _ in checked} == {True, False}
    for version, number in checked:
        read, (tensors, rows) = hw.load_weights(tmp_path, version.number), seen[number]
        assert read.training_version == (0, number)
        bits = np.uint16 if dtype == "bfloat16" else np.float32
        assert np.array_equal(read["w"].view(bits), cast(tensors["w"]))
        assert np.array_equal(read["model.bias"].view(bits), cast(tensors["b"]))
        assert np.array_equal(
            np.asarray(read_chain(tmp_path, version.number)["w"]).view(bits), cast(tensors["w"])
        )
        table = read.tables["users"]
        there = dict(zip(table["ids"].tolist(), table["values"], strict=True))
        assert all(np.array_equal(there[id], rows[id]) for id in there)
        assert 1 not in there or number < 6  # it was deleted


def test_a_version_that_cannot_be_written_is_made_up_for_by_the_next(tmp_path, monkeypatch):
    writes, failing = WeightsWriter._write, []

    def full_disk(self, *what):
        if failing:
            failing.append(True)
            raise hw.errors.CheckpointError("no space left on device")
        return writes(self, *what)

    monkeypatch.setattr(WeightsWriter, "_write", full_disk)
    with trained(steps=1) as training:
        done, thread = publishing(training, tmp_path, every=1, tables=["users"])
        wait_until(lambda: done)
        failing.append(True)
        before = training.do(lambda worker, model, table: worker.version)
        train(training, 5)
        version, *_ = train(training, 6)  # training goes on
        assert version > before
        wait_until(lambda: len(failing) > 1)
        failing.clear()
        version, tensors, _ = train(training, 7)
        wait_until(lambda: done[-1][1] >= version)
    thread.join(60)
    assert done[1][0].full
    read = hw.load_weights(tmp_path)
    assert np.array_equal(read["w"], tensors["w"])
    ids = read.tables["users"]["ids"]
    assert {5, 6, 7, 105, 106, 107} <= set(ids.tolist())


class Engine(BaseHTTPRequestHandler):
    posted: ClassVar[list] = []

    def do_POST(self):
        self.posted.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        self.send_response(200 if len(self.posted) > 1 else 503)
        self.end_headers()

    def log_message(self, *arguments):
        pass


def test_the_command_publishes_tells_an_engine_and_goes_on_where_that_fails(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Engine)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    (tmp_path / "names.json").write_text('{"w": "layers.0.weight"}')
    try:
        with trained(steps=1) as training:
            ended = threading.Event()

            def go_on():
                while not ended.is_set():
                    training.step()

            trains = threading.Thread(target=go_on)
            trains.start()
            command = [
                *("publish", training.address, "--to", f"{tmp_path}/out", "--every", "1", "--dtype", "bf16"),
                *("--dialect", "modelexpress", "--names", f"{tmp_path}/names.json", "--table", "users"),
                *("--notify", f"http://127.0.0.1:{server.server_port}/pull", "--versions", "3", "--json"),
            ]
            result = CliRunner().invoke(app, command)
            ended.set()
            trains.join()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [one["version"] for one in told] == [1, 2, 3] == versions(tmp_path / "out")
    assert [body["target_version"] for path, body in Engine.posted if path == "/pull"] == [1, 2, 3]
    assert "layers.0.weight" in hw.load_weights(tmp_path / "out")


def test_what_cannot_be_published_is_told_at_once(tmp_path):
    with trained(servers=1, steps=1) as training:
        for options, told in [
            ({"model": "other"}, "no model 'other': its models are 'net'"),
            ({"tables": ["items"]}, "no table 'items': its tables are 'users'"),
            ({"dtype": "fp8"}, "dtype must be 'float32' or 'bfloat16', got 'fp8'"),
            ({"dialect": "other"}, "dialect must be"),
            ({"tables": 5}, "tables must be names, got 5"),
            ({"versions": 0}, "versions must be an integer ≥ 1"),
            ({"wrote": 5}, "wrote must be a function"),
            ({"notify": 5}, "notify must be a URL"),
            ({"names": {"v": "x"}}, "no tensor 'v': it has"),
            ({"notify": "ftp://engine"}, "expected http"),
        ]:
            with pytest.raises(ConfigurationError, match=told):
                hw.publish(training.address, tmp_path, **options)
        with WeightsWriter(tmp_path), pytest.raises(ConfigurationError, match="publisher"):
            hw.publish(training.address, tmp_path)
        (tmp_path / "file").write_text("")
        with pytest.raises((WeightsError, ConfigurationError)):
            hw.publish(training.address, tmp_path / "file" / "below")
