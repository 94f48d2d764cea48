"""The roster: ids, ranks and terms."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.errors import RefusedError
from headwater.messages import Join
from headwater.roster import Departure, RosterBook


def join(book, role="worker", index=None):
    return book.join(Join(role, index, 100, "here", ("there",)))


def test_a_member_is_what_joined_and_gets_the_next_free_rank():
    book = RosterBook(workers=2, servers=1)
    assert [join(book).index for _ in range(3)] == [0, 1, 2]
    member = join(book, "server")
    assert (member.role, member.index, member.pid, member.host, member.addresses) == (
        "server",
        0,
        100,
        "here",
        ("there",),
    )


def test_a_rank_is_free_again_after_a_death_but_an_id_is_never_used_twice():
    book = RosterBook(workers=3, servers=1)
    members = [join(book) for _ in range(3)]
    assert book.remove(members[1].id) == Departure(members[1])
    again = join(book)
    assert again.index == 1
    assert again.id not in {member.id for member in members}
    assert book.remove(members[1].id) is None


def test_observers_have_no_rank_and_take_none():
    book = RosterBook(workers=1, servers=1)
    assert [join(book, "observer", index).index for index in (None, 0, 5)] == [-1, -1, -1]
    assert join(book, "worker", 0).index == 0


@pytest.mark.parametrize(
    ("role", "index", "text"),
    [
        ("worker", 0, "worker rank 0 is taken by a living worker"),
        ("server", 0, "server index 0 is taken by a living server"),
        ("worker", -1, "no worker with rank -1"),
        ("server", 2, "no server with index 2"),
    ],
)
def test_an_impossible_place_is_refused_and_changes_nothing(role, index, text):
    book = RosterBook(workers=1, servers=2)
    join(book, "worker", 0)
    join(book, "server", 0)
    before = book.view()
    with pytest.raises(RefusedError, match=text):
        join(book, role, index)
    assert book.view() == before


def test_a_full_row_of_servers_takes_no_more():
    book = RosterBook(workers=1, servers=2)
    assert not book.complete()
    join(book, "server", 1)
    assert not book.complete()
    join(book, "server")
    assert book.complete()
    assert [server.index for server in book.of("server")] == [0, 1]
    with pytest.raises(RefusedError, match="no server with index 2"):
        join(book, "server")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=40))
def test_each_change_is_a_term_and_the_view_is_who_is_there(changes):
    book, there = RosterBook(workers=2, servers=1), {}
    for coming, number in changes:
        term = book.term
        if coming:
            member = join(book)
            assert member.index not in {other.index for other in there.values()}
            there[member.id] = member
        elif there:
            book.remove(there.pop(sorted(there)[number % len(there)]).id)
        else:
            assert book.remove(99) is None
            term -= 1
        assert book.term == term + 1
        assert book.view().term == book.term
        assert set(book.view().members) == set(there.values())


def test_a_lease_begins_when_a_member_is_first_heard_of_not_while_it_waits_to_be_welcomed():
    book = RosterBook(workers=1, servers=2, lease_s=3.0)
    member = book.join(Join("server", 0, 0, "here"), math.inf)
    assert book.expired(1e9) == []
    assert book.silence(member.id, 1e9) == 0
    book.heard(member.id, 10.0)
    assert book.expired(13.0) == []
    assert book.expired(13.1) == [member]
