"""A machine over real connections: what it decides is carried out in order, and nothing more."""

import contextlib
import logging
import queue
import threading
import time

import pytest
from waiting import wait_until

from headwater.errors import ConfigurationError, JournalError, ProtocolError
from headwater.machines.actions import (
    BESIDE,
    Close,
    Dial,
    HandOver,
    Note,
    Pause,
    Perform,
    Persist,
    Resume,
    Send,
    Tell,
)
from headwater.messages import Acknowledged, Ask, CaughtUp, Finish, Heartbeat, Member, StandbyLost
from headwater.runtime.dialling import dial_member
from headwater.runtime.pump import Pump
from headwater.runtime.threads import ConnectionThreads
from headwater.wire.endpoint import LOCAL
from headwater.wire.listener import dial
from headwater.wire.security import PLAIN


class Script:
    """A machine that answers as `replies` says: by the type of a message, a function of its connection."""

    def __init__(self, **replies):
        self.due = None
        self.replies = replies
        self.heard = queue.SimpleQueue()

    def _reply(self, name, *arguments):
        self.heard.put((name, *arguments))
        reply = self.replies.get(name)
        return [] if reply is None else reply(*arguments)

    def opened(self, conn, dialled, now):
        return self._reply("opened", conn, dialled)

    def received(self, conn, message, payload, now, *, request=0):
        self.heard.put((type(message).__name__, conn, message))
        reply = self.replies.get(type(message).__name__)
        return [] if reply is None else reply(conn)

    def unreachable(self, dialled, why, now, *, nobody=False, refused=False):
        return self._reply("unreachable", dialled, nobody, refused)

    def closed(self, conn, now):
        return self._reply("closed", conn)

    def tick(self, now):
        self.due = None
        return self._reply("tick")

    def performed(self, tag, result, now):
        return self._reply("performed", tag, result)


class Owner:
    def __init__(self):
        self.done = []
        self.full = False
        self.failure = None

    def dial(self, member):
        return dial_member(member, timeout=5, security=PLAIN)

    def persist(self, record):
        if self.full:
            raise JournalError("the disk is full")
        self.done.append(record)

    def tell(self, event):
        self.done.append(event)

    def perform(self, task):
        if task is None:
            raise ConfigurationError("no task")
        return task * 2

    def failed(self, error):
        self.failure = error


class Node:
    """A pump with a listener; `hears` returns what the machine heard next."""

    def __init__(self, machine, **options):
        self.machine, self.owner = machine, Owner()
        self.threads = ConnectionThreads("headwater-test")
        self.pump = Pump(machine, self.owner, self.threads, **options)
        (self.address,) = self.threads.listen(LOCAL, self.pump.serve)
        self.pump.begin()

    def dial(self):
        return contextlib.closing(dial(self.address, timeout=10))

    def hears(self, name):
        while (heard := self.machine.heard.get(timeout=10))[0] != name:
            pass
        return heard[1:]

    def close(self):
        self.pump.stop()
        self.threads.close_channels()
        self.threads.join()


@pytest.fixture
def node():
    with contextlib.ExitStack() as stack:
        yield lambda machine=None, **options: stack.enter_context(
            contextlib.closing(Node(machine or Script(), **options))
        )


def told(channel):
    received = channel.receive(timeout=10)
    return received.message if received is not None else None


def test_actions_are_carried_out_in_the_order_in_which_they_were_decided(node):
    def reply(conn):
        return [Persist("first"), Send(conn, CaughtUp(1)), Tell("second"), Send(conn, CaughtUp(2))]

    made = node(Script(Heartbeat=reply))
    with made.dial() as channel:
        for _ in range(3):
            channel.send(Heartbeat())
        assert [told(channel) for _ in range(6)] == [CaughtUp(1), CaughtUp(2)] * 3
    assert made.owner.done == ["first", "second"] * 3


def test_what_leads_to_a_send_over_another_connection_does_not_wait_for_its_peer(node):
    """The peer of the other connection reads nothing, however much it is sent."""
    made = node(Script(Heartbeat=lambda conn: [Send(conn, Acknowledged())]))
    with made.dial() as deaf, made.dial() as other:
        deaf.send(Heartbeat())
        conn, _ = made.hears("Heartbeat")
        made.machine.replies["Finish"] = lambda _: [Send(conn, CaughtUp(1)) for _ in range(20_000)]
        other.send(Finish(0, 0, False))
        other.send(Heartbeat())
        assert told(other) == Acknowledged()


def test_a_record_that_cannot_be_kept_stops_everything_that_follows(node):
    made = node(Script(Heartbeat=lambda conn: [Persist(1), Send(conn, Acknowledged()), Tell("told")]))
    made.owner.full = True
    with made.dial() as channel:
        channel.send(Heartbeat())
        wait_until(lambda: made.owner.failure)
        assert str(made.owner.failure) == "the disk is full"
        channel.send(Heartbeat())
        with pytest.raises(TimeoutError):
            channel.receive(timeout=0.1)
    assert made.owner.done == []


def test_after_a_close_the_peer_hears_what_was_sent_before_and_the_machine_nothing_but_the_end(node):
    made = node(Script(Heartbeat=lambda conn: [Send(conn, CaughtUp(1)), Close(conn)]))
    with made.dial() as channel:
        channel.send(Heartbeat())
        assert told(channel) == CaughtUp(1)
        assert told(channel) is None
        channel.send(StandbyLost(1))
    assert made.hears("Heartbeat")
    assert made.machine.heard.get(timeout=10)[0] == "closed"


def test_a_peer_that_does_not_hear_of_the_end_is_cut_off(node, monkeypatch):
    monkeypatch.setattr("headwater.runtime.pump.GOODBYE_S", 0.05)
    made = node(Script(Heartbeat=lambda conn: [Close(conn)]))
    with made.dial() as channel:
        channel.send(Heartbeat())
        assert made.hears("closed") == (1,)


def test_a_message_that_breaks_the_protocol_ends_its_connection_alone(node, caplog):
    def refuses(conn):
        raise ProtocolError("that is no question")

    made = node(Script(Ask=refuses, Heartbeat=lambda conn: [Send(conn, Acknowledged())]))
    with made.dial() as good, made.dial() as bad:
        bad.send(Ask())
        assert told(bad) is None
        good.send(Heartbeat())
        assert told(good) == Acknowledged()
    wait_until(lambda: "that is no question" in caplog.text)


def test_time_passes_for_the_machine_when_it_is_due(node):
    machine = Script(tick=lambda: [Tell("ticked")])
    made = node(machine)

    def wait(now):
        machine.due = now + 0.01
        return []

    for ticks in (1, 2):
        made.pump.do(wait)
        wait_until(lambda ticks=ticks: made.owner.done == ["ticked"] * ticks)


def test_a_dial_ends_with_a_connection_or_with_the_reason(node):
    other = node(Script(opened=lambda conn, dialled: [Send(conn, CaughtUp(7))]))
    made = node()
    here, nobody = (
        Member(1, "server", 0, 1, "here", (address,)) for address in (other.address, "unix:@headwater-nobody")
    )
    made.pump.do(lambda now: [Dial(here, "here")])
    conn, tag = made.hears("opened")
    assert tag == "here"
    assert made.hears("CaughtUp") == (conn, CaughtUp(7))
    made.pump.do(lambda now: [Dial(nobody, "there")])
    assert made.hears("unreachable") == ("there", True, False)
    made.pump.do(lambda now: [Close(conn)])
    assert made.hears("closed") == (conn,)


def test_what_takes_long_is_done_beside_and_its_error_is_a_result(node):
    made = node()
    made.pump.do(lambda now: [Perform(21, "good"), Perform(None, "bad")])
    results = dict(made.hears("performed") for _ in range(2))
    assert results["good"] == 42
    assert isinstance(results["bad"], ConfigurationError)


def test_the_owner_asks_as_a_peer_does(node):
    made = node(Script(Ask=lambda conn: [Send(conn, CaughtUp(conn)), Close(conn)]))
    assert made.pump.ask(Ask(), 10) == CaughtUp(1)
    assert made.hears("closed") == (1,)
    assert made.pump.ask(Heartbeat(), 0.01) is None
    made.pump.stop()
    assert made.pump.ask(Ask(), 10) is None


def test_whoever_asks_is_told_when_all_stops(node):
    made = node()
    answers = queue.SimpleQueue()
    asking = threading.Thread(target=lambda: answers.put(made.pump.ask(Ask(), 60)))
    asking.start()
    made.hears("Ask")
    made.pump.stop()
    assert answers.get(timeout=10) is None
    asking.join()


def test_nothing_is_taken_from_a_paused_connection(node):
    made = node(Script(Ask=lambda conn: [Pause(conn)]))
    with made.dial() as channel:
        channel.send(Ask())
        channel.send(Heartbeat())
        made.hears("Ask")
        with pytest.raises(queue.Empty):
            made.machine.heard.get(timeout=0.05)
        made.pump.do(lambda now: [Resume(1)])
        made.hears("Heartbeat")


def test_a_connection_that_is_handed_over_goes_on_with_the_other_machine(node):
    other = node(Script(Heartbeat=lambda conn: [Send(conn, CaughtUp(2))]))
    made = node(
        Script(Ask=lambda conn: [Send(conn, CaughtUp(1)), HandOver(conn, "link"), Send(conn, CaughtUp(9))]),
        other=other.pump,
    )
    with made.dial() as channel:
        channel.send(Ask())
        assert told(channel) == CaughtUp(1)
        assert other.hears("opened") == (1, "link")
        channel.send(Heartbeat())
        assert told(channel) == CaughtUp(2)
    assert other.hears("closed") == (1,)
    assert made.machine.heard.qsize() == 2, "it hears nothing of the end"


def test_notes_go_into_the_log_of_the_node(node, caplog):
    caplog.set_level(logging.INFO, "headwater.coordinator")
    made = node(log=logging.getLogger("headwater.coordinator"))
    made.pump.do(lambda now: [Note("a plain line"), Note("a warning", "warning")])
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "a plain line"),
        ("WARNING", "a warning"),
    ]


def test_what_was_to_be_sent_has_left_after_a_flush(node):
    made = node(Script())
    with made.dial() as channel:
        made.hears("opened")
        made.pump.do(lambda now: [Send(1, CaughtUp(number)) for number in range(100)] + [Close(1)])
        made.pump.flush()
        made.pump.stop()
        made.threads.close_channels()
        assert [told(channel) for _ in range(101)] == [*(CaughtUp(number) for number in range(100)), None]


def both(conn):
    """To the other machine of the node first, and then to whoever said it."""
    return [Send(BESIDE, CaughtUp(1)), Send(conn, Acknowledged())]


def test_what_was_left_to_somebody_who_only_looked_is_done(node):
    """Whoever finds a machine busy leaves its work to the one inside, who has come for another reason."""
    second = node()
    first = node(Script(Heartbeat=both), other=second.pump)
    with first.dial() as channel:

        def meanwhile():
            channel.send(Heartbeat())
            return told(channel)

        assert second.pump.look(meanwhile) == Acknowledged()
        assert second.hears("CaughtUp")[1] == CaughtUp(1)


def test_what_was_left_to_a_decision_that_fails_is_done(node):
    second = node()
    first = node(Script(Heartbeat=both), other=second.pump)
    with first.dial() as channel:

        def meanwhile(now):
            channel.send(Heartbeat())
            assert told(channel) == Acknowledged()
            raise ProtocolError("what it came for cannot be")

        with pytest.raises(ProtocolError, match="cannot be"):
            second.pump.do(meanwhile)
        assert second.hears("CaughtUp")[1] == CaughtUp(1)


def test_what_was_left_to_the_thread_that_keeps_time_is_done(node):
    """It wakes up at any moment, so it must not be what others find the machine busy with."""
    armed = threading.Event()

    def clock():
        if armed.is_set() and threading.current_thread().name.endswith("-time"):
            armed.clear()
            told(channel)  # whoever has woken this up is through
            meanwhile.send(Heartbeat())
            acknowledged.put(told(meanwhile))
        return time.monotonic()

    def wake(conn):
        second.machine.due = second.machine.due or time.monotonic() + 60
        return []

    acknowledged = queue.SimpleQueue()
    second = node(Script(CaughtUp=wake), clock=clock)
    first = node(Script(Heartbeat=both), other=second.pump)
    with first.dial() as channel, first.dial() as meanwhile:
        armed.set()
        channel.send(Heartbeat())
        assert acknowledged.get(timeout=10) == Acknowledged()
        assert [second.hears("CaughtUp")[1] for _ in range(2)] == [CaughtUp(1)] * 2


class Growing(Script):
    """A machine with a piece of work after each message, and memory to prepare that takes for ever."""

    def __init__(self, **replies):
        super().__init__(**replies)
        self.pieces, self.unprepared = 0, False
        self.begun, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        self.preparing = set()

    @property
    def busy(self):
        return self.pieces > 0

    def received(self, conn, message, payload, now, *, request=0):
        self.pieces += 1
        return super().received(conn, message, payload, now, request=request)

    def advance(self, now):
        self.pieces -= 1
        self.unprepared = True
        return []

    def prepare(self):
        self.unprepared = False
        self.preparing.add(threading.current_thread())
        self.begun.release()
        self.go_on.acquire()


def test_nobody_waits_while_memory_is_prepared_and_the_node_can_be_stopped_meanwhile(node):
    machine = Growing(Heartbeat=lambda conn: [Send(conn, Acknowledged())])
    made = node(machine)
    with made.dial() as channel:
        channel.send(Heartbeat())
        assert told(channel) == Acknowledged()
        assert machine.begun.acquire(timeout=10)
        for _ in range(5):  # each is another piece, after which there is something to prepare
            channel.send(Heartbeat())
            assert told(channel) == Acknowledged()
        machine.go_on.release()
        assert machine.begun.acquire(timeout=10), "what was asked for meanwhile is prepared afterwards"
        assert len(machine.preparing) == 1
    made.pump.stop()
    machine.go_on.release()
