"""Reads outside the log: of one version on all servers, and current, also where a server was replaced."""

import numpy as np
import pytest
from members_alone import Alone
from server_desks import Desk, step
from test_replication import Pair
from test_requests import GRADIENTS, IDS, TABLE, one, put, with_table

import headwater as hw
from headwater import messages as m
from headwater.errors import UsageError
from headwater.machines.client import Settled
from headwater.machines.current_read import LARGE, is_large
from headwater.machines.read_lease import FENCE_S, READ_S, ReadLease
from headwater.machines.server import ServerMachine
from headwater.testing import run
from headwater.testing.faults import Partition
from headwater.testing.schedule import Schedule

# ── the member ──────────────────────────────────────────────────────────────────────────────────


def asked(alone):
    """What every server was asked last, as (number, ordered)."""
    return {(frame.message.number, frame.message.ordered) for frame in alone.asked.frames}


def test_answers_of_several_versions_are_asked_for_again_and_the_third_time_in_order():
    alone = Alone().joined(2).call()
    assert asked(alone) == {(1, False)}
    for ordered in (False, True):
        alone.answer(0, version=4).answer(1, version=5)
        assert asked(alone) == {(1, ordered)}
        assert alone.events(Settled) == []
    alone.answer(0, version=6).answer(1, version=6)
    assert alone.events(Settled) == [Settled(m.Answer(1, 6))]
    alone.call()
    assert asked(alone) == {(2, False)}, "the next read begins anew"


def test_a_server_that_cannot_say_what_is_current_has_the_read_ordered():
    alone = Alone().joined(2).call().answer(0, version=3).answer(1, version=m.UNREAD)
    assert asked(alone) == {(1, True)}


def test_a_version_older_than_one_that_was_seen_does_not_count():
    alone = Alone().joined().call().answer(version=4)
    alone.call().answer(version=3)
    assert asked(alone) == {(2, False)}
    assert alone.answer(version=4).events(Settled)[-1] == Settled(m.Answer(2, 4))


def test_a_read_that_was_ordered_once_stays_so_when_it_is_repeated():
    """Servers may hold it: another kind of request under its number would break the protocol."""
    alone = Alone().joined(2).call().answer(0, version=1).answer(1, version=m.UNREAD)
    alone.loses(alone.machine.connections.links[1])
    alone.says(
        m.ServerAddresses(6, tuple(m.Member(100 + i, "server", i, 1, "there", ("x",)) for i in (0, 1)))
    )
    alone.connect()
    assert asked(alone) == {(1, True)}


def test_a_read_that_a_server_refuses_is_over():
    alone = Alone().joined(2).call().answer(0, version=1)
    alone.answer(1, version=2, failure=m.Refused("UsageError", "no"))
    assert isinstance(alone.events(Settled)[-1].error, UsageError)


def test_large_reads_of_several_servers_are_ordered_from_the_start():
    assert not is_large(100 * LARGE, 1)
    assert not is_large(2 * LARGE, 2)
    assert is_large(2 * LARGE + 1, 2)


# ── a server ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("window", [True, False])
def test_a_pull_is_answered_at_once_and_the_log_has_no_entry_of_it(window):
    desk, conn, (_, parameters) = one(window)
    desk.machine.shard.vectors[0].values[:3] = 7
    before = desk.machine.shard.position
    desk.says(conn, m.Pull(2, (0,), -1), request=9)
    assert (desk.last(conn), desk.requests[conn]) == (m.Answer(2, 0, (0,)), 9)
    values = parameters if window else desk.carried[conn][-1][0][0]
    assert values[:3].tolist() == [7, 7, 7]
    desk.says(conn, m.Pull(3, (0,), 0))
    assert desk.last(conn) == m.Answer(3, 0), "nothing has changed since"
    assert desk.machine.shard.position == before
    desk.says(conn, m.Pull(4, (0,), -1, True))
    assert desk.last(conn) == m.Answer(4, 0, (0,))
    assert desk.machine.shard.position == before + 1
    assert not desk.paused


@pytest.mark.parametrize("shares", [True, False])
def test_rows_and_their_number_are_read_at_once(shares):
    desk, conn, scratch = with_table(shares)
    rows = m.Rows(0, 2, 0, 64)
    buffers = [] if shares else [IDS, GRADIENTS]
    put(scratch, 0, IDS)
    put(scratch, 64, GRADIENTS)
    desk.says(conn, m.Step(3, 1, 0, (), (), False, pushed=(rows,)), buffers=buffers)
    before = desk.machine.shard.position
    desk.says(conn, m.PullRows(4, (rows,)), buffers=buffers[:1])
    read = scratch[64:80].view(np.float32) if shares else desk.carried[conn][-1][0][0].reshape(-1)
    assert read.tolist() == (-GRADIENTS.reshape(-1)).tolist()
    desk.says(conn, m.CountRows(5, 0))
    assert [array.tolist() for array in desk.carried[conn][-1][0]] == [[2]]
    assert desk.machine.shard.position == before


def test_what_is_not_committed_cannot_be_read():
    desk = Desk(replicated=True)
    desk.serves(5)
    desk.do(desk.machine.received(0, m.StartTerm(1, 0), None, desk.now))
    conn = desk.hello(5, term=2)
    desk.says(conn, m.RegisterTable(1, TABLE))
    entry = m.Registered(1, m.ExchangeId(5, 1), "rows", "table")
    desk.do(desk.machine.received(0, m.Entries((entry,), 1, 1), None, desk.now))
    rows = m.Rows(0, 2, 0, 0)
    desk.says(conn, m.Step(2, 1, 0, (), (), False, pushed=(rows,)), buffers=[IDS, GRADIENTS])
    commit = m.Committed(2, 1, (m.ExchangeId(5, 2),), ())
    desk.do(desk.machine.received(0, m.Entries((commit,), 1, 1), None, desk.now))
    shard = desk.machine.shard
    assert (shard.prepared, shard.position) == (2, 1)
    other = desk.machine.shard.read(6, m.CountRows(1, 0))
    assert other.version == 0
    assert shard.take_copies(6)[0].tolist() == [0]


# ── where a server may have been replaced ───────────────────────────────────────────────────────


def test_a_lease_lasts_from_when_what_was_acknowledged_had_left():
    lease = ReadLease()
    assert not lease.holds(0.0)
    lease.asked(3, 7, 1.0)
    lease.asked(3, 8, 1.0 + READ_S / 2)
    lease.answered(3, 6)
    assert not lease.holds(1.0)
    lease.answered(3, 8)
    assert lease.holds(1.0 + READ_S * 0.99)
    assert not lease.holds(1.0 + READ_S)


def test_an_acknowledgement_of_another_term_is_none():
    """At the same position there may have been another entry, acknowledged long ago."""
    lease = ReadLease()
    lease.asked(3, 7, 1.0)
    lease.asked(4, 7, 2.0)
    lease.answered(3, 7)
    assert not lease.holds(2.0)
    lease.answered(4, 7)
    assert lease.holds(2.0)


def test_a_server_reads_only_while_its_standby_has_said_that_it_has_not_taken_over():
    pair = Pair("async", 5)
    pair.settle()
    desk, (conn,) = pair.server, pair.conns

    def read(number):
        desk.says(conn, m.Pull(number, (0,), -1))
        return desk.last(conn).version

    assert read(2) == m.UNREAD, "nothing was acknowledged yet but the snapshot"
    desk.says(conn, step(3, 2))
    pair.settle()
    assert desk.last(conn).version == 1
    assert read(4) == 1
    desk.passes(READ_S)
    assert read(5) == m.UNREAD
    desk.says(conn, m.Pull(5, (0,), -1, True))
    pair.settle()
    assert desk.last(conn).version == 1
    assert read(6) == 1, "with its entry there is a new lease"
    desk.takes(4, *pair.members([5]))
    desk.passes(READ_S)
    assert read(7) == 1, "the roster says that it has no standby, so nobody can take over"


def test_a_standby_that_takes_over_serves_nobody_before_any_lease_has_ended():
    pair = Pair("async", 5)
    pair.settle()
    standby = pair.standby
    promoted = m.Roster(4, 1, (m.Member(1, "server", 0, 101, "here", ("x",)), *pair.members([5])), 4, "c1")
    standby.says(standby.coordinator(), promoted)
    standby.do(standby.machine.received(0, m.StartTerm(4, standby.machine.shard.position), None, standby.now))
    conn = standby.hello(5, term=4, epoch=1)
    assert conn in standby.paused
    standby.passes(FENCE_S * 0.99)
    assert conn in standby.paused
    standby.passes(FENCE_S * 0.02)
    assert conn not in standby.paused
    assert standby.machine.served(conn).member.id == 5
    assert FENCE_S > READ_S


@pytest.mark.parametrize("seed", range(10))
def test_who_is_left_with_a_replaced_server_reads_nothing_old_from_it(seed):
    """Parted from everybody else with it, a reader may wait, or be struck off."""
    parted = (Partition(0.2, ("server 0", "reader 0"), 0.9),)
    fixed = {"servers": 1, "replicas": 1, "readers": 1, "steps": 60, "seed": seed, "faults": parted}
    assert run(Schedule("async", **fixed)).faults


# ── in a cluster ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("readable", [True, False])
def test_a_worker_reads_the_same_whether_servers_answer_at_once_or_in_order(monkeypatch, readable):
    if not readable:
        monkeypatch.setattr(ServerMachine, "readable", lambda self, now: False)

    def train(worker):
        model = worker.model("v", {"v": np.zeros(3000, np.float32)}, hw.Accumulate())
        table = worker.table("t", 2, hw.Accumulate(), initializer=hw.Zeros())
        read = []
        for number in range(1, 4):
            model.push({"v": np.full(3000, 1.0, np.float32)})
            table.push([number], np.ones((1, 2), np.float32))
            worker.step()
            read.append((set(model.pull()["v"].tolist()), table.pull([1, 2, 3]).sum(), len(table)))
            table.prefetch([1, number])
            read.append(table.pull([1, number]).tolist())
        return read

    result = hw.run(train, workers=1, servers=2, sync="async", engine="inline", deadline=60)
    assert result.values[0] == [
        ({1.0}, 2.0, 1),
        [[1, 1], [1, 1]],
        ({2.0}, 4.0, 2),
        [[1, 1], [1, 1]],
        ({3.0}, 6.0, 3),
        [[1, 1], [1, 1]],
    ]
