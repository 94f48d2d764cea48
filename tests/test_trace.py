"""Traces: valid files, slices that nest, flows with both ends, causes before effects; clocks, ends and full
disks."""

import errno
import json
import threading
from collections import defaultdict

import numpy as np
import pytest
from desks import Desk
from waiting import wait_until

import headwater as hw
from headwater.errors import ConfigurationError
from headwater.machines.coordinator.trace_collection import UNREAD
from headwater.messages import (
    Acknowledged,
    CollectTrace,
    Join,
    RecordTrace,
    TraceChunk,
    TraceEvent,
    TraceEvents,
    Welcome,
)
from headwater.observe.trace_file import TraceFile
from headwater.observe.tracer import Tracer, collect
from headwater.runtime.tracing import TraceRecorder


def train(worker):
    model = worker.model("m", {"x": np.zeros(8, np.float32)}, hw.SGD(lr=0.1))
    for batch in worker.batches(np.arange(40), 4):
        model.push({"x": np.full(8, batch[0], np.float32)})
        worker.step()
    worker.barrier()


@pytest.fixture(scope="module", params=["sync", "async"])
def traced(request, tmp_path_factory):
    """Events of two workers and two servers, all of whom recorded from before the first step, and what the
    workers came to."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"

    def run(worker):
        with worker:
            train(worker)

    with hw.Cluster(workers=2, servers=2, sync=request.param, trace=path) as cluster:
        collection, look = cluster._coordinator._machine.traces, cluster._coordinator._pump.look
        wait_until(lambda: look(lambda: collection._collecting))
        threads = [threading.Thread(target=run, args=(cluster.worker(),)) for _ in range(2)]
        wait_until(lambda: look(lambda: len(collection._recording) == 4 and not collection.unheard))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statistics = cluster.statistics()
    return json.loads(path.read_text()), statistics


PHASES = {
    "M": {"name", "pid", "tid", "args"},
    "X": {"name", "pid", "tid", "ts", "dur", "cat", "args"},
    "i": {"name", "pid", "tid", "ts", "cat", "s"},
    "s": {"name", "pid", "tid", "ts", "cat", "id"},
    "t": {"name", "pid", "tid", "ts", "cat", "id", "bp"},
    "f": {"name", "pid", "tid", "ts", "cat", "id", "bp"},
}
"""Keys by phase, of the Trace Event Format."""


def check_format(events):
    for event in events:
        assert set(event) == {"ph", *PHASES[event["ph"]]}, event
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        for number in event.keys() & {"ts", "dur"}:
            assert event[number] >= 0


def slices(events):
    return [event for event in events if event["ph"] == "X"]


def names(events, kind):
    return {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["ph"] == "M" and event["name"] == kind
    }


def end(event):
    return event["ts"] + event["dur"]


def flows(events):
    found = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            found[event["id"]].append(event)
    return found


def test_a_trace_is_valid_and_names_every_process_and_thread(traced):
    events, _ = traced
    check_format(events)
    processes = names(events, "process_name")
    assert {name.partition(" (")[0] for name in processes.values()} >= {
        "worker 0", "worker 1", "server 0", "server 1"
    }  # fmt: skip
    threads = names(events, "thread_name")
    assert {(event["pid"], event["tid"]) for event in events if event["ph"] not in "M"} <= threads.keys()
    assert {event["pid"] for event in events} - {0} <= {pid for pid, _ in processes}


def test_slices_of_a_thread_nest(traced):
    events, _ = traced
    by_thread = defaultdict(list)
    for event in slices(events):
        by_thread[event["pid"], event["tid"]].append(event)
    assert len(by_thread) > 4
    for own in by_thread.values():
        own.sort(key=lambda event: (event["ts"], -event["dur"]))
        outer = []
        for event in own:
            while outer and end(outer[-1]) <= event["ts"] + 1e-4:
                outer.pop()
            assert not outer or end(event) <= end(outer[-1]) + 1e-4, (outer[-1], event)
            outer.append(event)


def test_the_stages_of_every_turn_are_in_its_slice(traced):
    events, statistics = traced
    counts = defaultdict(int)
    for event in slices(events):
        counts[event["name"]] += 1
    steps = sum(sum(totals.steps.values()) for totals in statistics.totals)
    assert steps == 10 if statistics.sync == "sync" else steps >= 10
    for name in ("turn", "step", "push", "wait", "pull", "stage gradients", "Step"):
        expected = 2 * steps if name == "Step" else steps
        assert counts[name] == expected, name
    assert counts["data"] >= steps
    assert counts["meeting"] == 2


def test_every_flow_has_both_ends_and_passes_every_server(traced):
    events, statistics = traced
    found = flows(events)
    assert len(found) == sum(sum(totals.steps.values()) for totals in statistics.totals)
    processes = {pid: name for (pid, _), name in names(events, "process_name").items()}
    for parts in found.values():
        kinds = [part["ph"] for part in parts]
        assert (kinds[0], kinds[-1]) == ("s", "f")
        assert set(kinds[1:-1]) == {"t"}
        assert parts[0]["pid"] == parts[-1]["pid"]
        servers = {processes[part["pid"]].partition(" (")[0] for part in parts[1:-1]}
        assert servers == {"server 0", "server 1"}
        assert [part["ts"] for part in parts] == sorted(part["ts"] for part in parts)


def test_no_answer_comes_before_its_commit_and_no_commit_before_its_request(traced):
    events, _ = traced
    commits = {
        (event["pid"], event["tid"], event["ts"]): event
        for event in slices(events)
        if event["name"].startswith("commit ")
    }
    assert len(commits) >= 10
    joined = 0
    for parts in flows(events).values():
        for part in parts[1:-1]:
            commit = commits.get((part["pid"], part["tid"], part["ts"]))
            if commit is not None:
                joined += 1
                assert parts[0]["ts"] <= commit["ts"] <= parts[-1]["ts"]
    assert joined >= 20


def test_who_joined_is_in_the_trace_and_clocks_say_their_error(traced):
    events, _ = traced
    notes = [event["name"] for event in events if event["ph"] == "i"]
    for rank in range(2):  # servers join before or after the coordinator begins to record
        assert any(note.startswith(f"worker {rank} ") and "has joined" in note for note in notes)
    about = [event["args"] for event in events if event["name"] == "process_name"]
    assert all(args["clock_error_us"] >= 0 for args in about)
    (whole,) = [event["args"] for event in events if event["name"] == "headwater_trace"]
    assert whole["dropped_events"] == 0


# ── who collects, and when it ends ──────────────────────────────────────────────────────────────


def event(began, name="x", lasted=5):
    return TraceEvent("main", name, began, lasted)


def asked(node):
    return [message for message in node.said if isinstance(message, RecordTrace)]


def chunks(node):
    """Without the coordinator's own."""
    return [message for message in node.said if isinstance(message, TraceChunk) and message.member]


def test_members_record_while_somebody_collects_and_those_that_come_later_too():
    desk = Desk(workers=2)
    server, worker = desk.running("worker")
    assert not asked(worker)
    collector = desk.connect().say(CollectTrace(5.0))
    assert asked(server)[0].seconds >= 5.0
    later = desk.joins("worker", 1)
    (told,) = asked(later)
    assert told.clock == round(desk.now * 1e9)
    desk.now += 0.004
    later.say(TraceEvents(clock=1_000, echo=told.clock))
    later.say(TraceEvents(clock=2_000, events=(event(1_500),)))
    (chunk,) = chunks(collector)
    assert (chunk.role, chunk.index, chunk.events) == ("worker", 1, (event(1_500),))
    assert chunk.error == 2_000_000, "half of the time there and back"
    assert chunk.ahead == told.clock + 2_000_000 - 1_000
    desk.passes(5.5)
    assert [message.seconds for message in (asked(server)[-1], asked(later)[-1])] == [0.0, 0.0]
    for node in (server, worker):
        node.say(TraceEvents(clock=3_000, last=True))
    assert collector.last(Acknowledged) is None, "one has not said its last"
    later.say(TraceEvents(clock=3_000, events=(event(2_500),), last=True))
    assert chunks(collector)[-1].events == (event(2_500),)
    assert collector.last(Acknowledged) is not None
    assert not collector.closed, "it may not have read everything yet"
    later.say(TraceEvents(clock=3_000, events=(event(2_600),)))
    assert chunks(collector)[-1].events == (event(2_500),), "nothing follows the end"
    collector.hangs_up()


def test_a_node_is_asked_once_it_is_welcome_and_not_before():
    desk = Desk(servers=2)
    early = desk.joins("server", 0)
    desk.connect().say(CollectTrace(9.0))
    assert not asked(early), "it would not know what to make of it"
    desk.joins("server", 1)
    kinds = [type(message) for message in early.said]
    assert kinds.index(RecordTrace) > kinds.index(Welcome)
    assert len(asked(early)) == 1


def test_a_collection_ends_early_when_asked_to_and_does_not_wait_for_the_dead():
    desk = Desk(workers=2)
    server, worker, other = desk.running("worker", "worker")
    collector = desk.connect().say(CollectTrace(1e8))
    server.say(TraceEvents(clock=1, last=True))
    collector.say(CollectTrace(0.0))
    assert asked(worker)[-1].seconds == 0.0
    worker.hangs_up()
    assert collector.last(Acknowledged) is None
    own = [message for message in collector.said if isinstance(message, TraceChunk) and not message.member]
    assert any("is gone without leaving" in one.name for chunk in own for one in chunk.events)
    desk.passes(2.1)
    assert collector.last(Acknowledged) is not None, "the other says nothing, and is not waited for"
    assert not other.closed


def test_nobody_waits_for_the_last_words_of_a_member_that_is_dead():
    desk = Desk()
    server, worker = desk.running("worker")
    collector = desk.connect().say(CollectTrace(9.0))
    collector.say(CollectTrace(0.0))
    server.say(TraceEvents(clock=1, last=True))
    assert collector.last(Acknowledged) is None
    worker.hangs_up()
    assert collector.last(Acknowledged) is not None, "no time has passed"


def test_two_may_collect_at_a_time():
    desk = Desk()
    server, worker = desk.running("worker")
    first, second = desk.connect().say(CollectTrace(1.0)), desk.connect().say(CollectTrace(9.0))
    desk.passes(1.5)
    assert not [one for one in asked(worker) if not one.seconds], "the second goes on"
    worker.say(TraceEvents(clock=1, events=(event(1),)))
    assert len(chunks(second)) == 1
    desk.passes(2.0)
    assert first.last(Acknowledged) is not None
    assert second.last(Acknowledged) is None
    assert server.welcome is not None


def test_whoever_cannot_keep_up_is_told_how_much_was_dropped():
    desk = Desk()
    _, worker = desk.running("worker")
    collector = desk.connect().say(CollectTrace(1e8))
    for began in range(UNREAD + 7):
        worker.say(TraceEvents(clock=began, events=(event(began), event(began))))
    assert len(chunks(collector)) == UNREAD
    for _ in range(3):
        collector.say(Acknowledged())
    worker.say(TraceEvents(clock=1, events=(event(1),)))
    assert (len(chunks(collector)), chunks(collector)[-1].dropped) == (UNREAD + 1, 14)
    worker.say(TraceEvents(clock=2, events=(event(2),)))
    assert chunks(collector)[-1].dropped == 0


def test_clocks_of_one_machine_share_the_best_answer():
    desk = Desk(workers=2)
    _, worker, other = desk.running("worker", "worker")
    collector = desk.connect().say(CollectTrace(9.0))
    sent = asked(worker)[0].clock
    desk.now += 0.001
    worker.say(TraceEvents(clock=500, echo=sent))
    desk.now += 0.009
    other.say(TraceEvents(clock=10_000_500, echo=asked(other)[0].clock))
    other.say(TraceEvents(clock=10_000_900, events=(event(10_000_600),)))
    assert chunks(collector)[-1].error == 500_000
    ahead = chunks(collector)[-1].ahead
    late = desk.connect().say(CollectTrace(9.0))
    worker.say(TraceEvents(clock=20_000_000, echo=asked(worker)[-1].clock))
    worker.say(TraceEvents(clock=20_000_100, events=(event(20_000_050),)))
    told = chunks(late)[-1]
    assert (told.ahead, told.error) == (ahead, 500_000), "a better answer moves no slice"


def test_on_the_coordinators_own_machine_clocks_are_one():
    desk = Desk()
    desk.running()
    worker = desk.connect().say(Join("worker", 0, 7, "there", (), machine="here"))
    desk.machine.traces.machine = "here"
    collector = desk.connect().say(CollectTrace(9.0))
    desk.now += 0.5
    worker.say(TraceEvents(clock=1, echo=asked(worker)[0].clock))
    worker.say(TraceEvents(clock=2, events=(event(1),)))
    assert (chunks(collector)[-1].ahead, chunks(collector)[-1].error) == (0, 0)


# ── recording, and files ────────────────────────────────────────────────────────────────────────


def test_a_recorder_that_is_off_keeps_nothing_and_one_that_is_full_counts(monkeypatch):
    told, now = [], [0]
    recorder = TraceRecorder(told.append, lambda: now[0])
    recorder.slice("x", 0, 1)
    recorder.close()
    assert told == []
    monkeypatch.setattr("headwater.runtime.tracing._FLUSH_S", 1000.0)
    monkeypatch.setattr("headwater.runtime.tracing._WAITING", 3)
    recorder.obey(RecordTrace(5.0, 77))
    assert told.pop().echo == 77
    for began in range(5):
        recorder.slice("x", began, began + 1)
    recorder.obey(RecordTrace(0.0, 78))
    (last,) = told
    assert [one.began for one in last.events] == [0, 1, 2]
    assert (last.dropped, last.last) == (2, True)
    assert not recorder.on


def test_a_flow_without_both_ends_is_left_out():
    def part(began, place, *flows):
        return TraceEvent("main", "x", began, 5, flows, place)

    file = Full(1 << 20)
    trace = TraceFile(file)
    cut = (part(10, "begin", (1, 1)), part(20, "end", (1, 2)), part(30, "pass", (1, 1), (1, 2)))
    whole = (part(40, "begin", (1, 3)), part(50, "pass", (1, 3)), part(60, "end", (1, 3)))
    trace.add(TraceChunk(1, "worker", 0, 7, "here", 0, 0, (*whole, *cut)))
    trace.close()
    ((*kinds,),) = [[one["ph"] for one in parts] for parts in flows(json.loads(file.text)).values()]
    assert kinds == ["s", "t", "f"]


class Full:
    """A file on a disk that is full after so many characters."""

    def __init__(self, room):
        self.text, self._room = "", room

    def write(self, text):
        if len(self.text) + len(text) > self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.text += text

    def flush(self):
        pass


def test_what_was_written_before_a_disk_was_full_can_be_opened():
    file = Full(1500)
    trace = TraceFile(file)
    chunk = TraceChunk(1, "worker", 0, 7, "here", 0, 0, (event(1), event(2)))
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012 - which one fails is not said
        for _ in range(100):
            trace.add(chunk)
    events = json.loads(file.text.rstrip().rstrip(",") + "]")
    check_format(events)
    assert len(slices(events)) > 5


def test_a_full_disk_ends_the_trace_and_not_the_training(tmp_path, monkeypatch, caplog):
    def full(self, chunk):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TraceFile, "add", full)
    result = hw.run(train, workers=2, engine="inline", trace=tmp_path / "trace.json")
    assert result.version == 5
    assert "ends before its time: [Errno 28] No space left on device" in caplog.text


def test_a_file_that_cannot_be_written_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ConfigurationError, match="trace: cannot write to"):
        hw.run(train, trace=tmp_path / "none" / "trace.json")


def test_a_running_cluster_is_traced_for_a_while_and_again(tmp_path):
    with hw.Cluster(workers=1) as cluster, cluster.worker() as worker:
        model = worker.model("m", {"x": np.zeros(8, np.float32)}, hw.SGD(lr=0.1))
        for name in ("first.json", "second.json"):
            tracer = Tracer(cluster.address, tmp_path / name)
            while not worker.stages.trace.on:
                cluster.statistics()
            for _ in range(5):
                model.push({"x": np.ones(8, np.float32)})
                worker.step()
            tracer.close()
            assert not worker.stages.trace.on
            events = json.loads((tmp_path / name).read_text())
            assert sum(one["name"] == "turn" for one in slices(events)) == 5
            assert len(flows(events)) == 5


def test_what_is_no_coordinator_is_told(tmp_path):
    with hw.Cluster(workers=1) as cluster, cluster.worker():
        server = next(node for node in cluster.statistics().nodes if node.role == "server")
        with pytest.raises(hw.errors.ConnectionLostError, match="no trace comes from this address"):
            collect(server.address, 0.2, tmp_path / "trace.json")
