"""One member's exchanges on a server, event by event, and where their memory is."""

import numpy as np
import pytest
from server_desks import SPEC, Desk, member, step

from headwater import messages as m
from headwater.errors import CheckpointError, EnvironmentFailure, RegistrationError
from headwater.machines.member_memory import MemberMemory
from headwater.spec.initializers import Constant
from headwater.spec.layout import PAGE
from headwater.spec.rules import SGD

TABLE = m.TableSpec("rows", 2, SGD(lr=1.0).to_spec(), Constant(0.0).to_spec(), 0, None, None)


def refused(desk, conn):
    """With what whoever came over a connection was sent away."""
    assert conn in desk.closed
    return desk.sent[conn][-1]


def one(window=True, **options):
    """A server that member 5 trains with; its connection, and the member's memory."""
    desk = Desk(sequencer="async", **options)
    (conn,), (memory,) = desk.trains(5, window=window)
    return desk, conn, memory


def with_table(shares=True):
    """Member 5 has declared a table, and where it shares memory given a scratch window."""
    desk, conn, _ = one()
    desk.says(conn, m.RegisterTable(2, TABLE))
    scratch = np.zeros(1 << 12, np.uint8)
    if shares:
        desk.says(conn, m.Scratch(m.WindowSpec(len(scratch))), given=[scratch])
    return desk, conn, scratch


def put(scratch, offset, values):
    """Write an array into a scratch window."""
    scratch[offset : offset + values.nbytes] = values.view(np.uint8).reshape(-1)


# ── one exchange ────────────────────────────────────────────────────────────────────────────────


def test_while_loops_are_compiled_whoever_declares_is_told_so_and_others_are_served():
    desk = Desk(sequencer="async")
    conn, other = desk.trains(5, 6)[0]
    desk.says(conn, m.RegisterTable(2, TABLE), compiled=False)
    assert desk.paused == {conn}
    desk.says(other, step(2, 1))
    assert desk.last(other).number == 2, "nobody else waits for the compiler"
    desk.passes(20.0)
    assert desk.last(conn).reason.startswith("server 0 compiles the loops of 'rows'")
    desk.perform()
    assert desk.last(conn).table == 0
    assert not desk.paused


def test_who_goes_while_loops_are_compiled_for_it_leaves_nothing_behind():
    desk = Desk(sequencer="async")
    (conn,), _ = desk.trains(5)
    desk.says(conn, m.RegisterTable(2, TABLE), compiled=False)
    desk.ends(conn)
    again = desk.hello(5, term=2, epoch=1)
    desk.perform()
    desk.says(again, m.RegisterTable(2, TABLE))
    assert desk.last(again).table == 0


def test_a_step_is_held_reported_and_answered_and_its_connection_paused_meanwhile():
    desk = Desk()  # whose sequencer says nothing by itself
    desk.serves(5)
    desk.do(desk.machine.received(0, m.StartTerm(1, 0), None, desk.now))
    conn = desk.hello(5, term=2)
    desk.says(conn, m.RegisterTable(1, TABLE), request=31)
    assert desk.paused == {conn}
    assert desk.last(0).held == (m.Held(5, 1, "table", "rows"),)
    entries = m.Registered(1, m.ExchangeId(5, 1), "rows", "table")
    desk.do(desk.machine.received(0, m.Entries((entries,), 1), None, desk.now))
    assert (desk.last(conn).table, desk.requests[conn]) == (0, 31)
    assert not desk.paused


def test_values_are_written_to_a_window_and_follow_the_answer_without_one():
    for window in (True, False):
        desk, conn, (gradients, parameters) = one(window)
        gradients[:3] = 2
        if window:
            desk.says(conn, step(2))
            assert desk.carried[conn][-1] == ([], [])
        else:
            desk.says(conn, step(2, payload=(m.Run(0, 0, PAGE),)), buffers=[gradients])
            ((parameters,), _) = desk.carried[conn][-1]
        assert parameters[:3].tolist() == [2, 2, 2]


def test_assigned_values_come_as_payload_without_a_window():
    desk, conn, (_, parameters) = one(window=False)
    parameters[:3] = 5
    desk.says(conn, m.Assign(2, m.Carried(0, b"\1"), (m.Run(0, 0, PAGE),)), buffers=[parameters])
    assert desk.machine.shard.vectors[0].values[:3].tolist() == [5, 5, 5]


def test_what_cannot_be_served_is_answered_and_the_connection_goes_on():
    desk, conn, _ = one()
    broken = m.ModelSpec("other", SPEC.tensors, ())
    desk.says(conn, m.Register(2, broken, None), buffers=[np.zeros(PAGE, np.float32)])
    assert desk.last(conn).failure.error == RegistrationError.__name__
    assert not desk.paused
    desk.says(conn, m.Pull(3, (0,), -1))
    assert desk.last(conn).failure is None


def test_observers_only_read():
    desk = Desk(sequencer="async").joins().takes(2, member(5), member(6, "observer", -1))
    conn = desk.hello(6, "observer", term=2)
    desk.says(conn, m.End(1))
    assert "an observer sent End, which only workers may" in refused(desk, conn).reason


@pytest.mark.parametrize("message", [m.Heartbeat(), m.Acknowledged()])
def test_what_is_no_request_is_refused(message):
    desk, conn, _ = one()
    desk.says(conn, message)
    assert "a member sent" in refused(desk, conn).reason


def test_a_member_that_is_retired_while_it_waits_is_let_go():
    desk = Desk(sequencer="sync")
    (conn, _), _ = desk.trains(5, 6)
    desk.says(conn, step(2))
    desk.takes(3, member(6, "worker", 1))
    assert desk.closed[conn] == "member 5 was retired"


def test_the_models_are_described_outside_the_log():
    desk, conn, _ = one()
    position = desk.machine.shard.position
    desk.says(conn, m.Describe(2))
    assert [info.spec.name for info in desk.last(conn).models] == ["model"]
    assert desk.machine.shard.position == position
    assert not desk.paused


# ── windows ─────────────────────────────────────────────────────────────────────────────────────


def renewed(desk, message, given=()):
    """Member 5 connects anew, and gives this."""
    conn = desk.machine._members[5].conn
    newer = desk.hello(5, term=2, epoch=1)
    desk.ends(conn)
    desk.says(newer, message, given=given)
    return newer


def test_a_renewed_window_takes_the_place_of_the_older_one():
    desk, _, (gradients, parameters) = one()
    fresh = [gradients.copy(), parameters.copy()]
    fresh[0][:3] = 4
    conn = renewed(desk, m.Renew(0, m.WindowSpec(0)), fresh)
    desk.says(conn, step(2))
    assert fresh[1][:3].tolist() == [4, 4, 4]
    assert not parameters.any()


def test_what_was_staged_in_a_window_stays_there_when_the_member_comes_back_without_one():
    desk, _, (gradients, _) = one()
    gradients[:3] = 4
    conn = renewed(desk, m.Renew(0, None))
    desk.says(conn, step(2))
    assert desk.carried[conn][-1][0][0][:3].tolist() == [4, 4, 4]


def test_what_was_staged_in_a_private_buffer_stays_in_it():
    desk, _, _ = one(window=False)
    before = desk.machine.shard.staging(5, 0)
    renewed(desk, m.Renew(0, None))
    assert desk.machine.shard.staging(5, 0) is before


def test_a_model_that_was_never_given_memory_gets_a_private_buffer():
    desk = Desk(sequencer="async")
    desk.trains(5)
    desk.takes(3, member(5), member(6, "worker", 1), since=1)
    conn = desk.hello(6, term=3)
    desk.says(conn, m.Renew(0, None))
    desk.says(conn, m.Pull(1, (0,), -1))
    assert desk.carried[conn][-1][0][0].tolist() == [0] * PAGE


@pytest.mark.parametrize(
    ("message", "given", "why"),
    [
        (m.Register(2, SPEC, m.WindowSpec(0)), [], "a window came as 0 arrays"),
        (m.Register(2, SPEC, None), [1], "without a window came with a descriptor"),
        (m.Renew(7, None), [], "there is no model 7"),
        (m.Attach(2, 7, None), [], "there is no model 7"),
        (m.Pull(2, (0,), -1), [1], "Pull came with a descriptor, expected none"),
    ],
)
def test_memory_that_is_not_what_the_message_says_is_refused(message, given, why):
    desk, conn, _ = one()
    desk.says(conn, message, given=given)
    assert why in refused(desk, conn).reason


@pytest.mark.parametrize(
    ("message", "size", "why"),
    [
        (m.Register(2, SPEC, None), 8, "initial values of 8 bytes, expected 4096"),
        (m.Pull(2, (0,), -1), 8, "Pull with a payload of 8 bytes, expected none"),
        (step(2, payload=(m.Run(0, 0, PAGE + 4),)), 4 * PAGE + 16, "this server has [0, 1024)"),
        (step(2, payload=(m.Run(0, 8, 4),)), 4, "this server has [0, 1024)"),
        (step(2, payload=(m.Run(1, 0, 1),)), 4, "named model 1"),
        (step(2, pushed=(m.Rows(0, 9, 0, 0),)), 4, "names 9 rows in 4 bytes of payload"),
    ],
)
def test_payload_that_has_no_place_is_refused(message, size, why):
    desk, conn, _ = one(window=False)
    desk.says(conn, message, buffers=[np.zeros(size, np.uint8)])
    assert why in refused(desk, conn).reason


def test_payload_for_a_window_is_refused():
    desk, conn, _ = one()
    desk.says(conn, step(2, payload=(m.Run(0, 0, 1),)), buffers=[np.zeros(1, np.float32)])
    assert "payload for model 0, whose values are in a window" in refused(desk, conn).reason


# ── rows ────────────────────────────────────────────────────────────────────────────────────────

IDS = np.array([3, 8], np.int64)
GRADIENTS = np.array([[1, 2], [3, 4]], np.float32)


def pushes(desk, conn, scratch, shares, number=3):
    """Push both rows and pull one of them; the row."""
    if shares:
        put(scratch, 0, IDS)
        put(scratch, 64, GRADIENTS)
        pushed, pulled = m.Rows(0, 2, 0, 64), m.Rows(0, 1, 0, 128)
        buffers = []
    else:
        pushed, pulled = m.Rows(0, 2, 0, 0), m.Rows(0, 1, 0, 0)
        buffers = [IDS, GRADIENTS, IDS[:1]]
    message = m.Step(number, number - 2, 0, (), (), True, pushed=(pushed,), pulled=(pulled,))
    desk.says(conn, message, buffers=buffers)
    return scratch[128:136].view(np.float32).tolist() if shares else desk.carried[conn][-1][0][-1][0].tolist()


@pytest.mark.parametrize("shares", [True, False])
def test_rows_are_pushed_and_pulled(shares):
    desk, conn, scratch = with_table(shares)
    assert pushes(desk, conn, scratch, shares) == [-1, -2]
    assert pushes(desk, conn, scratch, shares, 4) == [-2, -4]
    rows = m.Rows(0, 1, 0, 128)
    desk.says(conn, m.PullRows(5, (rows,)), buffers=[] if shares else [IDS[:1]])
    desk.says(conn, m.DeleteRows(6, rows), buffers=[] if shares else [IDS[:1]])
    assert [array.tolist() for array in desk.carried[conn][-1][0]] == [[1]]
    desk.says(conn, m.CountRows(7, 0))
    assert [array.tolist() for array in desk.carried[conn][-1][0]] == [[1]]


def test_ids_that_change_after_they_were_checked_change_nothing():
    """Else one that belongs to no slot of this server would be looked up in an index that does not exist."""
    desk, conn, scratch = with_table()
    requests = desk.machine.served(conn)
    put(scratch, 0, IDS)
    put(scratch, 64, GRADIENTS)
    message = m.Step(3, 1, 0, (), (), False, pushed=(m.Rows(0, 2, 0, 64),))
    brought = requests.unpack(message, [])
    put(scratch, 0, np.array([-9, 1 << 60], np.int64))
    desk.do(desk.machine.received(conn, message, brought, desk.now))
    assert sorted(desk.machine.shard.tables[0].snapshot().ids.tolist()) == [3, 8]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (m.Rows(0, 1, 4096, 0), "8 bytes at 4096 of a scratch window of 4096"),
        (m.Rows(0, 1, 0, 4090), "8 bytes at 4090"),
        (m.Rows(0, -1, 0, 0), "-1 rows of table 0"),
        (m.Rows(4, 1, 0, 0), "there is no table 4"),
    ],
)
def test_rows_outside_of_the_scratch_window_are_refused(rows, why):
    desk, conn, _ = with_table()
    desk.says(conn, m.PullRows(3, (rows,)))
    assert why in refused(desk, conn).reason


def test_rows_whose_ids_did_not_come_are_refused_unless_there_are_none():
    desk, conn, _ = with_table(shares=False)
    desk.says(conn, m.PullRows(3, (m.Rows(0, 0, 0, 0),)))
    assert desk.last(conn).failure is None
    desk.says(conn, m.PullRows(4, (m.Rows(0, 1, 0, 0),)))
    assert "names rows, but no ids came with it" in refused(desk, conn).reason


def test_payload_beside_a_scratch_window_has_no_place():
    desk, conn, _ = with_table()
    desk.says(conn, m.PullRows(3, (m.Rows(0, 1, 0, 0),)), buffers=[IDS[:1]])
    assert "a payload of 8 bytes, expected 0" in refused(desk, conn).reason


# ── checkpoints ─────────────────────────────────────────────────────────────────────────────────


def checkpointed(number=2):
    """Member 5 has asked for a snapshot, for which memory was found first."""
    desk, conn, _ = one()
    desk.says(conn, m.Checkpoint(number))
    assert desk.paused == {conn}
    desk.perform()
    assert desk.last(conn).version == 0
    return desk, conn


def test_a_checkpoints_part_is_written_without_the_lock_and_said_to_be():
    desk, conn = checkpointed()
    desk.says(conn, m.Store(3, "folder", 0, 0))
    assert desk.paused == {conn}
    desk.perform()
    stored = desk.last(conn)
    assert (stored.number, stored.part.server, stored.failure) == (3, 0, None)
    assert stored.standings.position == desk.machine.shard.position
    assert not desk.paused


def test_a_part_of_another_version_is_not_stored():
    """The parts of all servers would not be of one position."""
    for version in (-1, 1):
        desk, conn = checkpointed()
        desk.says(conn, m.Store(3, "folder", 0, version))
        assert desk.last(conn).failure.error == CheckpointError.__name__
        assert not desk.tasks


def test_a_snapshot_is_stored_once():
    desk, conn = checkpointed()
    for _ in range(2):
        desk.says(conn, m.Store(3, "folder", 0, 0))
        desk.perform()
    assert "another server took it" in desk.last(conn).failure.reason


def test_memory_of_a_snapshot_is_used_again_once_it_is_written_and_not_before():
    desk, conn = checkpointed()
    snapshot = desk.machine.served(conn)._snapshot
    copies = desk.machine.shard._state.copies
    desk.says(conn, m.Store(3, "folder", 0, 0))
    values = snapshot.models[0].values
    assert copies.copy(values) is not values
    desk.perform()
    assert copies.copy(values) is values


def test_a_part_that_cannot_be_written_is_said_to_be_and_its_memory_used_again(monkeypatch):
    desk, conn = checkpointed()
    values = desk.machine.served(conn)._snapshot.models[0].values

    def fails(place, snapshot):
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(desk.memory, "write_part", fails)
    desk.says(conn, m.Store(3, "folder", 0, 0))
    desk.perform()
    assert desk.last(conn).failure == m.Refused("CheckpointError", "the disk is full")
    assert desk.machine.shard._state.copies.copy(values) is values


def test_a_member_that_goes_while_its_part_is_written_leaves_the_memory():
    desk, conn = checkpointed()
    values = desk.machine.served(conn)._snapshot.models[0].values
    desk.says(conn, m.Store(3, "folder", 0, 0))
    desk.ends(conn)
    desk.perform()
    assert desk.machine.shard._state.copies.copy(values) is values


def test_a_checkpoint_is_taken_though_no_memory_was_found_beforehand():
    desk, conn, _ = one()
    desk.says(conn, m.Checkpoint(2))
    (task,) = desk.tasks
    desk.tasks.clear()
    desk.do(desk.machine.performed(task.tag, EnvironmentFailure("no memory"), desk.now))
    assert desk.last(conn).failure is None
    assert desk.machine.served(conn)._snapshot is not None


def test_a_member_that_was_replaced_while_memory_was_found_is_let_go():
    desk, conn, _ = one()
    desk.says(conn, m.Checkpoint(2))
    desk.machine.shard.reconnected(5, 4)
    desk.perform()
    assert "connection epoch 0 of member 5 is over" in desk.closed[conn]


def test_two_memories_of_one_member_know_nothing_of_each_other():
    desk, _, _ = with_table()
    other = MemberMemory(desk.machine.shard, 5, desk.memory)
    assert [len(array) for array in other.place(m.PullRows(3, (m.Rows(0, 2, 0, 0),)), 16)] == [2]


def test_a_pace_that_cannot_be_ends_the_connection():
    for pace in (
        m.Pace(-1.0, 1, 0.0),
        m.Pace(float("nan"), 1, 0.0),
        m.Pace(1.0, -1, 0.0),
        m.Pace(1.0, 1, 1e999),
    ):
        desk, conn, _ = one()
        desk.says(conn, step(2, pace=pace))
        assert "says that its pace is" in desk.closed[conn]
