"""The sequencer and norms: what is asked, when that is void, and what is said of it."""

from types import SimpleNamespace

import pytest
from test_sequencer import MODES, Desk, committed, kinds

from headwater import messages as m
from headwater.log.measures import Measures


class ClippedDesk(Desk):
    """Steps that are held carry a model whose gradients are clipped."""

    def also(self, rank, kind, name="", servers=None):
        held = m.Held(
            self.ids[rank],
            self.numbers[rank],
            kind,
            name or (kind if kind == "sum" else ""),
            self.connection_epochs[rank],
            measured=kind == "step",
            meeting=self.place(rank, kind),
        )
        entries = []
        for server in self.servers if servers is None else servers:
            entries += self.sequencer.report(server, (held,), self.now)
        return entries

    def measured(self, entry, *values, server=0):
        """Servers from `server` on say their squares: block i of model 0 has values[i]."""
        entries = []
        for i, value in enumerate(values, start=server):
            sums = m.Sums(entry.position, (m.Sum(0, 0, i, value),))
            entries += self.sequencer.report(i, (), self.now, sums=(sums,))
        return entries


@pytest.mark.parametrize("mode", MODES)
def test_a_commit_has_the_norm_of_what_all_servers_say(mode):
    desk = ClippedDesk(mode, workers=1, servers=3)
    (asked,) = desk.hold(0, "step", "1")
    assert asked == m.Measured(asked.position, (desk.ticket(0),))
    assert desk.measured(asked, 9.0, 16.0) == []
    assert desk.waits(0) == "step 1 waits for server 2 to say how large the gradients are"
    entry = committed(desk.measured(asked, 0.0, server=2))
    assert entry.norms == ((0, 5.0),)
    assert entry.updates == (desk.ticket(0),)


def test_what_a_dead_worker_was_measured_in_is_measured_anew():
    desk = ClippedDesk("sync", workers=2, servers=1)
    desk.hold(0, "step", "1")
    (asked,) = desk.hold(1, "step", "1")
    retired, anew = desk.die(1)
    assert kinds([retired, anew]) == ["Retired", "Measured"]
    assert anew.updates == (desk.ticket(0),)
    assert desk.measured(asked, 9.0) == []
    assert committed(desk.measured(anew, 4.0)).norms == ((0, 2.0),)


def test_a_round_waits_for_one_that_became_active_while_it_was_measured():
    desk = ClippedDesk("sync", workers=1, servers=1)
    (asked,) = desk.hold(0, "step", "1")
    desk.join()
    assert desk.measured(asked, 9.0) == []
    (anew,) = desk.hold(1, "step", "1")
    assert anew.updates == (desk.ticket(0), desk.ticket(1))
    assert committed(desk.measured(anew, 16.0)).norms == ((0, 4.0),)


def test_an_update_that_comes_while_a_quorum_is_measured_is_part_of_the_round():
    desk = ClippedDesk("sync:quorum=1", workers=2, servers=1)
    (asked,) = desk.hold(0, "step", "1")
    (anew,) = desk.hold(1, "step", "1")
    assert desk.measured(asked, 9.0) == []
    assert committed(desk.measured(anew, 16.0)).updates == (desk.ticket(0), desk.ticket(1))


def test_an_open_round_stays_closed_while_it_is_measured():
    desk = ClippedDesk("sync:quorum=1,grace=2", workers=2, servers=1)
    assert desk.hold(0, "step", "1") == []
    (asked,) = desk.sequencer.tick(2.0)
    assert desk.sequencer.tick(2.5) == []
    committed(desk.measured(asked, 1.0))
    assert desk.sequencer.due is None


def test_without_rounds_updates_are_committed_in_the_order_in_which_their_norms_are_known():
    desk = ClippedDesk("async", workers=2, servers=1)
    (first,) = desk.hold(0, "step", "1")
    (second,) = desk.hold(1, "step", "1")
    assert committed(desk.measured(second, 4.0)).updates == (desk.ticket(1),)
    assert committed(desk.measured(first, 9.0)).updates == (desk.ticket(0),)


def test_a_measurement_is_not_taken_for_a_stall():
    desk = ClippedDesk("async", workers=1, servers=1)
    (asked,) = desk.hold(0, "step", "1")
    assert desk.sequencer.tick(100.0) == []
    assert kinds(desk.measured(asked, 1.0)) == ["Committed"]


def test_a_newer_attempt_is_what_the_commit_names():
    desk = ClippedDesk("async", workers=1, servers=1)
    (asked,) = desk.hold(0, "step", "1")
    assert desk.again(0, "step", "1") == []
    assert committed(desk.measured(asked, 1.0)).updates == (desk.ticket(0),)


def test_with_too_few_workers_a_measured_update_waits():
    desk = ClippedDesk("async", workers=2, servers=1, min_workers=2)
    (asked,) = desk.hold(0, "step", "1")
    assert kinds(desk.die(1)) == ["Retired"]
    assert desk.measured(asked, 1.0) == []
    assert kinds(desk.join(rank=1)) == ["Enrolled", "Activated", "Committed"]


def test_who_meets_while_a_round_is_measured_waits_for_those_in_it():
    desk = ClippedDesk("sync", workers=2, servers=1)
    desk.hold(1, "sum")
    desk.hold(0, "step", "1")
    assert desk.waits(1) == "sum waits for worker 0"


@pytest.mark.parametrize("mode", MODES)
def test_every_step_of_a_worker_has_a_norm_of_its_own(mode):
    desk = ClippedDesk(mode, workers=1, servers=2)
    for number, (squares, norm) in enumerate([((9.0, 16.0), 5.0), ((1.0, 0.0), 1.0)], start=1):
        (asked,) = desk.hold(0, "step", str(number))
        assert kinds([asked]) == ["Measured"]
        entry = committed(desk.measured(asked, *squares))
        assert (entry.updates, entry.norms) == ((desk.ticket(0),), ((0, norm),))


def test_a_measurement_of_one_that_died_hides_no_stall_of_the_others():
    desk = ClippedDesk("async", workers=3, servers=2)
    (asked,) = desk.hold(2, "step", "1")
    assert kinds([asked]) == ["Measured"]
    assert kinds(desk.die(2)) == ["Retired"]
    desk.hold(0, "barrier")
    assert "Stalled" in kinds(desk.hold(1, "sum"))


def test_what_was_measured_for_an_exchange_that_is_over_is_waited_for_no_more():
    """Else everybody who waits for each other would be taken for somebody who waits for a server."""
    measures = Measures(2)
    exchanges = [SimpleNamespace(member=member, id=m.ExchangeId(member, 1)) for member in (1, 2)]
    measures.begin(exchanges, 5, 0)
    measures.add(0, [m.Sums(5, ())])
    assert measures
    assert measures.missing(exchanges[1]) == [1]
    measures.forget(exchanges[0])
    assert not measures
    assert measures.missing(exchanges[1]) == []
    measures.forget(exchanges[1])
    measures.begin(exchanges[1:], 6, 0)
    measures.begin(exchanges, 7, 0)
    measures.add(0, [m.Sums(7, ())])
    measures.add(1, [m.Sums(7, ())])
    assert not measures, "what was asked of one of them before, with others, is void"
