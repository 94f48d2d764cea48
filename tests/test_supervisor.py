"""What a cluster starts again, what it gives up, and what it says: without a process, an engine that is
told."""

import time

import pytest

from headwater import supervisor as module
from headwater.engines import Outcome
from headwater.engines.engine import Failure
from headwater.errors import ConfigurationError, EngineError, RefusedError
from headwater.machines.roster import Departure
from headwater.messages import Member
from headwater.supervisor import REWINDS, STARTS, Supervisor

HOST = "here"


class Engine:
    """Ends what the test says, and keeps what it was asked for."""

    nearby = True

    def __init__(self):
        self.ended, self.killed, self.stops = [], [], 0

    def next_outcome(self, timeout):
        return self.ended.pop(0) if self.ended else None

    def end_process(self, process, why):
        self.killed.append(process)

    def stop_servers(self):
        self.stops += 1


class Coordinator:
    """Knows the processes that the test says, and keeps with what it ended."""

    def __init__(self):
        self.met, self.told = set(), []

    def has_met(self, process):
        return process in self.met

    def end(self, error, reason):
        self.told.append((error, reason))


class Case:
    """A supervisor in the test's own thread: `look` makes it look once."""

    def __init__(self, *, replicas=0, rewind=None):
        self.engine, self.coordinator, self.starts = Engine(), Coordinator(), []
        self.supervisor = Supervisor(
            self.engine,
            lambda role, index: self.starts.append((role, index)),
            coordinator=lambda: self.coordinator,
            servers=2,
            replicas=replicas,
            rewind=rewind,
        )

    def end(self, role, index, pid, error=None, summary="its process ended with signal SIGKILL"):
        failure = Failure(summary, "", error, died=error is None)
        self.engine.ended.append(Outcome(role, index, failure=failure, process=(pid, HOST)))
        self.look()

    def depart(self, role, index, pid, heir=None):
        self.supervisor.departures.put(Departure(Member(pid, role, index, pid, HOST), heir))
        self.look()

    def look(self):
        self.supervisor._look()


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.0)


def test_a_server_that_dies_before_it_joined_ends_a_cluster_without_copies_with_the_reason():
    case = Case()
    case.end("server", 1, 11)
    text = "server 1: its process ended with signal SIGKILL, before it had joined"
    with pytest.raises(EngineError, match=text):
        case.supervisor.next_outcome(0)
    assert case.coordinator.told == [("EngineError", text)]
    assert not case.starts


@pytest.mark.parametrize("options", [{"replicas": 1}, {"rewind": lambda: ""}])
def test_with_copies_it_is_started_again_a_limited_number_of_times(options):
    case = Case(**options)
    for pid in range(STARTS - 1):
        case.end("server", 0, pid)
        assert case.starts == [("server", 0)] * (pid + 1)
        assert case.supervisor.next_outcome(0) is None
    case.end("server", 0, STARTS)
    with pytest.raises(EngineError, match=rf"server 0: .*SIGKILL, .* \({STARTS} of {STARTS} starts\)"):
        case.supervisor.next_outcome(0)
    assert [error for error, _ in case.coordinator.told] == ["EngineError"]


def test_what_would_be_the_same_again_is_not_tried_again():
    case = Case(replicas=1)
    case.end("server", 0, 1, ConfigurationError("no such rule"), "ConfigurationError: no such rule")
    with pytest.raises(EngineError, match="no such rule"):
        case.supervisor.next_outcome(0)


def test_a_standby_that_dies_before_it_joined_is_started_again_for_as_long_as_it_takes():
    case = Case(replicas=1)
    for pid in range(3 * STARTS):
        case.end("standby", 1, pid)
    assert case.starts == [("standby", 1)] * 3 * STARTS
    assert case.supervisor.next_outcome(0) is None


def test_it_is_started_again_after_ever_longer_pauses(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.2)
    case = Case(replicas=1)
    began = time.monotonic()
    for pid in range(12):
        case.end("standby", 1, pid)
    pauses = [due - began for due, _, _ in case.supervisor._due]
    assert not case.starts
    assert pauses[0] == pytest.approx(0.2, abs=0.1)
    assert pauses[5] == pytest.approx(6.4, abs=0.2)
    assert pauses[-1] == pytest.approx(60.0, abs=0.5)


def test_a_standby_whose_place_another_one_has_is_not_started_again():
    case = Case(replicas=1)
    case.end("standby", 1, 5, RefusedError("standby index 1 is taken"))
    assert not case.starts


@pytest.mark.parametrize("first", ["end", "departure"])
def test_what_follows_from_the_end_of_a_member_follows_from_its_departure_once(first):
    case = Case(replicas=1)
    case.coordinator.met.add((7, HOST))
    if first == "end":
        case.end("standby", 0, 7)
        assert not case.starts
        case.depart("standby", 0, 7)
    else:
        case.depart("standby", 0, 7)
        case.end("standby", 0, 7)
    case.look()
    assert case.starts == [("standby", 0)]


@pytest.mark.parametrize("first", ["end", "departure"])
def test_without_copies_the_end_of_a_member_ends_the_cluster_with_what_its_process_ended_with(first):
    case = Case()
    case.coordinator.met.add((7, HOST))
    if first == "departure":
        case.depart("server", 0, 7)
    case.end("server", 0, 7)
    with pytest.raises(EngineError, match="server 0: its process ended with signal SIGKILL"):
        case.supervisor.next_outcome(0)
    assert case.coordinator.told[0][0] == "ClusterEndedError"


def test_a_server_that_died_while_the_others_were_awaited_is_started_again_once_its_place_is_free():
    case = Case(replicas=1)
    case.coordinator.met.add((7, HOST))
    case.end("server", 0, 7)
    assert not case.starts
    case.coordinator.met.clear()  # the coordinator has noticed, and gave up its place
    case.look()
    case.look()
    assert case.starts == [("server", 0)]


def test_the_process_of_a_member_that_was_declared_dead_is_killed_whatever_it_was():
    case = Case(replicas=1)
    case.depart("worker", 3, 31)
    case.depart("standby", 1, 32)
    case.depart("server", 0, 33, heir=Member(9, "standby", 0, 9, HOST))
    assert case.engine.killed == [(31, HOST), (32, HOST), (33, HOST)]
    assert case.starts == [("standby", 1), ("standby", 0)]


def lose_everything(case, times, pid=100):
    for _ in range(times):
        case.depart("server", 0, pid)


def test_training_does_not_begin_anew_for_ever_from_one_checkpoint():
    case = Case(rewind=lambda: "runs/g000-v000000010")
    case.coordinator.met.add((100, HOST))
    case.end("server", 0, 100, summary="its process ended with exit code 1")
    lose_everything(case, REWINDS)
    assert case.engine.stops == REWINDS
    assert case.starts == [("server", 0), ("server", 1)] * REWINDS
    with pytest.raises(EngineError, match=r"lost 5 times in a row since runs/g000-v000000010.*exit code 1"):
        lose_everything(case, 1)


def test_each_new_checkpoint_gives_new_beginnings():
    paths = iter(range(100))
    case = Case(rewind=lambda: f"runs/{next(paths)}")
    lose_everything(case, 5 * REWINDS)
    assert case.engine.stops == 5 * REWINDS


def test_a_server_lost_with_its_standby_ends_a_cluster_without_checkpoints():
    case = Case(replicas=1)
    case.depart("server", 1, 8)
    with pytest.raises(EngineError, match="server 1 is gone, and its standby had not caught up"):
        case.supervisor.next_outcome(0)


@pytest.mark.parametrize("error", [EngineError("no room"), ZeroDivisionError("a fault of ours")])
def test_whatever_goes_wrong_in_its_thread_ends_the_cluster_with_the_reason(error, monkeypatch):
    case = Case(replicas=1)

    def fails(timeout):
        raise error

    monkeypatch.setattr(case.engine, "next_outcome", fails)
    if not isinstance(error, EngineError):
        with pytest.raises(ZeroDivisionError):
            case.supervisor._run()
    else:
        case.supervisor._run()
    with pytest.raises(EngineError, match=str(error)):
        case.supervisor.next_outcome(0)
    assert case.coordinator.told
