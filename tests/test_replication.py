"""Both ends of replication, event by event: what a standby is sent, what it says, what follows from that."""

import numpy as np
import pytest
from server_desks import SPEC, Desk, member, step

from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.machines import standby_link
from headwater.machines.standby_link import StandbyLink
from headwater.shard import Shard, Staging
from headwater.shard.digest import digests
from headwater.shard.replica import MaterializedEntry, arriving
from headwater.spec.layout import PAGE
from headwater.testing.invariants.digest import digest
from headwater.testing.processes.memory import SharedArrays

STANDBY = member(9, "standby")


class Pair:
    """A server and its standby, each on a desk, and what is on its way between them."""

    def __init__(self, mode="async", *workers, shares=True):
        self.server = Desk(replicated=True, sequencer=mode, shares=shares)
        self.conns, self.memories = self.server.trains(*workers)
        self.standby = Desk(role="standby", replicated=True, shares=shares).joins()
        self.standby.takes(2, member(9, "server"))
        self.server.takes(3, *self.members(workers), STANDBY)
        ((_, tag),) = self.server.dialled
        self.here = self.server.connects(tag)
        self.there = self.standby.connects()
        self.read = self.said = 0

    @staticmethod
    def members(workers):
        return [member(id, "worker", rank) for rank, id in enumerate(workers)]

    def send(self, count=10_000):
        """So many of the server's messages arrive."""
        payload = self.server.sent[self.here]
        for message, (buffers, given) in zip(
            payload[self.read : self.read + count], self.carried[self.read :], strict=False
        ):
            self.read += 1
            if isinstance(message, m.Hello):
                message = m.Hello(9, "server", 2, cluster="c1")
            self.standby.says(self.there, message, buffers=buffers, given=given)
            self.standby.perform()

    @property
    def carried(self):
        return self.server.carried[self.here]

    def answer(self, count=10_000):
        """So many of the standby's messages arrive."""
        messages = self.standby.sent.get(self.there, [])[self.said : self.said + count]
        self.said += len(messages)
        for message in messages:
            self.server.says(self.here, message)

    def settle(self):
        while self.read < len(self.carried) or self.said < len(self.standby.sent.get(self.there, [])):
            self.send()
            self.answer()


def told(desk):
    return [type(event) for event in desk.told]


# ── how a standby begins ────────────────────────────────────────────────────────────────────────


def test_a_standby_is_dialled_once_however_many_rosters_come_meanwhile():
    """Two streams would go to one standby, and what it is promoted as could be that which lags."""
    desk = Desk(replicated=True, sequencer="sync").serves(5)
    for term in (3, 4, 5):
        desk.takes(term, member(5), STANDBY)
    assert [(one.id, tag) for one, tag in desk.dialled] == [(9, "standby 9")]
    desk.takes(6, member(5), STANDBY)
    conn = desk.connects("standby 9")
    desk.takes(7, member(5), STANDBY)
    assert len(desk.dialled) == 1
    second = desk.connects("standby 9")
    assert second in desk.closed
    assert desk.machine.standby.conn == conn


def test_a_snapshot_is_sent_in_parts_each_of_which_is_acknowledged(monkeypatch):
    monkeypatch.setattr(standby_link, "PART_BYTES", 1000)
    pair = Pair("async", 5)
    parts = [len(b"".join(x.tobytes() for x in buffers)) for buffers, _ in pair.carried if buffers]
    assert sum(parts) > 4 * PAGE
    assert max(parts) == 1000
    pair.send()
    acknowledged = [type(message) for message in pair.standby.sent[pair.there]]
    assert acknowledged == [m.Acknowledged] * (1 + len(parts)) + [m.AppendAck]
    assert digest(pair.standby.machine.shard) == digest(pair.server.machine.shard)


def test_a_snapshot_with_more_than_it_announced_is_refused():
    pair = Pair("async", 5)
    pair.send(2)
    pair.standby.says(pair.there, m.SnapshotPart(), buffers=[np.zeros(1 << 20)])
    assert "bytes more than its first message says" in pair.standby.closed[pair.there]


def test_an_empty_shard_needs_no_parts():
    desk = Desk(replicated=True, sequencer="sync").joins().takes(2, STANDBY)
    conn = desk.connects("standby 9")
    assert [type(message) for message in desk.sent[conn]] == [m.Hello, m.Snapshot, m.SnapshotPart]
    assert desk.carried[conn][2][0][0].nbytes < 100, "what no program keeps"


def test_nothing_waits_for_a_standby_that_catches_up():
    pair = Pair("async", 5)
    pair.server.says(pair.conns[0], step(2))
    assert pair.server.last(pair.conns[0]).version == 1
    assert not pair.server.machine.standby.needed


def test_a_standby_that_has_caught_up_is_told_of_once_and_waited_for_from_then_on():
    pair = Pair("async", 5)
    pair.settle()
    assert pair.server.told == [m.CaughtUp(9)]
    pair.server.says(pair.conns[0], step(2))
    assert pair.server.last(pair.conns[0]).number == 1, "the standby does not have it yet"
    pair.settle()
    assert pair.server.last(pair.conns[0]).version == 1
    assert pair.server.told == [m.CaughtUp(9)]
    assert digest(pair.standby.machine.shard) == digest(pair.server.machine.shard)


def test_what_a_standby_lacks_counts_once_the_roster_names_it_no_more():
    pair = Pair("async", 5)
    pair.settle()
    pair.server.says(pair.conns[0], step(2))
    pair.server.ends(pair.here)
    assert pair.server.told == [m.CaughtUp(9), m.StandbyLost(9)]
    assert pair.server.last(pair.conns[0]).number == 1
    pair.server.takes(4, member(5))
    assert pair.server.last(pair.conns[0]).version == 1


# ── what is given up ────────────────────────────────────────────────────────────────────────────


def test_a_standby_that_cannot_be_reached_is_tried_again_and_then_given_up():
    desk = Desk(replicated=True, sequencer="sync", standby_limit=5.0).serves(5).takes(3, member(5), STANDBY)
    while not desk.told:
        desk.do(desk.machine.unreachable("standby 9", "reset", desk.now))
        desk.passes(0.5)
    assert desk.told == [m.StandbyLost(9)]
    assert len(desk.dialled) == 5
    assert 3 < desk.now <= 5.5
    desk.do(desk.machine.unreachable("standby 9", "reset", desk.now))
    assert desk.told == [m.StandbyLost(9)], "it is given up once"
    desk.takes(4, member(5), STANDBY)
    assert desk.told == [m.StandbyLost(9)], "and not begun with again"
    desk.takes(5, member(5), member(10, "standby"))
    assert desk.dialled[-1][1] == "standby 10"


def test_a_standby_that_does_not_admit_this_server_is_given_up_at_once():
    desk = Desk(replicated=True, sequencer="sync").serves(5).takes(3, member(5), STANDBY)
    desk.do(desk.machine.unreachable("standby 9", "wrong token", desk.now, refused=True))
    assert desk.told == [m.StandbyLost(9)]


@pytest.mark.parametrize("messages", [0, 1, 2], ids=["nothing", "hello", "a part"])
def test_a_standby_that_hangs_while_it_catches_up_is_given_up(messages):
    pair = Pair("async", 5)
    pair.send(messages)
    pair.answer()
    pair.server.passes(29)
    assert pair.server.told == []
    pair.server.passes(32)
    assert pair.server.told == [m.StandbyLost(9)]
    assert pair.server.closed[pair.here] == "its standby acknowledged nothing for 30 s"
    pair.server.ends(pair.here)
    assert pair.server.told == [m.StandbyLost(9)]


def test_a_standby_that_hangs_with_an_entry_is_given_up_and_one_that_owes_nothing_never():
    pair = Pair("async", 5)
    pair.settle()
    pair.server.passes(500)
    assert pair.server.told == [m.CaughtUp(9)]
    pair.server.says(pair.conns[0], step(2))
    pair.server.passes(100)
    assert pair.server.told == [m.CaughtUp(9), m.StandbyLost(9)]


def test_a_slow_standby_that_acknowledges_now_and_then_is_kept(monkeypatch):
    monkeypatch.setattr(standby_link, "PART_BYTES", 1000)
    pair = Pair("async", 5)
    while pair.read < len(pair.carried):
        pair.send(1)
        pair.answer()
        pair.server.passes(25)
    assert pair.server.told == [m.CaughtUp(9)]


def test_while_a_standby_makes_its_shard_it_says_that_it_lives():
    pair = Pair("async", 5)
    pair.standby.perform = lambda: None
    pair.send()
    before = len(pair.standby.sent[pair.there])
    pair.standby.passes(20)
    assert pair.standby.sent[pair.there][before:] == [m.Acknowledged()] * 2
    assert pair.standby.paused == {pair.there}
    Desk.perform(pair.standby)
    assert isinstance(pair.standby.last(pair.there), m.AppendAck)
    pair.standby.passes(100)
    assert isinstance(pair.standby.last(pair.there), m.AppendAck)


def test_the_coordinator_is_told_again_when_it_is_back():
    pair = Pair("async", 5)
    pair.settle()
    pair.server.do(pair.server.machine.coordinator_returned(pair.server.now))
    assert pair.server.told == [m.CaughtUp(9)] * 2
    pair.server.takes(4, member(5))
    pair.server.do(pair.server.machine.coordinator_returned(pair.server.now))
    assert len(pair.server.told) == 2, "it is no member any more"


def test_what_a_standby_must_not_say_ends_its_connection():
    pair = Pair("async", 5)
    pair.server.says(pair.here, m.Heartbeat())
    assert pair.server.closed[pair.here] == "a standby sent Heartbeat"


def test_what_a_server_must_not_say_ends_its_connection():
    pair = Pair("async", 5)
    pair.send()
    pair.standby.says(pair.there, m.Heartbeat())
    assert pair.standby.closed[pair.there] == "a server sent its standby Heartbeat"
    pair.standby.ends(pair.there)
    again = pair.standby.hello(9, "server", term=2)
    pair.standby.says(again, m.Heartbeat(), buffers=[np.zeros(2)])
    assert "payload of 16 bytes, expected none" in pair.standby.closed[again]


def test_of_two_connections_from_its_server_a_standby_follows_the_later_one():
    pair = Pair("async", 5)
    pair.send(1)
    later = pair.standby.hello(9, "server", term=2)
    assert pair.standby.closed == {pair.there: "its server has connected anew"}
    assert later not in pair.standby.closed


# ── chunks ──────────────────────────────────────────────────────────────────────────────────────


def link(memory=None):
    return StandbyLink(STANDBY, 4, memory or SharedArrays(True))


def shipped(made, position, value):
    """An entry with one array in a chunk; returns the array."""
    memory = made.room(4 * PAGE).view(np.float32)
    memory[:] = value
    inputs = m.EntryInputs(3, m.Activated(position, ()), (), ((0, PAGE),))
    made.ship(MaterializedEntry(inputs, (memory,)), 0)
    return memory


@pytest.mark.parametrize(("standby", "server"), [(1, 0), (0, 1), (0, 5), (5, 0)])
def test_a_chunk_that_one_of_both_may_still_read_is_not_used_again(standby, server):
    made = link()
    first = shipped(made, 1, 7.0)
    made.acknowledged(m.AppendAck(3, 1, standby), server)
    assert shipped(made, 2, 8.0).ctypes.data != first.ctypes.data
    assert (first == 7).all()


def test_a_chunk_is_used_again_when_both_have_applied_its_entry():
    made = link()
    first = shipped(made, 1, 7.0)
    made.acknowledged(m.AppendAck(3, 1, 1), 1)
    assert shipped(made, 2, 8.0).ctypes.data == first.ctypes.data


def test_chunks_of_entries_that_are_discarded_are_used_again():
    made = link()
    first = shipped(made, 1, 7.0)
    second = shipped(made, 2, 8.0)
    made.agree(m.StartTerm(5, 1))
    assert shipped(made, 2, 9.0).ctypes.data == second.ctypes.data
    assert (first == 7).all()


def test_small_arrays_and_those_for_a_standby_elsewhere_travel():
    assert shipped_inline(link(), 100)
    assert shipped_inline(link(SharedArrays(False)), 4 * PAGE)
    made = link()
    made.end()
    assert made.room(4 * PAGE).base is not None
    assert made.ship(MaterializedEntry(m.EntryInputs(3, m.Activated(1, ()), ())), 0) == []
    assert made.commit(3, 1) == made.agree(m.StartTerm(3, 0)) == []


def shipped_inline(made, size):
    memory = made.room(size).view(np.float32)
    inputs = m.EntryInputs(3, m.Activated(1, ()), (), ((0, size // 4),))
    ((_, message, buffers, _, _),) = made.ship(MaterializedEntry(inputs, (memory,)), 0)
    return message.chunks == (-1,) and buffers[0].ctypes.data == memory.ctypes.data


def test_a_standby_says_that_it_has_applied_only_what_it_has_applied():
    pair = Pair("async", 5)
    pair.settle()
    pair.server.says(pair.conns[0], step(2))
    pair.send()
    assert pair.standby.last(pair.there) == m.AppendAck(1, 4, 3)
    pair.answer()
    pair.send()
    assert pair.standby.last(pair.there) == m.AppendAck(1, 4, 4)


def test_an_entry_that_names_more_of_a_chunk_than_there_is_is_refused():
    pair = Pair("async", 5)
    pair.settle()
    pair.server.says(pair.conns[0], step(2))
    entry = pair.server.sent[pair.here][-1]
    pair.send(1)  # the chunk
    larger = m.EntryInputs(entry.inputs.term, entry.inputs.entry, entry.inputs.requests, ((0, 9 * PAGE),))
    pair.standby.says(pair.there, m.AppendEntry(larger, 0, entry.chunks))
    assert "has an array of 36864 bytes in chunk 0" in pair.standby.closed[pair.there]


@pytest.mark.parametrize("shares", [True, False])
def test_both_end_with_the_same_bits_however_arrays_travel(shares):
    pair = Pair("async", 5, shares=shares)
    pair.settle()
    for number in range(2, 6):
        pair.memories[0][0][:3] = number
        pair.server.says(pair.conns[0], step(number))
        pair.settle()
    assert pair.server.machine.shard.version == 4
    assert digest(pair.standby.machine.shard) == digest(pair.server.machine.shard)
    assert any(isinstance(message, m.Chunk) for message in pair.server.sent[pair.here]) == shares


# ── terms ───────────────────────────────────────────────────────────────────────────────────────


def test_a_standby_that_takes_over_lets_go_of_its_former_server():
    pair = Pair("async", 5)
    pair.settle()
    pair.standby.says(
        pair.standby.coordinator(),
        m.Roster(4, 1, (member(1, "server"), member(5)), 4, cluster="c1"),
    )
    assert pair.standby.machine.role == "server"
    assert pair.standby.closed == {pair.there: "this standby has taken over"}
    assert "takes over in term 4" in pair.standby.notes[-1]
    assert pair.standby.machine.received(pair.there, m.CommitIndex(3, 9), None, 0.0) == []


def test_a_promoted_standby_keeps_nothing_in_memory_that_its_former_server_may_write():
    """That was stopped, not dead: it goes on in the middle of filling a chunk."""
    primary = Shard(0, 1, "mean")
    memory = Staging(np.zeros(PAGE, np.float32), np.zeros(PAGE, np.float32))
    primary.hold(1, m.Register(1, SPEC, None), memory)
    primary.process(m.Registered(1, m.ExchangeId(1, 1), "model"))
    snapshot, _ = primary.attach_standby()
    standby = Shard.restore(snapshot, "mean")
    memory.gradients[:3] = 2
    primary.hold(1, step(2))
    entry = m.Committed(2, 1, (m.ExchangeId(1, 2),), ())
    sent = primary.prepare(entry)
    shared = arriving(sent.inputs)
    for here, there in zip(shared.payload(), sent.payload(), strict=True):
        here[...] = there
    standby.follow(shared)
    standby.promote(4)
    shared.payload()[0][:] = 99
    standby.commit(2)
    assert standby.vectors[0].values[:3].tolist() == [2, 2, 2]


def test_what_a_new_sequencer_discards_is_discarded_there_too():
    pair = Pair("async", 5)
    pair.settle()
    pair.server.says(pair.conns[0], step(2))
    pair.settle_to_prepare = pair.send()
    assert pair.standby.machine.shard.prepared == 4
    pair.server.machine.shard.admit(6)
    pair.standby.says(pair.there, m.StartTerm(6, 3))
    assert pair.standby.machine.shard.prepared == 3


# ── digests ─────────────────────────────────────────────────────────────────────────────────────


def verified():
    """A pair whose member 5 has asked both for what they are."""
    pair = Pair("async", 5)
    pair.settle()
    pair.server.says(pair.conns[0], m.Verify(2))
    pair.settle()
    assert pair.server.last(pair.conns[0]).number == 2
    return pair


def test_server_and_standby_say_what_they_were_at_the_same_entry():
    pair = verified()
    position = pair.server.machine.shard.position
    (digested,) = [x for x in pair.standby.sent[pair.there] if isinstance(x, m.Digested)]
    assert digested.position == position
    pair.server.says(pair.conns[0], m.Compare(3))
    assert pair.server.paused == {pair.conns[0]}
    pair.server.perform()
    told = pair.server.last(pair.conns[0])
    assert (told.position, told.own, told.reason) == (position, told.standby, "")
    assert told.standby == digested.digests
    assert not pair.server.paused


def waiting():
    """A pair of which the standby has not summed up yet; the server has."""
    pair = Pair("async", 5)
    pair.settle()
    pair.standby.perform = lambda: None
    pair.server.says(pair.conns[0], m.Verify(2))
    pair.settle()
    pair.server.says(pair.conns[0], m.Compare(3))
    pair.server.perform()
    assert pair.server.last(pair.conns[0]).number == 2
    return pair


def test_whoever_compares_is_told_that_it_waits_for_the_standby():
    pair = waiting()
    pair.server.passes(25)
    why = "server 0 waits for its standby to sum up what it holds"
    assert pair.server.sent[pair.conns[0]][-2:] == [m.Waiting(3, why)] * 2
    Desk.perform(pair.standby)
    pair.answer()
    assert pair.server.last(pair.conns[0]).standby is not None


def test_a_standby_that_is_lost_meanwhile_is_said_to_be():
    pair = waiting()
    pair.server.ends(pair.here)
    told = pair.server.last(pair.conns[0])
    assert (told.standby, told.reason) == (None, "its standby was lost meanwhile")


def test_why_there_is_nothing_to_compare_is_said():
    pair = Pair("async", 5)
    pair.server.says(pair.conns[0], m.Verify(2))
    pair.server.says(pair.conns[0], m.Compare(3))
    pair.server.perform()
    assert pair.server.last(pair.conns[0]).reason == "its standby has not caught up yet"
    pair.settle()
    pair.server.says(pair.conns[0], m.Compare(4))
    assert "ask again" in pair.server.last(pair.conns[0]).failure.reason
    pair.server.says(pair.conns[0], m.Verify(5))
    pair.settle()
    pair.server.takes(4, member(5))
    pair.server.says(pair.conns[0], m.Compare(6))
    pair.server.perform()
    told = pair.server.last(pair.conns[0])
    assert (told.standby, told.reason) == (None, "it has no standby")
    assert {one.part for one in told.own} == {
        one.part for one in digests(pair.server.machine.shard.snapshot())
    }


def test_what_was_to_be_summed_up_and_is_discarded_is_not():
    pair = Pair("async", 5)
    pair.settle()
    pair.server.says(pair.conns[0], m.Verify(2))
    pair.send()
    pair.standby.says(pair.there, m.StartTerm(6, 3))
    pair.standby.says(pair.there, m.CommitIndex(6, 4))
    assert not pair.standby.tasks


def test_an_end_of_a_snapshot_that_cannot_be_restored_ends_the_connection():
    pair = Pair("async", 5)

    def fails(snapshot):
        raise ProtocolError("no such rule")

    pair.standby.machine._restore = fails
    pair.send(1)
    pair.send()
    assert pair.standby.closed[pair.there] == "the snapshot cannot be restored: no such rule"
