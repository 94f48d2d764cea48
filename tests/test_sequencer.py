"""The sequencer alone: what each report leads to, and what it says of those who wait."""

from collections import defaultdict
from dataclasses import dataclass

import pytest
from modes import Pairs

from headwater import messages as m
from headwater.errors import ConfigurationError, ProtocolError, RefusedError
from headwater.log.pending import MOVES, PendingExchanges, Stage
from headwater.log.sequencer import Sequencer
from headwater.log.state import LogState, MemberState
from headwater.machines.roster import RosterBook
from headwater.spec.sync import Commits, Decision, Mode, parse_sync

MODES = ["sync", "async", "ssp:1"]
MEETINGS = ["barrier", "sum"]


class Desk:
    """A sequencer alone, spoken to by rank: who holds what, in as few words as possible."""

    def __init__(
        self, mode: str, *, workers: int, servers: int = 1, joined: int | None = None, **options
    ) -> None:
        self.mode = parse_sync(mode)
        self.sequencer = Sequencer(servers, self.mode, **options)
        self.now = 0.0
        self.connection_epochs: dict[int, int] = defaultdict(int)
        self.servers = range(servers)
        self.book = RosterBook(workers, servers)
        self.numbers: dict[int, int] = defaultdict(int)
        self.ids: dict[int, int] = {}
        for _ in range(workers if joined is None else joined):
            self.ids[len(self.ids)] = self.book.join(m.Join("worker", None, 0, "here")).id
        self.opening = self.sequencer.roster(self.book.view())

    def join(self, role: m.Role = "worker", rank: int | None = None) -> list[m.AnyEntry]:
        member = self.book.join(m.Join(role, rank, 0, "here"))
        self.ids[member.index] = member.id
        return self.sequencer.roster(self.book.view())

    def die(self, rank: int) -> list[m.AnyEntry]:
        self.book.remove(self.ids[rank])
        return self.sequencer.roster(self.book.view())

    def hold(self, rank: int, kind: str, name: str = "", servers=None) -> list[m.AnyEntry]:
        """`rank`'s next exchange is held by `servers` (all by default, in order)."""
        self.numbers[rank] += 1
        return self.also(rank, kind, name, servers)

    def also(self, rank: int, kind: str, name: str = "", servers=None) -> list[m.AnyEntry]:
        """`rank`'s last exchange is held by `servers` too."""
        held = m.Held(
            self.ids[rank],
            self.numbers[rank],
            kind,
            name or (kind if kind in MEETINGS else ""),
            self.connection_epochs[rank],
            meeting=self.place(rank, kind),
        )
        entries: list[m.AnyEntry] = []
        for server in self.servers if servers is None else servers:
            entries += self.sequencer.report(server, (held,), self.now)
        return entries

    def place(self, rank: int, kind: str) -> m.Meeting | None:
        """Of a meeting: the rank's next one, or its own last if it has not ended."""
        return m.Meeting(self.sequencer.standings.met + 1, kind) if kind in MEETINGS else None

    def again(self, rank: int, kind: str, name: str = "", servers=None) -> list[m.AnyEntry]:
        """`rank`'s last exchange comes again, in its next attempt."""
        self.connection_epochs[rank] += 1
        return self.also(rank, kind, name, servers)

    def ticket(self, rank: int) -> m.ExchangeId:
        return m.ExchangeId(self.ids[rank], self.numbers[rank], self.connection_epochs[rank])

    def waits(self, rank: int) -> str:
        return self.sequencer.waits()[self.ids[rank]]


def kinds(entries):
    return [type(entry).__name__ for entry in entries]


def committed(entries):
    (entry,) = entries
    assert isinstance(entry, m.Committed)
    return entry


# ── commits ─────────────────────────────────────────────────────────────────────────────────────


def test_a_round_is_committed_exactly_when_every_server_holds_every_active_workers_update():
    desk = Desk("sync", workers=2, servers=2)
    assert desk.hold(0, "step", "1", servers=[0]) == []
    assert desk.hold(1, "step", "1", servers=[1, 0]) == []
    tickets = (desk.ticket(0), desk.ticket(1))
    assert desk.also(0, "step", "1", servers=[1]) == [m.Committed(3, 1, tickets, tickets)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_round_is_in_rank_order_however_it_arrived(order):
    desk = Desk("sync", workers=3)
    *_, last = [desk.hold(rank, "step", "1") for rank in order]
    assert committed(last).updates == tuple(desk.ticket(rank) for rank in range(3))


@pytest.mark.parametrize("mode", ["async", "ssp:1"])
def test_an_update_is_committed_as_soon_as_all_servers_hold_it(mode):
    desk = Desk(mode, workers=2, servers=2)
    assert desk.hold(1, "step", "1", servers=[1]) == []
    assert committed(desk.also(1, "step", "1", servers=[0])).answered == (desk.ticket(1),)


def test_a_server_that_reports_twice_counts_once():
    desk = Desk("async", workers=1, servers=2)
    assert desk.hold(0, "step", "1", servers=[0, 0]) == []
    assert kinds(desk.also(0, "step", "1", servers=[1])) == ["Committed"]


def test_what_is_held_of_a_newcomer_before_the_roster_names_it_counts_once_it_does():
    """Another server may know the roster, and serve the newcomer, before the sequencer does."""
    desk = Desk("async", workers=1, servers=2)
    newcomer = desk.book.join(m.Join("observer", None, 0, "here"))
    held = m.Held(newcomer.id, 1, "pull")
    assert desk.sequencer.report(1, (held,)) == []
    assert kinds(desk.sequencer.roster(desk.book.view())) == ["Enrolled"]
    (served,) = desk.sequencer.report(0, (held,))
    assert served.ticket == m.ExchangeId(newcomer.id, 1, 0)


def test_what_is_held_of_one_that_is_gone_never_counts():
    desk = Desk("async", workers=2, servers=1)
    desk.die(1)
    assert desk.sequencer.report(0, (m.Held(desk.ids[1], 1, "pull"),)) == []
    assert desk.ids[1] not in desk.sequencer.waits()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_committed_before_the_declared_workers_have_joined(mode):
    desk = Desk(mode, workers=2, joined=1)
    assert kinds(desk.opening) == ["Enrolled"]
    assert desk.hold(0, "step", "1") == []
    assert desk.waits(0) == "step 1 waits for worker 1 to join"
    entries = desk.join()
    assert kinds(entries) == ["Enrolled", "Activated"] + ["Committed"] * (mode != "sync")
    assert entries[1].members == (desk.ids[0], desk.ids[1])


@pytest.mark.parametrize("kind", ["assign", "barrier", "sum", "step"])
@pytest.mark.parametrize("mode", MODES)
def test_what_waits_for_the_start_goes_on_then_even_after_the_end_of_batches(mode, kind):
    """A worker whose part of the data is empty ends its batches before the others have joined."""
    desk = Desk(mode, workers=2, joined=1)
    assert kinds(desk.hold(0, "end")) == ["Retired"]
    assert desk.hold(0, kind) == []
    entries = desk.join() + desk.hold(1, "step", "1")
    answered = [entry for entry in entries if isinstance(entry, m.Assigned | m.Committed)]
    assert answered
    assert kinds(desk.hold(1, "leave"))[0] == "Retired"
    assert desk.sequencer.waits() == {}


def test_the_version_grows_with_commits_and_assignments_only():
    desk = Desk("async", workers=2)
    for version, kind in [(1, "step"), (1, "pull"), (2, "assign"), (2, "end"), (2, "stop"), (3, "step")]:
        desk.hold(0, kind)
        assert desk.sequencer.version == version
    assert desk.sequencer.position == 9  # Enrolled and two Activated among them


# ── who is in a round ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["end", "barrier", "sum", "leave"])
def test_a_round_does_not_wait_for_one_that_ended_meets_or_left(kind):
    desk = Desk("sync", workers=2)
    assert desk.hold(0, "step", "1") == []
    entries = desk.hold(1, kind)
    assert kinds(entries) == ["Retired", "Committed"]
    assert entries[1].updates == (desk.ticket(0),)


def test_a_round_does_not_wait_for_the_dead():
    desk = Desk("sync", workers=3, servers=2)
    desk.hold(0, "step", "1")
    desk.hold(1, "step", "1")
    desk.hold(2, "step", "1", servers=[0])
    entries = desk.die(2)
    assert kinds(entries) == ["Retired", "Committed"]
    assert entries[0] == m.Retired(3, desk.ids[2], True, "its process ended or its connection was lost")
    assert entries[1].updates == (desk.ticket(0), desk.ticket(1))


def test_a_dead_workers_complete_update_is_not_in_the_round():
    desk = Desk("sync", workers=3)
    desk.hold(0, "step", "1")
    desk.hold(2, "step", "1")
    desk.die(2)
    assert committed(desk.hold(1, "step", "1")).updates == (desk.ticket(0), desk.ticket(1))


def test_a_step_after_the_end_waits_until_nobody_is_active():
    desk = Desk("sync", workers=3)
    desk.hold(0, "end")
    assert desk.hold(0, "step", "1") == []
    for step in "12":
        assert desk.hold(1, "step", step) == []
        assert committed(desk.hold(2, "step", step)).updates == (desk.ticket(1), desk.ticket(2))
    desk.hold(1, "end")
    desk.hold(2, "end")
    assert desk.waits(0) == "step 1 waits for workers 1, 2"
    assert desk.hold(1, "step", "3") == []  # who goes on is decided when worker 2 has chosen, too
    entries = desk.hold(2, "leave")
    assert kinds(entries) == ["Retired", "Activated", "Committed"]
    assert entries[2].updates == (desk.ticket(0), desk.ticket(1))


def test_a_step_after_the_end_does_not_wait_without_rounds():
    desk = Desk("async", workers=2)
    desk.hold(0, "end")
    assert kinds(desk.hold(0, "step", "1")) == ["Activated", "Committed"]


def test_one_that_left_does_not_come_back_with_a_roster_that_is_older_than_its_leaving():
    desk = Desk("sync", workers=2)
    desk.hold(0, "leave")
    entries = desk.join(rank=2)
    assert kinds(entries) == ["Enrolled", "Activated"]
    assert entries[1].members == (desk.ids[2],)
    desk.hold(1, "step", "1")
    assert committed(desk.hold(2, "step", "1")).updates == (desk.ticket(1), desk.ticket(2))


# ── bounded staleness ───────────────────────────────────────────────────────────────────────────


def test_an_answer_is_held_until_the_others_have_caught_up():
    desk = Desk("ssp:1", workers=2)
    assert committed(desk.hold(0, "step", "1")).answered == (desk.ticket(0),)
    assert committed(desk.hold(0, "step", "2")).answered == ()
    assert desk.waits(0) == "step 2 waits for worker 1: leads the slowest worker by 2 steps, allowed 1"
    assert desk.hold(1, "step", "1")[1:] == [m.Served(6, desk.ticket(0), "step")]
    assert desk.sequencer.waits() == {}


@pytest.mark.parametrize("how", ["end", "barrier", "leave", "die"])
def test_one_that_is_no_longer_active_blocks_nobody(how):
    desk = Desk("ssp:0", workers=2)
    desk.hold(0, "step", "1")
    entries = desk.die(1) if how == "die" else desk.hold(1, how)
    assert kinds(entries) == ["Retired", "Served"]


def test_joiners_and_returning_workers_get_the_smallest_active_clock():
    desk = Desk("ssp:2", workers=3)
    for step, ranks in enumerate([(0, 1, 2), (0, 1, 2), (0, 1), (0,)], start=1):
        for rank in ranks:
            desk.hold(rank, "step", str(step))
    desk.hold(2, "end")  # clocks 4, 3 and, no longer active, 2
    desk.join()
    desk.hold(2, "step", "3")  # it returns with 3 and finishes 4
    for step in (5, 6):
        assert committed(desk.hold(0, "step", str(step))).answered == (desk.ticket(0),) * (step < 6)
    assert desk.waits(0).startswith("step 6 waits for workers 1, 3: leads the slowest worker by 3 steps")
    desk.hold(3, "step", "1")
    assert desk.waits(0).startswith("step 6 waits for worker 1:")
    assert kinds(desk.hold(1, "step", "4")) == ["Committed", "Served"]


def test_a_pull_is_answered_at_once_for_the_last_answer_has_waited():
    desk = Desk("ssp:0", workers=2)
    desk.hold(0, "step", "1")
    desk.hold(1, "step", "1")
    assert kinds(desk.hold(0, "pull")) == ["Served"]


# ── meetings ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["barrier", "sum"])
def test_a_meeting_ends_when_every_worker_is_there_and_makes_all_active(mode, kind):
    desk = Desk(mode, workers=3)
    desk.hold(1, "end")
    desk.hold(2, kind)
    desk.hold(0, kind)
    assert desk.waits(2) == f"{kind} waits for worker 1"
    assert desk.hold(1, kind)[1:] == [m.Met(7, tuple(desk.ticket(rank) for rank in range(3)), 1)]
    if mode == "sync":
        assert desk.hold(0, "step", "1") == []
        assert desk.waits(0).startswith("step 1 waits for workers 1, 2: 1 of 3 updates")


def test_a_meeting_ends_when_the_last_one_missing_leaves_or_dies():
    for how in ("leave", "die"):
        desk = Desk("async", workers=2)
        desk.hold(0, "barrier")
        entries = desk.die(1) if how == "die" else desk.hold(1, "leave")
        assert kinds(entries) == ["Retired", "Met"]


@pytest.mark.parametrize("mode", MODES)
def test_a_barrier_against_a_sum_stalls_at_once_and_names_both(mode):
    desk = Desk(mode, workers=2)
    desk.hold(0, "barrier")
    *_, last = desk.hold(1, "sum")
    assert last.tickets == (desk.ticket(0), desk.ticket(1))
    assert last.reason == (
        "everybody waits for each other, at different places of their programs: "
        "worker 0 waits in barrier; worker 1 waits in sum"
    )
    assert desk.sequencer.waits() == {}


def test_a_registration_that_waits_for_one_who_waits_stalls_at_once():
    desk = Desk("sync", workers=2)
    desk.hold(0, "step", "1")
    (entry,) = desk.hold(1, "register", "m")
    assert isinstance(entry, m.Stalled)
    assert "worker 0 waits in step 1; worker 1 waits in register m" in entry.reason


# ── registration ────────────────────────────────────────────────────────────────────────────────


def test_the_lowest_active_rank_supplies_a_model_and_the_others_join_it():
    desk = Desk("async", workers=3)
    assert desk.hold(2, "register", "m") == []
    assert desk.hold(1, "register", "m") == []
    assert desk.waits(2) == "register m waits for worker 0 to declare the model"
    entries = desk.hold(0, "register", "m")
    assert entries == [
        m.Registered(3, desk.ticket(0), "m"),
        m.Served(4, desk.ticket(1), "register"),
        m.Served(5, desk.ticket(2), "register"),
    ]


def test_rank_0_supplies_a_model_before_all_have_joined():
    desk = Desk("async", workers=3, joined=2)
    assert desk.hold(1, "register", "m") == []
    assert desk.waits(1) == "register m waits for worker 0 to declare the model"
    assert kinds(desk.hold(0, "register", "m")) == ["Registered", "Served"]


@pytest.mark.parametrize("how", ["end", "leave", "die"])
def test_the_next_rank_supplies_a_model_when_the_lowest_is_no_longer_active(how):
    """Both that wait are served, though the first of them brings the second along."""
    desk = Desk("async", workers=3)
    desk.hold(1, "register", "m")
    desk.hold(2, "register", "m")
    entries = desk.die(0) if how == "die" else desk.hold(0, how)
    assert entries[1:] == [m.Registered(4, desk.ticket(1), "m"), m.Served(5, desk.ticket(2), "register")]


# ── stop ────────────────────────────────────────────────────────────────────────────────────────


def test_a_stop_tells_all_but_those_whose_batches_are_over():
    desk = Desk("async", workers=5)
    desk.hold(1, "end")
    desk.hold(2, "end")
    desk.hold(2, "barrier")
    desk.hold(3, "barrier")
    desk.join("observer")
    (entry,) = desk.hold(0, "stop")
    assert entry.members == (desk.ids[0], desk.ids[3], desk.ids[4])


def test_a_stop_before_all_have_joined_is_for_the_declared_ones_that_come_and_not_for_later_ones():
    desk = Desk("async", workers=2, joined=1)
    desk.hold(0, "stop")
    desk.join()
    desk.join()
    desk.join("observer")
    states = desk.sequencer.standings.members
    assert [states[desk.ids[rank]].stopping for rank in (0, 1, 2, -1)] == [True, True, False, False]


def test_a_register_that_waits_for_a_dead_worker_names_who_has_not_joined():
    desk = Desk("sync", workers=3, joined=2)
    desk.hold(1, "register", "m")
    desk.die(0)
    assert desk.sequencer.waits()[desk.ids[1]] == "register m waits for worker 2 to join"


# ── observers ───────────────────────────────────────────────────────────────────────────────────


def test_an_observer_is_answered_at_once_and_waited_for_by_nobody():
    desk = Desk("sync", workers=2, joined=1)
    assert kinds(desk.join("observer")) == ["Enrolled"]
    assert kinds(desk.hold(-1, "attach")) == ["Served"]
    desk.join()
    for rank in (0, 1):
        desk.hold(rank, "barrier")
    assert kinds(desk.hold(-1, "pull") + desk.hold(-1, "leave")) == ["Served", "Retired"]
    assert desk.sequencer.waits() == {}


# ── waits ───────────────────────────────────────────────────────────────────────────────────────


def test_a_wait_names_the_servers_that_do_not_hold_the_exchange():
    desk = Desk("sync", workers=1, servers=4)
    desk.hold(0, "step", "7", servers=[1, 3])
    assert desk.waits(0) == "step 7 waits for servers 0, 2"


def test_a_round_names_the_active_workers_whose_update_is_missing():
    desk = Desk("sync", workers=5, servers=2)
    desk.hold(1, "end")
    desk.hold(2, "step", "1")
    desk.hold(3, "step", "1", servers=[0])
    desk.hold(4, "register", "m")
    assert desk.waits(2).startswith("step 1 waits for workers 0, 3, 4: 1 of 4 updates of this round")
    assert desk.waits(3) == "step 1 waits for server 1"
    assert desk.waits(4) == "register m waits for worker 0 to declare the model"


# ── repeats ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", MODES)
def test_what_all_servers_hold_at_some_attempt_proceeds_and_no_newer_one_takes_that_back(mode):
    desk = Desk(mode, workers=2, servers=2)
    desk.hold(0, "step", "1", servers=[0])
    desk.again(0, "step", "1", servers=[1])
    assert desk.waits(0) == "step 1 waits for server 1"  # at either attempt one server lacks it
    desk.connection_epochs[0] = 0
    entries = desk.also(0, "step", "1", servers=[1])
    desk.again(0, "step", "1", servers=[])
    entries += desk.hold(1, "step", "1")
    assert [ticket for entry in entries for ticket in entry.updates] == [
        m.ExchangeId(desk.ids[0], 1, 0),
        m.ExchangeId(desk.ids[1], 1, 0),
    ]


def test_an_entry_names_the_newest_attempt_that_every_server_holds():
    desk = Desk("sync", workers=2, servers=2)
    desk.hold(0, "step", "1")
    desk.again(0, "step", "1")
    desk.again(0, "step", "1", servers=[0])
    assert committed(desk.hold(1, "step", "1")).updates[0] == m.ExchangeId(desk.ids[0], 1, 1)
    assert desk.also(0, "step", "1", servers=[1]) == [m.Served(4, m.ExchangeId(desk.ids[0], 1, 2), "step")]
    assert desk.sequencer.waits() == {}


def test_what_was_answered_is_answered_again_for_a_newer_attempt_that_every_server_holds():
    desk = Desk("async", workers=1, servers=2)
    assert kinds(desk.hold(0, "step", "1")) == ["Committed"]
    assert desk.again(0, "step", "1", servers=[0]) == []
    assert desk.waits(0) == "step 1 waits for server 1"
    assert desk.also(0, "step", "1", servers=[1]) == [m.Served(4, desk.ticket(0), "step")]
    assert desk.sequencer.waits() == {}
    assert kinds(desk.hold(0, "step", "2")) == ["Committed"]


def test_a_blocked_answer_goes_to_the_newest_attempt():
    desk = Desk("ssp:0", workers=2)
    assert committed(desk.hold(0, "step", "1")).answered == ()
    assert desk.again(0, "step", "1") == []
    assert desk.hold(1, "step", "1")[1:] == [m.Served(5, desk.ticket(0), "step")]


@pytest.mark.parametrize("mode", MODES)
def test_late_and_doubled_reports_change_nothing(mode):
    desk = Desk(mode, workers=1, servers=2)
    for step in "123":
        desk.hold(0, "step", step)
        entries = desk.again(0, "step", step)
        assert kinds(entries) == ["Served"]
        for number in (desk.numbers[0], desk.numbers[0] - 1):
            for connection_epoch in range(desk.connection_epochs[0] + 1):
                stale = m.Held(desk.ids[0], number, "step", "", connection_epoch)
                assert desk.sequencer.report(0, (stale, stale)) == []
    assert desk.sequencer.report(0, (m.Held(999, 1, "step"),)) == []
    assert desk.sequencer.version == 3


# ── quorum ──────────────────────────────────────────────────────────────────────────────────────


def test_a_round_is_closed_with_the_quorum_and_who_comes_later_is_late():
    desk = Desk("sync:quorum=2", workers=3)
    assert desk.hold(2, "step", "1") == []
    assert desk.waits(2) == "step 1 waits for workers 0, 1: 1 of 2 updates of this round have arrived"
    assert committed(desk.hold(0, "step", "1")).updates == (desk.ticket(0), desk.ticket(2))
    (late,) = desk.hold(1, "step", "1")
    assert late == m.Late(4, desk.ticket(1), "its round was closed without it, 1 commit ago")
    desk.hold(1, "step", "2")  # meant for the round that is open now
    assert committed(desk.hold(0, "step", "2")).updates == (desk.ticket(0), desk.ticket(1))
    assert desk.sequencer.standings.late == 1


def test_an_update_that_some_servers_held_when_its_round_closed_is_late_too():
    desk = Desk("sync:quorum=1", workers=2, servers=2)
    desk.hold(1, "step", "1", servers=[0])
    assert committed(desk.hold(0, "step", "1")).updates == (desk.ticket(0),)
    assert kinds(desk.also(1, "step", "1", servers=[1])) == ["Late"]


def test_a_round_stays_open_for_its_grace_or_until_everybody_is_there():
    desk = Desk("sync:quorum=1,grace=0.5", workers=3)
    desk.now = 10.0
    assert desk.hold(1, "step", "1") == []
    assert desk.sequencer.due == 10.5
    desk.now = 10.2
    assert desk.hold(0, "step", "1") == []
    assert "the round stays open for the other 1 for 0.5 s" in desk.waits(0)
    assert desk.sequencer.tick(10.4) == []
    assert committed(desk.sequencer.tick(10.5)).updates == (desk.ticket(0), desk.ticket(1))
    assert desk.sequencer.due is None
    for rank in (0, 1):
        assert desk.hold(rank, "step", "2") == []
    assert kinds(desk.hold(2, "step", "1")) == ["Late"]
    assert desk.sequencer.due == 11.0  # time does not go back
    assert len(committed(desk.hold(2, "step", "2")).updates) == 3
    assert desk.sequencer.due is None


def test_a_quorum_is_at_most_who_is_active():
    desk = Desk("sync:quorum=3", workers=3)
    desk.hold(0, "step", "1")
    desk.hold(1, "step", "1")
    assert kinds(desk.die(2)) == ["Retired", "Committed"]
    desk.hold(0, "end")
    assert kinds(desk.hold(1, "step", "2")) == ["Committed"]


def test_who_resumes_or_joins_is_not_late():
    desk = Desk("sync:quorum=1", workers=2)
    desk.hold(0, "end")
    for step in "12":
        assert kinds(desk.hold(1, "step", step)) == ["Committed"]
    desk.join()
    assert kinds(desk.hold(2, "step", "1")) == ["Committed"]
    desk.hold(0, "step", "1")
    desk.hold(2, "leave")
    assert kinds(desk.hold(1, "leave")) == ["Retired", "Activated", "Committed"]


def test_an_open_round_is_not_taken_for_a_stall():
    desk = Desk("sync:quorum=1,grace=1", workers=2)
    desk.hold(0, "step", "1")
    assert desk.hold(1, "register", "m") == []
    assert kinds(desk.sequencer.tick(1.0)) == ["Committed"]


# ── modes of a user's own ───────────────────────────────────────────────────────────────────────


def own(mode, **options):
    """A desk whose sequencer asks a mode that is registered nowhere."""
    desk = Desk("sync", **options)
    desk.sequencer = Sequencer(len(desk.servers), mode)
    desk.sequencer.roster(desk.book.view())
    return desk


def test_a_mode_may_choose_some_of_the_steps_and_is_asked_again_for_the_rest():
    desk = own(Pairs(), workers=5)
    assert desk.hold(3, "step", "1") == []
    assert desk.waits(3) == "step 1 waits for workers 0, 1, 2, 4: 1 of 2 updates have arrived"
    assert committed(desk.hold(1, "step", "1")).updates == (desk.ticket(1), desk.ticket(3))
    held = [m.Held(desk.ids[rank], 1, "step", "1") for rank in (4, 2, 0)]
    desk.numbers.update({4: 1, 2: 1, 0: 1})
    (pair,) = desk.sequencer.report(0, held)
    assert pair.updates == (desk.ticket(0), desk.ticket(2))
    for rank in (1, 2, 3):
        desk.die(rank)
    assert kinds(desk.die(0)) == ["Retired", "Committed"]  # one active worker is left: its update is enough


@dataclass(frozen=True)
class Odd(Mode):
    """Chooses what `pick` makes of the pending steps."""

    pick: str

    def next(self, pending, now):
        first = next(iter(pending))
        return Commits(
            {"none": (), "empty": ((),), "twice": ((first,), (first,)), "else": ((self,),)}[self.pick]
        )


@pytest.mark.parametrize("pick", ["none", "empty", "twice", "else"])
def test_a_mode_that_chooses_what_it_was_not_asked_about_is_an_error_that_names_it(pick):
    desk = own(Odd(pick), workers=2)
    with pytest.raises(ConfigurationError, match=f"mode Odd:pick={pick}: next.. chose .* no step twice"):
        desk.hold(0, "step", "1")


def test_a_mode_may_withhold_some_answers_of_a_commit():
    @dataclass(frozen=True)
    class Leashed(Pairs):
        def may_read(self, clock, slowest):
            return Decision(clock <= slowest, f"{clock} is more than {slowest}")

    desk = own(Leashed(), workers=3)
    desk.hold(0, "step", "1")
    pair = committed(desk.hold(1, "step", "1"))
    assert (len(pair.updates), pair.answered) == (2, ())
    assert desk.waits(0) == "step 1 waits for worker 2: 1 is more than 0"
    entries = desk.die(2)
    assert kinds(entries) == ["Retired", "Served", "Served"]


@pytest.mark.parametrize("stage", Stage)
def test_an_exchange_moves_along_the_table_and_in_no_other_way(stage):
    for to in Stage:
        pending = PendingExchanges(1, LogState())
        state = pending._log.members[1] = MemberState(rank=0, phase="active")
        pending.add(1)
        one = pending.of[1]
        assert one.state is state
        one.held = m.Held(1, 1, "step", "1")
        del pending._in[one.stage][1]
        one.stage = stage
        pending._in[stage][1] = one
        pending.waiting = int(one.waits)
        if to in MOVES[stage]:
            pending.move(one, to)
            assert pending.at(to) == [one]
            assert pending.waiting == one.waits == (to not in (Stage.IDLE, Stage.ARRIVING))
        else:
            with pytest.raises(AssertionError, match="step 1 of member 1"):
                pending.move(one, to)


# ── too few workers ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", MODES)
def test_with_too_few_workers_nothing_is_committed_and_waits_say_so(mode):
    desk = Desk(mode, workers=2, min_workers=2)
    desk.die(1)
    assert desk.hold(0, "step", "1") == []
    assert desk.waits(0) == "training waits: 1 worker present, min_workers is 2"
    assert kinds(desk.hold(-1, "pull") if desk.join("observer") else []) == ["Served"]
    entries = desk.join() + desk.hold(1, "step", "1")
    assert any(isinstance(entry, m.Committed) for entry in entries)
    assert desk.sequencer.waits() == {}


@pytest.mark.parametrize("mode", MODES)
def test_one_that_left_by_itself_has_done_its_part(mode):
    desk = Desk(mode, workers=2, min_workers=2)
    desk.hold(1, "leave")
    assert kinds(desk.hold(0, "step", "1")) == ["Committed"]


# ── recovery ────────────────────────────────────────────────────────────────────────────────────


def answer(server, entries, *, applied=0, closed=None, held=(), term=5, written=0):
    """Of a server that has applied so many of these entries, and has so many more."""
    standings = LogState()
    for entry in entries[:applied]:
        standings.apply(entry)
    end = len(entries) if closed is None else applied + closed
    closed = tuple(entries[applied:end])
    written = (written,) * len(closed)
    return m.Recovery(term, server, standings.record(), closed, tuple(held), written)


def recovered(desk, *answers, term=5):
    return Sequencer.recover(desk.mode, answers, desk.book.view(), term=term)


@pytest.mark.parametrize("mode", MODES)
def test_what_was_applied_anywhere_or_is_everywhere_stands_and_the_rest_is_closed_anew(mode):
    desk = Desk(mode, workers=2, servers=2)
    log = desk.opening + desk.hold(0, "step", "1") + desk.hold(1, "step", "1")
    held = [m.Held(desk.ids[rank], 1, "step", "1") for rank in (0, 1)]
    for everywhere in range(len(log) + 1):
        answers = answer(0, log, held=held), answer(1, log, closed=everywhere, held=held)
        sequencer, agreed, entries = recovered(desk, *answers)
        assert agreed == m.StartTerm(5, everywhere)
        assert sequencer.committed == 0
        again = [type(entry) for entry in log[:everywhere] + entries]
        assert again.count(m.Committed) == [type(entry) for entry in log].count(m.Committed)
        assert sequencer.standings.record() == desk.sequencer.standings.record()
        assert sequencer.report(0, (), prepared=sequencer.position) == []
        assert sequencer.committed == 0
        sequencer.report(1, (), prepared=sequencer.position)
        assert sequencer.committed == sequencer.position


def test_entries_of_different_sequencers_at_one_position_are_not_the_same_entry():
    desk = Desk("async", workers=1, servers=2)
    log = desk.opening + desk.hold(0, "step", "1")
    _, agreed, entries = recovered(desk, answer(0, log, written=3), answer(1, log, written=4))
    assert agreed.position == 0
    assert kinds(entries) == ["Enrolled", "Activated"]
    _, agreed, _ = recovered(desk, answer(0, log, written=3), answer(1, log, written=3))
    assert agreed.position == 3


def test_what_one_server_applied_may_be_applied_by_all():
    desk = Desk("async", workers=1, servers=2)
    log = desk.opening + desk.hold(0, "step", "1")
    sequencer, agreed, _ = recovered(desk, answer(0, log, applied=3), answer(1, log, applied=1))
    assert agreed.position == sequencer.committed == 3


def test_an_answer_that_was_blocked_is_given_by_the_new_sequencer():
    desk = Desk("ssp:0", workers=2)
    log = desk.opening + desk.hold(0, "step", "1")
    held = [m.Held(desk.ids[0], 1, "step", "1")]
    sequencer, _, entries = recovered(desk, answer(0, log, applied=3, held=held))
    assert entries == []
    assert sequencer.waits()[desk.ids[0]].startswith("step 1 waits for worker 1: leads")
    entries = sequencer.report(0, (m.Held(desk.ids[1], 1, "step", "1"),))
    assert kinds(entries) == ["Committed", "Served"]
    assert entries[1].ticket == desk.ticket(0)


def test_a_meeting_and_the_dead_are_found_again():
    desk = Desk("sync", workers=3)
    log = desk.opening + desk.hold(0, "barrier") + desk.hold(1, "barrier")
    held = [m.Held(desk.ids[rank], 1, "barrier", meeting=m.Meeting(1, "barrier")) for rank in (0, 1)]
    desk.book.remove(desk.ids[2])
    _, _, entries = recovered(desk, answer(0, log, applied=4, held=held))
    assert kinds(entries) == ["Retired", "Met"]


def test_a_recovery_needs_one_answer_of_each_server_in_its_term():
    desk = Desk("sync", workers=1, servers=2)
    log = desk.opening
    for answers in (
        [answer(0, log)] * 2,
        [answer(0, log), answer(1, log, term=4)],
        [answer(1, log), answer(2, log)],
    ):
        with pytest.raises(ProtocolError, match="one answer of each server"):
            recovered(desk, *answers)
    with pytest.raises(ProtocolError, match=r"applied entry 2, which servers \[1\] lack"):
        recovered(desk, answer(0, log, applied=2), answer(1, log, closed=1))


def test_older_terms_are_refused():
    desk = Desk("sync", workers=1, servers=1, term=3)
    for term in (0, 2):
        with pytest.raises(RefusedError, match="it is 3"):
            desk.sequencer.report(0, (), term=term)
    assert desk.sequencer.report(0, (), term=3) == []
    old = desk.book.view()
    desk.join()
    with pytest.raises(RefusedError, match="roster of term"):
        desk.sequencer.roster(old)


def test_with_replicas_an_entry_is_committed_when_every_server_has_prepared_it():
    desk = Desk("async", workers=1, servers=2, replicated=True)
    desk.hold(0, "step", "1")
    assert (desk.sequencer.position, desk.sequencer.committed) == (3, 0)
    for server, prepared, committed in [(0, 3, 0), (1, 2, 2), (1, 1, 2), (1, 3, 3)]:
        assert desk.sequencer.report(server, (), prepared=prepared) == []
        assert desk.sequencer.committed == committed


# ── many ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", MODES)
def test_a_thousand_workers_on_four_servers_take_ten_steps_each(mode):
    workers, servers, steps = 1000, 4, 10
    sequencer = Sequencer(servers, parse_sync(mode))
    members = tuple(m.Member(id, "worker", id - 1, 0, "here") for id in range(1, workers + 1))
    sequencer.roster(m.Roster(1, workers, members))
    answers = 0
    for step in range(1, steps + 1):
        for server in range(servers):
            held = [m.Held(member.id, step, "step", str(step)) for member in members]
            entries = sequencer.report(server, held)
            answers += sum(len(e.answered) if isinstance(e, m.Committed) else 1 for e in entries)
    assert answers == workers * steps
    assert sequencer.version == (steps if mode == "sync" else workers * steps)
    assert sequencer.waits() == {}


def test_who_joined_beyond_the_declared_workers_and_never_steps_is_named_with_what_to_do():
    desk = Desk("sync", workers=1)
    desk.join()
    desk.hold(0, "step", "1")
    assert desk.waits(0).startswith(
        "step 1 waits for worker 1 (worker 1 joined beyond the declared workers and took no step yet: "
        "have it step, or leave with worker.leave())"
    )
    desk.hold(1, "step", "1")
    desk.hold(0, "step", "2")
    assert "beyond" not in desk.waits(0)
