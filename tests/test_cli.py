"""The command `headwater`: what it prints, what it exits with, what it leaves behind."""

import io
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import msgspec
import numpy as np
import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner
from waiting import wait_until

import headwater as hw
from headwater.bench import figures as bench_figures
from headwater.bench import latency
from headwater.bench.figures import Effort, Figure
from headwater.bench.resnet import resnet50_shapes
from headwater.bench.suites import SUITES
from headwater.bench.turns import take_turns
from headwater.cli import bench as cli_bench
from headwater.cli.app import COMMANDS, app
from headwater.cli.assignments import parse_settings
from headwater.cli.script import MODULE
from headwater.messages import ClusterStatistics, NodeStatistics, Progress
from headwater.observe.display import LiveDisplay, PlainDisplay, duration
from headwater.observe.worker_lines import ProgressLines
from headwater.runtime.coordinator import CoordinatorNode
from headwater.spec.cluster import ClusterConfig

TOKEN = "a secret of at least sixteen characters"

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
    assert re.search(
        r"^cluster address: (unix:\S+)\nto see how it is: headwater status \1$", result.stderr, re.M
    )
    assert all(len(line) <= 80 for line in result.stderr.splitlines())
    results = result.stdout.splitlines()
    assert re.search(r"^sync: version 3 after .*, [\d.]+ samples/s, [\d.]+ steps/s$", results[0])
    assert re.search(r"^sync: \d+% of the workers' time waiting, staleness median 0, max 0$", results[1])
    assert re.search(r"^sync: exposed time: worker [01] \w+ \d+%", results[2])
    assert results[3:] == ["worker 0 returned -3.0", "worker 1 returned -3.0"]


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
        (["--transport", "pigeon"], "--transport must be 'unix' or 'tcp', got 'pigeon'"),
        (
            ["--engine", "inline", "--rules", "no_such_rules"],
            "rules module 'no_such_rules' cannot be imported",
        ),
        (["--patience", "0"], "--patience must be > 0 seconds and at most a year"),
        (["--deadline", "inf"], "--deadline must be > 0 seconds"),
        (["--every", "10steps"], "--every 10steps has no effect without checkpoints: pass --checkpoint DIR"),
        (["--keep", "5"], "--keep 5 has no effect without checkpoints"),
        (["--resume"], "--resume has no effect without checkpoints"),
        (["--min-workers", "9"], "--min-workers must be at most --workers 2, got 9"),
        (["--bind", "0.0.0.0"], "--token-file or the three --tls files, or listen on 127.0.0.1; --insecure"),
        (
            ["--advertise", "node1"],
            "--advertise node1 without a TCP address: nothing listens there; pass --bind",
        ),
        (["--workers", "few"], "'--workers'"),
        (["--wrokers", "3"], "No such option: --wrokers"),
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
    assert "headwater: worker 1: ValueError: no such data\n\nTraceback" in result.stderr
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
        address = re.match(r"cluster address: (\S+)$", process.stderr.readline()).group(1)
        process.stderr.readline()
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


# ── what every command has ──────────────────────────────────────────────────────────────────────


def test_the_version_is_told(command):
    for option in ("--version", "-V"):
        result = command(option)
        assert (result.exit_code, result.stdout) == (0, f"headwater {hw.__version__}\n")


def test_shells_can_complete_commands_and_options():
    def completed(words, count):
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(count), "_HEADWATER_COMPLETE": "complete_bash"}
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; sys.argv = ['headwater']; import headwater.cli as c; c.main()",
            ],
            env={**os.environ, **asked},
            capture_output=True,
            text=True,
        )
        return done.stdout.split()

    assert completed("headwater s", 1) == ["serve", "status", "stop"]
    assert completed("headwater run --on-s", 2) == ["--on-server-loss"]


def test_the_list_of_commands_says_what_each_does(command):
    result = command("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert command(name, "--help").exit_code == 0
        assert re.search(rf"│ {name} ", result.stdout)


@pytest.mark.long
@pytest.mark.parametrize("columns", [80, 120])
def test_every_page_of_help_fits_the_terminal(command, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    pages = [[name] for name in COMMANDS] + [["serve", node] for node in ("coordinator", "server", "worker")]
    for words in pages:
        shown = command(*words, "--help").stdout.splitlines()
        assert [line for line in shown if len(line) > columns] == []


def test_showing_the_commands_loads_neither_the_compiler_nor_arrays():
    code = (
        "import sys; sys.argv = ['headwater', '--help']\n"
        "from headwater.cli import main\n"
        "try: main()\n"
        "finally: print([m for m in ('numba', 'numpy', 'torch', 'headwater.driver') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_every_option_can_be_an_environment_variable(command, script, monkeypatch):
    monkeypatch.setenv("HEADWATER_WORKERS", "3")
    monkeypatch.setenv("HEADWATER_SET", "epochs=2")
    path = script("def train(worker): return worker.settings")
    result = command("run", path, "--engine", "inline")
    assert result.stdout.count("returned {'epochs': 2}") == 3
    assert command("run", path, "--engine", "inline", "--workers", 1).stdout.count("returned") == 1


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("HEADWATER_WORKERS", "few", r"'--workers'.*\(from the environment variable HEADWATER_WORKERS\)"),
        ("HEADWATER_LEASE", "-1", r"--lease must be .*\(set by the environment: HEADWATER_LEASE\)"),
    ],
)
def test_an_error_from_a_variable_says_so(command, script, monkeypatch, variable, value, complaint):
    monkeypatch.setenv(variable, value)
    result = command("run", script("def train(worker): ..."))
    assert result.exit_code == 2
    assert re.search(complaint, result.stderr)


@pytest.mark.parametrize("words", [["status"], ["ping"], ["stop"], ["verify"], ["serve", "server"]])
def test_a_command_that_needs_a_cluster_says_where_to_find_it(command, words):
    result = command(*words)
    assert result.exit_code == 2
    assert "HEADWATER_COORDINATOR" in result.stderr


@pytest.mark.timeout(60)
def test_ctrl_c_while_everything_is_imported_says_nothing():
    code = "import time; from headwater.cli import main; import headwater.cli.app as app\n"
    code += "app.app = lambda: (print('here', flush=True), time.sleep(30)); main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")


# ── clusters seen from outside ──────────────────────────────────────────────────────────────────


def test_a_cluster_with_a_token_answers_every_command_that_has_it(command, tmp_path, monkeypatch):
    (tmp_path / "token").write_text(TOKEN)
    options = ["--token-file", tmp_path / "token"]
    with hw.Cluster(workers=1, bind="127.0.0.1", token=TOKEN) as cluster, cluster.worker() as worker:
        worker.model("mine", {"w": np.zeros(3, np.float32)}, hw.SGD(lr=0.1))
        monkeypatch.setenv("HEADWATER_COORDINATOR", cluster.address)
        for name in ("status", "ping"):
            assert command(name, *options).exit_code == 0
            assert "the caller has no token" in command(name).stderr
        assert "no standby" in command("verify", *options).stdout
        assert not cluster.verify().equal


def test_ping_tells_what_lives_and_what_is_ready(command):
    assert command("ping", "unix:@headwater-nobody-is-here").exit_code == 1
    with hw.Cluster(workers=1) as cluster, cluster.worker():
        alive = command("ping", cluster.address)
        ready = command("ping", cluster.address, "--ready")
        server = next(node for node in cluster.statistics().nodes if node.role == "server")
        assert "server 0 answers" in command("ping", server.address).stdout
    assert (alive.exit_code, ready.exit_code) == (0, 0)
    assert re.match(r"the coordinator answers after \d+ ms, at version 0; ready$", ready.stdout)


def test_ping_is_not_ready_without_a_server_and_waits_for_it(command):
    node = CoordinatorNode(ClusterConfig(workers=1))
    try:
        assert command("ping", node.address).exit_code == 0
        result = command("ping", node.address, "--ready", "--wait", "0.6")
        assert result.exit_code == 1
        assert result.stderr.endswith("not ready: server 0 is not there\n")
        status = command("status", node.address).stdout
        assert status.startswith("starting: server 0 is not there; worker 0 is not there\n")
    finally:
        node.close()


def test_stop_ends_a_cluster_and_its_run_says_who_did(command, tmp_path):
    addresses, raised = queue.Queue(), queue.Queue()

    def train(worker):
        model = worker.model("m", {"w": np.zeros(2, np.float32)}, hw.SGD(lr=1.0))
        while True:
            model.push({"w": np.ones(2, np.float32)})
            worker.step()

    def body():
        try:
            hw.run(train, workers=1, engine="inline", started=addresses.put, checkpoint=tmp_path)
        except hw.errors.HeadwaterError as error:
            raised.put(error)

    thread = threading.Thread(target=body)
    thread.start()
    address = addresses.get(timeout=30)
    wait_until(lambda: json.loads(command("status", address, "--json").stdout)["version"])
    result = command("stop", address)
    thread.join()
    assert result.exit_code == 0, result.output
    assert result.stdout == f"the cluster at {address} has ended\n"
    error = raised.get(timeout=10)
    assert isinstance(error, hw.errors.ClusterEndedError)
    assert re.search(r"was ended by headwater stop \(.*pid \d+ on ", str(error))
    assert command("checkpoint", "list", tmp_path).exit_code == 0


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
    assert (statistics["workers"], statistics["servers"], statistics["finished"]) == (1, 2, [])
    assert set(last) == {"role", "rank", "pid", "address", "term", "version", "waits_for", "silence"}
    assert statistics["metrics"]["headwater_version"] == [{"labels": {}, "value": 1}]
    assert statistics["version"] == 1
    assert statistics["models"][0]["name"] == "mine"
    first, second, *tables = as_table.stdout.splitlines()
    assert first == "healthy"
    assert second.startswith("sync, version 1, generation 0, term ")
    assert [line.split()[:2] for line in tables[1:5]] == [
        ["coordinator", str(os.getpid())],
        ["server", "0"],
        ["server", "1"],
        ["worker", "0"],
    ]
    assert any(line.startswith("mine") for line in tables)
    assert all(len(line) <= 80 for line in as_table.stdout.splitlines())


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
    lines = ProgressLines(1, "job.py")
    lines.update(statistics(progress(10, 10.0)))
    late = progress(30, 14.0, waiting=4.5, staleness={1: 20, 3: 10})
    (line,) = lines.update(statistics(late))
    assert (line.steps, line.version) == (30, 60)
    assert line.rate == 5.0
    assert line.waiting == 0.5
    assert line.staleness == 2.0  # ten steps of 1 and ten of 3 since the last report
    assert line.left == (800 - 240) * 14.0 / 240


def test_every_worker_has_a_line_from_the_beginning_that_says_what_is_waited_for():
    lines = ProgressLines(3, "jobs/train.py")
    assert [line.phase for line in lines.starting()] == ["starts"] * 3
    joined = statistics(waits_for="register 'net' waits for workers 1, 2 to join")
    waiting = msgspec.structs.replace(joined, joining=("worker 1 (pid 7 on here) waits for server 0",))
    assert [line.phase for line in lines.update(waiting)] == [
        "register 'net' waits for workers 1, 2 to join",
        "waits for server 0",
        "imports train.py",
    ]
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    with LiveDisplay(console, workers=3, script="train.py"):
        pass
    assert out.getvalue().count("starts") % 3 == 0 < out.getvalue().count("starts")


def test_a_worker_that_does_not_move_says_whom_it_waits_for():
    lines = ProgressLines(1, "job.py")
    waiting = statistics(progress(10, 10.0), waits_for="worker 1")
    assert lines.update(waiting)[0].waits_for is None
    assert lines.update(waiting)[0].waits_for == "worker 1"
    assert lines.update(waiting)[0].rate == 1.0


def test_a_restarted_worker_begins_anew():
    lines = ProgressLines(1, "job.py")
    lines.update(statistics(progress(10, 10.0)))
    (line,) = lines.update(statistics(progress(4, 2.0, member=9)))
    assert line.rate == 2.0


def test_plain_lines_come_every_five_seconds():
    now, out = [0.0], io.StringIO()
    with PlainDisplay(
        Console(file=out, width=40), workers=1, script="job.py", clock=lambda: now[0]
    ) as display:
        for second in range(11):
            now[0] = float(second)
            display.show(statistics(progress(second, float(second))))
    assert out.getvalue().splitlines() == [
        "worker 0: step 5, 1.0 steps/s, loss=0.5, version 10, staleness 1.0, 25% waiting, 1:35 left",
        "worker 0: step 10, 1.0 steps/s, loss=0.5, version 20, staleness 1.0, 25% waiting, 1:30 left",
    ]


def test_live_table_stays_below_the_lines_of_nodes():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    with LiveDisplay(console, workers=1, script="job.py") as display:
        display.show(statistics(progress(10, 10.0)))
        display.log("[worker 0] hello [bold]there[/bold]")
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


LONG = [
    *("follow", "models", "observe", "predictions", "programs"),
    *("rows", "safety", "soak", "splits", "steps", "table"),
]
"""Suites whose cases take long to set up, however little is measured."""


@pytest.mark.parametrize(
    "suite", [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in SUITES]
)
def test_every_suite_measures_figures_and_limits(command, monkeypatch, suite):
    monkeypatch.setattr(cli_bench, "QUICK", TINY)
    monkeypatch.setattr(latency, "_PINNINGS", {"one core": (0, 0)})
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


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["checkpoint", "now", "unix:@nobody", "--wait", "inf"], "--wait must be ≥ 0 seconds"),
        (["trace", "unix:@nobody", "--seconds", "inf"], "--seconds must be > 0 seconds"),
    ],
)
def test_an_endless_time_is_refused_before_anybody_is_asked(command, words, complaint):
    result = command(*words)
    assert result.exit_code == 2
    assert complaint in result.stderr
