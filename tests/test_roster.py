"""The roster: ids, ranks and terms."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.errors import RefusedError, RewoundError
from headwater.machines.roster import GONE, Departure, RosterBook, RosterRecord
from headwater.messages import Join


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


# ── books that go on from a record ──────────────────────────────────────────────────────────────


def again(book, now=0.0):
    """A book made of what another process reads of this one's record."""
    record = msgspec.json.decode(msgspec.json.encode(book.record()), type=RosterRecord)
    return RosterBook(workers=2, servers=2, lease_s=10, record=record, now=now)


roles = st.sampled_from(["worker", "server", "standby", "observer"])
changes = st.one_of(
    st.tuples(st.just("join"), roles, st.sampled_from([None, 0, 1])),
    st.tuples(st.sampled_from(["leave", "die", "catch up"]), st.integers(1, 20)),
    st.tuples(st.just("anew")),
)


def change(book, what, *which):
    """What came of it, errors too."""
    try:
        if what == "join":
            return join(book, *which)
        if what == "catch up":
            return book.caught_up(*which)
        if what == "anew":
            return book.begin_anew()
        return book.remove(*which, "it died" if what == "die" else "")
    except RefusedError as error:
        return str(error)


def fate(book, id):
    try:
        return book.take_back(id, 0, 0.0)
    except (RefusedError, RewoundError) as error:
        return str(error)


@given(st.lists(st.tuples(changes, st.booleans()), max_size=40))
def test_a_book_that_is_made_anew_at_any_point_goes_on_as_the_other_would_have(history):
    book = RosterBook(workers=2, servers=2, lease_s=10)
    restarted = again(book)
    for what, restarts in history:
        if restarts:
            restarted = again(restarted)
        assert change(restarted, *what) == change(book, *what)
        assert restarted.record() == book.record()
        assert restarted.view() == book.view()
        assert (restarted.complete(), restarted.unreplicated()) == (book.complete(), book.unreplicated())
        assert [fate(restarted, id) for id in range(21)] == [fate(book, id) for id in range(21)]


def test_everybody_in_a_record_has_a_full_lease_and_then_none():
    book = RosterBook(workers=2, servers=1, lease_s=10)
    server, silent, back = join(book, "server"), join(book), join(book)
    book = RosterBook(workers=2, servers=1, lease_s=10, record=book.record(), now=100.0)
    assert book.expired(110.0) == []
    assert book.take_back(back.id, 0, 105.0) == back
    book.heard(server.id, 105.0)
    assert book.expired(111.0) == [silent]


def test_who_is_no_member_any_more_is_told_why_and_one_of_an_older_generation_to_begin_anew():
    book = RosterBook(workers=2, servers=1)
    dead, left = join(book), join(book)
    book.remove(dead.id, "worker 0 was declared dead")
    book.remove(left.id)
    with pytest.raises(RefusedError, match="member 1 is none any more: worker 0 was declared dead"):
        again(book).take_back(dead.id, 0, 0.0)
    with pytest.raises(RefusedError, match="member 2 is none any more: it has left"):
        again(book).take_back(left.id, 0, 0.0)
    book.begin_anew()
    with pytest.raises(RewoundError, match="as generation 1; member 1 is of generation 0"):
        again(book).take_back(dead.id, 0, 0.0)


def test_of_members_that_are_gone_the_last_are_told_why_and_no_record_grows_without_end():
    book = RosterBook(workers=1, servers=1)
    gone = [join(book, "observer") for _ in range(GONE + 50)]
    for member in gone:
        book.remove(member.id, f"no word of reader {member.id}")
    assert len(book.record().gone) == GONE
    with pytest.raises(RefusedError, match=f"no word of reader {gone[-1].id}"):
        book.take_back(gone[-1].id, 0, 1.0)
    with pytest.raises(RefusedError, match="it has left"):
        book.take_back(gone[0].id, 0, 1.0)
