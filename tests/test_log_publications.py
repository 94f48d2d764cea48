"""When publications are written: at their version, with room on every server, never counting a follower."""

import pytest

from headwater import messages as m
from headwater.log.sequencer import Sequencer
from headwater.log.snapshot_schedule import ROOM
from headwater.log.state import LogState
from headwater.machines.roster import RosterBook
from headwater.spec.sync import parse_sync

MODES = ["sync", "async", "ssp:1"]


class Desk:
    """A sequencer of two servers with one worker and some followers."""

    def __init__(self, mode, followers=1, workers=1):
        self.book = RosterBook(workers, 2)
        self.sequencer = Sequencer(2, parse_sync(mode))
        self.workers = [self.join("worker") for _ in range(workers)]
        self.followers = [self.join("observer") for _ in range(followers)]
        self.numbers = {}

    def join(self, role):
        id = self.book.join(m.Join(role, None, 0, "here")).id
        self.sequencer.roster(self.book.view())
        return id

    def hold(self, member, kind, name="", servers=(0, 1)):
        self.numbers[member] = self.numbers.get(member, 0) + 1
        return self.also(member, kind, name, servers)

    def also(self, member, kind, name="", servers=(1,), epoch=0):
        held = m.Held(member, self.numbers[member], kind, name, epoch)
        return [entry for server in servers for entry in self.sequencer.report(server, (held,))]

    def step(self):
        return [self.hold(worker, "step", "1") for worker in self.workers][-1]


def published(entries):
    return [
        [ticket.member for ticket in entry.tickets] for entry in entries if isinstance(entry, m.Published)
    ]


@pytest.mark.parametrize("mode", MODES)
def test_a_publication_is_an_entry_once_every_server_holds_it_and_its_version_is_there(mode):
    desk = Desk(mode)
    (follower,) = desk.followers
    assert published(desk.hold(follower, "publish", "2", servers=(0,))) == []
    assert published(desk.also(follower, "publish", "2")) == []
    assert published(desk.step()) == []
    entries = desk.step()
    assert [type(entry) for entry in entries] == [m.Committed, m.Published]
    assert entries[1].tickets == (m.ExchangeId(follower, 1),)


@pytest.mark.parametrize("mode", MODES)
def test_followers_neither_hold_up_a_round_nor_a_meeting(mode):
    desk = Desk(mode, followers=3)
    desk.hold(desk.followers[0], "publish", "99")
    assert isinstance(desk.step()[0], m.Committed)
    (worker,) = desk.workers
    desk.numbers[worker] += 1
    held = m.Held(worker, desk.numbers[worker], "barrier", "barrier", meeting=m.Meeting(1, "barrier"))
    entries = [entry for server in (0, 1) for entry in desk.sequencer.report(server, (held,))]
    assert isinstance(entries[-1], m.Met)
    assert desk.sequencer.standings.ranks == {0}


def test_no_more_are_under_way_than_servers_have_room_for():
    desk = Desk("async", followers=ROOM + 2)
    wrote = [published(desk.hold(follower, "publish", "0")) for follower in desk.followers]
    assert wrote == [[[follower]] for follower in desk.followers[:ROOM]] + [[], []]
    assert isinstance(desk.step()[0], m.Committed)  # training does not wait
    entries = desk.hold(desk.followers[0], "taken")
    assert published(entries) == [[desk.followers[ROOM]]]
    desk.book.remove(desk.followers[1])  # one that never says that it has received it
    assert published(desk.sequencer.roster(desk.book.view())) == [[desk.followers[ROOM + 1]]]


def test_followers_that_wait_for_one_version_get_it_in_one_entry():
    desk = Desk("async", followers=2)
    for follower in desk.followers:
        desk.hold(follower, "publish", "1")
    assert published(desk.step()) == [desk.followers]


def test_a_repeated_publication_is_served_anew_and_keeps_its_room():
    desk = Desk("async", followers=ROOM + 1)
    for follower in desk.followers:
        desk.hold(follower, "publish", "0")
    entries = desk.also(desk.followers[0], "publish", "0", servers=(0, 1), epoch=1)
    assert entries == [m.Served(entries[0].position, m.ExchangeId(desk.followers[0], 1, 1), "publish")]
    assert desk.sequencer.standings.receiving() == desk.followers[:ROOM]


def test_what_is_under_way_is_part_of_the_logs_state():
    desk = Desk("async", followers=2)
    desk.hold(desk.followers[0], "publish", "0")
    assert LogState.of(desk.sequencer.standings.record()).receiving() == desk.followers[:1]
