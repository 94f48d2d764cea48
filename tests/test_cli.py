"""The command `headwater`: what it prints, what it exits with, what it leaves behind."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

import headwater as hw
from headwater.bench import figures as bench_figures
from headwater.bench import latency
from headwater.bench.figures import Effort, Figure
from headwater.bench.resnet import resnet50_shapes
from headwater.bench.rivals import RIVALS
from headwater.bench.suites import SUITES
from headwater.bench.turns import take_turns
from headwater.cli import app
from headwater.cli import bench as cli_bench
from headwater.cli.assignments import parse_settings
from headwater.cli.display import LiveDisplay, PlainDisplay, duration
from headwater.cli.progress import ProgressLines
from headwater.cli.script import MODULE
from headwater.messages import ClusterStatistics, NodeStatistics, Progress

TINY = Effort(repeats=2, rounds=2, shapes={"w": (64, 1024), "b": (100,)})

TRAIN = """
    import numpy as np
    import headwater as hw

    def train(worker):
        model = worker.model("m", {"w": np.zeros(4, np.float32)}, hw.SGD(lr=1.0))
        for _ in worker.batches(np.arange(12), 2):
            model.push({"w": np.ones(4, np.float32)})
            worker.step()
            worker.log(loss=0.25)
        return float(model.pull()["w"][0])
"""


@pytest.fixture
def command(monkeypatch):
    """Runs the command in this process and undoes what loading a script changes."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])

    def invoke(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    yield invoke
    sys.modules.pop(MODULE, None)


@pytest.fixture
def script(tmp_path):
    def write(text, name="job.v2.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


# ── run ─────────────────────────────────────────────────────────────────────────────────────────


def test_run_trains_and_sums_up(command, script):
    result = command("run", script(TRAIN), "--engine", "inline")
    assert result.exit_code == 0, result.output
    assert re.search(r"^cluster address: (unix:\S+); ask with: headwater status \1$", result.output, re.M)
    assert re.search(r"^sync: version 3 after .*, [\d.]+ samples/s, [\d.]+ steps/s$", result.output, re.M)
    assert re.search(
        r"^sync: \d+% of the workers' time waiting, staleness median 0, max 0$", result.output, re.M
    )
    assert "worker 0 returned -3.0\nworker 1 returned -3.0\n" in result.output


def test_main_block_does_not_run_and_siblings_can_be_imported(command, script):
    script("VALUE = 7", name="sibling.py")
    path = script("""
        import sys
        import sibling

        def main(worker):
            return sibling.VALUE, worker.settings, sys.argv[1:]

        if __name__ == "__main__":
            raise RuntimeError("the main block ran")
    """)
    options = [
        "--engine",
        "inline",
        "--workers",
        1,
        "--set",
        "epochs=3",
        "--set",
        "lr=0.5",
        "--set",
        "fast=true",
    ]
    result = command("run", f"{path}:main", *options)
    assert result.exit_code == 0, result.output
    assert "worker 0 returned (7, {'epochs': 3, 'lr': 0.5, 'fast': True}, [])" in result.output


def test_functions_classes_and_globals_of_a_script_reach_worker_processes_by_value(command, script):
    path = script("""
        from dataclasses import dataclass

        @dataclass
        class Answer:
            value: "int"

        OFFSET = 40

        def offset(rank):
            return Answer(OFFSET + rank)

        def train(worker):
            print("in", __name__)
            return offset(worker.rank)
    """)
    result = command("run", path, "--servers", 1)
    assert result.exit_code == 0, result.output
    assert f"[worker 1] in {MODULE}\n" in result.output
    assert "worker 0 returned Answer(value=40)\nworker 1 returned Answer(value=41)\n" in result.output


def test_a_missing_function_lists_those_the_script_has(command, script):
    path = script("from os.path import join\ndef fit(worker): ...\ndef tune(worker): ...\n")
    result = command("run", path)
    assert result.exit_code == 2
    assert (
        result.stderr
        == f"headwater: {path} has no function 'train': it has fit, tune; name one as {path}:fit\n"
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere.py"], "cannot read the script nowhere.py: No such file"),
        (["--set", "epochs"], "--set takes key=value, got 'epochs'"),
        (["--sync", "sometimes"], "sometimes"),
        (["--engine", "steam"], "engine: got 'steam', expected one of 'inline', 'local'"),
        (["--transport", "pigeon"], "transport: got 'pigeon'"),
        (
            ["--engine", "inline", "--rules", "no_such_rules"],
            "rules module 'no_such_rules' cannot be imported",
        ),
        (["--patience", "0"], "patience must be > 0 seconds"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(command, script, arguments, complaint):
    target = [] if arguments[0] == "nowhere.py" else [script("def train(worker): ...")]
    result = command("run", *target, *arguments)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_script_that_raises_shows_its_own_frames_only(command, script):
    result = command("run", script("def f():\n    return 1 / 0\nf()\n"))
    assert result.exit_code == 1
    assert "line 2, in f" in result.stderr
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert "headwater/cli" not in result.stderr


@pytest.mark.parametrize("engine", ["inline", "local"])
def test_an_exception_in_train_shows_rank_and_traceback_without_headwaters_own(command, script, engine):
    path = script("""
        def train(worker):
            if worker.rank == 1:
                raise ValueError("no such data")
            worker.barrier()
    """)
    result = command("run", path, "--engine", engine)
    assert result.exit_code == 1
    assert result.stderr.startswith("headwater: worker 1: ValueError: no such data\n\nTraceback")
    assert 'raise ValueError("no such data")' in result.stderr
    assert f"{os.sep}headwater{os.sep}" not in result.stderr


@pytest.mark.timeout(60)
def test_ctrl_c_stops_everything_within_two_seconds_and_leaves_no_process(script, command, long):
    """How long it takes is looked at with `--long` only, when nothing runs beside it."""
    path = script("""
        import time

        def train(worker):
            print("ready")
            while True:
                time.sleep(0.01)
    """)
    process = subprocess.Popen(
        [sys.executable, "-m", "headwater", "run", str(path), "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = re.match(r"cluster address: (\S+);", process.stdout.readline()).group(1)
        assert process.stdout.readline() == "[worker 0] ready\n"
        nodes = json.loads(command("status", address, "--json").stdout)["nodes"]
        assert sorted(node["role"] for node in nodes) == ["coordinator", "server", "worker"]
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate()
        assert time.monotonic() - began < 2.0 or not long
        assert process.returncode == 130
        assert complaint == "headwater: interrupted: everything was stopped\n"
        assert not any(psutil.pid_exists(node["pid"]) for node in nodes)
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_stops_inline_workers_together(script, command, long):
    path = script("""
        import _thread
        import time

        def train(worker):
            worker.barrier()
            if worker.rank == 0:
                _thread.interrupt_main()
            time.sleep(1.5)
    """)
    began = time.monotonic()
    result = command("run", path, "--engine", "inline", "--workers", 4)
    assert result.exit_code == 130
    assert time.monotonic() - began < 3.5 or not long


# ── status ──────────────────────────────────────────────────────────────────────────────────────


def test_status_shows_nodes_and_models(command):
    with hw.Cluster(workers=1, servers=2) as cluster, cluster.worker() as worker:
        model = worker.model("mine", {"w": np.zeros(3, np.float32)}, hw.SGD(lr=0.1))
        model.push({"w": np.ones(3, np.float32)})
        worker.step()
        as_json = command("status", cluster.address, "--json")
        as_table = command("status", cluster.address)
    assert as_json.exit_code == as_table.exit_code == 0
    statistics = json.loads(as_json.stdout)
    coordinator, *servers, last = statistics["nodes"]
    assert coordinator["role"] == "coordinator"
    assert coordinator["address"] == cluster.address
    assert [node["index"] for node in servers] == [0, 1]
    assert last["rank"] == 0
    assert set(last) == {"role", "rank", "pid", "address", "term", "version", "waits_for"}
    assert statistics["version"] == 1
    assert statistics["models"][0]["name"] == "mine"
    assert "sync, 1 workers declared, version 1" in as_table.stdout
    assert "mine" in as_table.stdout


def test_status_of_nobody_is_exit_code_1(command):
    result = command("status", "unix:@headwater-nobody-is-here")
    assert result.exit_code == 1
    assert result.stderr.startswith("headwater: cannot connect to unix:@headwater-nobody-is-here: ")
    assert result.stderr.count("\n") == 1


def test_status_of_a_strange_address_is_exit_code_2(command):
    result = command("status", "localhost")
    assert result.exit_code == 2
    assert "address 'localhost' is not one of" in result.stderr


def test_status_of_another_program_says_so(command):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def speak():
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"220 mail.example ESMTP ready, whoever you are and whatever you want\r\n")
                connection.recv(1 << 16)

        speaker = threading.Thread(target=speak)
        speaker.start()
        address = f"tcp:127.0.0.1:{listening.getsockname()[1]}"
        result = command("status", address)
        speaker.join()
    assert result.exit_code == 1
    assert result.stderr.startswith(f"headwater: cannot connect to {address}: ")
    assert result.stderr.endswith("the peer is not a Headwater node\n")


def test_status_of_a_server_points_to_the_coordinator(command):
    with hw.Cluster(workers=1) as cluster, cluster.worker():
        server = next(node for node in cluster.statistics().nodes if node.role == "server")
        result = command("status", server.address)
    assert result.exit_code == 1
    assert "is server 0: ask the coordinator" in result.stderr


# ── what is shown on the way ────────────────────────────────────────────────────────────────────


def progress(steps, elapsed, **changed):
    fields = {
        "member": 3,
        "rank": 0,
        "steps": steps,
        "version": 2 * steps,
        "samples": 8 * steps,
        "planned": 800,
        "waiting": elapsed / 4,
        "elapsed": elapsed,
        "staleness": {1: steps},
        "metrics": {"loss": 0.5},
    }
    return Progress(**{**fields, **changed})


def statistics(*reports, waits_for=None):
    node = NodeStatistics("worker", 1, "host", 1, 0, waits_for, rank=0)
    return ClusterStatistics(1, 0, 0, 1, "async", (node,), (), (), reports)


def test_lines_tell_of_the_time_since_the_last_report():
    lines = ProgressLines()
    lines.update(statistics(progress(10, 10.0)))
    late = progress(30, 14.0, waiting=4.5, staleness={1: 20, 3: 10})
    (line,) = lines.update(statistics(late))
    assert (line.steps, line.version) == (30, 60)
    assert line.rate == 5.0
    assert line.waiting == 0.5
    assert line.staleness == 2.0  # ten steps of 1 and ten of 3 since the last report
    assert line.left == (800 - 240) * 14.0 / 240


def test_a_worker_that_does_not_move_says_whom_it_waits_for():
    lines = ProgressLines()
    waiting = statistics(progress(10, 10.0), waits_for="worker 1")
    assert lines.update(waiting)[0].waits_for is None
    assert lines.update(waiting)[0].waits_for == "worker 1"
    assert lines.update(waiting)[0].rate == 1.0


def test_a_restarted_worker_begins_anew():
    lines = ProgressLines()
    lines.update(statistics(progress(10, 10.0)))
    (line,) = lines.update(statistics(progress(4, 2.0, member=9)))
    assert line.rate == 2.0


def test_plain_lines_come_every_five_seconds():
    now, out = [0.0], io.StringIO()
    with PlainDisplay(Console(file=out, width=40), clock=lambda: now[0]) as display:
        for second in range(11):
            now[0] = float(second)
            display.show(statistics(progress(second, float(second))))
    assert out.getvalue().splitlines() == [
        "worker 0: step 5, 1.0 steps/s, loss=0.5, version 10, staleness 1.0, 25% waiting, 1:35 left",
        "worker 0: step 10, 1.0 steps/s, loss=0.5, version 20, staleness 1.0, 25% waiting, 1:30 left",
    ]


def test_live_table_stays_below_the_lines_of_nodes():
    out = io.StringIO()
    with LiveDisplay(Console(file=out, force_terminal=True, width=100, color_system=None)) as display:
        display.show(statistics(progress(10, 10.0)))
        display.line("[worker 0] hello [bold]there[/bold]")
        display.show(statistics(progress(10, 10.0), waits_for="waits for worker 1"))
    text = out.getvalue()
    assert "[worker 0] hello [bold]there[/bold]" in text
    assert text.rindex("hello") < text.rindex("loss=0.5") < text.rindex("waits for worker 1")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1:00"), (187, "3:07"), (7387, "2:03:07")]
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-2", -2),
        ("1e-3", 0.001),
        ("True", True),
        ("false", False),
        ("adam", "adam"),
        ("", ""),
        ("a=b", "a=b"),
        ('[1, {"a": null}]', [1, {"a": None}]),
        ("[1, 2", "[1, 2"),
    ],
)
def test_settings_become_what_they_look_like(text, value):
    (parsed,) = parse_settings([f"key={text}"]).values()
    assert (parsed, type(parsed)) == (value, type(value))


# ── bench ───────────────────────────────────────────────────────────────────────────────────────


def test_the_benchmarks_model_has_the_tensors_of_resnet50():
    shapes = resnet50_shapes().values()
    assert (len(shapes), sum(int(np.prod(shape)) for shape in shapes)) == (161, 25_557_032)


def test_cases_are_measured_in_turns():
    calls = []
    times = take_turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        repeats=2,
        rounds=2,
        meet=lambda: calls.append("|"),
    )
    assert "".join(calls) == "|a||b|" + 2 * "|aa||bb|"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_a_target_is_met_from_its_own_side():
    def met(ratio, target, at_most):
        return Figure("", 1.0, "", "", 1.0, ratio, target, at_most).met

    assert [met(1.1, 1.2, True), met(1.3, 1.2, True), met(0.9, 0.8, False), met(0.7, 0.8, False)] == [
        True,
        False,
        True,
        False,
    ]
    assert met(1.0, None, True) is None


LONG = ["peers", "rows", "safety", "splits", "table"]
"""Suites whose cases take long to set up, however little is measured."""


@pytest.mark.parametrize(
    "suite", [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in SUITES]
)
def test_every_suite_measures_figures_and_limits(command, monkeypatch, suite):
    monkeypatch.setattr(cli_bench, "QUICK", TINY)
    monkeypatch.setattr(latency, "_PINNINGS", {"one core": (0, 0)})
    monkeypatch.delitem(RIVALS, "Ray")  # which takes half a minute to start and to end
    result = command("bench", suite, "--quick", "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures
    for figure in figures:
        assert figure["limit"] > 0
        assert figure.keys() == {*Figure.__dataclass_fields__, "met"}
    assert bench_figures.machine()["numba"] in result.stderr


def test_an_unknown_suite_lists_the_known(command):
    result = command("bench", "everything")
    assert result.exit_code == 2
    assert result.stderr == f"headwater: bench: got 'everything', expected one of {', '.join(SUITES)}\n"


@pytest.mark.parametrize("words", [["run"], ["status"], ["bench"]])
def test_help_gives_an_example(command, words):
    result = command(*words, "--help")
    assert result.exit_code == 0
    assert f"headwater {words[0]} " in result.stdout
