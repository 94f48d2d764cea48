"""A shard and its standby alone: what is kept until it is committed, and what may be reported as prepared."""

import numpy as np
import pytest
from clusters import model_spec

from headwater import messages as m
from headwater.errors import ProtocolError, RefusedError
from headwater.shard import Shard, StagedRows, Staging
from headwater.shard.digest import digests
from headwater.shard.replica import ReplicationProgress, arriving
from headwater.spec.initializers import Zeros
from headwater.spec.layout import PAGE
from headwater.spec.lifetime import AfterSteps
from headwater.spec.rules import SGD, Adam

SPEC = model_spec(shapes={"a": (3,), "b": (7,)}, rules=(SGD(lr=1.0),))


def entry(position):
    return m.Activated(position, ())


def memory():
    return Staging(*(np.zeros(PAGE, np.float32) for _ in range(2)))


def training():
    """A shard with model 0, which members 1 and 2 take part in, and their memory."""
    shard, members = Shard(0, 1, "mean"), [memory(), memory()]
    for member, staging in enumerate(members, start=1):
        shard.hold(member, m.Register(1, SPEC, None), staging)
    shard.process(m.Registered(1, m.ExchangeId(1, 1), "model"))
    shard.process(m.Served(2, m.ExchangeId(2, 1), "register"))
    return shard, members


def with_standby(shard):
    snapshot, closed = shard.attach_standby()
    standby = Shard.restore(snapshot, "mean")
    standby.admit(shard.agreed_term)
    for resolved in closed:
        standby.follow(resolved)
    return standby


def step(shard, member, value, number=2):
    shard.staging(member, 0).gradients[:10] = value
    shard.hold(member, m.Step(number, number - 1, 0, (m.Carried(0, b"\3"),), (), True))
    return m.ExchangeId(member, number)


# ── prepared, then committed ────────────────────────────────────────────────────────────────────


def test_a_prepared_commit_changes_nothing_before_it_is_committed_and_then_both_alike():
    shard, members = training()
    standby = with_standby(shard)
    tickets = step(shard, 1, 2.0), step(shard, 2, 4.0)
    members[0].parameters[:] = members[1].parameters[:] = 77
    resolved = shard.prepare(m.Committed(3, 1, tickets, tickets))
    standby.follow(resolved)
    assert (shard.position, shard.prepared, shard.safe) == (2, 3, 2)
    assert not shard.vectors[0].values.any()
    assert all((staging.parameters == 77).all() for staging in members)
    shard.acknowledged(0, 3)
    assert shard.safe == 3
    answers = shard.commit(3)
    assert [member for member, _ in answers] == [1, 2]
    assert answers[0][1].result == m.StepResult(1, True, 2, 0)
    assert (members[0].parameters[:3] == -3).all()
    assert standby.commit(3) == []  # nobody is connected to it
    for one in (shard, standby):
        assert (one.vectors[0].values[:3] == -3).all()
        assert one.version == 1
    assert standby.snapshot().ledger == shard.snapshot().ledger


def test_gradients_are_kept_until_the_commit_and_a_discarded_one_is_closed_anew():
    shard, _ = training()
    with_standby(shard)
    tickets = step(shard, 1, 2.0), step(shard, 2, 4.0)
    shard.prepare(m.Committed(3, 1, tickets, tickets))
    shard.recovery(5)
    shard.truncate(m.StartTerm(5, 2))
    assert shard.prepared == 2
    shard.prepare(m.Committed(3, 1, tickets[1:], tickets[1:]))
    shard.commit(3)
    assert (shard.vectors[0].values[:3] == -4).all()


def test_gradients_lie_in_the_memory_that_is_given_for_them():
    shard, _ = training()
    with_standby(shard)
    given = []

    def room(size):
        given.append(np.zeros(size // 8, np.int64).view(np.uint8))
        return given[-1]

    tickets = step(shard, 1, 2.0), step(shard, 2, 4.0)
    resolved = shard.prepare(m.Committed(3, 1, tickets, tickets), room)
    (memory,) = given
    assert resolved.payload()[0].ctypes.data == memory.ctypes.data
    assert (memory.view(np.float32)[:3] == 6).all()
    assert [array.shape for array in arriving(resolved.inputs).payload()] == [(PAGE,)]


def test_without_a_standby_nothing_is_collected_and_all_that_is_here_is_safe():
    shard, members = training()
    ticket = step(shard, 1, 2.0)
    assert shard.prepare(m.Committed(3, 1, (ticket,), (ticket,))) is None
    assert shard.safe == 3
    shard.commit(3)
    assert (members[0].parameters[:3] == -2).all()


def test_only_what_is_here_can_be_committed_and_in_order():
    shard, _ = training()
    with pytest.raises(ProtocolError, match="committed up to 3, but the last entry here is 2"):
        shard.commit(3)
    with pytest.raises(ProtocolError, match="entry 5 after 2"):
        shard.prepare(entry(5))
    shard.prepare(entry(3))
    with pytest.raises(ProtocolError, match="entry 3 after 3"):
        shard.process(entry(3))


# ── what may be reported ────────────────────────────────────────────────────────────────────────


def test_a_standby_does_not_have_what_its_server_applied_after_the_snapshot():
    """Else it could take over without an entry that was committed because its server alone had it."""
    shard = Shard(0, 1, "mean")
    shard.prepare(entry(1))
    assert shard.safe == 1  # reported, and so committed
    standby = with_standby(shard)
    shard.commit(1)
    assert shard.safe == 0
    shard.acknowledged(0, standby.prepared)
    assert shard.safe == 1


def test_before_a_new_sequencer_has_said_what_stands_only_what_is_applied_is_reported():
    shard = Shard(0, 1, "mean")
    for position in (1, 2, 3):
        shard.prepare(entry(position))
    shard.commit(1)
    assert shard.safe == 3
    shard.recovery(4)
    assert shard.safe == 1
    shard.truncate(m.StartTerm(4, 2))
    assert shard.safe == 2


def test_an_acknowledgement_of_discarded_entries_does_not_count_for_those_in_their_place():
    shipped = ReplicationProgress(2)

    def send(term, *positions):
        for position in positions:
            shard = Shard(0, 1, "mean")
            shard.term = shard.agreed_term = term
            shard._state.position = position - 1
            shard.attach_standby()
            shipped.add(shard.prepare(entry(position)))

    send(0, 3, 4, 5)
    shipped.acknowledge(0, 3)
    assert shipped.acknowledged == 3
    shipped.truncate(4)
    send(7, 5, 6)
    shipped.acknowledge(0, 5)
    assert shipped.acknowledged == 4
    shipped.acknowledge(7, 5)
    assert shipped.acknowledged == 5
    shipped.truncate(4)
    assert shipped.acknowledged == 4


def test_a_standby_may_come_between_a_recovery_and_its_result():
    shard = Shard(0, 1, "mean")
    for position in (1, 2, 3):
        shard.prepare(entry(position))
    shard.recovery(4)
    standby = with_standby(shard)
    assert (standby.term, standby.prepared) == (0, 3)
    for one in (shard, standby):
        one.truncate(m.StartTerm(4, 2))
    shard.acknowledged(0, 3)
    standby.follow(shard.prepare(entry(3)))
    assert shard.safe == 2
    shard.acknowledged(standby.term, standby.prepared)
    assert shard.safe == 3


def test_what_stands_in_a_term_is_said_once():
    """A server that lost the link to its sequencer may be told again, and has gone on meanwhile."""
    shard = Shard(0, 1, "mean")
    shard.prepare(entry(1))
    shard.recovery(4)
    shard.truncate(m.StartTerm(4, 0))
    shard.prepare(entry(1))
    shard.truncate(m.StartTerm(4, 0))
    again = shard.recovery(4)
    assert (again.agreed, again.prepared, again.written) == (4, 1, (4,))


def test_an_entry_keeps_the_term_in_which_it_was_written():
    shard = Shard(0, 1, "mean")
    standby = with_standby(shard)
    standby.follow(shard.prepare(entry(1)))
    for one in (shard, standby):
        one.recovery(4)
        one.truncate(m.StartTerm(4, 1))
    late = with_standby(shard)
    standby.follow(shard.prepare(entry(2)))
    for one in (shard, standby):
        assert one.recovery(9).written == (0, 4)
    assert late.recovery(9).written == (0,)


def test_what_is_applied_is_never_discarded():
    shard = Shard(0, 1, "mean")
    shard.prepare(entry(1))
    shard.commit(1)
    with pytest.raises(ProtocolError, match="agreed on 0, but entry 1 is applied here"):
        shard.truncate(m.StartTerm(1, 0))


# ── attempts ────────────────────────────────────────────────────────────────────────────────────


def test_an_attempt_that_is_over_is_refused_whatever_it_brings():
    shard, _ = training()
    shard.reconnected(1, 2)
    for action in (
        lambda: shard.reconnected(1, 1),
        lambda: shard.hold(1, m.Pull(2, (0,), -1), connection_epoch=1),
        lambda: shard.replace_staging(1, 0, memory(), 1),
    ):
        with pytest.raises(RefusedError, match="connection epoch 1 of member 1 is over"):
            action()
    shard.hold(1, m.Pull(2, (0,), -1), connection_epoch=2)


def test_a_former_connection_epochs_step_is_applied_but_its_memory_stays_as_it_is():
    shard, members = training()
    ticket = step(shard, 1, 2.0)
    members[0].parameters[:] = 77
    again = memory()
    again.gradients[:] = members[0].gradients
    shard.reconnected(1, 1)
    shard.replace_staging(1, 0, again, 1)
    assert shard.process(m.Committed(3, 1, (ticket,), (ticket,))) == []
    assert (shard.vectors[0].values[:3] == -2).all()
    assert (members[0].parameters == 77).all()
    assert not again.parameters.any()
    repeat = m.Step(2, 1, 0, (m.Carried(0, b"\3"),), (), True)
    assert shard.hold(1, repeat, connection_epoch=1) == m.Held(1, 2, "step", "1", 1)
    ((_, answer),) = shard.process(m.Served(4, m.ExchangeId(1, 2, 1), "step"))
    assert answer == m.Answer(2, 1, values=(0,), result=m.StepResult(1, True, 1, 0))
    assert (again.parameters[:3] == -2).all()
    assert shard.vectors[0].updates == 1


def test_the_same_exchange_comes_once_an_attempt_and_older_ones_never():
    shard, _ = training()
    with pytest.raises(ProtocolError, match="sent exchange 1, but 1 was answered"):
        shard.hold(1, m.Register(1, SPEC, None), memory())
    shard.hold(1, m.Pull(2, (0,), -1), connection_epoch=1)
    with pytest.raises(ProtocolError, match="sent 2 before 2 was answered"):
        shard.hold(1, m.Pull(2, (0,), -1), connection_epoch=1)
    shard.hold(1, m.Pull(2, (0,), -1), connection_epoch=2)
    shard.process(m.Served(3, m.ExchangeId(1, 2, 2)))
    with pytest.raises(ProtocolError, match="sent exchange 1, but 2 was answered"):
        shard.hold(1, m.Pull(1, (0,), -1), connection_epoch=3)


def test_an_entry_that_names_what_is_not_held_breaks_the_protocol():
    shard, _ = training()
    with pytest.raises(ProtocolError, match="which this server does not hold"):
        shard.process(m.Committed(3, 1, (m.ExchangeId(1, 9),), ()))


def test_a_standby_that_knows_a_newer_term_takes_nothing_of_a_former_primary():
    shard, _ = training()
    standby = with_standby(shard)
    late = shard.prepare(entry(3))
    standby.admit(shard.term + 1)
    with pytest.raises(RefusedError, match="this is of term 0"):
        standby.follow(late)
    assert standby.prepared == 2


def test_who_is_gone_for_good_is_refused():
    shard = Shard(0, 1, "mean")
    shard.process(m.Enrolled(1, 1, (m.Newcomer(4, 0),)))
    shard.hold(4, m.Leave(1))
    shard.process(m.Retired(2, 4, True, "it left", m.ExchangeId(4, 1)))
    with pytest.raises(RefusedError, match="member 4 has left or was retired"):
        shard.hold(4, m.Leave(1), connection_epoch=1)
    shard.hold(5, m.Leave(1))  # one that the log has not come to yet


# ── tables ──────────────────────────────────────────────────────────────────────────────────────


def test_a_pull_that_only_the_primary_serves_leaves_both_with_the_same_rows():
    rows = m.TableSpec("rows", 1, SGD(lr=1.0).to_spec(), Zeros().to_spec(), 0, None, AfterSteps(1).to_spec())
    shard, _ = training()
    shard.hold(1, m.RegisterTable(2, rows))
    shard.process(m.Registered(3, m.ExchangeId(1, 2), "rows", "table"))
    standby = with_standby(shard)

    def follow(entry):
        standby.follow(shard.prepare(entry))
        for one in (shard, standby):
            one.commit(entry.position)

    staged = StagedRows(0, np.array([7], np.int64), np.ones((1, 1), np.float32))
    shard.hold(1, m.Step(3, 1, 0, (), (), False, pushed=(m.Rows(0, 1, 0, 0),)), rows=[staged])
    pushed = m.ExchangeId(1, 3)
    follow(m.Committed(4, 1, (pushed,), (pushed,)))
    for version in (2, 3):
        ticket = step(shard, 2, 1.0, number=version)
        follow(m.Committed(3 + version, version, (ticket,), (ticket,)))
    asked = StagedRows(0, np.array([7], np.int64), np.empty((1, 1), np.float32))
    shard.hold(1, m.PullRows(4, (m.Rows(0, 1, 0, 0),)), rows=[asked])
    follow(m.Served(7, m.ExchangeId(1, 4)))
    assert asked.rows.tolist() == [[0.0]]
    assert [len(one.snapshot().tables[0].ids) for one in (shard, standby)] == [0, 0]
    assert digests(shard.snapshot()) == digests(standby.snapshot())


def test_what_was_measured_for_a_lost_sequencer_is_said_to_no_other():
    """The next one may ask for another worker's gradients at the same place of the log."""
    shard = Shard(0, 1, "mean")
    for member in (1, 2):
        clipped = model_spec(shapes={"a": (3,), "b": (7,)}, rules=(SGD(lr=1.0),), clip_norm=1.0)
        shard.hold(member, m.Register(1, clipped, None), memory())
    shard.process(m.Registered(1, m.ExchangeId(1, 1), "model"))
    shard.process(m.Served(2, m.ExchangeId(2, 1), "register"))
    first, second = step(shard, 1, 2.0), step(shard, 2, 4.0)
    shard.prepare(m.Measured(3, (first,)))
    assert shard.has_measured
    shard.recovery(5)
    shard.truncate(m.StartTerm(5, 2))
    assert not shard.has_measured
    assert shard.recovery(6).sums == ()
    shard.truncate(m.StartTerm(6, 2))
    shard.prepare(m.Measured(3, (second,)))
    (sums,) = shard.take_measured()
    assert sum(part.value for part in sums.parts) == 10 * 4.0**2


# ── what programs wrote ─────────────────────────────────────────────────────────────────────────


def test_a_state_and_values_that_ranks_wrote_alike_are_taken_once_on_both():
    spec = model_spec(shapes={"a": (3,), "b": (7,)}, rules=(Adam(lr=1.0),))
    shard, members = Shard(0, 1, "mean"), [memory(), memory()]
    for member, staging in enumerate(members, start=1):
        shard.hold(member, m.Register(1, spec, None), staging)
    shard.process(m.Registered(1, m.ExchangeId(1, 1), "model"))
    shard.process(m.Served(2, m.ExchangeId(2, 1), "register"))
    standby = with_standby(shard)
    answers = []

    def follow(entry):
        standby.follow(shard.prepare(entry))
        answers.extend(shard.commit(entry.position))
        standby.commit(entry.position)

    loaded = np.arange(2 * PAGE, dtype=np.float32)
    states = ("exp_avg", "exp_avg_sq")
    for member, position in ((1, 3), (2, 4)):
        request = m.LoadState(2, m.Carried(0, b"\3"), states, (5, 6), 6, m.ProgramWrite(9, 0))
        shard.hold(member, request, Staging(loaded * member, loaded * member))
        follow(m.Assigned(position, position - 2, m.ExchangeId(member, 2)))
    for member, position, digest in ((1, 5, 7), (2, 6, 7), (2, 7, 8)):
        members[member - 1].parameters[:10] = position
        number = 3 if position < 7 else 4
        shard.hold(member, m.Assign(number, m.Carried(0, b"\3"), (), m.ProgramWrite(digest, 0)))
        follow(m.Assigned(position, position - 2, m.ExchangeId(member, number)))
    assert [answer.failure and answer.failure.error for _, answer in answers] == [*[None] * 4, "UsageError"]
    for one in (shard, standby):
        vector = one.vectors[0]
        assert vector.values[:3].tolist() == [5.0] * 3
        assert vector.counts.tolist() == [5, 6]
        assert vector.updates == 6
        assert vector.states["exp_avg_sq"][:3].tolist() == [PAGE, PAGE + 1, PAGE + 2]
    assert digests(shard.snapshot()) == digests(standby.snapshot())


def test_a_state_of_other_vectors_or_tensors_is_refused():
    shard, _ = training()
    carried = m.Carried(0, b"\3")
    for states, counts, updates in ((("sum",), (1, 1), 1), ((), (1,), 1), ((), (-1, 1), 1), ((), (1, 1), -2)):
        with pytest.raises(ProtocolError):
            shard.hold(1, m.LoadState(2, carried, states, counts, updates), memory())
