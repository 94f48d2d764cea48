"""Who becomes which server or standby, and when a cluster's work is done: the rules, without processes."""

import pytest

from headwater.errors import ConfigurationError
from headwater.machines.roster import RosterBook
from headwater.machines.slots import SlotAllocator
from headwater.messages import Join, RequestSlot

ANY = RequestSlot(None, None)


def place(slot):
    return None if slot is None else (slot.role, slot.index)


def members(*roles):
    book = RosterBook(workers=1, servers=3)
    return [book.join(Join(role, index, 1, "here")) for role, index in roles]


def test_servers_come_first_then_standbys_then_spares():
    places = SlotAllocator(servers=2, replicas=1)
    given = [place(places.reserve(ANY, [], forming=True)) for _ in range(5)]
    assert given == [("server", 0), ("server", 1), ("standby", 0), ("standby", 1), None]


def test_without_replicas_there_are_no_standbys():
    places = SlotAllocator(servers=1, replicas=0)
    assert [place(places.reserve(ANY, [], forming=True)) for _ in range(2)] == [("server", 0), None]


def test_what_a_member_has_is_not_given():
    places = SlotAllocator(servers=3, replicas=1)
    there = members(("server", 0), ("server", 2), ("standby", 2))
    assert place(places.reserve(ANY, there, forming=True)) == ("server", 1)
    assert place(places.reserve(RequestSlot(None, 2), there, forming=True)) is None
    assert place(places.reserve(RequestSlot("standby", None), there, forming=True)) == ("standby", 0)


def test_a_server_that_is_lost_is_nobodys_until_a_new_generation_forms():
    places = SlotAllocator(servers=2, replicas=1)
    there = members(("server", 0))
    assert place(places.reserve(RequestSlot("server", None), there, forming=False)) is None
    assert place(places.reserve(ANY, there, forming=False)) == ("standby", 0)


def test_a_wish_is_granted_or_waits():
    places = SlotAllocator(servers=2, replicas=1)
    assert place(places.reserve(RequestSlot("server", 1), [], forming=True)) == ("server", 1)
    assert place(places.reserve(RequestSlot("server", 1), [], forming=True)) is None
    assert place(places.reserve(RequestSlot("standby", 0), [], forming=True)) is None, "servers first"
    assert place(places.reserve(RequestSlot(None, 0), [], forming=True)) == ("server", 0)
    assert place(places.reserve(RequestSlot("standby", 0), [], forming=True)) == ("standby", 0)


def test_a_promise_that_is_released_twice_frees_only_itself():
    places = SlotAllocator(servers=1, replicas=0)
    first = places.reserve(ANY, [], forming=True)
    places.release(first)
    assert place(places.reserve(ANY, [], forming=True)) == ("server", 0)
    places.release(first)
    assert places.reserve(ANY, [], forming=True) is None


@pytest.mark.parametrize(
    "enlist", [RequestSlot("server", 2), RequestSlot(None, 2), RequestSlot("standby", None)]
)
def test_places_that_can_never_be_are_refused(enlist):
    with pytest.raises(ConfigurationError):
        SlotAllocator(servers=2, replicas=0).check(enlist)


# ── the end of the work ─────────────────────────────────────────────────────────────────────────


def joined(book, *ranks):
    return [book.join(Join("worker", rank, 1, "here")).id for rank in ranks]


def test_all_have_finished_when_every_declared_rank_has_and_nobody_else_is_at_work():
    book = RosterBook(workers=2, servers=1)
    first, second, third = joined(book, 0, 1, 2)
    steps = [(book.finish, second), (book.remove, second), (book.finish, first)]
    for step, id in steps:
        step(id)
        assert not book.all_finished()
    book.remove(third, "it died")
    assert book.all_finished()


def test_a_rank_that_comes_again_has_not_finished():
    book = RosterBook(workers=1, servers=1)
    (first,) = joined(book, 0)
    book.finish(first)
    book.remove(first)
    assert book.all_finished()
    joined(book, 0)
    assert not book.all_finished()


def test_nobody_has_finished_after_a_rewind_and_the_record_knows_who_has():
    book = RosterBook(workers=1, servers=1)
    book.finish(joined(book, 0)[0])
    again = RosterBook(workers=1, servers=1, record=book.record())
    assert again.all_finished()
    again.begin_anew()
    assert not again.all_finished()
