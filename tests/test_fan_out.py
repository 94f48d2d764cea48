"""The readers of a served follower: who is taken in, what each is sent or lent, when memory is used again."""

import pytest
from clusters import model_spec
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.machines.actions import Close, Perform, Send, Tell
from headwater.machines.fan_out import (
    ASK_S,
    MOST_LENT,
    ROOM,
    SLOW_S,
    AskNewest,
    FanOutMachine,
    Offer,
    Released,
)
from headwater.machines.follower import FollowerMachine
from headwater.shard.version_copy import VersionCopy
from headwater.spec.rules import Accumulate

MODEL = model_spec(shapes={"w": (4,)}, rules=(Accumulate(),))
OWN = m.Member(0, "server", 0, 1, "here", ("tcp:here:1",))
THERE = m.Description(0, 0, (m.ModelInfo(0, MODEL),))


class World:
    """A follower that shows what it is told to, and readers of it. All values of a version are its number."""

    def __init__(self, lends=True):
        self.follower = FollowerMachine(2, elastic=True)
        self.follower.joined(0, lambda: VersionCopy({0: MODEL}, {}, "float32", 1))
        self.machine = FanOutMachine(OWN, "c", "tcp:cluster:1", "float32", lambda conn: lends)
        self.now, self.conns, self.told, self.closed = 0.0, 0, {}, set()
        self.show(1)

    def do(self, actions):
        for action in actions:
            if isinstance(action, Send):
                self.told.setdefault(action.conn, []).append((action.message, action.buffers))
            elif isinstance(action, Close):
                self.closed.add(action.conn)
            elif isinstance(action, Perform):
                self.do(self.machine.performed(action.tag, action.task.make(), self.now))
            elif isinstance(action, Tell) and isinstance(action.event, Released):
                if not action.event.reusable:
                    self.follower.give_up(action.event.slot)
                self.follower.unpin(action.event.slot)
            elif isinstance(action, Tell):
                assert isinstance(action.event, AskNewest)
                self.asks = True

    def show(self, number, generation=0):
        """The follower has version `number`."""
        follower = self.follower
        if generation != follower.generation:
            follower.joined(generation, lambda: VersionCopy({0: MODEL}, {}, "float32", 1))
        fill = follower.begin()
        fill.begin()
        fill.request(0, 1, "float32", 0)
        part = m.Publication(1, number, number, (0,))
        (place,) = fill.slot.copy.place(0, part)
        place[...] = number
        follower.arrived(fill.install([part]), self.now)
        slot = follower.pin()
        shared = m.SharedVersion(16, (m.SharedModel(0, 0),), ())
        offer = Offer(slot, slot.version, (), THERE, {}, shared, memory=slot)
        self.do(self.machine.shown(offer, self.now))

    def reader(self):
        """The connection over which a reader that has joined asks for versions."""
        welcome, _ = self.say(m.Join("observer", None, 1, "there"))[0][-1]
        assert welcome.keeps == "float32"
        return self.say(m.Hello(welcome.member.id, "observer", 1, 0, "c"))[1]

    def say(self, message, conn=None):
        if conn is None:
            self.conns += 1
            conn = self.conns
            self.do(self.machine.opened(conn, None, self.now))
        self.told.pop(conn, None)
        self.do(self.machine.received(conn, message, None, self.now))
        return self.told.get(conn, []), conn

    def ask(self, conn, *, have=-1, at=0, shared=False):
        """What comes at once of a request for a version; None: nothing."""
        told, _ = self.say(m.Publish(1, (m.Wanted(0, have),), (), "float32", at, shared), conn)
        return told[-1] if told else None

    def close(self, conn):
        self.do(self.machine.closed(conn, self.now))


def version_of(told):
    """Of what was sent: its version, which is also what its values say."""
    said, arrays = told
    assert [set(array.tolist()) for array in arrays] == [{said.version}] * len(said.models)
    return said.version


def test_a_reader_is_sent_what_has_changed_since_its_version():
    world = World()
    conn = world.reader()
    assert version_of(world.ask(conn)) == 1
    world.say(m.Taken(2), conn)
    world.show(2)
    told = world.ask(conn, have=1)
    assert version_of(told) == 2
    assert told[0].models == (0,)
    world.say(m.Taken(2), conn)
    assert world.ask(conn, have=2)[0].models == ()


def test_who_wants_a_later_version_has_it_as_soon_as_it_is_shown():
    world = World()
    conn = world.reader()
    assert world.ask(conn, at=3) is None
    world.show(2)
    assert conn not in world.told
    world.show(3)
    assert version_of(world.told[conn][-1]) == 3


def test_a_version_says_how_old_it_was_when_it_left():
    world = World()
    conn = world.reader()
    world.now = 7.0
    assert world.ask(conn)[0].age == 7.0
    assert world.ask(conn, shared=True)[0].age == 7.0


def test_which_version_is_the_newest_is_asked_for_and_waited_for_but_not_for_ever():
    world = World()
    conn = world.reader()
    world.now, world.asks = 10.0, False
    assert world.say(m.Describe(1), conn)[0] == []
    assert world.asks
    world.do(world.machine.heard(5, 9.5, world.now))  # before it was asked
    assert conn not in world.told
    world.do(world.machine.heard(6, 10.5, world.now))
    said = world.told[conn][-1][0]
    assert (said.version, said.age, said.models) == (6, 0.0, THERE.models)
    world.now = 20.0
    world.say(m.Describe(2), conn)
    world.now = world.machine.due
    assert world.now == 20.0 + ASK_S
    world.do(world.machine.tick(world.now))
    assert world.told[conn][-1][0].age == 9.5  # the cluster is away


def test_memory_that_is_lent_is_not_written_before_its_reader_lets_it_go():
    world = World()
    conn = world.reader()
    lent = world.ask(conn, shared=True)[0]
    assert (lent.version, lent.shared.models) == (1, (m.SharedModel(0, 0),))
    (first,) = [slot for slot in world.follower._slots if slot.version]
    for number in range(2, 8):
        world.show(number)
        assert set(first.copy.vectors[0].tolist()) == {1}
    world.say(m.Taken(2, keeps=()), conn)
    assert not first.pins
    for number in range(8, 12):
        world.show(number)
    assert len(world.follower._slots) == 3  # what was made meanwhile is gone
    assert world.machine.given_up == 0


def test_memory_of_a_reader_that_is_gone_is_its_own():
    world = World()
    conn = world.reader()
    world.ask(conn, shared=True)
    (first,) = [slot for slot in world.follower._slots if slot.version]
    world.close(conn)
    for number in range(2, 9):
        world.show(number)
    assert set(first.copy.vectors[0].tolist()) == {1}
    assert first not in world.follower._slots
    assert world.machine.given_up == 1


def test_a_reader_that_never_lets_go_holds_what_it_has_and_no_more():
    world = World()
    keeps, lets_go = world.reader(), world.reader()
    world.ask(keeps, shared=True)
    for number in range(2, 50):
        world.show(number)
        assert world.ask(lets_go, shared=True)[0].version == number
        world.say(m.Taken(2, keeps=(number,)), lets_go)
        assert world.machine.kept <= 3
        assert len(world.follower._slots) <= 4


def test_a_reader_cannot_have_every_version_there_ever_was():
    world = World()
    conn = world.reader()
    for number in range(2, MOST_LENT + 4):
        world.ask(conn, shared=True)
        world.show(number)
    assert conn in world.closed


def test_slow_readers_leave_room_for_others_or_are_cut_off():
    world = World(lends=False)
    slow = [world.reader() for _ in range(ROOM)]
    for number, conn in enumerate(slow, 2):
        assert world.ask(conn)
        world.show(number)
    other = world.reader()
    assert world.ask(other) is None  # as many are under way as there may be
    assert world.machine.kept <= ROOM + 1
    world.now = world.machine.due
    assert world.now == SLOW_S
    world.do(world.machine.tick(world.now))
    assert world.closed == {slow[0]}
    assert world.machine.slow == 1
    world.close(slow[0])
    assert version_of(world.told[other][-1]) == ROOM + 1


def test_slow_readers_of_the_current_version_hold_up_nobody():
    world = World(lends=False)
    conns = [world.reader() for _ in range(5)]
    assert [version_of(world.ask(conn)) for conn in conns] == [1] * 5


def test_after_a_rewind_readers_join_the_new_generation():
    world = World()
    conn = world.reader()
    world.show(1, generation=1)
    (refused,) = [
        message for told in world.told.values() for message, _ in told if isinstance(message, m.Refused)
    ]
    assert refused.error == "RewoundError"
    assert conn in world.closed
    welcome, _ = world.say(m.Join("observer", None, 1, "there"))[0][-1]
    assert welcome.generation == 1


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (m.Join("worker", None, 1, "there"), "RefusedError"),
        (m.Join("observer", None, 1, "there", cluster="other"), "OtherClusterError"),
        (m.Hello(99, "observer", 1, 0, "c"), "RefusedError"),
        (m.Ask(), "RefusedError"),
        (m.EndCluster("me"), "RefusedError"),
    ],
)
def test_who_wants_something_else_is_told_where_it_is(message, error):
    world = World()
    told, conn = world.say(message)
    assert told[-1][0].error == error
    assert conn in world.closed


def test_what_is_not_followed_cannot_be_asked_for():
    world = World()
    conn = world.reader()
    told, _ = world.say(m.Publish(1, (m.Wanted(3),)), conn)
    assert "[3] that are not followed" in told[-1][0].failure.reason
    told, _ = world.say(m.Publish(1, (), (m.Wanted(0),)), conn)
    assert told[-1][0].failure.error == "ConfigurationError"
    with pytest.raises(ProtocolError, match="a reader sent Leave"):
        world.say(m.Leave(3), conn)


def test_at_the_end_readers_and_newcomers_are_told():
    world = World()
    conn = world.reader()
    world.do(world.machine.ended(m.Finished()))
    assert conn in world.closed
    assert isinstance(world.say(m.Join("observer", None, 1, "there"))[0][-1][0], m.Finished)


EVENTS = st.tuples(st.sampled_from(["show", "ask", "lend", "take", "close"]), st.integers(0, 3))


@examples(60)
@given(st.lists(EVENTS, max_size=60))
def test_memory_that_somebody_has_is_never_written_whatever_readers_do(events):
    """What was lent or is under way keeps the values of its version; memory is bounded."""
    world, readers, lent, sent = World(), {}, {}, {}
    number = 1
    for what, who in events:
        conn = readers.get(who)
        if conn is None or conn in world.closed:
            conn = readers[who] = world.reader()
        if what == "show":
            number += 1
            world.show(number)
        elif what in ("ask", "lend"):
            sent.pop(who, None)
            told = world.ask(conn, shared=what == "lend")
            held = (world.machine._offer.slot.copy.vectors[0], number)
            if told is not None and what == "ask":
                sent[who] = held
            elif told is not None:
                lent.setdefault(who, []).append(held)
        elif what == "close":  # it may go on reading what it was lent
            world.close(conn)
            readers.pop(who)
            sent.pop(who, None)
            lent[object()] = lent.pop(who, [])
        else:
            keeps = tuple(version for _, version in lent.get(who, [])[-1:])
            world.say(m.Taken(2, keeps), conn)
            sent.pop(who, None)
            lent[who] = [one for one in lent.get(who, []) if one[1] in keeps]
        for vector, version in [*sent.values(), *(one for held in lent.values() for one in held)]:
            assert set(vector.tolist()) == {version}
    known = {who: {version for _, version in held} for who, held in lent.items() if who in readers}
    assert world.machine.kept <= 1 + len(sent) + sum(map(len, known.values()))
